package park

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// waitFor is the loop of the package comment.
func waitFor(ctx context.Context, e *Event, w *Waiter, try func() bool) error {
	for {
		if try() {
			return nil
		}
		e.Add(w)
		if try() {
			e.Remove(w)
			return nil
		}
		if err := w.Wait(ctx); err != nil {
			e.Remove(w)
			return err
		}
	}
}

func TestNoWakeIsLost(t *testing.T) {
	const turns = 20000
	var turn atomic.Int64
	var e Event
	var wg sync.WaitGroup
	for side := range int64(2) {
		wg.Go(func() {
			w := NewWaiter()
			for i := side; i < turns; i += 2 {
				if err := waitFor(t.Context(), &e, w, func() bool { return turn.Load() == i }); err != nil {
					t.Error(err)
					return
				}
				turn.Add(1)
				e.Wake()
			}
		})
	}
	wg.Wait()
	if got := turn.Load(); got != turns {
		t.Fatalf("took %d turns, want %d", got, turns)
	}
}

func TestDeadlineAndStaleWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e Event
		w := NewWaiter()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		err := waitFor(ctx, &e, w, func() bool { return false })
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, want a deadline error", err)
		}
		if e.Waiting() != 0 {
			t.Fatalf("%d waiters left behind", e.Waiting())
		}
		// A wake that was never taken must not satisfy the next wait.
		e.Add(w)
		e.Wake()
		e.Add(w)
		ctx2, cancel2 := context.WithTimeout(t.Context(), time.Second)
		defer cancel2()
		if err := w.Wait(ctx2); err == nil {
			t.Fatal("a stale wake ended a new wait")
		}
		e.Remove(w)
	})
}

func TestWakeDoesNotAllocate(t *testing.T) {
	var e Event
	w := NewWaiter()
	if n := testing.AllocsPerRun(1000, func() {
		e.Add(w)
		e.Wake()
		<-w.wake
	}); n != 0 {
		t.Fatalf("%v allocations per wait, want 0", n)
	}
}

func TestAddTwicePanics(t *testing.T) {
	var e Event
	w := NewWaiter()
	e.Add(w)
	defer func() {
		if recover() == nil {
			t.Fatal("adding one Waiter twice did not panic")
		}
	}()
	e.Add(w)
}

func TestWakeOneIsFirstComeFirstServed(t *testing.T) {
	var e Event
	seats := []*Waiter{NewWaiter(), NewWaiter(), NewWaiter(), NewWaiter()}
	for _, w := range seats {
		e.Add(w)
	}
	if !e.Remove(seats[1]) {
		t.Fatal("Remove says that a waiter was woken that was not")
	}
	for _, i := range []int{0, 2, 3} {
		e.WakeOne()
		for k, w := range seats {
			if woken := len(w.wake) == 1; woken != (k == i) {
				t.Fatalf("waiter %d woken: %v, when it was the turn of %d", k, woken, i)
			}
		}
		<-seats[i].wake
	}
	e.WakeOne() // nobody left
	if e.Waiting() != 0 || e.Remove(seats[0]) {
		t.Fatal("the list is not empty")
	}
	// The ends of the list survive every way of leaving it.
	for _, w := range seats[:3] {
		e.Add(w)
	}
	e.Remove(seats[2])
	e.Add(seats[3])
	e.Remove(seats[0])
	e.Wake()
	if len(seats[0].wake)+len(seats[2].wake) != 0 || len(seats[1].wake)+len(seats[3].wake) != 2 {
		t.Fatal("the wrong waiters were woken")
	}
}
