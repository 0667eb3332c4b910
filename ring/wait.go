package ring

import (
	"context"
	"io"
	"os"

	"github.com/ingestd/ingestd/internal/park"
)

// Reserve is TryReserve that waits while the ring is full. w is the caller's own seat. It returns os.ErrClosed after Close, or the context's error.
func (r *Ring) Reserve(ctx context.Context, w *park.Waiter, n int) (Run, error) {
	for {
		if r.Closed() {
			return Run{}, os.ErrClosed
		}
		if run, ok := r.TryReserve(n); ok {
			return run, nil
		}
		r.Space.Add(w)
		if run, ok := r.TryReserve(n); ok {
			r.Space.Remove(w)
			return run, nil
		}
		if r.Closed() {
			r.Space.Remove(w)
			return Run{}, os.ErrClosed
		}
		if err := w.Wait(ctx); err != nil {
			r.Space.Remove(w)
			return Run{}, err
		}
	}
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
