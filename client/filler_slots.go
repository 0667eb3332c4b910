//go:build linux

package client

import (
	"fmt"
	"os"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/ring"
)

// Slots are rows of a place in the daemon's memory that the caller fills: N samples, which stand one after another in each leaf's column. They are the
// caller's from Reserve to Commit or Abandon; using them after that panics. Nothing says what is in them at first.
type Slots struct {
	filler *Filler
	open   bool
	in     *held
	record *record
	place  ring.Place
	row, n int
}

// N returns how many slots there are.
func (s *Slots) N() int { return s.n }

// Column returns the bytes of one leaf for all slots: the array (N, *shape), row-major, little-endian. It is the ring's own memory. A leaf that is not there
// panics.
func (s *Slots) Column(leaf int) []byte {
	if !s.open {
		panic("client: slots are used after their Commit or Abandon")
	}
	return s.column(leaf)
}

func (s *Slots) column(leaf int) []byte {
	bytes := s.filler.leafBytes[leaf]
	from, to := int64(s.row)*bytes, int64(s.row+s.n)*bytes
	return s.in.Column(s.place, leaf)[from:to:to]
}

// ColumnNamed is Column by the leaf's name.
func (s *Slots) ColumnNamed(name string) ([]byte, error) {
	leaf, err := s.leaf(name)
	if err != nil {
		return nil, err
	}
	return s.Column(leaf), nil
}

func (s *Slots) leaf(name string) (int, error) {
	leaf, ok := s.filler.leaves[name]
	if !ok {
		return 0, fmt.Errorf("client: table %q has no leaf %q; its samples are %s", s.filler.cfg.Table, name, brief(s.filler.spec))
	}
	return leaf, nil
}

// Commit hands all slots over as filled. It never waits. After nil the samples are taken: they are in the ring as soon as the daemon looks, and with a
// session they survive its end. An error says that they are not: the Filler has ended, or the slots are not open.
func (s *Slots) Commit() error {
	s.filler.mu.Lock()
	defer s.filler.mu.Unlock()
	return s.commit("commit")
}

// commit wants the filler's mu.
func (s *Slots) commit(op string) error {
	p := s.filler
	if !s.open {
		return fmt.Errorf("client: %s: no slots are open: they were committed or abandoned, or never reserved", op)
	}
	in, r := s.in, s.record
	s.open, s.in, s.record = false, nil, nil
	defer p.release(in)
	if p.state == fillerLive && in == p.cur {
		if err := p.cur.Err(); err != nil {
			p.lose(err)
		}
	}
	switch {
	case p.state == fillerEnded:
		return fmt.Errorf("client: %s: %w", op, p.err)
	case p.life.Err() != nil:
		return fmt.Errorf("client: %s: %w", op, os.ErrClosed)
	case p.state == fillerBusy && p.cfg.Session == "":
		return fmt.Errorf("client: %s: %w", op, explainEnd(p.outage.last))
	}
	failpoint.Hit("client/filler/filled")
	p.done += uint64(s.n)
	r.rows += s.n
	if p.state == fillerLive && in == p.cur {
		if err := p.handOver(s.n); err != nil { // the daemon spoiled its queue; what is complete is copied to the next one
			p.lose(err)
		}
		return nil
	}
	if p.state == fillerLive { // reserved in an attachment that is no more: the keeper copies them
		p.state = fillerBusy
	}
	p.poke()
	return nil
}

// handOver tells the daemon that n further rows of the place are complete. It wants mu.
func (p *Filler) handOver(n int) error {
	if err := p.cur.Complete(p.place, n); err != nil {
		return err
	}
	failpoint.Hit("client/filler/handed")
	p.sent += uint64(n)
	if p.row += n; p.row == p.cur.size {
		p.place.Lease, p.record = 0, nil
	}
	return nil
}

// Abandon gives the slots back: the next Reserve may give them out again. Abandoning what is not open does nothing, so it can be deferred.
func (s *Slots) Abandon() {
	s.filler.mu.Lock()
	defer s.filler.mu.Unlock()
	if !s.open {
		return
	}
	s.open = false
	s.filler.release(s.in)
	if s.in != s.filler.cur { // the keeper kept it from saying that nothing of it is needed
		s.filler.poke()
	}
	s.in, s.record = nil, nil
}
