//go:build linux

package client

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/ingestd/ingestd/tensor"
)

// gradTx is what came of one transaction.
type gradTx struct {
	producer *gradProducer
	step     uint64
	layout   *gradLayout
	covered  *tensor.Coverage
	chunks   []*gradChunk // by flat offset
	subset   []uint32     // tensors of which it consists; nil: all, or not known yet
	latest   time.Time    // when its last chunk came
	lacks    []int64      // per unit of the sum that is being made: bytes that it needs and has not
}

// at returns the data at a flat offset, to the end of its chunk.
func (t *gradTx) at(flat int64) []byte {
	i, found := slices.BinarySearchFunc(t.chunks, flat, func(c *gradChunk, flat int64) int { return cmp.Compare(c.flat, flat) })
	if !found {
		i--
	}
	c := t.chunks[i]
	return c.data[flat-c.flat:]
}

// has says whether the transaction has a tensor.
func (t *gradTx) has(i int) bool {
	if t.subset == nil {
		return true
	}
	_, found := slices.BinarySearch(t.subset, uint32(i))
	return found
}

func (t *gradTx) progress() string {
	have, of := t.covered.Bytes(t.subset)
	return fmt.Sprintf("incomplete: %d of %d bytes", have, of)
}

// addChunk verifies the data of a chunk and adds it to its transaction.
func (c *gradCore) addChunk(b *gradBatch, t *gradTx, h *tensor.Header, data []byte) error {
	data = data[:h.Length:h.Length]
	if err := h.CheckData(t.layout.m, data); err != nil {
		return err
	}
	t.latest = c.now()
	if h.Flags&tensor.FlagEnd != 0 {
		subset, err := tensor.ParseEnd(t.layout.m, data)
		if err != nil {
			return err
		}
		return c.setSubset(t, subset)
	}
	if h.Length == 0 {
		return nil
	}
	flat := h.Flat(t.layout.m)
	if err := t.layout.checkSparse(flat, data); err != nil {
		return err
	}
	switch added := t.covered.Add(flat, h.Length, h.DataCRC); added {
	case tensor.Same:
		if h.Flags&tensor.FlagNoCRC != 0 && !bytes.Equal(t.at(flat)[:len(data)], data) {
			return &tensor.ChunkError{Tensor: t.layout.m.Tensor(int(h.Tensor)).Name, Offset: int64(h.Offset), Reason: "other bytes came for this place before"}
		}
		c.counts.duplicates.Add(1)
		return nil
	case tensor.New:
	default:
		return &tensor.ChunkError{Tensor: t.layout.m.Tensor(int(h.Tensor)).Name, Offset: int64(h.Offset), Reason: fmt.Sprintf("%v: bytes of it came before", added)}
	}
	chunk := &gradChunk{flat: flat, data: data, batch: b}
	b.chunks = append(b.chunks, chunk)
	i := len(t.chunks)
	if i > 0 && t.chunks[i-1].flat > flat {
		i, _ = slices.BinarySearchFunc(t.chunks, flat, func(c *gradChunk, flat int64) int { return cmp.Compare(c.flat, flat) })
	}
	t.chunks = slices.Insert(t.chunks, i, chunk)
	if t.subset != nil {
		if err := t.onlySubset(chunk); err != nil {
			return err
		}
	}
	switch {
	case c.asked == nil || c.asked.step != t.step:
	case c.changed: // its members may not be what they were
		t.lacks = nil
	default:
		c.asked.arrived(t, chunk)
	}
	return nil
}

// setSubset notes of which tensors a transaction consists. There may be bytes of no others.
func (c *gradCore) setSubset(t *gradTx, subset []uint32) error {
	t.subset, t.lacks = subset, nil
	for _, chunk := range t.chunks {
		if err := t.onlySubset(chunk); err != nil {
			return err
		}
	}
	c.changed = true
	return nil
}

// onlySubset checks that a chunk has bytes of no tensor that the transaction's end does not list.
func (t *gradTx) onlySubset(chunk *gradChunk) error {
	m := t.layout.m
	for i := m.At(chunk.flat); i < m.Len() && m.Offset(i) < chunk.end(); i++ {
		if m.EncodedBytes(i) > 0 && !t.has(i) {
			return fmt.Errorf("chunk: the step's end does not list tensor %q, of which bytes came", m.Tensor(i).Name)
		}
	}
	return nil
}
