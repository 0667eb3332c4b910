package reduce

import (
	"encoding/binary"
	"fmt"
	"math"
	"testing"
)

// BenchmarkAdd shows each kernel beside the loop `out[i] += x[i]` over as many elements, which lie in memory (16 Mi of them) or in the cache (16 Ki).
// MB/s are bytes of float32 added, so that all can be compared.
func BenchmarkAdd(b *testing.B) {
	for _, n := range []int{16 << 10, 16 << 20} {
		out, x := make([]float32, n), make([]float32, n)
		src := make([]byte, 4*n)
		for i := range x {
			x[i] = float32(i)
			binary.LittleEndian.PutUint32(src[4*i:], math.Float32bits(x[i]))
		}
		b.Run(fmt.Sprintf("loop/%d", n), func(b *testing.B) {
			b.SetBytes(int64(4 * n))
			for b.Loop() {
				for i := range out {
					out[i] += x[i]
				}
			}
		})
		b.Run(fmt.Sprintf("copy/%d", n), func(b *testing.B) {
			b.SetBytes(int64(4 * n))
			for b.Loop() {
				copy(out, x)
			}
		})
		for _, kind := range allKinds {
			b.Run(fmt.Sprintf("%v/%d", kind, n), func(b *testing.B) {
				b.SetBytes(int64(4 * n))
				for b.Loop() {
					Add(out, src[:n*kind.Bytes()], kind, 0.5)
				}
			})
			b.Run(fmt.Sprintf("%v, Go/%d", kind, n), func(b *testing.B) {
				b.SetBytes(int64(4 * n))
				for b.Loop() {
					addGo(out, src[:n*kind.Bytes()], kind, 0.5)
				}
			})
		}
	}
}

// BenchmarkSum adds eight arrays of 64 MiB in three ways: each as a whole, each in blocks whose sum stays in the cache, and all at once. MB/s are bytes of
// the sources.
func BenchmarkSum(b *testing.B) {
	const n, producers = 16 << 20, 8
	out := make([]float32, n)
	srcs := make([][]byte, producers)
	for i := range srcs {
		srcs[i] = make([]byte, 4*n)
		for j := 0; j < len(srcs[i]); j += 4096 {
			srcs[i][j] = 1
		}
	}
	b.Run("whole", func(b *testing.B) {
		b.SetBytes(producers * 4 * n)
		for b.Loop() {
			Set(out, srcs[0], F32, 1)
			for _, src := range srcs[1:] {
				Add(out, src, F32, 1)
			}
		}
	})
	for _, block := range []int{4 << 10, 16 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("blocks of %d KiB", block*4>>10), func(b *testing.B) {
			b.SetBytes(producers * 4 * n)
			for b.Loop() {
				for at := 0; at < n; at += block {
					Set(out[at:at+block], srcs[0][4*at:4*(at+block)], F32, 1)
					for _, src := range srcs[1:] {
						Add(out[at:at+block], src[4*at:4*(at+block)], F32, 1)
					}
				}
			}
		})
	}
	b.Run("at once", func(b *testing.B) {
		b.SetBytes(producers * 4 * n)
		for b.Loop() {
			Sum(out, srcs...)
		}
	})
}
