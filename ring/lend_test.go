package ring

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/internal/park"
)

// fillPlace writes and commits n rows of a lent place.
func fillPlace(r *Ring, p Place, row, n int, stream, first uint64) {
	for leaf, size := range r.layout.Columns {
		col := r.PlaceColumn(p, leaf)
		for i := range n {
			prove(col[int64(row+i)*size:int64(row+i+1)*size], stream, first+uint64(i), leaf)
		}
	}
	r.CommitPlace(p, row, n, stream, first, 1, Mark{})
}

func TestPlaceBecomesABatch(t *testing.T) {
	r := newRing(t, 4, 3, 8, 3)
	p, ok := r.TryLend(7)
	if !ok {
		t.Fatal("no place")
	}
	if s := r.BatchState(int(p.Index)); s.State != Lent || s.Stream != 7 {
		t.Fatalf("%+v", s)
	}
	fillPlace(r, p, 0, 3, 7, 0)
	// Another producer's samples are published meanwhile: nobody waits for the place.
	run, _ := r.TryReserve(4)
	fill(r, run, 1, 0)
	r.Commit(run, 1, 0, 1, Mark{})
	if b, ok := r.TryLease(); !ok || b.Number != 0 || b.Streams()[0] != 1 {
		t.Fatalf("got %+v, want the shared batch", b)
	}
	fillPlace(r, p, 3, 1, 7, 3)
	r.PublishPlace(p, 4)
	b, ok := r.TryLease()
	if !ok || b.Number != 1 || b.Index != p.Index || b.Count != 4 {
		t.Fatalf("got %+v, want the place", b)
	}
	if err := verify(b, r.layout.Columns); err != nil {
		t.Fatal(err)
	}
	r.Release(b)
	p, _ = r.TryLend(7)
	fillPlace(r, p, 0, 1, 7, 4)
	r.PublishPlace(p, 1)
	if b, ok := r.TryLease(); !ok || b.Count != 1 {
		t.Fatalf("got %+v, want a short batch", b)
	}
}

func TestLentPlacesRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 1, 2, 8)
		a, _ := r.TryLend(1)
		b, _ := r.TryLend(1)
		if _, ok := r.TryLend(1); ok {
			t.Fatal("three places of two")
		}
		if _, ok := r.TryReserve(1); ok {
			t.Fatal("a lent place was reserved")
		}
		got := make(chan error, 2)
		go func() {
			_, err := r.Lend(t.Context(), park.NewWaiter(), 2)
			got <- err
		}()
		synctest.Wait()
		go func() {
			_, err := r.Reserve(t.Context(), park.NewWaiter(), 1)
			got <- err
		}()
		synctest.Wait()
		r.ReturnPlace(a)
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		r.ReturnPlace(b)
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := r.Lend(ctx, park.NewWaiter(), 2); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("past the deadline: %v", err)
		}
		go func() {
			_, err := r.Lend(t.Context(), park.NewWaiter(), 2)
			got <- err
		}()
		synctest.Wait()
		r.Close()
		if err := <-got; !errors.Is(err, os.ErrClosed) {
			t.Fatalf("after Close: %v", err)
		}
	})
}

func TestFullIsTold(t *testing.T) {
	r := newRing(t, 1, 2, 8)
	var held []Batch
	for i := range 2 {
		put(r, 1, uint64(i))
		b, _ := r.TryLease()
		held = append(held, b)
	}
	told := 0
	r.Full = func() {
		told++
		r.Release(held[0]) // what it frees, the writer gets
		held = held[1:]
	}
	if _, err := r.Reserve(t.Context(), park.NewWaiter(), 1); err != nil || told != 1 {
		t.Fatalf("told %d times, %v", told, err)
	}
	if _, err := r.Lend(t.Context(), park.NewWaiter(), 1); err != nil || told != 2 {
		t.Fatalf("told %d times, %v", told, err)
	}
}

func TestOwnBugsWithPlacesPanic(t *testing.T) {
	mustPanic := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s did not panic", name)
			}
		}()
		f()
	}
	r := newRing(t, 2, 4, 8)
	p, _ := r.TryLend(1)
	mustPanic("publishing an empty place", func() { r.PublishPlace(p, 0) })
	mustPanic("committing a row out of turn", func() { r.CommitPlace(p, 1, 1, 1, 0, 1, Mark{}) })
	mustPanic("committing too many rows", func() { r.CommitPlace(p, 0, 3, 1, 0, 1, Mark{}) })
	r.CommitPlace(p, 0, 1, 1, 0, 1, Mark{})
	mustPanic("publishing rows that are not committed", func() { r.PublishPlace(p, 2) })
	r.SettledMark(p, 1).store()
	mustPanic("publishing what was settled", func() { r.PublishPlace(p, 1) })
	r.ReturnPlace(p)
	mustPanic("returning a place twice", func() { r.ReturnPlace(p) })
	mustPanic("committing to a returned place", func() { r.CommitPlace(p, 0, 1, 1, 0, 1, Mark{}) })
	if _, err := r.OpenSession("s", time.Unix(1, 0), 0); err != nil {
		t.Fatal(err)
	}
	mustPanic("opening a session twice", func() { _, _ = r.OpenSession("s", time.Unix(1, 0), 0) })
}

func TestSessions(t *testing.T) {
	l := Layout{BatchSize: 1, Batches: 2, Columns: []int64{8}, Sessions: 2}
	n, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Format(AlignedBytes(n), l)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1000, 0)
	open := func(name string) (*Session, error) { return r.OpenSession(name, now, time.Hour) }
	a, err := open("a")
	if err != nil || a.Name() != "a" || a.Held() != 0 || a.Stream() != 1 {
		t.Fatalf("%+v %v", a, err)
	}
	b, err := open("b")
	if err != nil || b.Stream() != 2 {
		t.Fatalf("%+v %v", b, err)
	}
	a.Mark(5).store()
	a.Close(now)
	if a, err = open("a"); err != nil || a.Held() != 5 || a.Stream() != 1 {
		t.Fatalf("opened again: %d held, stream %d, %v", a.Held(), a.Stream(), err)
	}
	a.Close(now)
	var full *SessionsFullError
	if _, err := open("c"); !errors.As(err, &full) || full.Sessions != 2 {
		t.Fatalf("a third session in a table of two: %v", err)
	}
	now = now.Add(time.Hour - 1)
	if _, err := open("c"); !errors.As(err, &full) {
		t.Fatalf("a session was forgotten too early: %v", err)
	}
	now = now.Add(1)
	if name, ok := r.SessionOf(1); !ok || name != "a" {
		t.Errorf("stream 1 is %q's, %v", name, ok)
	}
	c, err := open("c") // a is forgotten; b, as old, is open
	if err != nil || c.Held() != 0 || c.Stream() != 3 {
		t.Fatalf("%v", err)
	}
	for stream, want := range map[uint64]string{0: "", 1: "", 2: "b", 3: "c", 4: ""} {
		if name, ok := r.SessionOf(stream); name != want || ok != (want != "") {
			t.Errorf("stream %d is %q's, %v; want %q", stream, name, ok, want)
		}
	}
	if s := fmt.Sprint(r.Sessions()[0].Name, r.Sessions()[1].Name, len(r.Sessions())); s != "cb2" && s != "c b 2" {
		t.Fatalf("sessions %s", s)
	}
	for _, name := range []string{"", string(make([]byte, NameBytesMax+1))} {
		if _, err := open(name); err == nil {
			t.Errorf("a name of %d bytes was taken", len(name))
		}
	}
	b.Close(now)
	if _, err := open("b"); err != nil {
		t.Fatal(err)
	}
}

func TestGroups(t *testing.T) {
	r := newRing(t, 1, 4, 8)
	pending := func() uint64 {
		put(r, 1, 0)
		b, ok := r.TryLease()
		if !ok {
			t.Fatal("nothing to lease")
		}
		defer r.Release(b)
		return r.Pending(b.Index)
	}
	if got := pending(); got != AllGroups {
		t.Errorf("published while there was no group: pending %#x", got)
	}
	now := time.Unix(5, 0)
	for i := range GroupsMax {
		at, err := r.AddGroup(fmt.Sprint("g", i), now)
		if err != nil || at != i {
			t.Fatalf("group %d: %d, %v", i, at, err)
		}
	}
	var full *GroupsFullError
	if _, err := r.AddGroup("more", now); !errors.As(err, &full) {
		t.Fatalf("group %d: %v", GroupsMax, err)
	}
	if at, err := r.AddGroup("g3", now); at != 3 || err != nil {
		t.Fatalf("a group that is there: %d, %v", at, err)
	}
	for i := range GroupsMax {
		if i != 2 && i != 9 {
			r.RemoveGroup(i)
		}
	}
	if got := pending(); got != 1<<2|1<<9 {
		t.Errorf("pending %#x, want groups 2 and 9", got)
	}
	if at, err := r.AddGroup("new", now); at != 0 || err != nil || len(r.Groups()) != 3 {
		t.Fatalf("an entry that came free: %d, %v", at, err)
	}
}

// TestLendersAndWriters: shared batches and lent places on rings of a few places, from many goroutines, under the race detector.
func TestLendersAndWriters(t *testing.T) {
	rng := seeded(t)
	const writers, lenders, trainers, samples = 2, 2, 2, 3000
	for _, shape := range [][2]int{{1, 3}, {2, 4}, {5, 8}} {
		r := newRing(t, shape[0], shape[1], 8, 3)
		var writing, reading sync.WaitGroup
		var mu sync.Mutex
		got := map[[2]uint64]int{}
		for id := range uint64(writers + lenders) {
			seed := rng.Uint64()
			writing.Go(func() {
				rng, w := rand.New(rand.NewPCG(seed, id)), park.NewWaiter()
				for next := uint64(0); next < samples; {
					if id < writers {
						run, err := r.Reserve(t.Context(), w, int(min(samples-next, 1+rng.Uint64N(7))))
						if err != nil {
							t.Error(err)
							return
						}
						fill(r, run, id, next)
						r.Commit(run, id, next, 1, Mark{})
						next += uint64(run.N)
						continue
					}
					p, err := r.Lend(t.Context(), w, id)
					if err != nil {
						t.Error(err)
						return
					}
					rows := int(min(samples-next, 1+rng.Uint64N(uint64(shape[0]))))
					for row := 0; row < rows; {
						n := 1 + rng.IntN(rows-row)
						fillPlace(r, p, row, n, id, next)
						row, next = row+n, next+uint64(n)
					}
					r.PublishPlace(p, rows)
				}
			})
		}
		for range trainers {
			reading.Go(func() {
				w := park.NewWaiter()
				for {
					b, err := r.Lease(t.Context(), w)
					if err == io.EOF {
						return
					}
					if err == nil {
						err = verify(b, r.layout.Columns)
					}
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					for i := range b.Count {
						got[[2]uint64{b.Streams()[i], b.Numbers()[i]}]++
					}
					mu.Unlock()
					r.Release(b)
				}
			})
		}
		writing.Wait()
		r.Flush()
		r.Close()
		reading.Wait()
		if len(got) != (writers+lenders)*samples {
			t.Fatalf("%v: %d different samples, want %d", shape, len(got), (writers+lenders)*samples)
		}
		for s, n := range got {
			if n != 1 {
				t.Fatalf("%v: sample %v came %d times", shape, s, n)
			}
		}
	}
}
