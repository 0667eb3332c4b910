package drainer

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
)

// Stream is the sender's side of one producer's queue. Its methods belong to the one goroutine that receives for it; Stats, Done, Committed and
// Waiting may be called from anywhere.
type Stream struct {
	cfg     StreamConfig
	held    uint64 // number of the stream's first sample
	ring    *ring.Ring
	queue   *spsc.Queue[filled]
	drainer *drainer
	seat    *park.Waiter // the sender's
	next    uint64       // number of the sender's next sample; the sender's own
	columns [][]byte     // what a Checker is given; the sender's own, nil without one

	pushed       atomic.Uint64 // number of the next sample to be pushed; written by the sender
	abandoned    atomic.Uint64 // slots given back unfilled; written by the sender
	waitingSince atomic.Int64  // Unix nanoseconds, 0 when not waiting for a slot; written by the sender
	committed    atomic.Uint64 // number of the next sample to be committed; written by the drainer
	settled      park.Event    // woken after committed moved

	ended bool // the drainer's own: closed and empty
	done  chan struct{}
}

// StreamStats is a snapshot of a stream.
type StreamStats struct {
	Stream       uint64
	Session      string    // "" without one
	Held         uint64    // number of the stream's first sample
	Pushed       uint64    // samples placed and queued
	Committed    uint64    // samples in the ring
	Abandoned    uint64    // slots given back unfilled
	WaitingSince time.Time // when the stream began to wait for a free slot; zero if it does not
}

// ID returns the number of the stream, as it stands beside its samples in the ring.
func (s *Stream) ID() uint64 { return s.cfg.ID }

// Held returns the number of the stream's first sample: of a session, how many there are in the ring already, or were.
func (s *Stream) Held() uint64 { return s.held }

// TryReserve takes up to n slots inside one batch, or returns false when the ring is full or closed, or others wait for a slot; Reserve tells which.
func (s *Stream) TryReserve(n int) (ring.Run, bool) { return s.ring.TryReserveInTurn(n) }

// Reserve takes up to n slots inside one batch, waiting while the ring is full. It returns os.ErrClosed when the ring is closed, or the context's error,
// of which StreamConfig.Full may have made another.
func (s *Stream) Reserve(ctx context.Context, n int) (ring.Run, error) {
	if run, ok := s.TryReserve(n); ok {
		return run, nil
	}
	s.waitingSince.Store(time.Now().UnixNano())
	defer s.waitingSince.Store(0)
	run, err := s.ring.Reserve(ctx, s.seat, n)
	if err != nil && s.cfg.Full != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		err = s.cfg.Full(err)
	}
	return run, err
}

// Column returns the bytes of one leaf of a reserved run, to be filled before Push.
func (s *Stream) Column(run ring.Run, leaf int) []byte { return s.ring.RunColumn(run, leaf) }

// Push hands filled slots on, in the order of the samples, and commits them itself if the drainer is at rest; arrival is when the last byte of the last of
// them was read. It waits while the queue is full, which lasts no longer than a drainer needs for its round. It returns how many it took: all, or with a
// *CheckError those before the sample that the stream's Checker turned down; the slots after them are still the caller's, to be abandoned.
// Pushing after Close panics.
func (s *Stream) Push(run ring.Run, arrival time.Time) (pushed int, err error) {
	if s.cfg.Check != nil {
		if run, err = s.check(run); run.N == 0 {
			return 0, err
		}
	}
	f := [1]filled{{run: run, first: s.next, arrival: uint64(arrival.UnixNano())}}
	// The pool commits without ever waiting, so this wait ends as long as the pool runs, and the pool outlives the streams.
	s.next += uint64(run.N)
	s.pushed.Store(s.next) // before the push, so that it is never below committed
	if s.queue.TryPush(f[:]) == 0 {
		s.drainer.work.Wake()
		if err := s.queue.Push(context.Background(), f[:]); err != nil {
			panic("drainer: Push after Close")
		}
	}
	s.drainer.help(s)
	return int(run.N), err
}

// check returns the part of the run that may be committed.
func (s *Stream) check(run ring.Run) (ring.Run, error) {
	for leaf := range s.columns {
		s.columns[leaf] = s.ring.RunColumn(run, leaf)
	}
	good, err := s.cfg.Check.Check(s.columns)
	if err != nil {
		err = &CheckError{err}
	}
	run, _ = run.Split(good)
	return run, err
}

// AppendNotes appends what the stream's Checker has for the producer, to be written before the acks of what was pushed.
func (s *Stream) AppendNotes(dst []byte) []byte {
	if s.cfg.Check == nil {
		return dst
	}
	return s.cfg.Check.AppendNotes(dst)
}

// Abandon gives slots back unfilled: their samples never came whole.
func (s *Stream) Abandon(run ring.Run) {
	s.abandoned.Store(s.abandoned.Load() + uint64(run.N))
	s.ring.Abandon(run)
}

// WaitCommitted waits until every sample pushed so far is in the ring.
func (s *Stream) WaitCommitted(ctx context.Context) error {
	for s.committed.Load() < s.next {
		s.settled.Add(s.seat)
		if s.committed.Load() >= s.next {
			s.settled.Remove(s.seat)
			return nil
		}
		if err := s.seat.Wait(ctx); err != nil {
			s.settled.Remove(s.seat)
			return err
		}
	}
	return nil
}

// Close says that nothing follows. The drainer commits what is queued and then lets the stream go.
func (s *Stream) Close() {
	s.queue.Close()
	s.drainer.work.Wake()
}

// Done is closed when the stream was closed and everything pushed is in the ring.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Stats returns a snapshot.
func (s *Stream) Stats() StreamStats {
	st := StreamStats{
		Stream:    s.cfg.ID,
		Held:      s.held,
		Committed: s.committed.Load() - s.held, // before pushed, so that it is never above it
		Pushed:    s.pushed.Load() - s.held,
		Abandoned: s.abandoned.Load(),
	}
	if s.cfg.Session != nil {
		st.Session = s.cfg.Session.Name()
	}
	if ns := s.waitingSince.Load(); ns != 0 {
		st.WaitingSince = time.Unix(0, ns)
	}
	return st
}
