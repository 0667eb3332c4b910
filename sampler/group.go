package sampler

import (
	"fmt"
	"math/bits"
	"slices"
	"time"
)

// OnDeath says what becomes of a batch whose trainer died.
type OnDeath uint8

// The policies on death.
const (
	Offer OnDeath = iota // another trainer of the group gets it, before anything newer
	Drop                 // nobody of the group gets it any more; counted
)

func (p OnDeath) String() string { return name(uint8(p), "offer", "drop") }

// UnmarshalText reads the policy from a configuration.
func (p *OnDeath) UnmarshalText(text []byte) error {
	v, err := parse("on-death policy", text, "offer", "drop")
	if err == nil {
		*p = OnDeath(v)
	}
	return err
}

// OnLag says what becomes of producers when a group does not keep up with them.
type OnLag uint8

// The policies on lag.
const (
	Hold OnLag = iota // producers wait for the group
	Lose              // the group loses the oldest batches that nobody of it has begun to read; counted, and its trainers are told
)

func (p OnLag) String() string { return name(uint8(p), "hold", "lose") }

// UnmarshalText reads the policy from a configuration.
func (p *OnLag) UnmarshalText(text []byte) error {
	v, err := parse("on-lag policy", text, "hold", "lose")
	if err == nil {
		*p = OnLag(v)
	}
	return err
}

func name(v uint8, names ...string) string {
	if int(v) < len(names) {
		return names[v]
	}
	return fmt.Sprintf("policy %d", v)
}

func parse(what string, text []byte, names ...string) (int, error) {
	if at := slices.Index(names, string(text)); at >= 0 {
		return at, nil
	}
	return 0, fmt.Errorf("sampler: the %s is %.40q: must be one of %q", what, text, names)
}

// GroupConfig is a group of trainers and its policies.
type GroupConfig struct {
	Name    string
	OnDeath OnDeath
	OnLag   OnLag
}

// group is some trainers that share the batches. Everything in it is under the FIFO's mu.
type group struct {
	GroupConfig
	index   int    // in the segment's table
	bit     uint64 // 1 << index
	listed  bool   // in the configuration: never ends
	members []*Member
	since   time.Time // when its last member left, or when it was made
	queue   queue     // places with batches to give out, by number
	leases  []lease   // per place
	leased  int
	untold  LostError // what it lost while it had no members

	delivered, released, returned, dropped, lost uint64
	again                                        int // queued batches that were given out before
}

// lease is one batch in the hands of one member. A member's leases are linked in the order in which it got them.
type lease struct {
	member     *Member       // nil: none
	since      time.Duration // after the FIFO was made
	prev, next int32         // 1 + place, or 0
}

func (s *FIFO) group(name string) *group {
	for _, g := range s.groups {
		if g.Name == name {
			return g
		}
	}
	return nil
}

// add makes a group whose entry in the segment is made.
func (s *FIFO) add(name string, index int) *group {
	cfg, listed := s.cfg.Default, false
	for _, c := range s.cfg.Groups {
		if c.Name == name {
			cfg, listed = c, true
		}
	}
	cfg.Name = name
	g := &group{
		GroupConfig: cfg, index: index, bit: 1 << index, listed: listed, since: time.Now(),
		queue: newQueue(len(s.places)), leases: make([]lease, len(s.places)),
	}
	s.groups = append(s.groups, g)
	s.all |= g.bit
	if cfg.OnLag == Lose {
		s.losing |= g.bit
	}
	return g
}

// open finds or makes the group of a trainer that joins. The first group gets everything there is; a later one what comes after.
func (s *FIFO) open(name string) (*group, error) {
	now := time.Now()
	if g := s.group(name); g != nil {
		s.ring.SeenGroup(g.index, now)
		return g, nil
	}
	if s.all != 0 {
		for s.pull() { // for the others
		}
	}
	index, err := s.ring.AddGroup(name, now)
	if err != nil {
		return nil, fmt.Errorf("sampler: group %q: %w", name, err)
	}
	g := s.add(name, index)
	for _, i := range s.first {
		s.places[i].need = g.bit
		s.enqueue(i)
		s.done(i, 0)
	}
	s.first = nil
	return g, nil
}

// end forgets a group without members.
func (s *FIFO) end(g *group) {
	for s.pull() { // so that nothing is left that is pending for it
	}
	for g.queue.len() > 0 {
		i := g.queue.pop()
		g.forget(&s.places[i])
		g.dropped++
		s.done(i, g.bit)
	}
	s.groups = slices.DeleteFunc(s.groups, func(have *group) bool { return have == g })
	s.all &^= g.bit
	s.losing &^= g.bit
	s.ring.RemoveGroup(g.index)
	s.past.Ended++
	g.addTo(&s.past)
}

// forget takes the marks off a batch that left the queue.
func (g *group) forget(p *place) {
	p.queued &^= g.bit
	if p.again&g.bit != 0 {
		p.again &^= g.bit
		g.again--
	}
}

// tell notes a lost batch for every member, or for the next one when there is none.
func (g *group) tell(number uint64) {
	for _, m := range g.members {
		m.lost.add(number, 1)
	}
	if len(g.members) == 0 {
		g.untold.add(number, 1)
	}
}

// queue holds places: at most as many as the ring has, so it never grows.
type queue struct {
	places   []uint32 // a power of two of them
	front, n int
}

func newQueue(most int) queue { return queue{places: make([]uint32, 1<<bits.Len(uint(most-1)))} }

func (q *queue) len() int { return q.n }

func (q *queue) slot(k int) *uint32 { return &q.places[(q.front+k)&(len(q.places)-1)] }

func (q *queue) at(k int) uint32 { return *q.slot(k) }

func (q *queue) push(place uint32) {
	*q.slot(q.n) = place
	q.n++
}

func (q *queue) pop() uint32 {
	place := q.at(0)
	q.front++
	q.n--
	return place
}

// insert puts a place before the k-th. What is put back is older than most of the queue, so those before it move.
func (q *queue) insert(k int, place uint32) {
	q.front--
	q.n++
	for i := range k {
		*q.slot(i) = q.at(i + 1)
	}
	*q.slot(k) = place
}

func (q *queue) remove(k int) {
	for i := k; i > 0; i-- {
		*q.slot(i) = q.at(i - 1)
	}
	q.front++
	q.n--
}

func (q *queue) find(place uint32) int {
	k := 0
	for q.at(k) != place {
		k++
	}
	return k
}
