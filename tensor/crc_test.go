package tensor

import (
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// TestCRCOfAllLengths: what is asked for ahead changes nothing, on both sides of each block.
func TestCRCOfAllLengths(t *testing.T) {
	b := make([]byte, 5*aheadBytes+100)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	for blocks := range 6 {
		for off := -70; off <= 70; off++ {
			n := blocks*aheadBytes + off
			if n < 0 || n+3 > len(b) {
				continue
			}
			part := b[3 : 3+n]
			want := crc32.Checksum(part, crc32.MakeTable(crc32.Castagnoli))
			if got := CRC(part); got != want {
				t.Fatalf("%d bytes: %08x, want %08x", n, got, want)
			}
			if got := UpdateCRC(CRC(part[:n/3]), part[n/3:]); got != want {
				t.Fatalf("%d bytes in two parts: %08x, want %08x", n, got, want)
			}
		}
	}
}

// BenchmarkCRCAhead shows the sum beside that of the standard library, of bytes that lie in the cache and in memory.
func BenchmarkCRCAhead(b *testing.B) {
	table := crc32.MakeTable(crc32.Castagnoli)
	for name, n := range map[string]int{"64KiB": 64 << 10, "64MiB": 64 << 20} {
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(i)
		}
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				CRC(data)
			}
		})
		b.Run(name+"/crc32", func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				crc32.Checksum(data, table)
			}
		})
	}
}
