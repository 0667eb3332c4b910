package tensor

import (
	"errors"
	"fmt"
	"slices"

	"github.com/ingestd/ingestd/internal/strictjson"
)

// smallBytes is below which a piece is copied into the cutter's own memory, so that a chunk of many small tensors has few pieces.
const smallBytes = 8 << 10

// Emit takes one chunk: its header of HeaderBytes bytes, and its data in pieces, which have the header's Length together. All of it may be kept, unchanged, until the cutter's next
// Begin; the pieces of large tensors are the producer's own memory.
type Emit func(header []byte, data [][]byte) error

// Cutter cuts the tensors of a transaction into chunks, in the order in which they are put. Tensors that are put in the manifest's order, or in the reverse of it, share chunks
// with their neighbours; one that is put elsewhere begins a new chunk. It belongs to one goroutine.
type Cutter struct {
	m          *Manifest
	chunkBytes int
	header     Header // of the next chunk, but for its place
	emit       Emit
	noCRC      bool

	begun      bool
	failed     error     // of emit: nothing more comes out
	put        []bool    // of which tensors something was put
	covered    *Coverage // by chunks that came out
	run        run
	last       int64 // where the last piece starts, -1: there is none
	descending bool  // tensors come in reverse order; thought of the next transaction, too
	arena      arena
}

// NewCutter makes a cutter for one stream. chunkBytes is what the daemon said, legal by CheckChunkBytes; others panic.
func NewCutter(m *Manifest, chunkBytes int, stream, producer uint64, emit Emit) *Cutter {
	if err := CheckChunkBytes(chunkBytes); err != nil {
		panic("tensor: " + err.Error())
	}
	return &Cutter{
		m: m, chunkBytes: chunkBytes, emit: emit, header: Header{Stream: stream, Producer: producer, Manifest: m.ID()},
		put: make([]bool, m.Len()), covered: NewCoverage(m), arena: arena{blockBytes: chunkBytes},
	}
}

// SkipCRC leaves the data's sums out from now on: chunks have FlagNoCRC.
func (c *Cutter) SkipCRC() { c.noCRC = true }

// PlaceError says why bytes were not put: they are not of their tensor, or were put before. The transaction is as it was.
type PlaceError struct {
	Tensor string
	Offset int64 // in the encoded bytes of the tensor
	Reason string
}

func (e *PlaceError) Error() string {
	return fmt.Sprintf("tensor %s at byte %d: %s", strictjson.Quote(e.Tensor), e.Offset, e.Reason)
}

// MissingTensor is a tensor of which bytes were not put.
type MissingTensor struct {
	Name  string
	Bytes int64
}

// IncompleteError says what a transaction lacks.
type IncompleteError struct{ Missing []MissingTensor }

func (e *IncompleteError) Error() string {
	const most = 4
	text := fmt.Sprintf("the step is not complete: %d tensors lack bytes:", len(e.Missing))
	for i, t := range e.Missing {
		if i == most {
			return text + fmt.Sprintf(" and %d more", len(e.Missing)-most)
		}
		text += fmt.Sprintf(" %s %d;", strictjson.Quote(t.Name), t.Bytes)
	}
	return text[:len(text)-1]
}

// errNotBegun is for calls outside of a transaction.
var errNotBegun = errors.New("tensor: no transaction is open; call Begin first")

// Begin begins the transaction of a step. One that was not finished is dropped, without a chunk that says so: the first chunk of this one does.
func (c *Cutter) Begin(step uint64) {
	c.begun, c.failed = true, nil
	c.header.Step, c.header.Flags = step, FlagBegin
	if c.noCRC {
		c.header.Flags |= FlagNoCRC
	}
	clear(c.put)
	c.covered.Reset()
	c.run.reset()
	c.last = -1
	c.arena.reset()
}

// Put puts a whole tensor: its encoded bytes, which must not change until they were received.
func (c *Cutter) Put(i int, encoded []byte) error {
	if int64(len(encoded)) != c.m.EncodedBytes(i) {
		return c.placeErrorf(i, 0, "has %d bytes, the manifest says %s: %d bytes", len(encoded), c.m.tensors[i].Type(), c.m.EncodedBytes(i))
	}
	return c.PutAt(i, 0, encoded)
}

// PutAt puts a part of a tensor's encoded bytes, which must not change until they were received. It starts on a multiple of Align bytes and ends on one, or with its tensor; or it
// goes on where the part put just before ended. Errors are *PlaceError, or what Emit returned.
func (c *Cutter) PutAt(i int, offset int64, encoded []byte) error {
	size, n := c.m.EncodedBytes(i), int64(len(encoded))
	switch {
	case !c.begun:
		return errNotBegun
	case c.failed != nil:
		return c.failed
	case offset < 0 || offset > size || n > size-offset:
		return c.placeErrorf(i, offset, "%d bytes do not lie in the tensor's %d bytes", n, size)
	case n == 0:
		c.put[i] = c.put[i] || size == 0
		return nil
	}
	p := piece{c.m.offsets[i] + offset, encoded}
	goesOn, block := c.run.goesOn(p, c.whole), p.flat&^(Align-1)
	switch {
	case p.flat%Align != 0 && !goesOn:
		return c.placeErrorf(i, offset, "a part must start on a multiple of %d bytes, or where the part put just before ended", Align)
	case c.run.overlaps(p) || c.covered.Touches(block, p.end()-block):
		return c.placeErrorf(i, offset, "some of these %d bytes were put before", n)
	case !goesOn && !c.run.precedes(p, c.whole):
		if err := c.leave(); err != nil {
			return err
		}
	}
	c.put[i] = true
	if c.last >= 0 {
		c.descending = roundUp(p.end()) == c.last
	}
	c.last = p.flat
	c.run.add(p, c.descending && c.whole(p.end()))
	for c.run.bytes() >= int64(c.chunkBytes) {
		if err := c.cut(int64(c.chunkBytes)); err != nil {
			return err
		}
	}
	return nil
}

// leave cuts what is left of the run, since the next piece lies elsewhere.
func (c *Cutter) leave() error {
	if end, ok := c.run.end(); ok && !c.whole(end) {
		i := c.m.At(end - 1)
		return c.placeErrorf(i, end-c.m.offsets[i], "the part that ends here must be followed by the next one, since it is no multiple of %d bytes", Align)
	}
	return c.flush()
}

// whole says whether a chunk may end at a flat offset.
func (c *Cutter) whole(end int64) bool {
	_, last := slices.BinarySearch(c.m.ends, end)
	return end%Align == 0 || last
}

func (c *Cutter) placeErrorf(i int, offset int64, format string, args ...any) error {
	return &PlaceError{c.m.tensors[i].Name, offset, fmt.Sprintf(format, args...)}
}

// Finish sends what is left. All bytes of the manifest must have been put, else it returns *IncompleteError, and the transaction goes on.
func (c *Cutter) Finish() error {
	if err := c.drain(); err != nil {
		return err
	}
	if !c.covered.Complete(nil) {
		return c.incomplete(nil)
	}
	if c.header.Flags&FlagBegin != 0 { // no tensor has bytes
		if err := c.send(Header{}); err != nil {
			return err
		}
	}
	c.begun = false
	return nil
}

// FinishSubset sends what is left and announces that the transaction has exactly the tensors of which something was put; of each of these all bytes must have been put, else it
// returns *IncompleteError, and the transaction goes on.
func (c *Cutter) FinishSubset() error {
	if err := c.drain(); err != nil {
		return err
	}
	subset := make([]uint32, 0, len(c.put))
	for i, put := range c.put {
		if put {
			subset = append(subset, uint32(i))
		}
	}
	if len(subset) == len(c.put) {
		return c.Finish()
	}
	if !c.covered.Complete(subset) {
		return c.incomplete(subset)
	}
	if 4*len(subset) > c.chunkBytes {
		return fmt.Errorf("tensor: a list of %d tensors does not fit a chunk of %d bytes; make chunks larger, or put all tensors", len(subset), c.chunkBytes)
	}
	if len(subset) > 0 {
		c.arena.list = append(c.arena.list, AppendEnd(c.arena.take(4 * len(subset))[:0], subset))
	}
	if err := c.send(Header{Flags: FlagEnd}); err != nil {
		return err
	}
	c.begun = false
	return nil
}

// Abort gives the step up. If chunks came out, one more says so.
func (c *Cutter) Abort() error {
	if !c.begun {
		return errNotBegun
	}
	c.begun = false
	if c.header.Flags&FlagBegin != 0 || c.failed != nil {
		return nil
	}
	return c.send(Header{Flags: FlagAbort})
}

func (c *Cutter) drain() error {
	switch {
	case !c.begun:
		return errNotBegun
	case c.failed != nil:
		return c.failed
	}
	if end, ok := c.run.end(); ok && !c.whole(end) {
		return c.incomplete(nil)
	}
	return c.flush()
}

// incomplete names what is missing, of what was put and is still here, too.
func (c *Cutter) incomplete(subset []uint32) error {
	e := &IncompleteError{}
	for i, bytes := range c.covered.Missing(subset) {
		if bytes -= c.run.within(c.m.offsets[i], c.m.ends[i]); bytes > 0 {
			e.Missing = append(e.Missing, MissingTensor{c.m.tensors[i].Name, bytes})
		}
	}
	return e
}

// flush cuts what is left of the run.
func (c *Cutter) flush() error {
	for c.run.bytes() > 0 {
		if err := c.cut(min(c.run.bytes(), int64(c.chunkBytes))); err != nil {
			return err
		}
	}
	c.run.reset()
	return nil
}

// cut takes one chunk of so many bytes off the run, at the side that was put first.
func (c *Cutter) cut(bytes int64) error {
	flat := c.run.take(bytes, &c.arena)
	i := c.m.At(flat)
	return c.send(Header{Tensor: uint32(i), Offset: uint64(flat - c.m.offsets[i])})
}

// send completes the header of the data that the arena has, and hands the chunk over.
func (c *Cutter) send(place Header) error {
	data := c.arena.pieces()
	h := c.header
	h.Flags, h.Tensor, h.Offset = h.Flags|place.Flags, place.Tensor, place.Offset
	for _, b := range data {
		h.Length += uint32(len(b))
		if h.Flags&FlagNoCRC == 0 {
			h.DataCRC = UpdateCRC(h.DataCRC, b)
		}
	}
	header := c.arena.take(HeaderBytes)
	h.Put(header)
	if h.HasData() {
		c.covered.Add(h.Flat(c.m), h.Length, h.DataCRC)
	}
	if err := c.emit(header, data); err != nil {
		c.failed = err
		return err
	}
	c.header.Flags &^= FlagBegin
	return nil
}
