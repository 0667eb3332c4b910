package weights

import (
	"fmt"
	"sync"
)

// Pins is one reader's page of pins. Only this reader writes it; the daemon looks at it when it wants a place. The methods of a reader may be called from
// any of its goroutines.
//
// A pin and the taking of a place are the two halves of Dekker's protocol: each side writes its word, then reads the other's, with sequentially consistent
// atomics. So either the daemon sees the pin, or the reader sees that the place is no longer whole.
type Pins struct {
	page []byte // PinsBytes of them

	mu   sync.Mutex
	held [PlacesMax]struct {
		generation uint64
		times      int // Pin minus Unpin; the word in the page is 0 when this is
	}
}

// NewPins takes a page that is all zero.
func NewPins(page []byte) (*Pins, error) {
	if len(page) < PinsBytes {
		return nil, formatError("a page of pins of %d bytes, must be %d", len(page), PinsBytes)
	}
	if err := checkBase(page); err != nil {
		return nil, err
	}
	return &Pins{page: page[:PinsBytes]}, nil
}

// Pin pins the newest generation, if it is above newerThan; false: there is none. It must be followed by Unpin of that place. The same generation can be
// pinned more than once.
func (p *Pins) Pin(s *Segment, newerThan uint64) (generation uint64, place int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for tried := uint64(0); ; tried = generation {
		generation, place = s.Newest()
		if generation == 0 || generation <= newerThan || generation == tried { // tried: only a publisher that means harm makes that so
			return 0, 0, false
		}
		held := &p.held[place]
		if held.times > 0 { // by us, so the place has held that generation all the time
			held.times++
			return generation, place, true
		}
		if p.try(s, generation, place) {
			held.generation, held.times = generation, 1
			return generation, place, true
		}
	}
}

// try stores the pin and looks whether it holds. If not, a newer generation has been published since.
func (p *Pins) try(s *Segment, generation uint64, place int) bool {
	pin := word(p.page, int64(8*place))
	// edge(pin): release - whoever takes the place after this store sees the pin.
	pin.Store(generation)
	// edge(place): acquire - if this is still the generation, its bytes are whole, and nobody writes the place before the pin is 0.
	if s.generationWord(place).Load() == generation {
		return true
	}
	pin.Store(0)
	return false
}

// hold pins a generation where nobody can take its place meanwhile: in the daemon, under its store's mu.
func (p *Pins) hold(generation uint64, place int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := &p.held[place]
	if held.times++; held.times == 1 {
		held.generation = generation
		word(p.page, int64(8*place)).Store(generation)
	}
}

// Unpin lets go of a place once. One that is not pinned panics.
func (p *Pins) Unpin(place int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := &p.held[place]
	if held.times == 0 {
		panic(fmt.Sprintf("weights: place %d is not pinned: released twice", place))
	}
	if held.times--; held.times == 0 {
		// edge(unpin): release - all our reads of the place are done before this store is seen.
		word(p.page, int64(8*place)).Store(0)
	}
}

// Pinned returns how many places are pinned.
func (p *Pins) Pinned() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.held {
		n += min(p.held[i].times, 1)
	}
	return n
}

// pinned returns what stands in a page for a place, as the daemon sees it. Whatever is not the generation that the place held can never become a pin: a
// number is not used twice, so the reader that wrote it, if it keeps the rules, is about to find its place taken and to take it back.
func pinned(page []byte, place int) uint64 {
	// edge(pin): acquire - a pin stored before the place's generation was set to 0 is seen here.
	// edge(unpin): acquire - after a load that is not the generation, nobody reads that generation any more.
	return word(page, int64(8*place)).Load()
}
