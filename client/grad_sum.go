//go:build linux

package client

import (
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/reduce"
	"github.com/ingestd/ingestd/tensor"
)

// How much is summed at a time where a sum is made in several passes, so that it stays in the cache; and from how much on it is worth another goroutine.
const (
	passElements  = 16 << 10
	parallelBytes = 4 << 20
)

// gradSum is the sum of a step, or of those who are expected to be part of it, as it is made while chunks come in. Units are summed when all members have all of them.
type gradSum struct {
	step    uint64
	least   int // members, for it to be worth the work
	layout  *gradLayout
	out     [][]float32 // by tensor; nil: not wanted
	units   []gradUnit  // by from
	members []*gradTx
	missing []*gradProducer // expected, of whom nothing came yet
	scaled  bool            // some units need a scale that lies elsewhere
	waits   []int           // per unit: members that lack something of it
	done    []bool
}

// newGradSum makes the sum of a step into slices by name, which must be those of the manifest.
func newGradSum(step uint64, least int, layout *gradLayout, into map[string][]float32, chunkBytes int) (*gradSum, error) {
	s := &gradSum{step: step, least: least, layout: layout, out: make([][]float32, layout.m.Len())}
	wanted := make([]bool, layout.m.Len())
	for name, values := range into {
		i, ok := layout.m.Index(name)
		if !ok {
			return nil, unknownTensor(layout.m, name)
		}
		t := layout.m.Tensor(i)
		switch {
		case layout.kinds[i] == 0 && !layout.isSparse(i):
			return nil, fmt.Errorf("client: tensor %q is %s, which cannot be summed; only F32, F16, BF16 and encodings can", name, t.Type())
		case int64(len(values)) != t.Elements():
			return nil, fmt.Errorf("client: the sum of tensor %q, %s, has %d elements; %d are given for it", name, t.Type(), t.Elements(), len(values))
		}
		s.out[i], wanted[i] = values, true
	}
	s.units = layout.units(wanted, int64(chunkBytes))
	s.scaled = slices.ContainsFunc(s.units, func(u gradUnit) bool { return u.scaleOf >= 0 })
	s.waits, s.done = make([]int, len(s.units)), make([]bool, len(s.units))
	return s, nil
}

// expect says who is part of the sum: transactions in the order of names, and producers of whom nothing came yet. What was summed of others is summed anew.
func (s *gradSum) expect(members []*gradTx, missing []*gradProducer) {
	if slices.Equal(members, s.members) && slices.Equal(missing, s.missing) && !slices.ContainsFunc(members, func(t *gradTx) bool { return t.lacks == nil }) {
		return
	}
	s.members, s.missing = members, missing
	clear(s.done)
	for u := range s.waits {
		s.waits[u] = len(missing)
	}
	for _, t := range members {
		t.lacks = make([]int64, len(s.units))
		for u := range s.units {
			t.lacks[u] = s.units[u].needs(s.layout, t)
		}
		for _, chunk := range t.chunks {
			s.bring(t, chunk, func(int) {})
		}
		for u, n := range t.lacks {
			if n > 0 {
				s.waits[u]++
			}
		}
	}
	for u := range s.units {
		s.reduceWhole(u)
	}
}

// bring takes what a chunk brings from what its transaction lacks, and calls whole for each unit of which it has everything now.
func (s *gradSum) bring(t *gradTx, chunk *gradChunk, whole func(u int)) {
	give := func(u int, n int64) {
		if n == 0 {
			return
		}
		if t.lacks[u] -= n; t.lacks[u] == 0 {
			whole(u)
		}
	}
	k := sort.Search(len(s.units), func(k int) bool { return s.units[k].to > chunk.flat })
	for ; k < len(s.units) && s.units[k].from < chunk.end(); k++ {
		u := &s.units[k]
		give(k, s.layout.bytes(max(u.from, chunk.flat), min(u.to, chunk.end())))
	}
	if !s.scaled {
		return
	}
	m := s.layout.m
	for i := m.At(chunk.flat); i < m.Len() && m.Offset(i) < chunk.end(); i++ {
		if !s.layout.scaled(i) || m.Offset(i) < chunk.flat {
			continue
		}
		k := sort.Search(len(s.units), func(k int) bool { return s.units[k].from > m.Offset(i) })
		for ; k < len(s.units) && s.units[k].scaleOf == i; k++ {
			give(k, tensor.ScaleBytes)
		}
	}
}

// arrived sums what a chunk completes.
func (s *gradSum) arrived(t *gradTx, chunk *gradChunk) {
	if t.lacks == nil || !slices.Contains(s.members, t) {
		return
	}
	s.bring(t, chunk, func(u int) {
		s.waits[u]--
		s.reduceWhole(u)
	})
}

// reduceWhole sums a unit if all members have all of it.
func (s *gradSum) reduceWhole(u int) {
	if s.waits[u] == 0 && !s.done[u] && len(s.members) >= s.least && len(s.members) > 0 {
		s.reduce(u)
	}
}

// finish sums all that was not yet, when all members are complete.
func (s *gradSum) finish() {
	var left []int
	bytes := int64(0)
	for u, done := range s.done {
		if !done {
			left = append(left, u)
			bytes += s.units[u].to - s.units[u].from
		}
	}
	workers := min(runtime.GOMAXPROCS(0), len(left), int(bytes*int64(max(1, len(s.members)))/parallelBytes))
	var next atomic.Int64
	work := func() {
		for k := next.Add(1) - 1; k < int64(len(left)); k = next.Add(1) - 1 {
			s.reduce(left[k])
		}
	}
	var others sync.WaitGroup
	for range workers - 1 {
		others.Go(work)
	}
	work()
	others.Wait()
}

// reduce sums one unit.
func (s *gradSum) reduce(u int) {
	unit := &s.units[u]
	for i := unit.first; i <= unit.last; i++ {
		out := s.out[i]
		if out == nil {
			continue
		}
		var of []*gradTx
		for _, t := range s.members {
			if t.has(i) {
				of = append(of, t)
			}
		}
		at := s.layout.m.Offset(i)
		from, to := max(unit.from, at), min(unit.to, at+s.layout.m.EncodedBytes(i))
		switch {
		case from >= to:
		case s.layout.isSparse(i):
			sumSparse(out, of, from, to)
		default:
			sumDense(out, of, s.layout, i, from, to)
		}
	}
	s.done[u] = true
}

// sumSparse adds pairs to zeros. They were checked when they came; one that changed since, in memory that its producer may still write to, is left out.
func sumSparse(out []float32, of []*gradTx, from, to int64) {
	clear(out)
	for _, t := range of {
		for at := from; at < to; {
			pairs := t.at(at)
			pairs = pairs[:min(int64(len(pairs)), to-at)]
			_ = reduce.AddSparse(out, pairs)
			at += int64(len(pairs))
		}
	}
}

// sumDense sums a flat range of one tensor.
func sumDense(out []float32, of []*gradTx, l *gradLayout, i int, from, to int64) {
	kind, start := l.kinds[i], l.m.Offset(i)
	if l.scaled(i) {
		start += tensor.ScaleBytes
	}
	size := int64(kind.Bytes())
	if len(of) == 0 {
		clear(out[(from-start)/size : (to-start)/size])
		return
	}
	pieces := make([][]byte, len(of))
	for at := from; at < to; {
		end := to
		for k, t := range of {
			pieces[k] = t.at(at)
			end = min(end, at+int64(len(pieces[k])))
		}
		for k := range pieces {
			pieces[k] = pieces[k][:end-at]
		}
		part := out[(at-start)/size : (end-start)/size]
		if kind == reduce.F32 {
			sumF32(part, pieces)
		} else {
			sumNarrow(part, pieces, of, l, i)
		}
		at = end
	}
}

func sumF32(out []float32, pieces [][]byte) {
	n := min(len(pieces), reduce.SumMax)
	reduce.Sum(out, pieces[:n]...)
	for rest := pieces[n:]; len(rest) > 0; rest = rest[n:] {
		n = min(len(rest), reduce.SumMax)
		reduce.AddAll(out, rest[:n]...)
	}
}

func sumNarrow(out []float32, pieces [][]byte, of []*gradTx, l *gradLayout, i int) {
	kind := l.kinds[i]
	for at := 0; at < len(out); at += passElements {
		end := min(len(out), at+passElements)
		for k, piece := range pieces {
			scale := float32(1)
			if l.scaled(i) {
				scale = math.Float32frombits(binary.LittleEndian.Uint32(of[k].at(l.m.Offset(i))))
			}
			part := piece[at*kind.Bytes() : end*kind.Bytes()]
			if k == 0 {
				reduce.Set(out[at:end], part, kind, scale)
			} else {
				reduce.Add(out[at:end], part, kind, scale)
			}
		}
	}
}
