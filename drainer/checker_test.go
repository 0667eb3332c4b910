package drainer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// limit is a Checker that lets samples below a number pass, and marks each of those it sees.
type limit struct {
	number uint64
	seen   int
	notes  string
}

var errLimit = errors.New("too large")

func (l *limit) Check(columns [][]byte) (int, error) {
	rows := len(columns[1]) / 8
	if len(columns) != 2 || len(columns[0]) != 16*rows {
		return 0, fmt.Errorf("columns of %d and %d bytes", len(columns[0]), len(columns[1]))
	}
	for row := range rows {
		if binary.LittleEndian.Uint64(columns[0][16*row+8:]) >= l.number {
			return row, errLimit
		}
		columns[1][8*row] = 0xAA
		l.seen++
		l.notes += "n"
	}
	return rows, nil
}

func (l *limit) AppendNotes(dst []byte) []byte {
	dst = append(dst, l.notes...)
	l.notes = ""
	return dst
}

// TestCheckedStream: what the Checker lets pass is pushed, with what it wrote; the slots of the rest stay the sender's.
func TestCheckedStream(t *testing.T) {
	r := newRing(t, 4, 4, 16, 8)
	pool := NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	check := &limit{number: 6}
	s := pool.Open(r, StreamConfig{ID: 3, Check: check})
	if err := send(ctx, s, 0, 4); err != nil {
		t.Fatal(err)
	}
	run, ok := s.TryReserve(4)
	if !ok || run.N != 4 {
		t.Fatal("no slots")
	}
	for i := range uint64(4) {
		binary.LittleEndian.PutUint64(s.Column(run, 0)[16*i:], 3)
		binary.LittleEndian.PutUint64(s.Column(run, 0)[16*i+8:], 4+i)
	}
	n, err := s.Push(run, time.Unix(1, 0))
	var bad *CheckError
	if n != 2 || !errors.As(err, &bad) || !errors.Is(err, errLimit) {
		t.Fatalf("%d were pushed, %v", n, err)
	}
	_, rest := run.Split(n)
	s.Abandon(rest)
	run, _ = s.TryReserve(1)
	binary.LittleEndian.PutUint64(s.Column(run, 0)[8:], 6)
	if n, err := s.Push(run, time.Unix(1, 0)); n != 0 || !errors.As(err, &bad) {
		t.Fatalf("%d were pushed, %v", n, err)
	}
	s.Abandon(run)
	if got := string(s.AppendNotes([]byte("before "))); got != "before nnnnnn" {
		t.Errorf("notes %q", got)
	}
	if got := s.AppendNotes(nil); got != nil {
		t.Errorf("notes again: %q", got)
	}
	s.Close()
	<-s.Done()
	r.Flush()
	r.Close()
	var got []uint64
	for {
		b, ok := r.TryLease()
		if !ok {
			break
		}
		got = append(got, b.Numbers()...)
		for row := range b.Count {
			if b.Column(1)[8*row] != 0xAA {
				t.Errorf("sample %d was not seen", b.Numbers()[row])
			}
		}
		r.Release(b)
	}
	if fmt.Sprint(got) != "[0 1 2 3 4 5]" || check.seen != 6 {
		t.Errorf("samples %v, %d seen", got, check.seen)
	}
	if st := s.Stats(); st.Pushed != 6 || st.Committed != 6 || st.Abandoned != 3 {
		t.Errorf("%+v", st)
	}
	stop()
	running.Wait()
}

// TestCheckedLender: of rows that are called complete, those before a bad one are committed.
func TestCheckedLender(t *testing.T) {
	r := newRing(t, 4, 4, 16, 8)
	check := &limit{number: 2}
	f := newFiller(t, r, LenderID{Stream: 7, Check: check})
	f.lend()
	f.fill(1)
	col := r.PlaceColumn(f.places[0], 0)
	for i := range uint64(3) {
		binary.LittleEndian.PutUint64(col[16*(i+1):], 7)
		binary.LittleEndian.PutUint64(col[16*(i+1)+8:], i+1)
	}
	var bad *CheckError
	if full, err := f.l.Commit(f.leases[0], 3, 9); full || !errors.As(err, &bad) || !errors.Is(err, errLimit) {
		t.Fatalf("full: %v, %v", full, err)
	}
	if f.l.Held() != 2 || check.seen != 2 {
		t.Fatalf("%d are held, %d seen", f.l.Held(), check.seen)
	}
	if full, err := f.l.Commit(f.leases[0], 1, 9); full || !errors.As(err, &bad) || f.l.Held() != 2 {
		t.Fatalf("again: full %v, %v", full, err)
	}
	if got := string(f.l.AppendNotes(nil)); got != "nn" {
		t.Errorf("notes %q", got)
	}
	f.l.Free() // the producer is gone
	if err := f.l.End(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	f.l.Free()
	r.Flush()
	want(t, "what is left of it", rows(t, r), "[0 1]")
	want(t, "after it", rows(t, r), "none")
}
