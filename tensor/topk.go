package tensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// magnitude orders elements by size, of 31 bits: NaNs are the largest and equal to each other.
func magnitude(x float32) uint32 { return min(math.Float32bits(x)&^f32Sign, f32Infinite+1) }

// encodeTop writes the len(dst)/PairBytes largest elements, by ascending index. They are selected by three counts of 11, 10 and 10 bits of their magnitudes, in linear time and
// without sorting.
func encodeTop(dst []byte, x []float32) {
	least, ties := selectTop(x, len(dst)/PairBytes)
	for i, v := range x {
		m := magnitude(v)
		if m < least || m == least && ties == 0 {
			continue
		}
		if m == least {
			ties--
		}
		binary.LittleEndian.PutUint32(dst, uint32(i))
		binary.LittleEndian.PutUint32(dst[4:], math.Float32bits(v))
		dst = dst[PairBytes:]
	}
}

// selectTop returns the magnitude of the k-th largest element, and how many elements of just that magnitude are among the k.
func selectTop(x []float32, k int) (least uint32, ties int) {
	var counts [1 << 11]int
	known := uint32(0) // the bits of least that are known
	for _, digit := range [...]struct{ shift, bits int }{{20, 11}, {10, 10}, {0, 10}} {
		clear(counts[:])
		above := digit.shift + digit.bits
		for _, v := range x {
			if m := magnitude(v); m>>above == known>>above {
				counts[m>>digit.shift&(1<<digit.bits-1)]++
			}
		}
		d := 1<<digit.bits - 1
		for ; counts[d] < k; d-- {
			k -= counts[d]
		}
		known |= uint32(d) << digit.shift
	}
	return known, k
}

// Feedback is a producer's memory for one top-k tensor: what was not sent is added to the next step's gradient (error feedback; Seide et al., 2014; Stich et al., 2018).
// It belongs to one goroutine, and has twice the memory of the tensor.
type Feedback struct {
	t        Tensor
	residual []float32
	next     []float32 // after the step that was encoded and is not committed
	encoded  bool
}

// NewFeedback is for one tensor whose encoding is TopK. Its residual is zero.
func NewFeedback(t *Tensor) (*Feedback, error) {
	if t.Encoding.Kind != TopK {
		return nil, fmt.Errorf("tensor %q: its encoding is %q; only topk has error feedback", t.Name, t.Encoding)
	}
	if _, err := t.encodedBytes(); err != nil {
		return nil, fmt.Errorf("tensor %q: %w", t.Name, err)
	}
	n := t.Elements()
	return &Feedback{t: *t, residual: make([]float32, n), next: make([]float32, n)}, nil
}

// Encode writes the K largest elements of residual + gradient into dst. The residual changes with Commit only; encoding again before that begins with the same residual.
func (f *Feedback) Encode(dst []byte, gradient []float32) error {
	if err := f.t.checkLengths(dst, gradient); err != nil {
		return err
	}
	for i, v := range gradient {
		f.next[i] = f.residual[i] + v
	}
	encodeTop(dst, f.next)
	for at := 0; at < len(dst); at += PairBytes {
		f.next[binary.LittleEndian.Uint32(dst[at:])] = 0
	}
	f.encoded = true
	return nil
}

// Commit is for when the step that was encoded last is complete.
func (f *Feedback) Commit() error {
	if !f.encoded {
		return errors.New("tensor: nothing was encoded since the last Commit or Rollback")
	}
	f.residual, f.next, f.encoded = f.next, f.residual, false
	return nil
}

// Rollback is for when it was aborted: the residual is as it was before.
func (f *Feedback) Rollback() { f.encoded = false }

// Residual is what was not sent, as of the last Commit. It is the Feedback's own memory: to keep it with a checkpoint, copy it; to go on from one, write to it.
func (f *Feedback) Residual() []float32 { return f.residual }
