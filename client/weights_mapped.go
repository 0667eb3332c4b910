//go:build linux

package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// mapped is generations in the daemon's own memory. It attaches again when the table has another segment, or another daemon serves it.
type mapped struct {
	path string
	cfg  SubscribeConfig

	attaching sync.Mutex // one call at a time attaches again

	mu     sync.Mutex
	now    *weights.Attachment
	last   uint64    // the newest generation that was given out
	before uint64    // generations up to this one are of a daemon before this one: their numbers say nothing; 0: none
	down   time.Time // since when no daemon is there; zero: one is, or nobody has looked
	tries  int
	closed bool
}

func openMapped(ctx context.Context, path string, cfg SubscribeConfig) (source, error) {
	m := &mapped{path: path, cfg: cfg}
	a, err := m.attach(ctx, cfg.Wait)
	if err != nil {
		return nil, fmt.Errorf("client: %w", named(err))
	}
	m.now = a
	return m, nil
}

// attach attaches once.
func (m *mapped) attach(ctx context.Context, wait bool) (*weights.Attachment, error) {
	if !wait {
		limited, cancel := context.WithTimeout(ctx, m.cfg.HandshakeTimeout)
		defer cancel()
		ctx = limited
	}
	hello := wire.Hello{Table: m.cfg.Table, Client: m.cfg.Client, Wait: wait}
	hello.SetToken(m.cfg.Token)
	return weights.Attach(ctx, m.path, hello)
}

func (m *mapped) current() *weights.Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

func (m *mapped) manifest() *tensor.Manifest { return m.current().Segment().Manifest() }

// pin holds the newest generation of the segment that is attached, if it is newer.
func (m *mapped) pin(newerThan uint64) (*heldWeights, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, m.closedError()
	}
	a := m.now
	generation, place, ok := a.Pin(0)
	if !ok {
		return nil, nil
	}
	if generation <= newerThan && (generation == newerThan || newerThan > m.before) {
		a.Unpin(place)
		return nil, nil
	}
	m.last = generation
	s := a.Segment()
	sums := s.SumBytes(place)
	return &heldWeights{
		manifest: s.Manifest(), generation: generation, digest: s.Digest(place), published: s.Published(place), data: s.Data(place),
		sum:     func(i int) uint32 { return binary.LittleEndian.Uint32(sums[4*i:]) },
		release: func() { a.Unpin(place) },
	}, nil
}

func (m *mapped) latest(newerThan uint64) (*heldWeights, error) {
	a := m.current()
	if err := a.Err(); err != nil {
		ctx, cancel := context.WithTimeout(context.Background(), m.cfg.HandshakeTimeout)
		defer cancel()
		if err := m.again(ctx, a, err); err != nil {
			return nil, err
		}
	}
	return m.pin(newerThan)
}

func (m *mapped) await(ctx context.Context, newerThan uint64) (*heldWeights, error) {
	for {
		if ctx.Err() != nil {
			return nil, m.waited(ctx, newerThan)
		}
		a := m.current()
		changed, ended := a.Changed(), a.Err() // before it is looked at
		held, err := m.pin(newerThan)
		if held != nil || err != nil {
			return held, err
		}
		if ended == nil {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		if err := m.again(ctx, a, ended); err != nil {
			if pause := m.pause(err); pause == 0 {
				return nil, err
			} else if !sleep(ctx, pause) {
				return nil, m.waited(ctx, newerThan)
			}
		}
	}
}

// sleep waits; false: ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// again attaches anew where old has ended. Where that fails the old attachment stays, and with it the reason why it had ended, so that a later call tries
// again.
func (m *mapped) again(ctx context.Context, old *weights.Attachment, why error) error {
	m.attaching.Lock()
	defer m.attaching.Unlock()
	replaced := codeOf(why) == wire.CodeReplaced
	switch {
	case m.current() != old: // somebody else was here first
		return nil
	case errors.Is(why, os.ErrClosed):
		return m.closedError()
	case m.cfg.ReconnectFor < 0 && !replaced:
		return m.ended(why, nil)
	}
	a, err := m.attach(ctx, false)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err != nil:
		if m.down.IsZero() {
			m.down = time.Now()
		}
		m.tries++
		return m.ended(why, err)
	case m.closed:
		_ = a.Close()
		return m.closedError()
	}
	if !replaced || a.Accepted().Newest < m.last { // another daemon's numbers
		m.before = max(m.before, m.last)
	}
	m.now, m.down, m.tries = a, time.Time{}, 0
	_ = old.Close() // what is held of it stays mapped
	return nil
}

func (m *mapped) closedError() error {
	return fmt.Errorf("client: weights of table %q: %w", m.cfg.Table, os.ErrClosed)
}

// ended says why there is no attachment: why the last one ended, and what came of attaching anew.
func (m *mapped) ended(why, again error) error {
	switch {
	case again != nil && answered(again):
		return fmt.Errorf("client: %w", named(again))
	case again != nil:
		why = fmt.Errorf("%w; attaching again: %w", why, again)
	}
	if codeOf(why) != "" {
		return fmt.Errorf("client: weights of table %q: %w", m.cfg.Table, named(why))
	}
	return fmt.Errorf("client: weights of table %q: %w: %w", m.cfg.Table, ErrDaemonGone, why)
}

// pause returns how long to wait before attaching is tried again after err; 0: that is of no use, or was done for long enough.
func (m *mapped) pause(err error) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.cfg.ReconnectFor < 0 || m.closed:
		return 0
	case codeOf(err) == wire.CodeNoGeneration: // a daemon is there: whoever waits, waits for its first generation
	case codeOf(err) != wire.CodeReplaced && !passing(err) || !m.down.IsZero() && time.Since(m.down) >= m.cfg.ReconnectFor:
		return 0
	}
	most := m.cfg.ReconnectFrom << min(m.tries, 16)
	return 1 + rand.N(max(1, min(most, m.cfg.ReconnectTo)))
}

// waited says what the call was waiting for when its context ended.
func (m *mapped) waited(ctx context.Context, newerThan uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	what := fmt.Sprintf("client: weights of table %q: no generation newer than %d", m.cfg.Table, newerThan)
	if !m.down.IsZero() {
		return &ReconnectingError{m.down, m.tries, m.now.Err(), what, ctx}
	}
	return &waitError{ctx, what}
}

func (m *mapped) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return m.now.Close()
}

// mappedSink writes generations into the daemon's own memory. When its connection has ended, begin attaches again: nothing of a generation outlives the
// connection over which it was begun.
type mappedSink struct {
	path       string
	cfg        PublisherConfig
	attachment *weights.PublisherAttachment // nil: there is none
	ended      error                        // why the last one ended
	dialog     *dialog
	place      int
}

func openMappedSink(ctx context.Context, path string, cfg PublisherConfig) (sink, error) {
	s := &mappedSink{path: path, cfg: cfg}
	if err := s.attach(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *mappedSink) attach(ctx context.Context) error {
	hello := wire.Hello{Table: s.cfg.Table, Client: s.cfg.Client, Manifest: s.cfg.Manifest.JSON()}
	hello.SetToken(s.cfg.Token)
	a, err := weights.AttachPublisher(ctx, s.path, hello)
	if err != nil {
		return publisherError(err)
	}
	s.attachment = a
	s.dialog = &dialog{conn: a.Conn(), timeout: s.cfg.Timeout, places: int(a.Segment().Layout().Places)}
	return nil
}

// take takes a place, over another connection if the one there was has ended: perhaps long ago, while nothing was to be said.
func (s *mappedSink) take(ctx context.Context, want uint64) (generation uint64, place int, err error) {
	for again := s.attachment != nil; ; again = false {
		if s.attachment == nil {
			if err := s.attach(ctx); err != nil {
				return 0, 0, fmt.Errorf("%w; attaching again: %w", s.ended, err)
			}
		}
		generation, place, err = s.dialog.begin(ctx, want)
		if err == nil || s.dialog.broken == nil {
			return generation, place, err
		}
		s.ended = err
		_ = s.close()
		if !again || ctx.Err() != nil || errors.Is(err, wire.ErrProtocol) {
			return 0, 0, err
		}
	}
}

func (s *mappedSink) begin(ctx context.Context, want uint64) (*begun, error) {
	generation, place, err := s.take(ctx, want)
	if err != nil {
		return nil, err
	}
	if l := s.attachment.Segment().Layout(); place < 0 || int64(place) >= l.Places {
		return nil, fmt.Errorf("%w: the daemon gave place %d of %d", wire.ErrProtocol, place, l.Places)
	}
	failpoint.Hit("client/publisher/begun")
	s.place = place
	return &begun{generation, s.attachment.Segment().Data(place)}, nil
}

func (s *mappedSink) put(context.Context, int, []byte) error {
	return errors.New("client: a publisher in place sends no tensors")
}

func (s *mappedSink) commit(ctx context.Context, generation uint64, sums []uint32) (spec.Fingerprint, error) {
	failpoint.Hit("client/publisher/written")
	b := s.attachment.Segment().SumBytes(s.place)
	for i, sum := range sums {
		binary.LittleEndian.PutUint32(b[4*i:], sum)
	}
	failpoint.Hit("client/publisher/summed")
	return s.dialog.commit(ctx, generation)
}

func (s *mappedSink) abort() error { return s.dialog.abort() }

func (s *mappedSink) close() error {
	if s.attachment == nil {
		return nil
	}
	a := s.attachment
	s.attachment = nil
	return a.Close()
}
