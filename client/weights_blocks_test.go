//go:build linux

package client

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/ingestd/ingestd/tensor"
)

// TestBlocks: what is copied and summed in blocks is what copy and tensor.CRC make of each tensor, whatever its size; a tensor without a source stays as it is.
func TestBlocks(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	sizes := []int64{0, 1, 255, 256, 257, blockBytes - 1, blockBytes, blockBytes + 1, 3*blockBytes + 5, 0}
	for range 50 {
		sizes = append(sizes, rng.Int64N(1000))
	}
	m := vectors(t, sizes...)
	data, sources := make([]byte, m.DataBytes()), make([][]byte, m.Len())
	for i := range sources {
		if i%7 == 3 {
			copy(data[m.Offset(i):], tensorContent(9, i, sizes[i])) // was written in place
			continue
		}
		sources[i] = tensorContent(1, i, sizes[i])
	}
	b := newBlocks(m)
	for range 2 {
		sums := b.run(data, sources)
		for i, n := range sizes {
			version := uint64(1)
			if sources[i] == nil {
				version = 9
			}
			want := tensorContent(version, i, n)
			if got := data[m.Offset(i):][:n]; !bytes.Equal(got, want) || sums[i] != tensor.CRC(want) {
				t.Errorf("tensor %d of %d bytes: sum %08x, want %08x", i, n, sums[i], tensor.CRC(want))
			}
		}
	}
	next := int64(0)
	for i := range m.Len() { // the bytes between are not touched
		for ; next < m.Offset(i); next++ {
			if data[next] != 0 {
				t.Fatalf("byte %d lies between tensors and is %d", next, data[next])
			}
		}
		next += m.EncodedBytes(i)
	}
}

// BenchmarkBlocks is copying and summing beside copying alone: what a publication costs above one memcpy.
func BenchmarkBlocks(b *testing.B) {
	const n = 64 << 20
	m := vectors(b, n/2, n/4, n/4)
	data, source := make([]byte, m.DataBytes()), tensorContent(1, 0, m.DataBytes())
	sources := make([][]byte, m.Len())
	for i := range sources {
		sources[i] = source[m.Offset(i):][:m.EncodedBytes(i)]
	}
	blocks := newBlocks(m)
	b.Run("copy", func(b *testing.B) {
		b.SetBytes(n)
		for b.Loop() {
			copy(data, source)
		}
	})
	b.Run("copy and sum", func(b *testing.B) {
		b.SetBytes(n)
		for b.Loop() {
			blocks.run(data, sources)
		}
	})
	b.Run("sum", func(b *testing.B) {
		b.SetBytes(n)
		for b.Loop() {
			blocks.sum(data)
		}
	})
}
