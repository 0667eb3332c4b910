package sampler

import "time"

// Stats counts batches since the FIFO was made. Every group counts a batch for itself.
type Stats struct {
	Delivered uint64 // given out, again after a Return
	Released  uint64 // given back read
	Returned  uint64 // given back by the death of their trainer
	Dropped   uint64 // given up unread, because their trainer died or their group ended
	Lost      uint64 // given up unread, because their group was too slow
	Lingered  uint64 // published early because a sample had waited for Linger
	Ended     uint64 // groups that ended

	Leased   int // out now
	Waiting  int // returned and not given out again yet
	Sleeping int // trainers that wait for a batch
	Pinned   int // places kept for streams that may come back

	Groups []GroupStats // in the order in which they were made
}

// GroupStats is one group.
type GroupStats struct {
	GroupConfig
	Listed  bool // in the configuration
	Members int
	Since   time.Time // where there are no members: since when

	Unread int    // published batches that it has not given out
	Leased int    // batches that its trainers hold
	Oldest uint64 // number of the oldest of both, if there is one

	Delivered, Released, Returned, Dropped, Lost uint64 // as in Stats
}

func (g *group) addTo(st *Stats) {
	st.Delivered += g.delivered
	st.Released += g.released
	st.Returned += g.returned
	st.Dropped += g.dropped
	st.Lost += g.lost
	st.Leased += g.leased
	st.Waiting += g.again
}

// Stats returns the counts.
func (s *FIFO) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.past
	st.Sleeping, st.Pinned = s.ring.Ready.Waiting(), s.pinned
	for _, g := range s.groups {
		g.addTo(&st)
		one := GroupStats{
			GroupConfig: g.GroupConfig, Listed: g.listed, Members: len(g.members), Unread: g.queue.len() + s.unpulled(), Leased: g.leased,
			Delivered: g.delivered, Released: g.released, Returned: g.returned, Dropped: g.dropped, Lost: g.lost,
		}
		if one.Members == 0 {
			one.Since = g.since
		}
		one.Oldest, _ = s.oldest(g)
		st.Groups = append(st.Groups, one)
	}
	return st
}

// unpulled returns how many batches are published and lie in no queue yet.
func (s *FIFO) unpulled() int {
	leased := s.ring.Leased() // first, so that the difference is not negative
	return int(s.ring.Published() - leased)
}

// oldest returns the number of the oldest batch that a group has not released.
func (s *FIFO) oldest(g *group) (number uint64, ok bool) {
	if g.queue.len() > 0 {
		number, ok = s.places[g.queue.at(0)].batch.Number, true
	} else if s.unpulled() > 0 {
		number, ok = s.ring.Leased(), true
	}
	for _, m := range g.members {
		for at := m.oldest; at != 0; at = g.leases[at-1].next {
			if n := s.places[at-1].batch.Number; !ok || n < number {
				number, ok = n, true
			}
		}
	}
	return number, ok
}

// Lease is a batch in a trainer's hands.
type Lease struct {
	Number uint64
	Index  uint32
	Since  time.Time
}

// Leases returns what the member holds, longest held first.
func (m *Member) Leases() []Lease {
	s, g := m.fifo, m.group
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []Lease{}
	for at := m.oldest; at != 0; at = g.leases[at-1].next {
		all = append(all, Lease{s.places[at-1].batch.Number, uint32(at - 1), s.made.Add(g.leases[at-1].since)})
	}
	return all
}

// Holder is who keeps writers waiting when the ring is full.
type Holder struct {
	Group string // "" when there is no group: nobody has ever trained
	Who          // the trainer that has held a batch for longest; zero when Idle
	Batch uint64 // its number; when Idle, of the oldest unread one
	Since time.Time
	Idle  bool // the group has unread batches, and no trainer of it holds one
}

// Holder returns who keeps writers waiting: of the group that has the most batches it has not released, the trainer that has held one for longest, or the
// group itself when nobody takes them. It returns false when no published batch is unread.
func (s *FIFO) Holder() (Holder, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.groups) == 0 {
		if len(s.first) > 0 {
			return Holder{Batch: s.places[s.first[0]].batch.Number, Since: s.made, Idle: true}, true
		}
		return Holder{Batch: s.ring.Leased(), Since: s.made, Idle: true}, s.unpulled() > 0
	}
	var worst Holder
	most := 0
	for _, g := range s.groups {
		have := g.queue.len() + g.leased
		if have < most {
			continue
		}
		h, ok := s.holder(g)
		if ok && (have > most || worst.Group == "" || h.Since.Before(worst.Since)) {
			worst, most = h, have
		}
	}
	return worst, worst.Group != ""
}

// holder is Holder for one group.
func (s *FIFO) holder(g *group) (Holder, bool) {
	var h Holder
	for _, m := range g.members {
		if m.oldest == 0 {
			continue
		}
		if since := s.made.Add(g.leases[m.oldest-1].since); h.Group == "" || since.Before(h.Since) {
			h = Holder{Group: g.Name, Who: m.who, Batch: s.places[m.oldest-1].batch.Number, Since: since}
		}
	}
	if h.Group != "" {
		return h, true
	}
	oldest, ok := s.oldest(g)
	return Holder{Group: g.Name, Batch: oldest, Since: g.since, Idle: true}, ok
}
