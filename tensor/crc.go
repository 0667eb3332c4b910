package tensor

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// aheadBytes are asked for while as many before them are summed: the processor alone fetches what is summed too late. Of 64 MiB in memory, 4 KiB ahead gave 18 GB/s instead of 7, and
// twice or four times as much less than that.
const aheadBytes = 4 << 10

// CRC is the CRC-32C (Castagnoli, RFC 3720) of b.
func CRC(b []byte) uint32 { return UpdateCRC(0, b) }

// UpdateCRC is the CRC of what sum is of, followed by b.
func UpdateCRC(sum uint32, b []byte) uint32 {
	for len(b) >= 2*aheadBytes {
		prefetch(&b[aheadBytes], aheadBytes/64)
		sum = crc32.Update(sum, castagnoli, b[:aheadBytes])
		b = b[aheadBytes:]
	}
	return crc32.Update(sum, castagnoli, b)
}

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
