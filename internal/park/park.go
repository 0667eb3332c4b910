package park

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
)

// Event is a place where goroutines wait for a change. The zero value is ready.
type Event struct {
	waiting atomic.Int32 // length of the list; written under mu, read by Wake without it
	mu      sync.Mutex
	first   *Waiter
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

// Add puts w on the list of those that the next Wake wakes. After it the caller tests its condition again.
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
	w.next = e.first
	e.first = w
	e.waiting.Add(1)
}

// Remove takes w off the list again; it does nothing when a Wake has done so already.
func (e *Event) Remove(w *Waiter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !w.queued {
		return
	}
	for at := &e.first; *at != nil; at = &(*at).next {
		if *at == w {
			*at = w.next
			break
		}
	}
	w.next, w.queued = nil, false
	e.waiting.Add(-1)
}

// Wake wakes everybody who waits. The caller changes the state before it calls Wake; sequentially consistent atomics on both sides
// see to it that a waiter either finds the change when it tests again or is found on the list here.
func (e *Event) Wake() {
	if e.waiting.Load() == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := e.first; w != nil; {
		next := w.next
		w.next, w.queued = nil, false
		select {
		case w.wake <- struct{}{}:
		default:
		}
		w = next
	}
	e.first = nil
	e.waiting.Store(0)
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
