package tensor

import (
	"bytes"
	"hash/crc32"
	"testing"
)

// TestSums: sums are CRC-32C by all ways to them.
func TestSums(t *testing.T) {
	b, table := bytes.Repeat([]byte("0123456789abcde"), 1000), crc32.MakeTable(crc32.Castagnoli)
	for _, n := range []int{0, 1, 63, 64, 255, 256, 1000, len(b)} {
		want := crc32.Checksum(b[:n], table)
		into := make([]byte, n)
		for name, got := range map[string]uint32{
			"CRC":         CRC(b[:n]),
			"UpdateCRC":   UpdateCRC(CRC(b[:n/3]), b[n/3:n]),
			"CopyCRC":     CopyCRC(CopyCRC(0, into, b[:n/3]), into[n/3:], b[n/3:n]),
			"CopyPastCRC": CopyPastCRC(CopyPastCRC(0, into, b[:n/3]), into[n/3:], b[n/3:n]),
		} {
			if got != want {
				t.Errorf("%s of %d bytes: %08x, want %08x", name, n, got, want)
			}
		}
	}
}
