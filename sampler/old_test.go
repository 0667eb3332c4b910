package sampler

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// Config configures a FIFO.
type oldConfig struct {
	// Linger is how long a sample may wait for its batch to fill: after it the batch is published with the rows it has. 0 means for
	// ever. Run does it; the age is seen to about a quarter of Linger.
	Linger time.Duration
}

// LingerMin is the shortest Linger but 0.
const oldMin = time.Millisecond

// FIFO gives each batch of a ring to one trainer, oldest first.
type oldFIFO struct {
	ring *ring.Ring
	cfg  oldConfig

	waiting   atomic.Int64 // len(returned): read without mu, so that Next takes the lock only when there is something
	delivered atomic.Uint64
	released  atomic.Uint64
	returns   atomic.Uint64
	lingered  atomic.Uint64

	mu       sync.Mutex
	returned []ring.Batch // by number, highest first; written under mu
}

// Stats counts batches since the FIFO was made.
type oldStats struct {
	Delivered uint64 // given out, again after a Return
	Released  uint64 // given back read
	Returned  uint64 // given back by the death of their trainer
	Lingered  uint64 // published early because a sample had waited for Linger
	Leased    int    // out now
	Waiting   int    // returned and not given out again yet
	Sleeping  int    // trainers that wait for a batch
}

// New returns a FIFO over r, or an error when the configuration cannot be.
func newOld(r *ring.Ring, cfg oldConfig) (*oldFIFO, error) {
	if cfg.Linger != 0 && cfg.Linger < LingerMin {
		return nil, fmt.Errorf("sampler: linger is %v: must be 0 (off) or at least %v", cfg.Linger, LingerMin)
	}
	return &oldFIFO{ring: r, cfg: cfg}, nil
}

// TryNext returns the next batch if there is one now.
func (s *oldFIFO) TryNext() (ring.Batch, bool) {
	if s.waiting.Load() > 0 {
		if b, ok := s.again(); ok {
			return b, true
		}
	}
	b, ok := s.ring.TryLease()
	if ok {
		s.delivered.Add(1)
	}
	return b, ok
}

// again takes the oldest of the batches that were returned.
func (s *oldFIFO) again() (ring.Batch, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := len(s.returned) - 1
	if last < 0 {
		return ring.Batch{}, false
	}
	b := s.returned[last]
	s.returned = s.returned[:last]
	s.waiting.Store(int64(last))
	s.delivered.Add(1)
	return b, true
}

// Next waits for the next batch. w is the caller's own seat. The error is io.EOF when the ring is closed and every batch is out, or
// the context's.
func (s *oldFIFO) Next(ctx context.Context, w *park.Waiter) (ring.Batch, error) {
	for {
		if b, ok := s.TryNext(); ok {
			return b, nil
		}
		s.ring.Ready.Add(w)
		closed := s.ring.Closed() // before the last look: what was published before Close must be found
		if b, ok := s.TryNext(); ok {
			s.ring.Ready.Remove(w)
			return b, nil
		}
		if closed {
			s.ring.Ready.Remove(w)
			return ring.Batch{}, io.EOF
		}
		if err := w.Wait(ctx); err != nil {
			s.ring.Ready.Remove(w)
			return ring.Batch{}, err
		}
	}
}

// Release gives back a batch that was read; its place may be filled again at once.
func (s *oldFIFO) Release(b ring.Batch) {
	s.ring.Release(b)
	s.released.Add(1)
}

// Return gives back a batch that its trainer did not get to the end of. It goes to another one before anything newer does.
func (s *oldFIFO) Return(b ring.Batch) {
	s.mu.Lock()
	at, twice := slices.BinarySearchFunc(s.returned, b.Number, func(have ring.Batch, number uint64) int {
		switch {
		case have.Number > number:
			return -1
		case have.Number < number:
			return 1
		}
		return 0
	})
	if twice {
		s.mu.Unlock()
		panic(fmt.Sprintf("sampler: batch %d was returned twice", b.Number))
	}
	s.returned = slices.Insert(s.returned, at, b)
	s.waiting.Store(int64(len(s.returned)))
	s.mu.Unlock()
	s.returns.Add(1)
	s.ring.Ready.Wake()
}

// Stats returns the counts; they are read one after the other, not at one moment.
func (s *oldFIFO) Stats() oldStats {
	st := oldStats{
		Released: s.released.Load(), Returned: s.returns.Load(), Lingered: s.lingered.Load(),
		Waiting: int(s.waiting.Load()), Sleeping: s.ring.Ready.Waiting(),
	}
	st.Delivered = s.delivered.Load() // last, so that Leased is not negative
	st.Leased = max(0, int(st.Delivered-st.Released-st.Returned))
	return st
}

// Run publishes batches that have been open for longer than Linger, until ctx ends or the ring is closed. It returns nil at once
// when Linger is 0, and the context's error when that ended it.
func (s *oldFIFO) Run(ctx context.Context) error {
	if s.cfg.Linger == 0 {
		return nil
	}
	size := uint64(s.ring.BatchSize())
	tick := time.NewTicker(max(s.cfg.Linger/4, LingerMin))
	defer tick.Stop()
	var open, seen uint64 // 1 + number of the batch that was partly filled at the last look, or 0
	var since time.Time   // when it was seen so first
	for !s.ring.Closed() {
		select {
		case <-ctx.Done():
			return park.ContextError(ctx)
		case now := <-tick.C:
			// The batch being filled is told by the position alone, so that writers need not note any time: a batch is as old as
			// the first look that found a row of it taken.
			if at := s.ring.Reserved(); at%size == 0 {
				open = 0
			} else if seen = at/size + 1; seen != open {
				open, since = seen, now
			} else if now.Sub(since) >= s.cfg.Linger {
				if s.ring.Flush() {
					s.lingered.Add(1)
				}
				open = 0
			}
		}
	}
	return nil
}
