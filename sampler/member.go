package sampler

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// Who is a trainer, as it is told to people.
type Who struct {
	Trainer uint64 // its number in the daemon's life; 0: one of this process
	Client  string // what it calls itself
	PID     int    // 0 where the kernel does not say
}

// Member is a trainer in its group. It may hold several batches at once.
type Member struct {
	fifo  *FIFO
	group *group
	who   Who

	// Under the FIFO's mu.
	left           bool
	lost           LostError // not told yet
	oldest, newest int32     // its leases: 1 + place, or 0
}

// Join makes a trainer a member of the group of that name, which is made if there is none: a *ring.GroupsFullError says that there can be no
// more. The trainer must Leave.
func (s *FIFO) Join(group string, who Who) (*Member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, err := s.open(group)
	if err != nil {
		return nil, err
	}
	m := &Member{fifo: s, group: g, who: who, lost: g.untold}
	m.lost.Group, g.untold = g.Name, LostError{}
	g.members = append(g.members, m)
	return m, nil
}

// Group returns the name of its group.
func (m *Member) Group() string { return m.group.Name }

// Policies returns those of its group. Only with OnLag Lose can Next return a *LostError.
func (m *Member) Policies() GroupConfig { return m.group.GroupConfig }

// TryNext returns the next batch if there is one now. The error is a *LostError, once for every loss, or os.ErrClosed after Leave.
func (m *Member) TryNext() (ring.Batch, bool, error) {
	s, g := m.fifo, m.group
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.left {
		return ring.Batch{}, false, os.ErrClosed
	}
	if m.lost.N > 0 {
		told := m.lost
		m.lost.N = 0
		return ring.Batch{}, false, &told
	}
	if g.queue.len() == 0 && !s.pull() {
		return ring.Batch{}, false, nil
	}
	i := g.queue.pop()
	p := &s.places[i]
	g.forget(p)
	g.delivered++
	m.hold(i)
	return p.batch, true, nil
}

// Next waits for the next batch. w is the caller's own seat. The error is io.EOF when the ring is closed and every batch is out, a *LostError when the
// group lost batches, once for every loss, os.ErrClosed after Leave, or the context's. After a *LostError it goes on.
func (m *Member) Next(ctx context.Context, w *park.Waiter) (ring.Batch, error) {
	r := m.fifo.ring
	for {
		if b, ok, err := m.TryNext(); ok || err != nil {
			return b, err
		}
		r.Ready.Add(w)
		closed := r.Closed() // before the last look: what was published before Close must be found
		if b, ok, err := m.TryNext(); ok || err != nil {
			r.Ready.Remove(w)
			return b, err
		}
		if closed {
			r.Ready.Remove(w)
			return ring.Batch{}, io.EOF
		}
		if err := w.Wait(ctx); err != nil {
			r.Ready.Remove(w)
			return ring.Batch{}, err
		}
	}
}

// Release gives back a batch that was read. When no other group needs it, its place may be filled again at once. Giving back what is not held panics.
func (m *Member) Release(b ring.Batch) {
	s := m.fifo
	s.mu.Lock()
	defer s.mu.Unlock()
	m.drop(b)
	m.group.released++
	s.finish(b.Index, m.group)
}

// finish says that a group is done with a batch.
func (s *FIFO) finish(index uint32, g *group) {
	s.done(index, g.bit)
	s.makeRoom(index)
}

// makeRoom is called when a batch has come into fewer hands: maybe only losing groups keep writers from its place now.
func (s *FIFO) makeRoom(index uint32) {
	if p := &s.places[index]; s.losing != 0 && p.need != 0 && s.ring.Space.Waiting()+s.ring.Room.Waiting() > 0 && s.loseable(p) {
		s.lose()
	}
}

// Return gives back a batch that its trainer did not get to the end of. By the group's policy, it goes to another one before anything newer
// does, or to nobody. Giving back what is not held panics.
func (m *Member) Return(b ring.Batch) { m.giveUp(b, m.group.OnDeath) }

// Offer gives back a batch that its trainer had not begun to read: it goes to another one before anything newer does, whatever the policy.
func (m *Member) Offer(b ring.Batch) { m.giveUp(b, Offer) }

func (m *Member) giveUp(b ring.Batch, then OnDeath) {
	s := m.fifo
	s.mu.Lock()
	defer s.mu.Unlock()
	m.drop(b)
	m.putBack(b.Index, then)
	s.ring.Ready.Wake()
}

func (m *Member) putBack(index uint32, then OnDeath) {
	s, g := m.fifo, m.group
	g.returned++
	if then == Drop {
		g.dropped++
		s.finish(index, g)
		return
	}
	p := &s.places[index]
	k := 0
	for k < g.queue.len() && s.places[g.queue.at(k)].batch.Number < p.batch.Number {
		k++
	}
	g.queue.insert(k, index)
	g.again++
	p.queued |= g.bit
	p.again |= g.bit
	s.makeRoom(index)
}

// Leave ends the membership, as the trainer's death does: what it holds is returned. A Next under way returns os.ErrClosed. Leaving twice is no error.
func (m *Member) Leave() {
	s, g := m.fifo, m.group
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.left {
		return
	}
	m.left = true
	for m.oldest != 0 {
		i := uint32(m.oldest - 1)
		m.unhold(i)
		m.putBack(i, g.OnDeath)
	}
	g.members = slices.DeleteFunc(g.members, func(have *Member) bool { return have == m })
	if len(g.members) == 0 {
		g.since = time.Now()
		g.untold = m.lost
	}
	s.ring.SeenGroup(g.index, time.Now())
	s.ring.Ready.Wake()
}

// hold gives the member the batch in a place.
func (m *Member) hold(index uint32) {
	g := m.group
	g.leases[index] = lease{member: m, since: time.Since(m.fifo.made), prev: m.newest}
	if m.newest != 0 {
		g.leases[m.newest-1].next = int32(index) + 1
	} else {
		m.oldest = int32(index) + 1
	}
	m.newest = int32(index) + 1
	g.leased++
}

// drop takes back what a caller says it holds.
func (m *Member) drop(b ring.Batch) {
	if int(b.Index) >= len(m.group.leases) || m.group.leases[b.Index].member != m || m.fifo.places[b.Index].batch.Number != b.Number {
		panic(fmt.Sprintf("sampler: batch %d in place %d is given back by a member of group %q that does not hold it", b.Number, b.Index, m.group.Name))
	}
	m.unhold(b.Index)
}

func (m *Member) unhold(index uint32) {
	g := m.group
	l := &g.leases[index]
	if l.prev != 0 {
		g.leases[l.prev-1].next = l.next
	} else {
		m.oldest = l.next
	}
	if l.next != 0 {
		g.leases[l.next-1].prev = l.prev
	} else {
		m.newest = l.prev
	}
	l.member = nil
	g.leased--
}
