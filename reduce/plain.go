package reduce

import (
	"encoding/binary"
	"math"
)

// The bits of a quiet NaN's mark, and of the NaN that an operation on numbers gives.
const (
	quietBit   = 0x00400000
	defaultNaN = 0xffc00000
)

// add is a + b. NaN is treated as amd64 does with a as the first operand, whatever the machine and the compiler do.
func add(a, b float32) float32 {
	if s := a + b; s == s {
		return s
	}
	return nan(a, b)
}

// mul is a * b, with NaN as in add. The conversion forbids the compiler to fuse it with an addition.
func mul(a, b float32) float32 {
	if s := float32(a * b); s == s {
		return s
	}
	return nan(a, b)
}

// div is a / b, with NaN as in add.
func div(a, b float32) float32 {
	if s := a / b; s == s {
		return s
	}
	return nan(a, b)
}

// nan is the result of an operation on a and b that is NaN.
func nan(a, b float32) float32 {
	switch {
	case a != a:
		return math.Float32frombits(math.Float32bits(a) | quietBit)
	case b != b:
		return math.Float32frombits(math.Float32bits(b) | quietBit)
	}
	return math.Float32frombits(defaultNaN)
}

func setGo(dst []float32, src []byte, kind Kind, scale float32) {
	switch kind {
	case F32:
		for i := range dst {
			dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
		}
	case F16:
		for i := range dst {
			dst[i] = fromF16(binary.LittleEndian.Uint16(src[2*i:]))
		}
	case BF16:
		for i := range dst {
			dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(src[2*i:])) << 16)
		}
	default:
		table := tables[kind]
		for i := range dst {
			dst[i] = mul(table[src[i]], scale)
		}
	}
}

func addGo(dst []float32, src []byte, kind Kind, scale float32) {
	switch kind {
	case F32:
		for i := range dst {
			dst[i] = add(dst[i], math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:])))
		}
	case F16:
		for i := range dst {
			dst[i] = add(dst[i], fromF16(binary.LittleEndian.Uint16(src[2*i:])))
		}
	case BF16:
		for i := range dst {
			dst[i] = add(dst[i], math.Float32frombits(uint32(binary.LittleEndian.Uint16(src[2*i:]))<<16))
		}
	default:
		table := tables[kind]
		for i := range dst {
			dst[i] = add(dst[i], mul(table[src[i]], scale))
		}
	}
}

func divideGo(dst []float32, by float32) {
	for i := range dst {
		dst[i] = div(dst[i], by)
	}
}

// fromF16 decodes IEEE binary16. NaN keeps its bits and becomes quiet.
func fromF16(h uint16) float32 {
	sign, exponent, fraction := uint32(h>>15)<<31, uint32(h>>10)&31, uint32(h)&0x3ff
	switch {
	case exponent == 31 && fraction != 0:
		return math.Float32frombits(sign | 0x7f800000 | fraction<<13 | quietBit)
	case exponent == 31:
		return math.Float32frombits(sign | 0x7f800000)
	case exponent == 0: // fraction * 2^-24, which is a float32 exactly
		return math.Float32frombits(math.Float32bits(float32(fraction)*(1.0/(1<<24))) | sign)
	}
	return math.Float32frombits(sign | (exponent+127-15)<<23 | fraction<<13)
}

// tables holds every value of the 8-bit kinds. E5M2 is the upper half of an F16. E4M3 has four bits of exponent (bias 7), no infinity, and NaN where all bits but the
// sign are set.
var tables = func() (t [F8E5M2 + 1]*[256]float32) {
	t[F8E4M3], t[F8E5M2] = new([256]float32), new([256]float32)
	for b := range 256 {
		t[F8E5M2][b] = fromF16(uint16(b) << 8)
		if b&0x7f == 0x7f {
			t[F8E4M3][b] = math.Float32frombits(uint32(b>>7)<<31 | 0x7ff00000)
			continue
		}
		exponent, fraction := b>>3&15, float64(b&7)/8
		value := math.Ldexp(1+fraction, exponent-7)
		if exponent == 0 {
			value = math.Ldexp(fraction, -6)
		}
		t[F8E4M3][b] = float32(math.Copysign(value, float64(1-b>>7<<1)))
	}
	return t
}()
