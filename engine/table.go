package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"sync"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/steps"
)

// Memory is where a table's segment lies.
type Memory interface {
	Bytes() []byte // at least the size asked for, starting on a multiple of 64
	Close() error
}

// NameBytesMax is the longest name of a table: what a handshake can carry.
const NameBytesMax = 128

// SessionTTLDefault is how long a session without a connection is remembered at least.
const SessionTTLDefault = 24 * time.Hour

// Config says what a table is.
type Config struct {
	Name      string // 1 to NameBytesMax bytes
	Spec      *spec.Spec
	BatchSize int           // samples in a batch
	Batches   int           // capacity in batches, at least 2
	Linger    time.Duration // publish a batch short when its first sample is this old, or a stream ends; 0 (default): never
	Drainers  *drainer.Pool // shared by all tables; its Run is the caller's

	Sessions      int           // how many sessions the table knows at most; 0: ring.SessionsDefault
	SessionTTL    time.Duration // how long a session without a connection is remembered at least; 0: SessionTTLDefault
	CommittedAcks bool          // transports ack no sample of this table before it is in the ring, whatever a producer asks for

	// Groups of trainers that are there from the start and never end; the policies of those that are not listed (its Name is empty), and how long such a one lasts
	// without a trainer (0: sampler's default).
	Groups       []sampler.GroupConfig
	DefaultGroup sampler.GroupConfig
	GroupKeep    time.Duration

	// Steps makes it a table of kind tensors, whose Spec is steps.Spec of its ChunkBytes: the samples are chunks, their headers are checked, and the herald says
	// in the ring who is there, which needs Run. Nil: a table of samples.
	Steps *steps.Config

	// Memory makes the segment's memory; nil takes it from the heap.
	Memory func(size int64) (Memory, error)

	// Recover says that the memory holds a segment that an earlier process left, however that ended: New takes it up as ring.Recover does, and what no trainer
	// has released is offered again. The errors of ring.Recover are wrapped; the memory is as it was then. Boot identifies the run of the machine, see
	// ring.Layout.
	Recover bool
	Boot    [16]byte
}

// Table is a named ring with one spec, its streams and its sampler.
type Table struct {
	cfg     Config
	ring    *ring.Ring
	sampler *sampler.FIFO
	steps   *steps.Keeper // nil: its samples are no chunks
	memory  Memory
	found   *ring.Recovery // nil: the segment was made anew

	mu       sync.Mutex
	closed   bool
	closing  chan struct{} // closed with closed
	opened   uint64        // streams there ever were
	streams  map[uint64]*drainer.Stream
	lenders  map[uint64]*drainer.Lender
	sessions map[string]*session // those that somebody has or waits for
	taken    uint64              // sessions that went to another connection
	past     drainer.StreamStats // of the streams that are gone
	watching sync.WaitGroup
}

type heap struct{ b []byte }

func (h heap) Bytes() []byte { return h.b }
func (heap) Close() error    { return nil }

// SegmentBytes returns how much memory a table of this configuration takes.
func SegmentBytes(s *spec.Spec, batchSize, batches int) (int64, error) {
	return layout(&Config{Spec: s, BatchSize: batchSize, Batches: batches}).Bytes()
}

func layout(cfg *Config) ring.Layout {
	return ring.Layout{
		BatchSize:   cfg.BatchSize,
		Batches:     cfg.Batches,
		Columns:     cfg.Spec.LeafBytes(),
		Spec:        cfg.Spec.JSON(),
		Fingerprint: cfg.Spec.Fingerprint(),
		Table:       cfg.Name,
		Sessions:    cfg.Sessions,
		Boot:        cfg.Boot,
		Created:     time.Now(),
	}
}

// New makes a table. It starts nothing: Run and the pool's Run do.
func New(cfg Config) (*Table, error) {
	if n := len(cfg.Name); n < 1 || n > NameBytesMax {
		return nil, fmt.Errorf("engine: the table's name %.40q has %d bytes, must have 1 to %d", cfg.Name, n, NameBytesMax)
	}
	if cfg.Spec == nil || cfg.Drainers == nil {
		return nil, fmt.Errorf("table %q: Config.Spec and Config.Drainers are required", cfg.Name)
	}
	if cfg.Steps != nil {
		if s, err := steps.Spec(cfg.Steps.ChunkBytes); err != nil || !s.Equal(cfg.Spec) {
			return nil, fmt.Errorf("table %q: Config.Spec is %s, which is not that of chunks of %d bytes", cfg.Name, cfg.Spec.Text(), cfg.Steps.ChunkBytes)
		}
	}
	if cfg.SessionTTL < 0 {
		return nil, fmt.Errorf("table %q: Config.SessionTTL is %v, must not be negative", cfg.Name, cfg.SessionTTL)
	}
	if cfg.SessionTTL == 0 {
		cfg.SessionTTL = SessionTTLDefault
	}
	l := layout(&cfg)
	size, err := l.Bytes()
	if err != nil {
		return nil, fmt.Errorf("table %q: %w", cfg.Name, err)
	}
	var memory Memory = heap{}
	if cfg.Memory != nil {
		if memory, err = cfg.Memory(size); err != nil {
			return nil, fmt.Errorf("table %q: %w", cfg.Name, err)
		}
	} else {
		memory = heap{ring.AlignedBytes(size)}
	}
	t := &Table{cfg: cfg, memory: memory, closing: make(chan struct{}), sessions: map[string]*session{},
		streams: map[uint64]*drainer.Stream{}, lenders: map[uint64]*drainer.Lender{}}
	if err = t.makeRing(l); err != nil {
		_ = memory.Close()
		return nil, fmt.Errorf("table %q: %w", cfg.Name, err)
	}
	return t, nil
}

func (t *Table) makeRing(l ring.Layout) (err error) {
	config := sampler.Config{Linger: t.cfg.Linger, Groups: t.cfg.Groups, Default: t.cfg.DefaultGroup, Keep: t.cfg.GroupKeep}
	if t.cfg.Recover {
		t.ring, t.found, err = ring.Recover(t.memory.Bytes(), l)
	} else {
		t.ring, err = ring.Format(t.memory.Bytes(), l)
	}
	if err != nil {
		return err
	}
	if t.cfg.Steps != nil {
		t.steps = steps.New(t.ring, *t.cfg.Steps, t.found)
	}
	var found []ring.Recovered
	if t.found != nil {
		found = t.found.Batches
	}
	t.sampler, err = sampler.New(t.ring, config, found)
	return err
}

// Found returns what was found in a segment that was taken up; nil of one that was made anew.
func (t *Table) Found() *ring.Recovery { return t.found }

// Name returns the table's name.
func (t *Table) Name() string { return t.cfg.Name }

// Spec returns the layout of a sample.
func (t *Table) Spec() *spec.Spec { return t.cfg.Spec }

// Steps returns what the table knows of the producers of tensors; nil of a table of samples.
func (t *Table) Steps() *steps.Keeper { return t.steps }

// CommittedAcks tells whether Config says that transports ack only what is in the ring.
func (t *Table) CommittedAcks() bool { return t.cfg.CommittedAcks }

// Ring returns the ring.
func (t *Table) Ring() *ring.Ring { return t.ring }

// Sampler returns what gives batches to trainers.
func (t *Table) Sampler() *sampler.FIFO { return t.sampler }

// Memory returns what the segment lies in.
func (t *Table) Memory() Memory { return t.memory }

// Run runs what the table does by the clock, until ctx ends.
func (t *Table) Run(ctx context.Context) error {
	var herald sync.WaitGroup
	if t.steps != nil {
		herald.Go(func() { _ = t.steps.Run(ctx) })
	}
	err := t.sampler.Run(ctx)
	herald.Wait()
	return err
}

// Close ends the table for producers: no new streams; when the open ones, which their owners close, are drained, the batch being filled is published short,
// and trainers get io.EOF after the last batch. If ctx ends before the streams do, Close goes on without them and returns its error.
func (t *Table) Close(ctx context.Context) error {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		close(t.closing)
	}
	t.mu.Unlock()
	drained := make(chan struct{})
	go func() {
		t.watching.Wait()
		close(drained)
	}()
	var err error
	select {
	case <-drained:
	case <-ctx.Done():
		err = fmt.Errorf("table %q: streams were not drained: %w", t.cfg.Name, park.ContextError(ctx))
	}
	if t.steps != nil { // who has gone is said before the end
		if flushed := t.steps.Flush(ctx); err == nil && flushed != nil && !errors.Is(flushed, os.ErrClosed) {
			err = fmt.Errorf("table %q: readers were not told of all ends: %w", t.cfg.Name, flushed)
		}
	}
	t.ring.Flush()
	t.ring.Close()
	return err
}

// Free gives the memory back. Nobody may use the ring or hold a batch any more.
func (t *Table) Free() error { return t.memory.Close() }

// Stats is a snapshot of a table.
type Stats struct {
	Table     string
	BatchSize int
	Batches   int
	Reserved  uint64 // position after the last slot given to a writer
	Published uint64 // batches
	Leased    uint64 // batches given to trainers
	Places    map[string]int
	Pushed    uint64 // samples taken by transports, all streams there ever were
	Committed uint64 // of those, in the ring
	Abandoned uint64 // slots given back unfilled
	Opened    uint64 // streams there ever were
	Sessions  int    // known, with and without a connection
	Taken     uint64 // sessions that went from one connection to another that asked for it
	Streams   []drainer.StreamStats
	Lenders   []drainer.LenderStats // producers that fill places themselves; they count as streams above
	Sampler   sampler.Stats
	Steps     *steps.Stats // nil: a table of samples
}

// Stats returns a snapshot; its parts may belong to slightly different moments.
func (t *Table) Stats() Stats {
	st := Stats{
		Table:     t.cfg.Name,
		BatchSize: t.ring.BatchSize(),
		Batches:   t.ring.Batches(),
		Reserved:  t.ring.Reserved(),
		Published: t.ring.Published(),
		Leased:    t.ring.Leased(),
		Places:    map[string]int{},
		Sessions:  len(t.ring.Sessions()),
		Sampler:   t.sampler.Stats(),
	}
	if t.steps != nil {
		of := t.steps.Stats()
		st.Steps = &of
	}
	for i := range t.ring.Batches() {
		st.Places[t.ring.BatchState(i).State.String()]++
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	st.Opened, st.Taken = t.opened, t.taken
	st.Pushed, st.Committed, st.Abandoned = t.past.Pushed, t.past.Committed, t.past.Abandoned
	for _, s := range t.streams {
		ss := s.Stats()
		st.Pushed += ss.Pushed
		st.Committed += ss.Committed
		st.Abandoned += ss.Abandoned
		st.Streams = append(st.Streams, ss)
	}
	for _, l := range t.lenders {
		ls := l.Stats()
		st.Pushed += ls.Committed
		st.Committed += ls.Committed
		st.Lenders = append(st.Lenders, ls)
	}
	sort.Slice(st.Lenders, func(i, j int) bool { return st.Lenders[i].Stream < st.Lenders[j].Stream })
	sort.Slice(st.Streams, func(i, j int) bool { return st.Streams[i].Stream < st.Streams[j].Stream })
	return st
}
