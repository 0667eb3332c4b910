package sampler

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// Config configures a FIFO. The zero value is ready.
type Config struct {
	// Linger is how long a sample may wait for its batch to fill: after it the batch is published with the rows it has. 0 means for
	// ever. Run does it; the age is seen to about a quarter of Linger.
	Linger time.Duration

	// Groups exist from the start and never end, whether somebody trains in them or not. Names are given once.
	Groups []GroupConfig

	// Default holds the policies of groups that Groups does not name. Its Name is empty.
	Default GroupConfig

	// Keep is how long a group that Groups does not name lasts without a trainer. The last group of a table never ends. Default 1 min.
	// Run does it, to about a quarter of Keep.
	Keep time.Duration

	// Grace is how long after New the places that had been lent to a stream are kept from reuse, unless Unpin says that it needs them no
	// more. Default 30 s. Run does it, to about a quarter of Grace.
	Grace time.Duration
}

// LingerMin is the shortest Linger but 0, and the shortest Keep and Grace.
const LingerMin = time.Millisecond

func (c Config) withDefaults() Config {
	if c.Keep == 0 {
		c.Keep = time.Minute
	}
	if c.Grace == 0 {
		c.Grace = 30 * time.Second
	}
	return c
}

func (c Config) check() error {
	if c.Linger != 0 && c.Linger < LingerMin {
		return fmt.Errorf("sampler: linger is %v: must be 0 (off) or at least %v", c.Linger, LingerMin)
	}
	if c.Keep < LingerMin || c.Grace < LingerMin {
		return fmt.Errorf("sampler: keep is %v and grace is %v: must be 0 (the default) or at least %v", c.Keep, c.Grace, LingerMin)
	}
	if c.Default.Name != "" {
		return fmt.Errorf("sampler: the default policies carry the name %q: list a group of that name instead", c.Default.Name)
	}
	seen := map[string]bool{}
	for _, g := range append([]GroupConfig{c.Default}, c.Groups...) {
		if g.OnDeath > Drop || g.OnLag > Lose {
			return fmt.Errorf("sampler: group %q: %v and %v are no policies", g.Name, g.OnDeath, g.OnLag)
		}
		if seen[g.Name] {
			return fmt.Errorf("sampler: group %q is listed twice, or without a name", g.Name)
		}
		seen[g.Name] = true
	}
	return nil
}

// FIFO gives each batch of a ring to one trainer of every group, oldest first.
type FIFO struct {
	ring *ring.Ring
	cfg  Config
	made time.Time

	mu     sync.Mutex // once or twice per batch, never per sample
	places []place    // per place of the ring
	groups []*group   // in the order in which they were made
	all    uint64     // their bits
	losing uint64     // those of groups that lose what they are too slow for
	first  []uint32   // recovered batches for the first group there will be
	pinned int        // places kept for streams that may come back
	past   Stats      // of groups that ended; Lingered
}

// place is what is known of the batch in a place that was taken from the ring.
type place struct {
	batch  ring.Batch
	need   uint64 // groups that have not released it, and
	queued uint64 // of those, the ones that nobody reads it for
	again  uint64 // of the queued, those that had given it out before
	stream uint64 // not 0: kept from reuse for that stream
}

// New returns a FIFO over r, or an error when the configuration cannot be. recovered is what ring.Recover found: it is offered before
// anything newer. It sets r.Full. A *ring.GroupsFullError says that too many groups are listed.
func New(r *ring.Ring, cfg Config, recovered []ring.Recovered) (*FIFO, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s := &FIFO{ring: r, cfg: cfg, made: time.Now(), places: make([]place, r.Batches())}
	for _, g := range r.Groups() {
		s.add(g.Name, g.Index)
	}
	for _, g := range cfg.Groups {
		if s.group(g.Name) != nil {
			continue
		}
		index, err := r.AddGroup(g.Name, s.made)
		if err != nil {
			return nil, fmt.Errorf("sampler: group %q: %w", g.Name, err)
		}
		s.add(g.Name, index)
	}
	for _, b := range recovered {
		s.recover(b)
	}
	r.Full = s.full
	return s, nil
}

// recover takes over a batch that an earlier process left.
func (s *FIFO) recover(b ring.Recovered) {
	p := &s.places[b.Index]
	p.batch, p.stream = b.Batch, b.Stream
	if b.Stream != 0 {
		s.pinned++
	}
	if b.Pending == ring.AllGroups && b.Count > 0 && s.all == 0 {
		p.need = ring.AllGroups
		s.first = append(s.first, b.Index)
		return
	}
	if b.Count > 0 {
		p.need = b.Pending & s.all
	}
	s.enqueue(b.Index)
	s.done(b.Index, 0)
}

// pull takes the next batch from the ring, for every group.
func (s *FIFO) pull() bool {
	b, ok := s.ring.TryLease()
	if !ok {
		return false
	}
	s.places[b.Index] = place{batch: b, need: s.all}
	if s.ring.Pending(b.Index) != s.all { // groups came or went after it was published
		s.ring.SetPending(b, s.all)
	}
	s.enqueue(b.Index)
	return true
}

// enqueue puts a batch at the end of the queue of each group that needs it.
//
// It wakes nobody, and need not: who waits found its group's queue and the ring empty under mu, so what is put there later was published later,
// and that publication wakes everybody.
func (s *FIFO) enqueue(index uint32) {
	p := &s.places[index]
	p.queued = p.need
	for _, g := range s.groups {
		if p.need&g.bit != 0 {
			g.queue.push(index)
		}
	}
}

// done says that groups need a batch no more. They have it neither queued nor leased.
func (s *FIFO) done(index uint32, groups uint64) {
	p := &s.places[index]
	p.need &^= groups
	switch {
	case p.need == 0 && p.stream == 0:
		s.ring.Release(p.batch)
	case p.need != s.ring.Pending(index):
		s.ring.SetPending(p.batch, p.need)
		failpoint.Hit("sampler/done/noted")
	}
}

// Unpin says that a stream has come back and needs what earlier processes lent it no more.
func (s *FIFO) Unpin(stream uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unpin(func(pinned uint64) bool { return pinned == stream })
}

func (s *FIFO) unpin(which func(stream uint64) bool) {
	for i := 0; i < len(s.places) && s.pinned > 0; i++ {
		if p := &s.places[i]; p.stream != 0 && which(p.stream) {
			p.stream = 0
			s.pinned--
			s.ring.Unpin(p.batch)
			if p.need == 0 {
				s.ring.Release(p.batch)
			}
		}
	}
}

// Run does what the clock says, until ctx ends, whose error it returns, or the ring is closed: it publishes batches that have been open for
// longer than Linger, ends groups that nobody trains in, and unpins what nobody came back for.
func (s *FIFO) Run(ctx context.Context) error {
	each := min(s.cfg.Keep, s.cfg.Grace)
	if s.cfg.Linger > 0 {
		each = min(each, s.cfg.Linger)
	}
	tick := time.NewTicker(max(each/4, LingerMin))
	defer tick.Stop()
	var open opening
	for !s.ring.Closed() {
		select {
		case <-ctx.Done():
			return park.ContextError(ctx)
		case now := <-tick.C:
			if s.cfg.Linger > 0 {
				s.linger(&open, now)
			}
			s.expire(now)
		}
	}
	return nil
}

// opening is the batch that was partly filled at the last look.
type opening struct {
	seen  uint64    // 1 + its number, or 0
	since time.Time // when it was seen so first
}

// linger closes the batch being filled when it is old. It is told by the position alone, so that writers need not note any time: a batch is
// as old as the first look that found a row of it taken.
func (s *FIFO) linger(open *opening, now time.Time) {
	size := uint64(s.ring.BatchSize())
	if at := s.ring.Reserved(); at%size == 0 {
		open.seen = 0
	} else if seen := at/size + 1; seen != open.seen {
		open.seen, open.since = seen, now
	} else if now.Sub(open.since) >= s.cfg.Linger {
		if s.ring.Flush() {
			s.mu.Lock()
			s.past.Lingered++
			s.mu.Unlock()
		}
		open.seen = 0
	}
}

// expire ends what its time is over for.
func (s *FIFO) expire(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pinned > 0 && now.Sub(s.made) >= s.cfg.Grace {
		s.unpin(func(uint64) bool { return true })
	}
	for _, g := range slices.Clone(s.groups) {
		if !g.listed && len(g.members) == 0 && now.Sub(g.since) >= s.cfg.Keep && len(s.groups) > 1 {
			s.end(g)
		}
	}
}

// full is called when a writer is about to wait for a place: a group that may lose batches does.
func (s *FIFO) full() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lose()
}

// LostError says that batches were dropped before a group had read them, because producers needed their places and the table lets the group lose what
// it is too slow for. The trainer goes on with what is left.
type LostError struct {
	Group string
	First uint64 // number of the first
	N     int    // how many
}

func (e *LostError) Error() string {
	return fmt.Sprintf("group %q lost %d unread batches, the first of them number %d: its trainers are slower than the table's producers", e.Group, e.N, e.First)
}

// add notes a loss beside those not told yet.
func (e *LostError) add(first uint64, n int) {
	if e.N == 0 || first < e.First {
		e.First = first
	}
	e.N += n
}

// lose takes the oldest batch away that nothing but losing groups keep from being free, and none of them has given out.
func (s *FIFO) lose() {
	if s.losing == 0 {
		return
	}
	for s.pull() {
	}
	var victim *place
	for _, g := range s.groups {
		if g.bit&s.losing == 0 {
			continue
		}
		for k := range g.queue.len() {
			p := &s.places[g.queue.at(k)]
			if victim != nil && victim.batch.Number <= p.batch.Number {
				break
			}
			if s.loseable(p) {
				victim = p
				break
			}
		}
	}
	if victim == nil {
		return
	}
	for _, g := range s.groups {
		if victim.need&g.bit != 0 {
			g.queue.remove(g.queue.find(victim.batch.Index))
			g.forget(victim)
			g.lost++
			g.tell(victim.batch.Number)
		}
	}
	s.done(victim.batch.Index, victim.need)
}

func (s *FIFO) loseable(p *place) bool { return p.stream == 0 && p.need&^(p.queued&s.losing) == 0 }
