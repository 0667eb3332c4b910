package weights

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/ingestd/ingestd/tensor"
)

// tableModel is a table as it should be: plain values and no memory.
type tableModel struct {
	places  int
	newest  uint64
	whole   map[uint64]bool               // generations of the newest segment that are there
	held    map[*modelReader][]*modelHeld // by reader
	segment int                           // number of the newest generation's
}

type modelReader struct {
	segment int
	inside  *Reader // one of the two is set
	view    *Segment
	pins    *Pins
	page    *Reader
}

type modelHeld struct {
	generation uint64
	place      int
	held       *Held
}

// pinned tells whether a reader holds a generation of the newest segment.
func (m *tableModel) pinned(generation uint64) bool {
	for r, all := range m.held {
		for _, h := range all {
			if r.segment == m.segment && h.generation == generation {
				return true
			}
		}
	}
	return false
}

// begin tells whether there is a place for one more generation: one that holds nothing, or an old generation's that nobody pins. It takes the oldest of those.
func (m *tableModel) begin() bool {
	if len(m.whole) < m.places {
		return true
	}
	oldest := uint64(0)
	for g := range m.whole {
		if g != m.newest && !m.pinned(g) && (oldest == 0 || g < oldest) {
			oldest = g
		}
	}
	delete(m.whole, oldest)
	return oldest != 0
}

// life runs random publishers and readers against a store and the model, and compares all that can be seen after each step.
type life struct {
	t         *testing.T
	rng       *rand.Rand
	store     *Store
	model     *tableModel
	manifests []*tensor.Manifest
	readers   []*modelReader
	p         *Publishing
	place     *Place
	own       int // which manifest p publishes; what of the newest segment is
	current   int
}

func TestModel(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			places := 2 + int(seed%3)
			l := &life{
				t: t, rng: rand.New(rand.NewPCG(seed, 7)), store: heapStore(t, places), current: -1,
				manifests: []*tensor.Manifest{manifestOf(t, 40, 0, 9), manifestOf(t, 300)},
				model:     &tableModel{places: places, whole: map[uint64]bool{}, held: map[*modelReader][]*modelHeld{}},
			}
			for step := 0; step < 400 && !t.Failed(); step++ {
				l.step()
				l.compare()
			}
			if t.Failed() {
				t.Logf("again: go test ./weights -run 'TestModel/%d$'", seed)
			}
		})
	}
}

func (l *life) step() {
	switch n := l.rng.IntN(100); {
	case l.p == nil:
		l.own = l.rng.IntN(10) / 9 // seldom the other one
		l.p = must(l.store.OpenPublisher(l.manifests[l.own], Who{}))(l.t)
	case n < 3:
		l.p.Close()
		l.p, l.place = nil, nil
	case n < 40 && l.place == nil:
		l.begin()
	case n < 35:
		l.commit()
	case n < 40:
		l.place.Abort()
		l.place = nil
	case n < 45 && l.model.newest > 0 && len(l.readers) < 5:
		l.open()
	case len(l.readers) == 0:
	case n < 50:
		l.close(l.rng.IntN(len(l.readers)))
	case n < 75:
		l.pin(l.readers[l.rng.IntN(len(l.readers))])
	default:
		l.release(l.readers[l.rng.IntN(len(l.readers))])
	}
}

func (l *life) begin() {
	ok := l.own != l.current || l.model.begin() // a segment that nothing was published of has place
	place, err := l.p.TryBegin(0)
	if busy := (*PinnedError)(nil); ok != (err == nil) || err != nil && !errors.As(err, &busy) {
		l.t.Fatalf("begin: %v; the model says %v", err, ok)
	}
	if err == nil {
		l.place = place
		if place.Generation() != l.model.newest+1 {
			l.t.Fatalf("generation %d after %d", place.Generation(), l.model.newest)
		}
		write(place)
	}
}

func (l *life) commit() {
	must(l.place.Commit())(l.t)
	if l.own != l.current {
		l.model.whole = map[uint64]bool{}
		l.model.segment++
		l.current = l.own
	}
	l.model.newest = l.place.Generation()
	l.model.whole[l.model.newest] = true
	l.place = nil
}

func (l *life) open() {
	r := &modelReader{segment: l.model.segment}
	if l.rng.IntN(2) == 0 {
		r.inside = must(l.store.OpenReader(Who{}))(l.t)
	} else {
		r.view, r.pins, r.page = lookOf(l.t, l.store)
	}
	l.readers = append(l.readers, r)
}

// close ends a reader: one of another process dies with all its pins, one inside lets go of them first.
func (l *life) close(i int) {
	r := l.readers[i]
	if r.inside != nil {
		for _, h := range l.model.held[r] {
			h.held.Release()
		}
		check(l.t, r.inside.Close())
	} else {
		check(l.t, r.page.Close())
	}
	delete(l.model.held, r)
	l.readers = append(l.readers[:i], l.readers[i+1:]...)
}

func (l *life) pin(r *modelReader) {
	h := &modelHeld{}
	ok := false
	if r.inside != nil {
		if h.held, ok = r.inside.Latest(0); ok {
			h.generation, h.place = h.held.Generation(), h.held.Place()
		}
	} else {
		h.generation, h.place, ok = r.pins.Pin(r.view, 0)
	}
	if !ok || r.segment == l.model.segment && h.generation != l.model.newest {
		l.t.Fatalf("pinned generation %d (%v), the newest is %d", h.generation, ok, l.model.newest)
	}
	l.model.held[r] = append(l.model.held[r], h)
}

func (l *life) release(r *modelReader) {
	all := l.model.held[r]
	if len(all) == 0 {
		return
	}
	i := l.rng.IntN(len(all))
	if r.inside != nil {
		all[i].held.Release()
	} else {
		r.pins.Unpin(all[i].place)
	}
	l.model.held[r] = append(all[:i], all[i+1:]...)
}

// compare looks at all that can be seen.
func (l *life) compare() {
	st := l.store.Stats()
	there := map[uint64]bool{}
	for _, g := range st.Generations {
		there[g.Generation] = true
		if (len(g.Pins) > 0) != l.model.pinned(g.Generation) {
			l.t.Errorf("generation %d has pins %v, the model says %v", g.Generation, g.Pins, l.model.pinned(g.Generation))
		}
	}
	if st.Newest != l.model.newest || fmt.Sprint(there) != fmt.Sprint(l.model.whole) {
		l.t.Errorf("newest %d of %v, the model has %d of %v", st.Newest, there, l.model.newest, l.model.whole)
	}
	for r, all := range l.model.held {
		for _, h := range all {
			view := r.view
			if r.inside != nil {
				view = r.inside.memory.view
			}
			if i := wrongContent(view.Manifest(), view.Data(h.place), h.generation); i >= 0 || view.Generation(h.place) != h.generation {
				l.t.Errorf("generation %d is held, and its tensor %d changed", h.generation, i)
			}
		}
	}
}
