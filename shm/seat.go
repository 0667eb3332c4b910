//go:build linux

package shm

import (
	"cmp"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/wire"
)

// Outcome is how an attachment ended.
type Outcome int

// The outcomes.
const (
	OutcomeAttached Outcome = iota // it has not
	OutcomeDetached                // by the trainer's will, holding nothing that it had begun to read
	OutcomeDied                    // its socket ended while it held batches
	OutcomeCutOff                  // by the daemon, at its end
	OutcomeStalled                 // by the daemon: over a connection, it took nothing for too long
	OutcomeFailed                  // by the daemon, whose own trouble it was
	OutcomeBadPeer                 // it broke the rules
)

// attendee is a trainer of the server's: of another process, or one that somebody else serves from a Seat.
type attendee interface {
	stats() TrainerStats // called under the server's mu
	addTo(s *Stats)
}

// Seat is a trainer that somebody else serves, over a connection: it has its number, its share of the table's batches and its group among those that attach here,
// and is counted with them. Its methods but Leave may be called from any goroutine.
type Seat struct {
	Table    Table
	ID       uint64 // number of the trainer in the daemon's life
	Prefetch int    // most batches it may hold
	Member   *sampler.Member

	server       *Server
	client, peer string
	since        time.Time

	mu         sync.Mutex
	state      TrainerState
	stateSince time.Time
	delivered  uint64
	givenBack  uint64
	returned   uint64
	lost       uint64
	sent       uint64
	inPlace    uint64
	outcome    Outcome
}

// Seat admits a trainer that the caller serves, by the same rules as one that attaches here, but that its table need not be mapped by others. peer is where
// it comes from. The error is a *wire.Refusal, which the caller passes to Refused, or the daemon's own trouble. The caller calls Leave.
func (s *Server) Seat(hello *wire.Hello, peer string) (*Seat, error) {
	table, err := s.find(hello)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	seat := &Seat{Table: table, server: s, client: hello.Client, peer: peer, since: now, state: StateWaiting, stateSince: now}
	if err := s.admit(hello, table, func(id uint64, prefetch int) attendee {
		seat.ID, seat.Prefetch = id, prefetch
		return seat
	}); err != nil {
		return nil, err
	}
	m, err := join(table, hello, sampler.Who{Trainer: seat.ID, Client: hello.Client})
	if err != nil {
		s.dismiss(seat.ID, table.Name, seat.Prefetch)
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	seat.Member = m
	s.total.Attached++
	return seat, nil
}

// join makes a trainer a member of the group it names.
func join(table Table, hello *wire.Hello, who sampler.Who) (*sampler.Member, error) {
	group := cmp.Or(hello.Group, wire.GroupDefault)
	m, err := table.Source.Join(group, who)
	if full := (*ring.GroupsFullError)(nil); errors.As(err, &full) {
		return nil, wire.Refuse(wire.CodeTooManyGroups, "group %q cannot be made: %v; use one there is, or wait until one without trainers ends", group, full)
	} else if err != nil {
		return nil, fmt.Errorf("table %q: trainer %d: %w", table.Name, who.Trainer, err)
	}
	return m, nil
}

// SetState says who waits for whom.
func (t *Seat) SetState(s TrainerState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != s {
		t.state, t.stateSince = s, time.Now()
	}
}

// Delivered counts a batch that is being sent.
func (t *Seat) Delivered() { t.count(&t.delivered, 1) }

// GivenBack counts a batch that the trainer has answered.
func (t *Seat) GivenBack() { t.count(&t.givenBack, 1) }

// Returned counts batches that were taken from the trainer as it ended.
func (t *Seat) Returned(n int) { t.count(&t.returned, uint64(n)) }

// Lost counts batches that the trainer was told its group lost.
func (t *Seat) Lost(n int) { t.count(&t.lost, uint64(n)) }

// Sent counts bytes of batches that the kernel has; inPlace: straight from the segment, without a copy.
func (t *Seat) Sent(n int64, inPlace bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sent += uint64(n)
	if inPlace {
		t.inPlace += uint64(n)
	}
}

func (t *Seat) count(what *uint64, n uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*what += n
}

// Leave ends the membership, and returns to the group what the trainer still holds. It must be called once.
func (t *Seat) Leave(how Outcome) {
	t.Member.Leave()
	t.mu.Lock()
	t.outcome = how
	t.mu.Unlock()
	t.server.remove(t.ID, t.Table.Name, t.Prefetch)
}

func (t *Seat) stats() TrainerStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	var held []LeaseStats
	group := ""
	if t.Member != nil {
		group, held = t.Member.Group(), t.Member.Leases()
	}
	return TrainerStats{
		ID: t.ID, Table: t.Table.Name, Group: group, Client: t.client, Peer: t.peer, Since: t.since, Prefetch: t.Prefetch,
		Held: held, State: t.state, StateSince: t.stateSince, Sleeping: t.state == StateWaiting && len(held) == 0,
		Delivered: t.delivered, GivenBack: t.givenBack, Lost: t.lost, Sent: t.sent, SentInPlace: t.inPlace,
	}
}

func (t *Seat) addTo(s *Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.add(t.delivered, t.givenBack, t.returned, t.lost, t.outcome)
	s.Sent += t.sent
	s.SentInPlace += t.inPlace
}

// add adds what a trainer did.
func (s *Stats) add(delivered, givenBack, returned, lost uint64, how Outcome) {
	s.Delivered += delivered
	s.GivenBack += givenBack
	s.Returned += returned
	s.Lost += lost
	switch how {
	case OutcomeDetached:
		s.Detached++
	case OutcomeDied:
		s.Died++
	case OutcomeCutOff:
		s.CutOff++
	case OutcomeStalled:
		s.Stalled++
	case OutcomeFailed:
		s.Failed++
	case OutcomeBadPeer:
		s.BadPeers++
	}
}
