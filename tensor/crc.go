package tensor

import (
	"hash/crc32"

	"github.com/ingestd/ingestd/internal/crc32c"
)

// CRC is the CRC-32C (Castagnoli, RFC 3720) of b.
func CRC(b []byte) uint32 { return crc32c.Update(0, b) }

// UpdateCRC is the CRC of what sum is of, followed by b.
func UpdateCRC(sum uint32, b []byte) uint32 { return crc32c.Update(sum, b) }

// CopyCRC copies src to the beginning of dst, which must be as long, and returns what UpdateCRC(sum, src) does, of the bytes that it stored.
func CopyCRC(sum uint32, dst, src []byte) uint32 { return crc32c.Copy(sum, dst, src) }

// CopyPastCRC does the same past the processor's caches: for copies of which caches hold little.
func CopyPastCRC(sum uint32, dst, src []byte) uint32 { return crc32c.CopyPast(sum, dst, src) }

// CombineCRC is the CRC of A followed by B, from the CRCs of A and B and the length of B (0 or more).
//
// Appending bytesB zero bytes to A multiplies its remainder by x^(8*bytesB) modulo the polynomial; powers of two of x are kept in a table. Source: zlib, crc32_combine.
func CombineCRC(a, b uint32, bytesB int64) uint32 {
	p := uint32(1) << 31 // x^0, in reflected order
	for k := 3; bytesB > 0; k, bytesB = k+1, bytesB>>1 {
		if bytesB&1 != 0 {
			p = multiply(powers[k], p)
		}
	}
	return multiply(p, a) ^ b
}

// powers[k] is x^(2^k), for lengths of up to 2^63 bytes.
var powers = func() (t [66]uint32) {
	t[0] = 1 << 30 // x
	for k := 1; k < len(t); k++ {
		t[k] = multiply(t[k-1], t[k-1])
	}
	return t
}()

// multiply multiplies two polynomials modulo the Castagnoli polynomial, all reflected.
func multiply(a, b uint32) uint32 {
	var p uint32
	for m := uint32(1) << 31; m != 0; m >>= 1 {
		if a&m != 0 {
			p ^= b
		}
		b = b>>1 ^ crc32.Castagnoli&-(b&1)
	}
	return p
}
