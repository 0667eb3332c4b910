package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/tensor"
)

// StreamConfig says whose stream is opened. The zero value is a producer that nobody will know again.
type StreamConfig struct {
	// Session is a producer's identity across connections, at most NameBytesMax bytes; "" is none. Its samples are numbered through all of its streams,
	// and one stream has it at a time.
	Session string

	// Manifest says of what tensors the chunks are: for a table of kind tensors, which needs it, and a Session, which is the producer's name.
	Manifest *tensor.Manifest

	// Taken is called once, from any goroutine, when another stream of the session is asked for: push no more, and Close soon. It must not wait.
	Taken func()
}

// ErrSessionTaken is why OpenStream gave up: it waited for the session, and then somebody else asked for it, too.
var ErrSessionTaken = errors.New("another connection has opened the same session")

// session is who has one of the table's sessions, and who waits for it. Under Table.mu.
type session struct {
	inRing  *ring.Session // of who has it
	taken   func()        // of who has it; nil once it was called
	ended   chan struct{} // closed when all that its stream was given is in the ring; nil while nobody has it
	waiting chan struct{} // closed when a later one waits instead; nil while nobody waits
}

// entry returns the session in the segment, nil of none.
func (s *session) entry() *ring.Session {
	if s == nil {
		return nil
	}
	return s.inRing
}

// OpenStream makes the queue of one producer, which begins with sample number Stream.Held. Where another stream has the session, its Taken is called, and
// OpenStream waits until it was closed and all that it was given is in the ring, or until ctx ends (a deadline also matches os.ErrDeadlineExceeded).
// Other errors, wrapped: os.ErrClosed once Close was called, ErrSessionTaken, *ring.SessionsFullError, *steps.MismatchError.
func (t *Table) OpenStream(ctx context.Context, cfg StreamConfig) (*drainer.Stream, error) {
	if err := t.admit(&cfg); err != nil {
		return nil, fmt.Errorf("table %q: %w", t.cfg.Name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	own, id, producer, err := t.open(ctx, &cfg)
	if err != nil {
		return nil, fmt.Errorf("table %q: %w", t.cfg.Name, err)
	}
	of := drainer.StreamConfig{ID: id, Session: own.entry(), FlushAtEnd: t.cfg.Linger > 0, Full: t.full}
	if producer != nil {
		of.Check = producer
	}
	s := t.cfg.Drainers.Open(t.ring, of)
	t.opened++
	t.streams[id] = s
	if own != nil {
		t.sampler.Unpin(id) // it writes elsewhere now
	}
	t.watching.Go(func() {
		<-s.Done()
		t.mu.Lock()
		defer t.mu.Unlock()
		st := s.Stats()
		t.past.Pushed += st.Pushed
		t.past.Committed += st.Committed
		t.past.Abandoned += st.Abandoned
		delete(t.streams, id)
		t.release(cfg.Session, own, producer)
	})
	return s, nil
}

// OpenLender is OpenStream for a producer that fills places of the ring itself. It ends with Lender.End.
func (t *Table) OpenLender(ctx context.Context, cfg StreamConfig) (*drainer.Lender, error) {
	if err := t.admit(&cfg); err != nil {
		return nil, fmt.Errorf("table %q: %w", t.cfg.Name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	own, id, producer, err := t.open(ctx, &cfg)
	if err != nil {
		return nil, fmt.Errorf("table %q: %w", t.cfg.Name, err)
	}
	of := drainer.LenderID{Stream: id, Session: own.entry(), FlushAtEnd: t.cfg.Linger > 0, Resumed: func() { t.sampler.Unpin(id) }}
	if producer != nil {
		of.Check = producer
	}
	l := drainer.NewLender(t.ring, of)
	t.opened++
	t.lenders[id] = l
	t.watching.Go(func() {
		<-l.Done()
		t.mu.Lock()
		defer t.mu.Unlock()
		st := l.Stats()
		t.past.Pushed += st.Committed
		t.past.Committed += st.Committed
		delete(t.lenders, id)
		t.release(cfg.Session, own, producer)
	})
	return l, nil
}

// admit judges what a producer of tensors says of them.
func (t *Table) admit(cfg *StreamConfig) error {
	switch {
	case t.steps == nil && cfg.Manifest == nil:
		return nil
	case t.steps == nil:
		return errors.New("its samples are no chunks of tensors")
	case cfg.Manifest == nil || cfg.Session == "":
		return errors.New("its producers give a manifest and a session")
	}
	return t.steps.Admit(cfg.Session, cfg.Manifest)
}

// open claims the session and, for a table of kind tensors, makes the checker of what comes. Called under mu, which it lets go while it waits.
func (t *Table) open(ctx context.Context, cfg *StreamConfig) (*session, uint64, *steps.Producer, error) {
	own, id, err := t.claim(ctx, *cfg)
	if err != nil || t.steps == nil {
		return own, id, nil, err
	}
	producer, err := t.steps.Open(cfg.Session, id, cfg.Manifest)
	if err != nil {
		t.release(cfg.Session, own, nil)
		return nil, 0, nil, err
	}
	return own, id, producer, nil
}

// claim makes the session the caller's, who gives it back with release; nil where cfg names none. It returns the stream's number, too. Called under mu, which
// it lets go while it waits.
func (t *Table) claim(ctx context.Context, cfg StreamConfig) (*session, uint64, error) {
	if t.closed {
		return nil, 0, os.ErrClosed
	}
	if cfg.Session == "" {
		return nil, t.ring.NextStream(), nil
	}
	s := t.sessions[cfg.Session]
	if s == nil {
		s = &session{}
		t.sessions[cfg.Session] = s
	}
	if s.waiting != nil {
		close(s.waiting) // the one that came last gets it
		s.waiting = nil
	}
	if s.ended != nil {
		if err := t.await(ctx, cfg.Session, s); err != nil {
			return nil, 0, err
		}
	}
	inRing, err := t.ring.OpenSession(cfg.Session, time.Now(), t.cfg.SessionTTL)
	if err != nil {
		t.release(cfg.Session, nil, nil)
		return nil, 0, fmt.Errorf("session %.40q: %w", cfg.Session, err)
	}
	s.inRing, s.taken, s.ended = inRing, cfg.Taken, make(chan struct{})
	return s, inRing.Stream(), nil
}

// await takes the session from who has it.
func (t *Table) await(ctx context.Context, name string, s *session) error {
	mine, taken := make(chan struct{}), s.taken
	s.waiting, s.taken = mine, nil
	if taken != nil {
		t.taken++
	}
	ended := s.ended
	t.mu.Unlock()
	if taken != nil {
		taken()
	}
	select {
	case <-ended:
	case <-mine:
	case <-t.closing:
	case <-ctx.Done():
	}
	t.mu.Lock()
	if s.waiting != mine {
		return fmt.Errorf("session %q: %w", name, ErrSessionTaken)
	}
	s.waiting = nil
	switch {
	case t.closed:
		t.release(name, nil, nil)
		return os.ErrClosed
	case s.ended != nil:
		return fmt.Errorf("session %q: the stream that has it has not ended yet: %w", name, park.ContextError(ctx))
	}
	return nil
}

// release gives a session back: s and p, unless they are nil, are the caller's. Called under mu.
func (t *Table) release(name string, s *session, p *steps.Producer) {
	if p != nil { // before anybody else can have the session
		p.Close()
	}
	if s != nil {
		s.inRing.Close(time.Now())
		close(s.ended)
		s.inRing, s.taken, s.ended = nil, nil, nil
	}
	if s = t.sessions[name]; s != nil && s.ended == nil && s.waiting == nil {
		delete(t.sessions, name)
	}
}
