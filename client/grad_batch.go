//go:build linux

package client

import (
	"bytes"
	"slices"
)

// gradLease is a batch of the ring that is held. A Batch is one.
type gradLease interface {
	Release()
	Intact() bool
}

// gradBatch is a lease with the chunks that lie in it.
type gradBatch struct {
	lease  gradLease
	chunks []*gradChunk // not dropped yet
	rows   int          // not looked at yet
}

// gradChunk is a verified chunk with data.
type gradChunk struct {
	flat  int64
	data  []byte
	batch *gradBatch // in whose memory the data lies; nil: on the heap
}

func (c *gradChunk) end() int64 { return c.flat + int64(len(c.data)) }

// add takes a batch of so many rows, each of which is to be given to take.
func (c *gradCore) add(lease gradLease, rows int) *gradBatch {
	b := &gradBatch{lease: lease, rows: rows}
	c.held = append(c.held, b)
	c.holding++
	return b
}

// looked says that one row of a batch was dealt with.
func (c *gradCore) looked(b *gradBatch) {
	b.rows--
	c.letGo(b)
}

// letGo gives a batch back when nothing of it is needed.
func (c *gradCore) letGo(b *gradBatch) {
	if b.rows > 0 || len(b.chunks) > 0 || b.lease == nil {
		return
	}
	b.lease.Release()
	b.lease = nil
	c.holding--
	if len(c.held) > 2*c.holding+16 {
		c.held = slices.DeleteFunc(c.held, func(b *gradBatch) bool { return b.lease == nil })
	}
}

// drop forgets a chunk.
func (c *gradCore) drop(chunk *gradChunk) {
	b := chunk.batch
	if b == nil {
		c.counts.spilled.Add(-int64(len(chunk.data)))
		return
	}
	if i := slices.Index(b.chunks, chunk); i >= 0 {
		b.chunks = slices.Delete(b.chunks, i, i+1)
	}
	chunk.batch = nil
	c.letGo(b)
}

func (c *gradCore) dropAll(t *gradTx) {
	for _, chunk := range t.chunks {
		c.drop(chunk)
	}
	t.chunks = nil
}

// spill copies what is held of the oldest batch to the heap and gives the batch back. It returns how many bytes that were, and false if there is nothing to give back, or what was
// copied was no longer there.
func (c *gradCore) spill() (n int64, ok bool) {
	for len(c.held) > 0 && c.held[0].lease == nil {
		c.held = c.held[1:]
	}
	if len(c.held) == 0 || c.held[0].rows > 0 {
		return 0, false
	}
	b := c.held[0]
	for _, chunk := range b.chunks {
		chunk.data = bytes.Clone(chunk.data)
		chunk.batch = nil
		n += int64(len(chunk.data))
	}
	intact := b.lease.Intact()
	b.chunks = nil
	c.letGo(b)
	c.counts.spilled.Add(n)
	c.counts.spilledAll.Add(uint64(n))
	return n, intact
}

// release gives everything back, at the end.
func (c *gradCore) release() {
	for _, b := range c.held {
		if b.lease != nil {
			b.lease.Release()
			b.lease, b.rows, b.chunks = nil, 0, nil
		}
	}
	c.held, c.holding = nil, 0
	clear(c.producers)
}
