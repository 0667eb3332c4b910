package drainer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newRing(t testing.TB, batchSize, batches int, columns ...int64) *ring.Ring {
	t.Helper()
	l := ring.Layout{BatchSize: batchSize, Batches: batches, Columns: columns}
	n, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	r, err := ring.Format(ring.AlignedBytes(n), l)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// send pushes samples first..first+n of s, each holding stream and number.
func send(ctx context.Context, s *Stream, first, n uint64) error {
	for n > 0 {
		run, err := s.Reserve(ctx, int(n))
		if err != nil {
			return err
		}
		col := s.Column(run, 0)
		for i := range uint64(run.N) {
			binary.LittleEndian.PutUint64(col[16*i:], s.ID())
			binary.LittleEndian.PutUint64(col[16*i+8:], first+i)
		}
		s.Push(run, time.Unix(1, 0))
		first += uint64(run.N)
		n -= uint64(run.N)
	}
	return nil
}

// receive releases every batch and returns how many samples of each stream came, in order and whole.
func receive(r *ring.Ring) (map[uint64]uint64, error) {
	next := map[uint64]uint64{}
	w := park.NewWaiter()
	for {
		b, err := r.Lease(context.Background(), w)
		if err == io.EOF {
			return next, nil
		}
		if err != nil {
			return nil, err
		}
		for row, stream := range b.Streams() {
			cell := b.Column(0)[16*row:]
			number := b.Numbers()[row]
			if binary.LittleEndian.Uint64(cell) != stream || binary.LittleEndian.Uint64(cell[8:]) != number || number != next[stream] {
				return nil, fmt.Errorf("batch %d row %d: stream %d number %d, due %d", b.Number, row, stream, number, next[stream])
			}
			next[stream]++
		}
		r.Release(b)
	}
}

func TestEveryStreamArrivesWholeAndInOrder(t *testing.T) {
	const streams, samples = 9, 5000
	for _, drainers := range []int{1, 3} {
		r := newRing(t, 4, 4, 16)
		pool := NewPool(drainers)
		ctx, stop := context.WithCancel(t.Context())
		var running, sending sync.WaitGroup
		running.Go(func() { _ = pool.Run(ctx) })
		for id := range uint64(streams) {
			s := pool.Open(r, StreamConfig{ID: id})
			sending.Go(func() {
				if err := send(t.Context(), s, 0, samples); err != nil {
					t.Error(err)
				}
				s.Close()
				<-s.Done()
				if st := s.Stats(); st.Committed != samples || st.Pushed != samples {
					t.Errorf("done with %+v", st)
				}
			})
		}
		go func() {
			sending.Wait()
			r.Flush()
			r.Close()
		}()
		got, err := receive(r)
		if err != nil {
			t.Fatal(err)
		}
		for id := range uint64(streams) {
			if got[id] != samples {
				t.Errorf("stream %d: %d of %d samples", id, got[id], samples)
			}
		}
		stop()
		running.Wait()
		for _, d := range pool.drainers {
			if len(d.streams) != 0 || d.owned.Load() != 0 {
				t.Errorf("a drainer still owns %d streams", len(d.streams))
			}
		}
	}
}

// TestFloodStarvesNobody drives a drainer by hand: while one queue is refilled as fast as it is emptied, each pass must still reach the others, take from the
// flooding one only what was there on arrival, and begin with another stream than the last pass.
func TestFloodStarvesNobody(t *testing.T) {
	r := newRing(t, 256, 64, 16)
	pool := NewPool(1)
	d := pool.drainers[0]
	flood, quiet := pool.Open(r, StreamConfig{ID: 1}), pool.Open(r, StreamConfig{ID: 2})
	for pass := range uint64(10) {
		d.baton.Store(true) // as if the drainer were at work: nobody helps it
		for flood.queue.Len() < QueueRuns {
			if err := send(t.Context(), flood, flood.next, 1); err != nil {
				t.Fatal(err)
			}
		}
		if err := send(t.Context(), quiet, quiet.next, 1); err != nil {
			t.Fatal(err)
		}
		d.letGo()
		before := flood.committed.Load()
		turn := d.turn
		if !d.pass() {
			t.Fatal("nothing done")
		}
		if d.turn == turn {
			t.Fatal("the next pass begins with the same stream")
		}
		if got := quiet.committed.Load(); got != pass+1 {
			t.Fatalf("pass %d: the quiet stream has %d samples in the ring", pass, got)
		}
		if took := flood.committed.Load() - before; took > QueueRuns {
			t.Fatalf("took %d runs of one stream in one pass", took)
		}
	}
}

// TestSendersHelp: a sender that finds the drainer at rest commits its own samples; one that finds it at work leaves them, and the drainer learns of it.
func TestSendersHelp(t *testing.T) {
	r := newRing(t, 4, 4, 16)
	pool := NewPool(1)
	d := pool.drainers[0]
	s := pool.Open(r, StreamConfig{ID: 1})
	if err := send(t.Context(), s, 0, 2); err != nil {
		t.Fatal(err)
	}
	if got := s.Stats().Committed; got != 2 {
		t.Fatalf("%d committed by the sender, want 2", got)
	}
	d.baton.Store(true)
	if err := send(t.Context(), s, 2, 2); err != nil {
		t.Fatal(err)
	}
	if got := s.Stats().Committed; got != 2 {
		t.Fatalf("%d committed while the drainer was at work, want 2", got)
	}
	d.work.Add(d.seat)
	d.letGo()
	if d.work.Waiting() != 0 {
		t.Fatal("the drainer was not woken for what came while its baton was held")
	}
	if !d.pass() || s.Stats().Committed != 4 {
		t.Fatalf("%+v after the drainer's pass, want 4 committed", s.Stats())
	}
}

func TestReserveSaysClosedAndDeadline(t *testing.T) {
	r := newRing(t, 1, 2, 16)
	s := NewPool(1).Open(r, StreamConfig{ID: 1})
	for range 2 {
		if _, err := s.Reserve(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	if _, err := s.Reserve(ctx, 1); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %v, want a deadline error", err)
	}
	r.Close()
	if _, err := s.Reserve(t.Context(), 1); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("got %v, want os.ErrClosed", err)
	}
}

func TestEndOfStreamFlushes(t *testing.T) {
	for _, flush := range []bool{true, false} {
		r := newRing(t, 8, 2, 16)
		pool := NewPool(1)
		s := pool.Open(r, StreamConfig{ID: 1, FlushAtEnd: flush})
		if err := send(t.Context(), s, 0, 3); err != nil {
			t.Fatal(err)
		}
		s.Close()
		for pool.drainers[0].pass() {
		}
		<-s.Done()
		b, ok := r.TryLease()
		if ok != flush || (ok && b.Count != 3) {
			t.Fatalf("flush %v: leased %v %+v", flush, ok, b)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	r := newRing(t, 4, 4, 16)
	pool := NewPool(1)
	s := pool.Open(r, StreamConfig{ID: 1})
	d := pool.drainers[0]
	d.pass()
	if n := testing.AllocsPerRun(1000, func() {
		run, _ := s.TryReserve(4)
		s.Push(run, time.Unix(1, 0))
		d.pass()
		b, _ := r.TryLease()
		r.Release(b)
	}); n != 0 {
		t.Fatalf("%v allocations per batch, want 0", n)
	}
}
