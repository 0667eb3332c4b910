package client

import (
	"fmt"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
)

// Weights is a generation, held until Release: it is whole and does not change. Asking it for tensors after that panics; the slices it gave out must not be
// used any more either, and show other data if they are.
//
// All methods may be called from any goroutine.
type Weights struct {
	table    string
	held     *heldWeights
	released atomic.Bool
}

// BadSumError says that the bytes of a tensor are not those that were published: somebody wrote over them, or memory or a disk failed.
type BadSumError struct {
	Table      string
	Generation uint64
	Tensor     string // "": the digest does not agree with the sums
	Got, Want  uint32 // CRCs
}

func (e *BadSumError) Error() string {
	if e.Tensor == "" {
		return fmt.Sprintf("generation %d of table %q: its digest is not that of its sums: do not use it", e.Generation, e.Table)
	}
	return fmt.Sprintf("generation %d of table %q: tensor %q has the sum %08x, it was published with %08x: do not use it",
		e.Generation, e.Table, e.Tensor, e.Got, e.Want)
}

// Release lets go of the generation. Releasing twice is no error, so it can be deferred.
func (w *Weights) Release() {
	if w.released.CompareAndSwap(false, true) {
		w.held.release()
	}
}

func (w *Weights) check() *heldWeights {
	if w.released.Load() {
		panic(fmt.Sprintf("client: generation %d of table %q is used after its Release", w.held.generation, w.table))
	}
	return w.held
}

// Generation returns its number.
func (w *Weights) Generation() uint64 { return w.held.generation }

// Digest says which bytes it has: SHA-256 over the manifest's fingerprint and the sums.
func (w *Weights) Digest() spec.Fingerprint { return w.held.digest }

// Published returns when it was published, by the daemon's clock.
func (w *Weights) Published() time.Time { return w.held.published }

// Manifest returns what tensors it has.
func (w *Weights) Manifest() *tensor.Manifest { return w.held.manifest }

// At returns the bytes of tensor i as the manifest's encoding has them, starting on a multiple of 64. It is shared memory and read-only: writing to it may
// end the process. An index that is not there panics.
func (w *Weights) At(i int) []byte {
	h := w.check()
	from, n := h.manifest.Offset(i), h.manifest.EncodedBytes(i)
	return h.data[from : from+n : from+n]
}

// Tensor is At by the tensor's name.
func (w *Weights) Tensor(name string) ([]byte, error) {
	i, err := w.index(name)
	if err != nil {
		return nil, err
	}
	return w.At(i), nil
}

func (w *Weights) index(name string) (int, error) {
	i, ok := w.held.manifest.Index(name)
	if !ok {
		return 0, fmt.Errorf("client: generation %d of table %q has no tensor %q; it has %d, see Manifest", w.held.generation, w.table, name, w.held.manifest.Len())
	}
	return i, nil
}

// Rows returns rows from to before (exclusive) of a tensor, along its first dimension. Only of a tensor without an encoding.
func (w *Weights) Rows(name string, from, before int64) ([]byte, error) {
	i, err := w.index(name)
	if err != nil {
		return nil, err
	}
	t := w.held.manifest.Tensor(i)
	if t.Encoding != (tensor.Encoding{}) || len(t.Shape) == 0 {
		return nil, fmt.Errorf("client: tensor %q, %s, has no rows of bytes", name, t.Type())
	}
	if from < 0 || before < from || before > t.Shape[0] {
		return nil, fmt.Errorf("client: rows %d to %d of tensor %q, which has %d", from, before, name, t.Shape[0])
	}
	if t.Shape[0] == 0 {
		return nil, nil
	}
	row := w.held.manifest.EncodedBytes(i) / t.Shape[0]
	return w.At(i)[from*row : before*row : before*row], nil
}

// Selected is a tensor that Select found.
type Selected struct {
	Index int // in the manifest
	tensor.Tensor
	Data []byte // as Weights.At
}

// Select returns the tensors whose names match a pattern, in the manifest's order: * stands for any characters, ? for one, [a-z] for one of these. A pattern
// that is malformed is path.ErrBadPattern.
func (w *Weights) Select(pattern string) ([]Selected, error) {
	slashless := strings.NewReplacer("/", "\x00") // to path.Match a slash is not any character; names have no zero byte
	pattern = slashless.Replace(pattern)
	var found []Selected
	for i, m := 0, w.held.manifest; i < m.Len(); i++ {
		t := m.Tensor(i)
		ok, err := path.Match(pattern, slashless.Replace(t.Name))
		if err != nil {
			return nil, fmt.Errorf("client: the pattern %q: %w", pattern, err)
		}
		if ok {
			found = append(found, Selected{i, t, w.At(i)})
		}
	}
	return found, nil
}

// Verify compares every tensor with its sum, and the sums with the digest: a *BadSumError says which is wrong. It reads everything once, on all cores.
func (w *Weights) Verify() error {
	h := w.check()
	sums := make([]uint32, h.manifest.Len())
	for i := range sums {
		sums[i] = h.sum(i)
	}
	if weights.Digest(h.manifest, sums) != h.digest {
		return &BadSumError{Table: w.table, Generation: h.generation}
	}
	got := newBlocks(h.manifest).sum(h.data)
	for i, sum := range got {
		if sum != sums[i] {
			return &BadSumError{Table: w.table, Generation: h.generation, Tensor: h.manifest.Tensor(i).Name, Got: sum, Want: sums[i]}
		}
	}
	return nil
}

// CopyInto verifies the generation and copies tensors into the caller's memory, by name: each must have the length of its tensor. Nothing is copied if the
// generation or one of the lengths is wrong.
func (w *Weights) CopyInto(into map[string][]byte) error {
	for name, dst := range into {
		i, err := w.index(name)
		if err != nil {
			return err
		}
		if n := w.held.manifest.EncodedBytes(i); int64(len(dst)) != n {
			return fmt.Errorf("client: tensor %q has %d bytes, and there are %d to copy it to", name, n, len(dst))
		}
	}
	if err := w.Verify(); err != nil {
		return err
	}
	for name, dst := range into {
		i, _ := w.held.manifest.Index(name)
		copy(dst, w.At(i))
	}
	return nil
}
