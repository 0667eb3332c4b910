package ring

import (
	"fmt"
	"sync/atomic"
)

// State is where a batch is in its life.
type State uint64

// The states of a place in the ring, as stored in the low three bits of its state word.
const (
	Free      State = 0 // in nobody's hands
	Open      State = 1 // being filled
	Sealing   State = 2 // full, about to be published
	Published State = 3 // waiting for a trainer
	Leased    State = 4 // a trainer reads it
	Lent      State = 5 // one producer fills it in place
)

var stateNames = [...]string{"free", "open", "sealing", "published", "leased", "lent"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint64(s))
}

// BatchState is one state line, read without stopping the ring: its fields may belong to different moments.
type BatchState struct {
	Number    uint64 // number of the batch in this place; of one that is open or being sealed: its opening
	State     State
	Committed int    // slots committed or void
	Void      int    // slots given up
	Count     int    // rows, when published or leased
	Pending   uint64 // groups that have not released it, when published or leased
	Stream    uint64 // who fills it, when lent
	Settled   int    // of its rows, those that were copied to another batch, when lent
}

// View reads a segment and never writes. All methods may be called from any goroutine.
type View struct {
	mem    []byte
	layout Layout
	geo    geometry
}

// OpenView checks every fixed field of mem, which must stay mapped as long as the View and its batches are used. It returns a
// *FormatError for anything that is not a whole segment of this version.
func OpenView(mem []byte) (*View, error) {
	if err := checkMemory(mem); err != nil {
		return nil, err
	}
	l, g, err := readHeader(mem)
	if err != nil {
		return nil, err
	}
	return &View{mem: mem[:g.segment:g.segment], layout: *l, geo: *g}, nil
}

// Layout returns the layout; its slices are shared and must not be changed.
func (v *View) Layout() Layout { return v.layout }

// SampleBytes returns the bytes of one sample.
func (v *View) SampleBytes() int64 { return v.geo.sample }

// BatchSize returns the slots in a batch.
func (v *View) BatchSize() int { return v.layout.BatchSize }

// Batches returns the capacity in batches.
func (v *View) Batches() int { return v.layout.Batches }

// SegmentBytes returns the length of the segment.
func (v *View) SegmentBytes() int64 { return v.geo.segment }

// Reserved returns the position after the last slot given to a writer.
func (v *View) Reserved() uint64 { return word(v.mem, offReserved).Load() }

// Published returns how many batches have been published.
func (v *View) Published() uint64 { return word(v.mem, offPublished).Load() }

// Leased returns how many batches have been given to trainers.
func (v *View) Leased() uint64 { return word(v.mem, offLeased).Load() }

// Closed tells whether nothing will be published any more.
func (v *View) Closed() bool { return word(v.mem, offClosed).Load() != 0 }

func (v *View) line(index uint32) int64 { return v.geo.statesOffset + lineBytes*int64(index) }

// BatchState reads the state line of a place, 0 <= index < Batches.
func (v *View) BatchState(index int) BatchState {
	at := v.line(uint32(index))
	state := word(v.mem, at).Load()
	progress := word(v.mem, at+lineProgress).Load()
	return BatchState{
		Number:    state >> stateBits,
		State:     State(state & stateMask),
		Committed: int(progress & progressMask),
		Void:      int(progress >> progressBits),
		Count:     int(word(v.mem, at+lineCount).Load()),
		Pending:   word(v.mem, at+linePending).Load(),
		Stream:    word(v.mem, at+lineStream).Load(),
		Settled:   int(word(v.mem, at+lineSettled).Load()),
	}
}

const (
	stateBits    = 3
	stateMask    = 1<<stateBits - 1
	progressBits = 32
	progressMask = 1<<progressBits - 1
)

// Offsets in a state line.
const (
	lineProgress = 8
	lineCount    = 16
	lineMove     = 24
	linePending  = 32
	lineStream   = 40
	lineSettled  = 48
)

// Batch is a batch that its holder may read until it is given back. It is a small value; copies mean the same lease.
type Batch struct {
	Number uint64 // counts up by one with every batch of the ring
	Index  uint32 // its place
	Count  int    // rows that hold samples
	view   *View
}

// Batch returns the batch that a peer was told of, after checking that the segment agrees: number is leased in place index and has count rows.
func (v *View) Batch(number uint64, index uint32, count int) (Batch, error) {
	if int64(index) >= int64(v.layout.Batches) {
		return Batch{}, formatError("batch %d is said to be in place %d of %d", number, index, v.layout.Batches)
	}
	at := v.line(index)
	// edge(publish): acquire - after this load, the batch's rows and count are ours to read.
	if got := word(v.mem, at).Load(); State(got&stateMask) != Leased || got>>stateBits != number {
		return Batch{}, formatError("place %d is %v with batch %d, not leased with batch %d", index, State(got&stateMask), got>>stateBits, number)
	}
	if have := word(v.mem, at+lineCount).Load(); count < 1 || count > v.layout.BatchSize || have != uint64(count) {
		return Batch{}, formatError("batch %d is said to have %d rows, the segment says %d of %d", number, count, have, v.layout.BatchSize)
	}
	return Batch{Number: number, Index: index, Count: count, view: v}, nil
}

func (v *View) base(index uint32) int64 { return v.geo.dataOffset + v.geo.stride*int64(index) }

func (v *View) slotWords(index uint32, column int64) []uint64 {
	return words(v.mem, v.base(index)+column, int64(v.layout.BatchSize))
}

// Intact tells whether the batch still lies in its place, leased. It does from before a trainer is told of it until it is given back, also over a restart of the daemon on a
// segment that is kept; so what was read before Intact said so was whole. If not, the daemon that lent the batch is gone, or it took the batch back, and the place
// may have been filled anew.
func (b Batch) Intact() bool {
	var fence atomic.Uint32
	fence.Add(1) // the reads before do not slip behind the load
	return word(b.view.mem, b.view.line(b.Index)).Load() == b.Number<<stateBits|uint64(Leased)
}

// Columns returns the number of leaf columns.
func (b Batch) Columns() int { return len(b.view.layout.Columns) }

// Column returns the bytes of one leaf for all rows: the array (Count, *shape), row-major, starting on a multiple of 64. It is the ring's own memory.
func (b Batch) Column(leaf int) []byte {
	at := b.view.base(b.Index) + b.view.geo.columns[leaf]
	end := at + int64(b.Count)*b.view.layout.Columns[leaf]
	return b.view.mem[at:end:end]
}

// Streams returns, for each row, the number of the stream that sent the sample.
func (b Batch) Streams() []uint64 {
	return b.view.slotWords(b.Index, b.view.geo.streams)[:b.Count:b.Count]
}

// Numbers returns, for each row, the sample's number in its stream.
func (b Batch) Numbers() []uint64 {
	return b.view.slotWords(b.Index, b.view.geo.numbers)[:b.Count:b.Count]
}

// Arrivals returns, for each row, when the sample's last byte was read, in Unix nanoseconds.
func (b Batch) Arrivals() []uint64 {
	return b.view.slotWords(b.Index, b.view.geo.arrivals)[:b.Count:b.Count]
}
