package weights

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// StoreConfig configures a Store. All may be left zero.
type StoreConfig struct {
	// Table is the table's name, for messages and for /proc/<pid>/maps.
	Table string

	// Generations is how many whole generations the segment has places for, PlacesMin to PlacesMax. Default PlacesDefault. One more than readers hold for
	// long are needed for publishing never to wait.
	Generations int

	// Capacity is the most bytes of a segment. A publisher whose manifest needs more is refused. While one manifest replaces another, both segments are there.
	// Default 4 GiB.
	Capacity int64

	// ReadersMax is the most readers at once. Default 1024.
	ReadersMax int

	// HugePages asks for huge pages; without enough of them ordinary ones are taken.
	HugePages bool

	// Heap puts segments on this process's heap, where no other process can map them.
	Heap bool
}

const (
	capacityDefault   = 4 << 30
	readersMaxDefault = 1024
)

func (c StoreConfig) withDefaults() StoreConfig {
	if c.Generations == 0 {
		c.Generations = PlacesDefault
	}
	if c.Capacity == 0 {
		c.Capacity = capacityDefault
	}
	if c.ReadersMax == 0 {
		c.ReadersMax = readersMaxDefault
	}
	return c
}

func (c StoreConfig) check() error {
	switch {
	case c.Generations < PlacesMin || c.Generations > PlacesMax:
		return fmt.Errorf("weights: Generations is %d, must be from %d to %d", c.Generations, PlacesMin, PlacesMax)
	case c.Capacity < 1 || c.Capacity > segmentBytesMax:
		return fmt.Errorf("weights: Capacity is %d, must be from 1 to %d", c.Capacity, int64(segmentBytesMax))
	case c.ReadersMax < 1:
		return fmt.Errorf("weights: ReadersMax is %d, must be at least 1", c.ReadersMax)
	}
	return nil
}

// Store holds the generations of one table. Its methods may be called from any goroutine.
type Store struct {
	cfg   StoreConfig
	now   func() time.Time // published
	first chan struct{}    // closed when something was published

	mu            sync.Mutex
	current       *memory // where the newest generation lies; nil: nothing was published
	newest        uint64
	publisher     *Publishing
	readers       map[uint64]*Reader
	lastPublisher uint64
	lastReader    uint64
	closed        bool
	idle          []*memory // to be freed by unlock
	total         counters
}

// NewStore makes a store without a segment: the first publisher's manifest says how large that is.
func NewStore(cfg StoreConfig) (*Store, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Store{cfg: cfg, now: time.Now, first: make(chan struct{}), readers: map[uint64]*Reader{}, total: counters{failed: map[Failure]uint64{}}}, nil
}

// Table returns the table's name.
func (s *Store) Table() string { return s.cfg.Table }

// First is closed once something was published.
func (s *Store) First() <-chan struct{} { return s.first }

// Newest returns the newest generation; 0: there is none.
func (s *Store) Newest() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest
}

// unlock ends the section under mu and frees what nobody uses any more: unmapping a large segment takes time.
func (s *Store) unlock() {
	idle := s.idle
	s.idle = nil
	s.mu.Unlock()
	for _, m := range idle {
		_ = m.close() // what is left of a mapping that cannot be unmapped ends with the process
	}
}

// release drops one use of a memory. Called under mu, which unlock must end.
func (s *Store) release(m *memory) {
	if m == nil {
		return
	}
	if m.uses--; m.uses == 0 {
		s.idle = append(s.idle, m)
	}
}

// OpenPublisher gives the table to a publisher of this manifest, until it closes. If the newest generation has another manifest, or there is none, it makes a
// segment, which takes the place of the other one at the publisher's first commit.
//
// *ActiveError: it has one; *CapacityError: its generations would be too large; an *shm.InsufficientError: there is not enough memory.
func (s *Store) OpenPublisher(m *tensor.Manifest, who Who) (*Publishing, error) {
	p, err := s.admit(m, who)
	if err != nil || p.memory != nil {
		return p, err
	}
	made, err := s.newMemory(m) // not under mu: making all pages present takes 0.35 s per GiB
	s.mu.Lock()
	defer s.unlock()
	if err == nil && s.closed {
		err = errors.Join(errClosed, made.close())
	}
	if err != nil {
		s.publisher = nil
		return nil, err
	}
	made.uses = 1
	p.memory = made
	return p, nil
}

// admit makes the publisher the table's, and gives it the segment that there is, if it has its manifest.
func (s *Store) admit(m *tensor.Manifest, who Who) (*Publishing, error) {
	s.mu.Lock()
	defer s.unlock()
	if s.closed {
		return nil, errClosed
	}
	if p := s.publisher; p != nil {
		return nil, &ActiveError{p.number, p.who, p.since}
	}
	if l := LayoutOf(m, s.cfg.Generations); l.SegmentBytes > s.cfg.Capacity {
		return nil, &CapacityError{Bytes: l.SegmentBytes, Capacity: s.cfg.Capacity, DataBytes: l.DataBytes, Places: s.cfg.Generations}
	}
	s.lastPublisher++
	p := &Publishing{store: s, number: s.lastPublisher, who: who, since: time.Now(), manifest: m}
	s.publisher = p
	if s.current != nil && bytes.Equal(s.current.view.manifest.JSON(), m.JSON()) { // metadata too
		p.memory = s.current
		p.memory.uses++
	}
	return p, nil
}

// show makes a place that is written the newest generation. Called under mu.
func (s *Store) show(p *Publishing, place int, st whole) {
	m := p.memory
	m.places[place], m.newest = st, place
	// edge(place): release - all bytes of the generation are written before its number is seen.
	m.view.generationWord(place).Store(st.generation)
	failpoint.Hit("weights/commit/stated")
	// edge(newest): release - the place holds that generation, whole, before it is named here.
	m.view.newestWord().Store(st.generation*generationsPerRow + uint64(place))
	if s.newest == 0 {
		close(s.first)
	}
	s.newest = st.generation
	old := s.current
	if old != m {
		s.current = m
		m.uses++
		s.release(old)
	}
	for _, r := range s.readers {
		if r.memory != m {
			r.end(&ReplacedError{s.cfg.Table})
		}
		r.ring()
	}
}

// Close ends the store: publishers and readers get os.ErrClosed, what they hold stays until they let go.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	for _, r := range s.readers {
		r.end(errClosed)
		r.ring()
	}
	s.release(s.current)
	s.current = nil
	return nil
}

// whole is what the daemon itself knows of the generation in a place: publishers in place can write all of the segment.
type whole struct {
	generation uint64 // 0: the place holds nothing whole
	published  time.Time
	digest     spec.Fingerprint
	publisher  uint64
	sums       []uint32
}

// memory is a segment and its places. All but view and backing is under the store's mu.
type memory struct {
	view    *Segment
	backing backing // nil on the heap
	uses    int     // by the store as the current one, the publisher, readers and what they hold
	places  []whole
	writing int // the place that was taken for the publisher; -1: none
	newest  int // place; -1: none
}

// backing is memory that other processes can map.
type backing interface {
	Bytes() []byte
	Descriptor() int
	Writable() (int, bool)
	Close() error
}

func (s *Store) newMemory(m *tensor.Manifest) (*memory, error) {
	l := LayoutOf(m, s.cfg.Generations)
	made := &memory{places: make([]whole, l.Places), writing: -1, newest: -1}
	var mem []byte
	if s.cfg.Heap {
		mem = alignedBytes(l.SegmentBytes)
	} else {
		b, err := newBacking("ingestd-weights-"+s.cfg.Table, l.SegmentBytes, s.cfg.HugePages)
		if err != nil {
			return nil, err
		}
		made.backing, mem = b, b.Bytes()[:l.SegmentBytes]
	}
	format(mem, m, l)
	made.view = &Segment{mem: mem, layout: l, manifest: m}
	return made, nil
}

func (m *memory) close() error {
	if m.backing == nil {
		return nil
	}
	return m.backing.Close()
}

// take takes a place that no reader pins: one that holds nothing whole, or else the oldest generation's. -1: all are pinned. Called under mu.
func (m *memory) take(readers map[uint64]*Reader) int {
	for i := range m.places {
		if m.places[i].generation == 0 {
			return m.taken(i)
		}
	}
	for _, i := range m.byAge() {
		if i == m.newest {
			continue
		}
		w, generation := m.view.generationWord(i), m.places[i].generation
		w.Store(0)
		free := true
		for _, r := range readers {
			free = free && (r.memory != m || pinned(r.pins.page, i) != generation)
		}
		if free {
			return m.taken(i)
		}
		// edge(place): release - nothing was written: it is the generation that it was.
		w.Store(generation)
	}
	return -1
}

func (m *memory) taken(place int) int {
	m.view.generationWord(place).Store(0)
	m.places[place] = whole{}
	m.writing = place
	return place
}
