package crc32c

import (
	"math/bits"
	"testing"
)

// TestFactors: each factor is a power of x modulo the polynomial, by long division of plain (not reflected) polynomials.
func TestFactors(t *testing.T) {
	remainder := func(n int) uint64 {
		const divisor = 1<<32 | 0x1EDC6F41 // RFC 3720
		r := uint64(1)
		for range n {
			if r <<= 1; r>>32 != 0 {
				r ^= divisor
			}
		}
		return bits.Reverse64(r)
	}
	pair := func(distance int) [2]uint64 { // of 128 bits that are moved by as many bits; a product is multiplied by x already
		return [2]uint64{remainder(distance + 64 - 1), remainder(distance - 1)}
	}
	if got, want := folding.turn, pair(4*512); got != want {
		t.Errorf("a turn: %016x, want %016x", got, want)
	}
	if got, want := folding.block, pair(512); got != want {
		t.Errorf("a block: %016x, want %016x", got, want)
	}
	for i := range 3 {
		if got, want := [2]uint64(folding.lanes[2*i:]), pair(384-128*i); got != want {
			t.Errorf("lane %d: %016x, want %016x", i, got, want)
		}
	}
	if folding.lanes[6] != 0 || folding.lanes[7] != 0 {
		t.Error("the last lane is multiplied")
	}
}
