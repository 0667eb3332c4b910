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
		r.Space.Add(w)
		if r.Closed() {
			r.Space.Remove(w)
			return Run{}, os.ErrClosed
		}
		if r.hasSpace() { // since, or left by others: the first in line takes it
			r.Space.WakeOne()
		}
		if err := w.Wait(ctx); err != nil {
			if !r.Space.Remove(w) {
				r.Space.WakeOne()
			}
			return Run{}, err
		}
		if r.Closed() {
			return Run{}, os.ErrClosed
		}
		if run, ok := r.TryReserve(n); ok {
			if r.hasSpace() {
				r.Space.WakeOne()
			}
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

// hasSpace tells whether a TryReserve now would find a slot.
func (r *Ring) hasSpace() bool {
	size := uint64(r.layout.BatchSize)
	p := r.reserved.Load()
	number := p / size
	return p%size != 0 || r.orderOf(number).Load()>>placeBits == number+1 || !r.free.empty()
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
