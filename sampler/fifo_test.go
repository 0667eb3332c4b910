package sampler

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

const batchSize = 4

func newRing(t testing.TB, batches int) *ring.Ring {
	t.Helper()
	layout := ring.Layout{BatchSize: batchSize, Batches: batches, Columns: []int64{8}, Table: "t", Created: time.Now()}
	size, err := layout.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	r, err := ring.Format(ring.AlignedBytes(size), layout)
	if err != nil {
		t.Fatal(err)
	}
	r.Poison = true
	return r
}

func newFIFO(t testing.TB, r *ring.Ring, linger time.Duration) *FIFO {
	t.Helper()
	s, err := New(r, Config{Linger: linger})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fill commits samples numbered from first on, as stream 0.
func fill(t testing.TB, r *ring.Ring, first, n int) {
	t.Helper()
	for n > 0 {
		run, ok := r.TryReserve(n)
		if !ok {
			t.Fatalf("the ring is full at sample %d", first)
		}
		clear(r.RunColumn(run, 0))
		r.Commit(run, 0, uint64(first), 1, ring.Mark{})
		first += int(run.N)
		n -= int(run.N)
	}
}

func take(t testing.TB, s *FIFO, want uint64) ring.Batch {
	t.Helper()
	b, ok := s.TryNext()
	if !ok || b.Number != want {
		t.Fatalf("got batch %d (%v), want %d", b.Number, ok, want)
	}
	return b
}

func TestConfig(t *testing.T) {
	r := newRing(t, 2)
	for linger, ok := range map[time.Duration]bool{0: true, LingerMin: true, time.Hour: true, LingerMin - 1: false, -1: false} {
		if _, err := New(r, Config{Linger: linger}); (err == nil) != ok {
			t.Errorf("linger %v: %v", linger, err)
		} else if err != nil && !strings.Contains(err.Error(), "must be 0 (off) or at least 1ms") {
			t.Errorf("linger %v: %v", linger, err)
		}
	}
}

func TestOrderAndReturn(t *testing.T) {
	r := newRing(t, 8)
	s := newFIFO(t, r, 0)
	if _, ok := s.TryNext(); ok {
		t.Fatal("an empty ring gave a batch")
	}
	fill(t, r, 0, 6*batchSize)
	var held []ring.Batch
	for i := range uint64(4) {
		held = append(held, take(t, s, i))
	}
	// Trainers die in any order: what they held comes again by number, and before anything newer.
	for _, i := range []int{2, 0, 3} {
		s.Return(held[i])
	}
	if st := s.Stats(); st != (Stats{Delivered: 4, Returned: 3, Leased: 1, Waiting: 3}) {
		t.Errorf("stats: %+v", st)
	}
	again := []ring.Batch{take(t, s, 0), take(t, s, 2)}
	s.Return(again[0])
	s.Release(take(t, s, 0))
	s.Release(take(t, s, 3))
	s.Release(take(t, s, 4))
	b := again[1]
	if got := b.Numbers(); !slices.Equal(got, []uint64{8, 9, 10, 11}) {
		t.Errorf("batch 2 after its return holds samples %v", got)
	}
	s.Release(b)
	s.Release(held[1])
	r.Close()
	s.Release(take(t, s, 5))
	if _, err := s.Next(t.Context(), park.NewWaiter()); err != io.EOF {
		t.Fatalf("after the last batch: %v, want io.EOF", err)
	}
	if st := s.Stats(); st != (Stats{Delivered: 10, Released: 6, Returned: 4}) {
		t.Errorf("stats: %+v", st)
	}
}

func TestReturnAfterTheEnd(t *testing.T) {
	r := newRing(t, 2)
	s := newFIFO(t, r, 0)
	fill(t, r, 0, batchSize)
	b := take(t, s, 0)
	r.Close()
	w := park.NewWaiter()
	if _, err := s.Next(t.Context(), w); err != io.EOF {
		t.Fatalf("nothing is left to give out: %v, want io.EOF", err)
	}
	s.Return(b)
	b, err := s.Next(t.Context(), w)
	if err != nil || b.Number != 0 {
		t.Fatalf("the batch that came back after the end: %d, %v", b.Number, err)
	}
	s.Release(b)
}

func TestReturnTwicePanics(t *testing.T) {
	r := newRing(t, 2)
	s := newFIFO(t, r, 0)
	fill(t, r, 0, batchSize)
	b := take(t, s, 0)
	s.Return(b)
	defer func() {
		if recover() == nil {
			t.Fatal("returning a batch twice did not panic")
		}
	}()
	s.Return(b)
}

// What ends a wait: a publication, a Return, the end, a deadline.
func TestNextWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 4)
		s := newFIFO(t, r, 0)
		got := make(chan uint64)
		next := func() {
			b, err := s.Next(t.Context(), park.NewWaiter())
			if err == io.EOF {
				got <- 1 << 40
				return
			}
			if err != nil {
				t.Error(err)
			}
			got <- b.Number
		}
		go next()
		synctest.Wait()
		if n := s.Stats().Sleeping; n != 1 {
			t.Errorf("%d trainers sleep, want 1", n)
		}
		fill(t, r, 0, batchSize-1)
		synctest.Wait()
		select {
		case n := <-got:
			t.Fatalf("batch %d came before its last sample", n)
		default:
		}
		fill(t, r, batchSize-1, 1)
		if n := <-got; n != 0 {
			t.Fatalf("got batch %d, want 0", n)
		}
		b, _ := r.View.Batch(0, 0, batchSize)
		go next()
		synctest.Wait()
		s.Return(b)
		if n := <-got; n != 0 {
			t.Fatalf("got batch %d, want the returned one", n)
		}
		go next()
		synctest.Wait()
		r.Close()
		if n := <-got; n != 1<<40 {
			t.Fatalf("got batch %d, want the end", n)
		}

		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := newFIFO(t, newRing(t, 2), 0).Next(ctx, park.NewWaiter()); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("past the deadline: %v", err)
		}
	})
}

func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const linger = 20 * time.Second
		r := newRing(t, 4)
		s := newFIFO(t, r, linger)
		done := make(chan error)
		go func() { done <- s.Run(t.Context()) }()
		<-time.After(10 * linger)
		if n := s.Stats().Lingered; n != 0 {
			t.Fatalf("%d empty batches were published", n)
		}
		start := time.Now()
		fill(t, r, 0, batchSize-1)
		b, err := s.Next(t.Context(), park.NewWaiter())
		if err != nil || b.Count != batchSize-1 {
			t.Fatalf("%d rows, %v, want %d", b.Count, err, batchSize-1)
		}
		if waited := time.Since(start); waited < linger || waited > 3*linger/2 {
			t.Errorf("published after %v of simulated time, want %v to %v", waited, linger, 3*linger/2)
		}
		s.Release(b)
		// A batch that fills in time is not cut; the one after it has its own time.
		fill(t, r, 0, batchSize-1)
		<-time.After(linger / 2)
		fill(t, r, 3, 2)
		start = time.Now()
		s.Release(take(t, s, 1))
		b, err = s.Next(t.Context(), park.NewWaiter())
		if err != nil || b.Count != 1 || time.Since(start) < linger {
			t.Fatalf("%d rows after %v, %v, want 1 after %v", b.Count, time.Since(start), err, linger)
		}
		if n := s.Stats().Lingered; n != 2 {
			t.Errorf("Lingered is %d, want 2", n)
		}
		r.Close()
		if err := <-done; err != nil {
			t.Errorf("Run at the end of the ring: %v", err)
		}
	})
}

func TestRunEnds(t *testing.T) {
	if err := newFIFO(t, newRing(t, 2), 0).Run(t.Context()); err != nil {
		t.Errorf("Run without linger: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newFIFO(t, newRing(t, 2), time.Hour).Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Run with an ended context: %v", err)
	}
}

func TestNoAllocations(t *testing.T) {
	r := newRing(t, 4)
	s := newFIFO(t, r, 0)
	w := park.NewWaiter()
	ctx := t.Context()
	fill(t, r, 0, batchSize)
	s.Return(take(t, s, 0))
	if n := testing.AllocsPerRun(1000, func() {
		b, err := s.Next(ctx, w)
		if err != nil {
			t.Error(err)
		}
		s.Return(b)
		b, _ = s.TryNext()
		s.Release(b)
		run, _ := r.TryReserve(batchSize)
		r.Commit(run, 0, 0, 1, ring.Mark{})
	}); n != 0 {
		t.Errorf("%v allocations per batch, want 0", n)
	}
}

// Several trainers, some of which die holding a batch, on the smallest rings: every sample is read exactly once.
func TestManyTrainers(t *testing.T) {
	const samples = 4000 * batchSize
	for _, batches := range []int{2, 4} {
		r := newRing(t, batches)
		s := newFIFO(t, r, 0)
		var mu sync.Mutex
		read := make([]int, samples)
		var trainers sync.WaitGroup
		for id := range 3 {
			trainers.Go(func() {
				w := park.NewWaiter()
				for turn := 0; ; turn++ {
					b, err := s.Next(t.Context(), w)
					if err == io.EOF {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					if turn%7 == id {
						s.Return(b)
						continue
					}
					mu.Lock()
					for _, n := range b.Numbers() {
						read[n]++
					}
					mu.Unlock()
					s.Release(b)
				}
			})
		}
		w := park.NewWaiter()
		for at := 0; at < samples; {
			run, err := r.Reserve(t.Context(), w, 3)
			if err != nil {
				t.Fatal(err)
			}
			r.Commit(run, 0, uint64(at), 1, ring.Mark{})
			at += int(run.N)
		}
		r.Close()
		trainers.Wait()
		for b, ok := s.TryNext(); ok; b, ok = s.TryNext() { // returned after the others had seen the end
			for _, n := range b.Numbers() {
				read[n]++
			}
			s.Release(b)
		}
		for n, times := range read {
			if times != 1 {
				t.Fatalf("%d batches: sample %d was read %d times", batches, n, times)
			}
		}
		if st := s.Stats(); st.Leased != 0 || st.Waiting != 0 || st.Delivered != st.Released+st.Returned {
			t.Errorf("stats at the end: %+v", st)
		}
	}
}
