// Package crc32c sums bytes with CRC-32C (Castagnoli, RFC 3720), alone or while they are copied. Sums cost the gradient path and the publishers of weights more than
// anything else but the system calls, so on amd64 machines with AVX-512 and VPCLMULQDQ there are kernels for them; all others use hash/crc32 and copy. Both give the
// same sums.
//
// The kernels fold: 64 bytes of the input are an accumulator; multiplied by a power of x modulo the polynomial, it can be added (xor) to input that
// lies further on, and the remainder stays what it was. Four accumulators hide how long a multiplication takes. At the end 16 bytes are left, which the processor's
// instruction for the CRC sums. The powers are computed when the program starts. Source of the method: Gopal et al., Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction, Intel 2009.
//
// Ownership: nothing is kept, nothing is allocated. Any alignment will do. Source and destination of a copy may not overlap. Functions may be called from any goroutine.
//
// Errors: none, but a destination shorter than its source panics.
//
// Proof: crc32c_test.go compares both ways with hash/crc32 for every short length, alignments, continued sums and random input; factors_amd64_test.go computes the powers by long
// division.
package crc32c
