package ring

import (
	"context"
	"io"
	"os"

	"github.com/ingestd/ingestd/internal/park"
)

// Reserve is TryReserve that waits while the ring is full. Writers that wait are served in the order in which they came, one for each place that comes free;
// a caller that finds others waiting waits behind them. w is the caller's own seat. It returns os.ErrClosed after Close, or the context's error.
func (r *Ring) Reserve(ctx context.Context, w *park.Waiter, n int) (Run, error) {
	if run, ok := r.TryReserveInTurn(n); ok {
		return run, nil
	}
	for {
		if err := r.turn(ctx, w, &r.Space, r.hasSpace); err != nil {
			return Run{}, err
		}
		if run, ok := r.TryReserve(n); ok {
			r.next(&r.Space, r.hasSpace)
			return run, nil
		}
	}
}

// TryReserveInTurn is TryReserve that leaves what there is to the writers that wait in Reserve, and false after Close.
func (r *Ring) TryReserveInTurn(n int) (Run, bool) {
	if r.Space.Waiting() > 0 || r.Closed() {
		return Run{}, false
	}
	return r.TryReserve(n)
}

// Lend is TryLend that waits while no place is free, in the order in which the callers came. It returns os.ErrClosed after Close, or the context's error.
func (r *Ring) Lend(ctx context.Context, w *park.Waiter, stream uint64) (Place, error) {
	if p, ok := r.TryLend(stream); ok {
		return p, nil
	}
	for {
		if err := r.turn(ctx, w, &r.Room, r.hasRoom); err != nil {
			return Place{}, err
		}
		if p, ok := r.lend(stream); ok {
			r.next(&r.Room, r.hasRoom)
			return p, nil
		}
	}
}

// turn waits until the caller is the one to take what came free.
func (r *Ring) turn(ctx context.Context, w *park.Waiter, line *park.Event, has func() bool) error {
	line.Add(w)
	if r.Closed() {
		line.Remove(w)
		return os.ErrClosed
	}
	if r.Full != nil && !has() {
		r.Full()
	}
	if has() { // since, or left by others: the first in line takes it
		line.WakeOne()
	}
	if err := w.Wait(ctx); err != nil {
		if !line.Remove(w) {
			line.WakeOne()
		}
		return err
	}
	if r.Closed() {
		return os.ErrClosed
	}
	return nil
}

// next is called by the one that took its turn: what is left is for the next in line, and if nothing is, that one is now about to wait.
func (r *Ring) next(line *park.Event, has func() bool) {
	if has() {
		line.WakeOne()
	} else if r.Full != nil && line.Waiting() > 0 {
		r.Full()
	}
}

// hasRoom tells whether a TryLend now would find a place.
func (r *Ring) hasRoom() bool { return !r.free.empty() }

// hasSpace tells whether a TryReserve now would find a slot.
func (r *Ring) hasSpace() bool {
	size := uint64(r.layout.BatchSize)
	p := r.reserved.Load()
	opening := p / size
	return p%size != 0 || r.openedOf(opening).Load()>>placeBits == opening+1 || !r.free.empty()
}

// Lease is TryLease that waits while nothing is published. It returns io.EOF when the ring is closed and every batch was leased, or the context's error.
func (r *Ring) Lease(ctx context.Context, w *park.Waiter) (Batch, error) {
	for {
		if b, ok := r.TryLease(); ok {
			return b, nil
		}
		r.Ready.Add(w)
		closed := r.Closed() // before the last look: what was published before Close must be found
		if b, ok := r.TryLease(); ok {
			r.Ready.Remove(w)
			return b, nil
		}
		if closed {
			r.Ready.Remove(w)
			return Batch{}, io.EOF
		}
		if err := w.Wait(ctx); err != nil {
			r.Ready.Remove(w)
			return Batch{}, err
		}
	}
}
