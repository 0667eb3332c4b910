//go:build linux

package client

import (
	"fmt"
	"sort"

	"github.com/ingestd/ingestd/reduce"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// gradLayout is a manifest as a reader sees it.
type gradLayout struct {
	m      *tensor.Manifest
	kinds  []reduce.Kind // of the tensors' elements; 0: they cannot be summed, or are sparse
	sparse []int         // tensors of pairs, ascending
	before []int64       // bytes of tensors before each
}

func newGradLayout(m *tensor.Manifest) *gradLayout {
	l := &gradLayout{m: m, kinds: make([]reduce.Kind, m.Len()), before: make([]int64, m.Len()+1)}
	for i := range m.Len() {
		t := m.Tensor(i)
		l.kinds[i] = kindOf(&t)
		if t.Encoding.Kind == tensor.TopK {
			l.sparse = append(l.sparse, i)
		}
		l.before[i+1] = l.before[i] + m.EncodedBytes(i)
	}
	return l
}

func kindOf(t *tensor.Tensor) reduce.Kind {
	switch t.Encoding.Kind {
	case tensor.BF16:
		return reduce.BF16
	case tensor.F16:
		return reduce.F16
	case tensor.F8E4M3:
		return reduce.F8E4M3
	case tensor.F8E5M2:
		return reduce.F8E5M2
	case tensor.Raw:
		switch t.DType {
		case spec.F32:
			return reduce.F32
		case spec.F16:
			return reduce.F16
		case spec.BF16:
			return reduce.BF16
		}
	}
	return 0
}

// all is how many bytes all tensors have.
func (l *gradLayout) all() int64 { return l.before[l.m.Len()] }

// isSparse says whether a tensor consists of pairs.
func (l *gradLayout) isSparse(i int) bool {
	k := sort.SearchInts(l.sparse, i)
	return k < len(l.sparse) && l.sparse[k] == i
}

// scaled says whether a tensor's bytes begin with a scale.
func (l *gradLayout) scaled(i int) bool {
	return l.kinds[i] == reduce.F8E4M3 || l.kinds[i] == reduce.F8E5M2
}

// bytes is how many bytes of tensors lie in a flat range.
func (l *gradLayout) bytes(from, to int64) int64 { return l.bytesBefore(to) - l.bytesBefore(from) }

func (l *gradLayout) bytesBefore(flat int64) int64 {
	i := l.m.At(flat)
	if i == l.m.Len() {
		return l.before[i]
	}
	return l.before[i] + max(0, flat-l.m.Offset(i))
}

// checkSparse checks the indexes of all pairs in a run of flat bytes.
func (l *gradLayout) checkSparse(flat int64, data []byte) error {
	if len(l.sparse) == 0 {
		return nil
	}
	end := flat + int64(len(data))
	for k := sort.SearchInts(l.sparse, l.m.At(flat)); k < len(l.sparse); k++ {
		i := l.sparse[k]
		from, to := l.m.Offset(i), l.m.Offset(i)+l.m.EncodedBytes(i)
		if from >= end {
			break
		}
		from, to = max(from, flat), min(to, end)
		t := l.m.Tensor(i)
		if err := reduce.CheckSparse(data[from-flat:to-flat], int(t.Elements())); err != nil {
			return &tensor.ChunkError{Tensor: t.Name, Offset: from - l.m.Offset(i), Reason: fmt.Sprint("pairs from here on: ", err)}
		}
	}
	return nil
}

// gradUnit is what is summed at once: a part of the flat range that a chunk may have, of one or more tensors with elements one after another; or all of one tensor of
// pairs.
type gradUnit struct {
	first, last int   // tensors
	from, to    int64 // flat; of a tensor with a scale without that
	scaleOf     int   // tensor whose scale, which lies elsewhere, is needed too; -1: none
}

// needs is how many bytes of a producer a unit needs.
func (u *gradUnit) needs(l *gradLayout, t *gradTx) int64 {
	scale := int64(0)
	if u.scaleOf >= 0 {
		scale = tensor.ScaleBytes
	}
	if t == nil || t.subset == nil {
		return l.bytes(u.from, u.to) + scale
	}
	n := int64(0)
	for i := u.first; i <= u.last; i++ {
		if t.has(i) {
			n += max(0, min(u.to, l.m.Offset(i)+l.m.EncodedBytes(i))-max(u.from, l.m.Offset(i))) + scale
		}
	}
	return n
}

// units cuts the tensors that are wanted into units of at most so many flat bytes.
func (l *gradLayout) units(wanted []bool, most int64) []gradUnit {
	var all []gradUnit
	open := false // the last unit may go on
	for i := range l.m.Len() {
		from, to := l.m.Offset(i), l.m.Offset(i)+l.m.EncodedBytes(i)
		switch {
		case !wanted[i] || from == to:
			continue
		case l.isSparse(i):
			all = append(all, gradUnit{i, i, from, to, -1})
			open = false
			continue
		}
		scaleOf := -1
		if l.scaled(i) {
			from, scaleOf, open = from+tensor.ScaleBytes, i, false
		}
		for from < to {
			cell := from / most
			end := min(to, (cell+1)*most)
			if u := len(all) - 1; open && all[u].from/most == cell {
				all[u].last, all[u].to = i, end
			} else {
				all = append(all, gradUnit{i, i, from, end, scaleOf})
			}
			from, open = end, scaleOf < 0
		}
	}
	return all
}
