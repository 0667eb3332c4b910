package park

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
)

// Event is a place where goroutines wait for a change. The zero value is ready.
type Event struct {
	waiting     atomic.Int32 // length of the list; written under mu, read by Wake without it
	mu          sync.Mutex
	first, last *Waiter // in the order of Add
}

// Waiter is one goroutine's seat at an Event. It is made once and used for every wait of its owner.
type Waiter struct {
	wake   chan struct{} // capacity 1: a wake that comes before Wait is kept
	next   *Waiter
	queued bool // under the Event's mu
}

// NewWaiter returns a seat for one goroutine.
func NewWaiter() *Waiter {
	return &Waiter{wake: make(chan struct{}, 1)}
}

// Add puts w at the end of the list of those to wake. After it the caller tests its condition again.
func (e *Event) Add(w *Waiter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if w.queued {
		panic("park: Waiter added twice")
	}
	select { // a wake left over from a wait that ended by its context
	case <-w.wake:
	default:
	}
	w.queued = true
	if e.last == nil {
		e.first = w
	} else {
		e.last.next = w
	}
	e.last = w
	e.waiting.Add(1)
}

// Remove takes w off the list again. It returns false when w was woken already: where each wake is meant for one waiter, the caller then
// passes it on with WakeOne if it has no use for it.
func (e *Event) Remove(w *Waiter) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !w.queued {
		return false
	}
	var before *Waiter
	for at := e.first; at != w; at = at.next {
		before = at
	}
	e.unlink(before, w)
	return true
}

// unlink takes w, which follows before, off the list. Called under mu.
func (e *Event) unlink(before, w *Waiter) {
	if before == nil {
		e.first = w.next
	} else {
		before.next = w.next
	}
	if e.last == w {
		e.last = before
	}
	w.next, w.queued = nil, false
	e.waiting.Add(-1)
}

// Wake wakes everybody who waits. The caller changes the state before it calls Wake; sequentially consistent atomics on both sides
// see to it that a waiter either finds the change when it tests again or is found on the list here.
func (e *Event) Wake() { e.wake(math.MaxInt) }

// WakeOne wakes the one that has waited longest, for a change of which one can make use. Whoever is woken calls WakeOne again if there is
// something left for the next.
func (e *Event) WakeOne() { e.wake(1) }

func (e *Event) wake(most int) {
	if e.waiting.Load() == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for ; most > 0 && e.first != nil; most-- {
		w := e.first
		e.unlink(nil, w)
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// Waiting returns how many goroutines wait, for status pages.
func (e *Event) Waiting() int { return int(e.waiting.Load()) }

// Wait sleeps until a Wake of the Event that w was added to, or until ctx ends.
func (w *Waiter) Wait(ctx context.Context) error {
	select {
	case <-w.wake:
		return nil
	case <-ctx.Done():
		return ContextError(ctx)
	}
}

// ContextError returns why ctx ended; a deadline also matches os.ErrDeadlineExceeded.
func ContextError(ctx context.Context) error {
	err := context.Cause(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
	}
	return err
}
