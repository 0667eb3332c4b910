package tcpingest

import (
	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/ring"
)

// target is a row of reserved slots, possibly in several batches, that one read fills. Byte offsets in it count as the bytes come: sample
// after sample, leaves in order.
type target struct {
	stream *drainer.Stream
	plan   *plan
	runs   []ring.Run
}

func (t *target) samples() int64 {
	n := int64(0)
	for _, r := range t.runs {
		n += int64(r.N)
	}
	return n
}

// vectors lists in v the places for the bytes from offset off on, at most readBytes of them and vectorsMax places.
func (t *target) vectors(v *vector, off int64) {
	v.reset()
	left := int64(readBytes)
	for _, run := range t.runs {
		size := int64(run.N) * t.plan.sample
		if off >= size {
			off -= size
			continue
		}
		if t.plan.way == direct {
			b := t.stream.Column(run, 0)[off:]
			b = b[:min(int64(len(b)), left)]
			v.add(b)
			left -= int64(len(b))
		} else {
			left = t.leafVectors(v, run, off, left)
		}
		if off = 0; left == 0 || len(v.parts) == vectorsMax {
			return
		}
	}
}

// leafVectors does so for the leaves of one run and returns how many bytes may still be listed.
func (t *target) leafVectors(v *vector, run ring.Run, off, left int64) int64 {
	row, off := off/t.plan.sample, off%t.plan.sample
	for ; row < int64(run.N); row++ {
		for leaf, size := range t.plan.leaves {
			if off >= size {
				off -= size
				continue
			}
			if left == 0 || len(v.parts) == vectorsMax {
				return left
			}
			cell := t.stream.Column(run, leaf)[row*size+off : (row+1)*size]
			cell = cell[:min(int64(len(cell)), left)]
			v.add(cell)
			left -= int64(len(cell))
			off = 0
		}
	}
	return left
}

// scatter copies whole samples from src, which holds exactly those of the target.
func (t *target) scatter(src []byte) {
	sample := t.plan.sample
	for _, run := range t.runs {
		n := int64(run.N)
		for leaf, size := range t.plan.leaves {
			scatterLeaf(t.stream.Column(run, leaf), src[t.plan.offsets[leaf]:], size, sample, n)
			failpoint.Hit("tcpingest/scatter/leaf")
		}
		src = src[n*sample:]
	}
}

// scatterLeaf copies one leaf of n samples. Small sizes are spelt out: a copy of constant size is one
// move, not a call; between two such sizes, two moves that overlap.
func scatterLeaf(col, src []byte, size, sample, n int64) {
	switch {
	case size == 1:
		for i := range n {
			col[i] = src[i*sample]
		}
	case size == 4:
		for i := range n {
			*(*[4]byte)(col[i*4:]) = [4]byte(src[i*sample:])
		}
	case size == 8:
		for i := range n {
			*(*[8]byte)(col[i*8:]) = [8]byte(src[i*sample:])
		}
	case size > 8 && size <= 16:
		for i := range n {
			to, from := col[i*size:(i+1)*size], src[i*sample:i*sample+size]
			*(*[8]byte)(to) = [8]byte(from)
			*(*[8]byte)(to[size-8:]) = [8]byte(from[size-8:])
		}
	case size > 16 && size <= 32:
		for i := range n {
			to, from := col[i*size:(i+1)*size], src[i*sample:i*sample+size]
			*(*[16]byte)(to) = [16]byte(from)
			*(*[16]byte)(to[size-16:]) = [16]byte(from[size-16:])
		}
	default:
		for i := range n {
			copy(col[i*size:(i+1)*size], src[i*sample:])
		}
	}
}

// put copies src to offset 0 of the target: the part of its first sample that came before the slots were reserved. It must be shorter than a sample.
func (t *target) put(src []byte) {
	for leaf, size := range t.plan.leaves {
		n := copy(t.stream.Column(t.runs[0], leaf)[:size], src)
		if src = src[n:]; len(src) == 0 {
			return
		}
	}
}
