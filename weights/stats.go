package weights

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/ingestd/ingestd/spec"
)

// Failure is why a generation that was begun, or wanted, was not published.
type Failure string

// The failures. They are the codes of the answer "failed", and two more.
const (
	FailedPinned        Failure = "pinned"
	FailedOldGeneration Failure = "old_generation"
	FailedIncomplete    Failure = "incomplete"
	FailedBadSum        Failure = "bad_sum"
	FailedAborted       Failure = "aborted" // the publisher gave it up
	FailedEnded         Failure = "ended"   // the publisher ended, or was ended
)

// Failures returns all of them, for counters with a fixed set of labels.
func Failures() []Failure {
	return []Failure{FailedPinned, FailedOldGeneration, FailedIncomplete, FailedBadSum, FailedAborted, FailedEnded}
}

type counters struct {
	begun, published, bytes uint64
	failed                  map[Failure]uint64
}

// Stats is what a store holds and what has happened to it.
type Stats struct {
	Table        string
	Newest       uint64           // generation; 0: nothing was published
	Manifest     spec.Fingerprint // of the newest generation's
	Tensors      int
	DataBytes    int64 // of one generation
	SegmentBytes int64
	Capacity     int64
	Places       int

	Generations []GenerationStats // whole ones of the newest generation's segment, oldest first
	Publisher   *PublisherStats   // nil: there is none
	Readers     []ReaderStats     // by number

	Begun     uint64             // places given to publishers
	Published uint64             // generations
	Bytes     uint64             // of the tensors published
	Failed    map[Failure]uint64 // generations that were not
}

// GenerationStats is a generation that is there.
type GenerationStats struct {
	Generation, Publisher uint64
	Place                 int
	Published             time.Time
	Digest                spec.Fingerprint
	Pins                  []Pin // by reader
}

// PublisherStats is who publishes.
type PublisherStats struct {
	Number  uint64
	Who     Who
	Since   time.Time
	Writing uint64 // the generation it has begun; 0: none
}

// ReaderStats is a reader.
type ReaderStats struct {
	Number uint64
	Who    Who
	Since  time.Time
	Pins   int
	Ended  bool // it was told to attach again, and has not ended yet
}

// Stats returns what the store holds now, and its counters.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.unlock()
	all := Stats{
		Table: s.cfg.Table, Newest: s.newest, Capacity: s.cfg.Capacity, Places: s.cfg.Generations,
		Begun: s.total.begun, Published: s.total.published, Bytes: s.total.bytes, Failed: maps.Clone(s.total.failed),
	}
	if m := s.current; m != nil {
		l := m.view.layout
		all.Manifest, all.Tensors, all.DataBytes, all.SegmentBytes = m.view.manifest.Fingerprint(), int(l.Tensors), l.DataBytes, l.SegmentBytes
		pins := s.pins(m)
		for _, i := range m.byAge() {
			w := m.places[i]
			g := GenerationStats{Generation: w.generation, Publisher: w.publisher, Place: i, Published: w.published, Digest: w.digest}
			for _, p := range pins {
				if p.Place == i {
					g.Pins = append(g.Pins, p)
				}
			}
			all.Generations = append(all.Generations, g)
		}
	}
	if p := s.publisher; p != nil {
		all.Publisher = &PublisherStats{Number: p.number, Who: p.who, Since: p.since}
		if p.place != nil {
			all.Publisher.Writing = p.place.generation
		}
	}
	for _, n := range slices.Sorted(maps.Keys(s.readers)) {
		r := s.readers[n]
		all.Readers = append(all.Readers, ReaderStats{n, r.who, r.since, len(r.look()), r.Err() != nil})
	}
	return all
}

// fail counts a generation that was wanted and did not come about.
func (s *Store) fail(why Failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.failed[why]++
}

// byAge returns the places that hold something whole, the oldest generation's first. Called under mu.
func (m *memory) byAge() []int {
	places := make([]int, 0, len(m.places))
	for i := range m.places {
		if m.places[i].generation != 0 {
			places = append(places, i)
		}
	}
	slices.SortFunc(places, func(a, b int) int { return cmp.Compare(m.places[a].generation, m.places[b].generation) })
	return places
}

// pins returns who pins what of a memory, the newest generation's aside only if it is pinned too; oldest generation first. Called under mu.
func (s *Store) pins(m *memory) []Pin {
	var pins []Pin
	for _, r := range s.readers {
		if r.memory == m {
			pins = append(pins, r.look()...)
		}
	}
	slices.SortFunc(pins, func(a, b Pin) int {
		return cmp.Or(cmp.Compare(a.Generation, b.Generation), cmp.Compare(a.Reader, b.Reader))
	})
	return pins
}

// look notes for all readers of the newest segment what they pin, so that it is known since when. Called under mu.
func (s *Store) look() {
	for _, r := range s.readers {
		r.look()
	}
}

// look returns what a reader pins. Called under the store's mu.
func (r *Reader) look() (pins []Pin) {
	for i, w := range r.memory.places {
		if w.generation == 0 || pinned(r.pins.page, i) != w.generation {
			r.seen[i] = Pin{}
			continue
		}
		if r.seen[i].Generation != w.generation {
			r.seen[i] = Pin{r.number, r.who, w.generation, i, time.Now()}
		}
		pins = append(pins, r.seen[i])
	}
	return pins
}
