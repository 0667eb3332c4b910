package crc32c

import (
	"fmt"
	"hash/crc32"
	"testing"
)

var benchSum uint32

// BenchmarkSum compares the kernel with hash/crc32, from the shortest inputs to what no cache holds.
func BenchmarkSum(b *testing.B) {
	for _, n := range []int{64, 128, 192, 256, 320, 512, 1 << 10, 4 << 10, 64 << 10, 1 << 20, 64 << 20, 512 << 20} {
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(i)
		}
		for _, way := range []struct {
			name string
			do   func()
		}{
			{"here", func() { benchSum = Update(benchSum, data) }},
			{"stdlib", func() { benchSum = crc32.Update(benchSum, table, data) }},
		} {
			benchmark(b, way.name, n, way.do)
		}
	}
}

// BenchmarkCopy compares copies with and without a sum with copy.
func BenchmarkCopy(b *testing.B) {
	for _, n := range []int{4 << 10, 64 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20, 512 << 20} {
		src, dst := make([]byte, n), make([]byte, n)
		for i := range src {
			src[i], dst[i] = byte(i), 1
		}
		for _, way := range []struct {
			name string
			do   func()
		}{
			{"copy", func() { copy(dst, src) }},
			{"Copy", func() { benchSum = Copy(benchSum, dst, src) }},
			{"CopyPast", func() { benchSum = CopyPast(benchSum, dst, src) }},
			{"plain", func() { benchSum = copyPlain(benchSum, dst, src) }},
		} {
			benchmark(b, way.name, n, way.do)
		}
	}
}

func benchmark(b *testing.B, name string, n int, do func()) {
	b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
		b.SetBytes(int64(n))
		for b.Loop() {
			do()
		}
	})
}
