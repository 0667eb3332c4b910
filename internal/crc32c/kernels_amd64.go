package crc32c

import "golang.org/x/sys/cpu"

// accelerated says whether the processor has what the kernels use, and the system keeps the registers (what cpu.X86 says of AVX-512 is false where it does not).
var accelerated = cpu.X86.HasAVX512F && cpu.X86.HasAVX512VPCLMULQDQ && cpu.X86.HasAVX2 && cpu.X86.HasSSE42

// factors are what the kernels multiply by.
type factors struct {
	turn, block [2]uint64 // for 256 and 64 bytes: of the first and of the second half of 128 bits
	lanes       [8]uint64 // for 48, 32, 16 bytes; the last 128 bits stay
}

var folding = factors{
	turn: factor(256), block: factor(64),
	lanes: func() (l [8]uint64) {
		for i, bytes := range []int{48, 32, 16} {
			f := factor(bytes)
			copy(l[2*i:], f[:])
		}
		return l
	}(),
}

// factor multiplies 128 bits by x^(8*bytes). The product of two reflected numbers of 64 bits is one bit short of 128, which is a multiplication by x; so
// each factor has one power less.
func factor(bytes int) [2]uint64 {
	return [2]uint64{uint64(power(8*bytes+63)) << 32, uint64(power(8*bytes-1)) << 32}
}

// power is x^n modulo the polynomial, reflected.
func power(n int) uint32 {
	p := uint32(1) << 31
	for range n {
		p = p>>1 ^ polynomial&-(p&1)
	}
	return p
}

// Kernels: sums neither begin nor end complemented; n is a multiple of blockBytes and at least leastBytes.

//go:noescape
func fold(sum uint32, src *byte, n int, by *factors) uint32

//go:noescape
func copyFold(sum uint32, dst, src *byte, n int, by *factors) uint32

// streamFold wants dst on a multiple of blockBytes.
//
//go:noescape
func streamFold(sum uint32, dst, src *byte, n int, by *factors) uint32

// sumBlocks sums whole blocks of b and returns how many bytes those are; the other functions here do the same for theirs.
func sumBlocks(sum uint32, b []byte) (uint32, int) {
	n := len(b) &^ (blockBytes - 1)
	return ^fold(^sum, &b[0], n, &folding), n
}

func copyBlocks(sum uint32, dst, src []byte) (uint32, int) {
	n := len(src) &^ (blockBytes - 1)
	return ^copyFold(^sum, &dst[0], &src[0], n, &folding), n
}

func streamBlocks(sum uint32, dst, src []byte) (uint32, int) {
	n := len(src) &^ (blockBytes - 1)
	return ^streamFold(^sum, &dst[0], &src[0], n, &folding), n
}
