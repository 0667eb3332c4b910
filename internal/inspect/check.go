package inspect

import (
	"encoding/binary"
	"fmt"

	"github.com/ingestd/ingestd/ring"
)

// Offsets of the slots' own columns in the header; docs/segment-format.md. The header was validated before they are used.
const (
	offStates     = 80
	offData       = 88
	offStride     = 96
	offStreamCol  = 104
	offNumberCol  = 112
	offArrivalCol = 120
	lineBytes     = 64
)

// problemsMax bounds the list: after so many, the rest adds nothing.
const problemsMax = 100

// checker gathers what is wrong.
type checker struct {
	mem      []byte
	view     *ring.View
	problems []string
	places   map[uint64]ring.State // live batches by number
}

func (c *checker) found(format string, args ...any) {
	if len(c.problems) < problemsMax {
		c.problems = append(c.problems, fmt.Sprintf(format, args...))
	}
}

// Check checks a whole segment that nobody writes to: header, spec, cursors, every state line, and the slots' own words of every batch that can be
// read. The error is for bytes that are not a segment; problems are what is wrong with one.
func Check(mem []byte) (*Report, []string, error) {
	v, err := ring.OpenView(mem)
	if err != nil {
		return nil, nil, err
	}
	r, err := New(v)
	if err != nil {
		return nil, nil, err
	}
	c := &checker{mem: mem, view: v, places: map[uint64]ring.State{}}
	if extra := int64(len(mem)) - v.SegmentBytes(); extra >= 4096 {
		c.found("%d bytes follow the segment", extra)
	}
	c.cursors(r)
	for i := range r.Batches {
		c.place(r, i, v.BatchState(i))
	}
	// Counted, not walked: the cursors may be damaged, too.
	for number := r.Leased; number < r.Published && number-r.Leased < uint64(r.Batches); number++ {
		if c.places[number] != ring.Published {
			c.found("batch %d is published and not leased, and no place holds it: its samples are lost", number)
		}
	}
	return r, c.problems, nil
}

func (c *checker) cursors(r *Report) {
	full := r.Reserved / uint64(r.BatchSize)
	switch {
	case r.Leased > r.Published:
		c.found("%d batches are leased, and only %d published", r.Leased, r.Published)
	case r.Published > full:
		c.found("%d batches are published, and only %d reserved in full", r.Published, full)
	case full-r.Leased > uint64(r.Batches):
		c.found("%d batches are reserved and not leased, in a ring of %d", full-r.Leased, r.Batches)
	}
}

func (c *checker) place(r *Report, index int, b ring.BatchState) {
	if b.State == ring.Free {
		return
	}
	if b.State > ring.Leased {
		c.found("place %d: state %d does not exist", index, b.State)
		return
	}
	if other, dup := c.places[b.Number]; dup {
		c.found("place %d: batch %d is %v here and %v in another place", index, b.Number, b.State, other)
	}
	c.places[b.Number] = b.State
	if b.Committed > r.BatchSize || b.Void > b.Committed {
		c.found("place %d: %d slots committed, %d of them given up, in a batch of %d", index, b.Committed, b.Void, r.BatchSize)
		return
	}
	switch b.State {
	case ring.Open, ring.Sealing:
		if b.Number < r.Published || b.Number > r.Reserved/uint64(r.BatchSize) {
			c.found("place %d: batch %d is %v, with %d published and %d samples reserved", index, b.Number, b.State, r.Published, r.Reserved)
		}
		return
	case ring.Published:
		if b.Number < r.Leased || b.Number >= r.Published {
			c.found("place %d: batch %d is published, and the cursors say %d leased, %d published", index, b.Number, r.Leased, r.Published)
		}
	case ring.Leased:
		if b.Number >= r.Leased {
			c.found("place %d: batch %d is leased, and the cursor says that %d are", index, b.Number, r.Leased)
		}
	}
	if b.Committed != r.BatchSize || b.Count != b.Committed-b.Void {
		c.found("place %d: batch %d is %v with %d rows, %d slots committed and %d given up of %d", index, b.Number, b.State, b.Count, b.Committed, b.Void, r.BatchSize)
		return
	}
	c.rows(index, b)
}

// rows checks that every row was written, and that the samples of each stream are in order.
func (c *checker) rows(index int, b ring.BatchState) {
	header := func(off int) int { return int(binary.LittleEndian.Uint64(c.mem[off:])) }
	base := header(offData) + index*header(offStride)
	at := func(column, row int) uint64 {
		return binary.LittleEndian.Uint64(c.mem[base+header(column)+8*row:])
	}
	last := map[uint64]uint64{}
	for row := range b.Count {
		stream, number := at(offStreamCol, row), at(offNumberCol, row)
		if at(offArrivalCol, row) == 0 {
			c.found("batch %d row %d: its sample never arrived", b.Number, row)
		}
		if before, ok := last[stream]; ok && number <= before {
			c.found("batch %d row %d: sample %d of stream %d comes after sample %d", b.Number, row, number, stream, before)
		}
		last[stream] = number
	}
}
