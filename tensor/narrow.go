package tensor

import "math"

// narrow is a format of fewer bits: sign, exponent, mantissa. Source: IEEE 754 for F16; OCP 8-bit Floating Point Specification 1.0 for the others.
type narrow struct {
	mantissa int    // bits
	bias     int    // of the exponent
	largest  uint16 // code of the largest finite value
	above    uint16 // code of what is larger
	infinite uint16 // code of infinity
	nan      uint16 // bits that a NaN has at least
	sign     int    // place of the sign bit
}

var (
	halfFormat = narrow{mantissa: 10, bias: 15, largest: 0x7BFF, above: 0x7C00, infinite: 0x7C00, nan: 0x7E00, sign: 15}
	e4m3Format = narrow{mantissa: 3, bias: 7, largest: 0x7E, above: 0x7E, infinite: 0x7F, nan: 0x7F, sign: 7}
	e5m2Format = narrow{mantissa: 2, bias: 15, largest: 0x7B, above: 0x7B, infinite: 0x7C, nan: 0x7E, sign: 7}
)

const (
	f32Sign     = 1 << 31
	f32Infinite = 0x7F800000
)

// round returns the code of the nearest value, of two equally near ones the even one.
func (f *narrow) round(x float32) uint16 {
	bits := math.Float32bits(x)
	sign := uint16(bits>>31) << f.sign
	bits &^= f32Sign
	shift := 23 - f.mantissa
	switch {
	case bits > f32Infinite:
		return sign | f.nan | uint16(bits>>shift)&(1<<f.mantissa-1)
	case bits == f32Infinite:
		return sign | f.infinite
	case bits>>23 < uint32(127+1-f.bias):
		// Subnormal here: the sum with a number of which the last bit weighs as much as the last one here is rounded by the processor.
		magic := float32(uint32(1)<<23) * f.unit()
		sum := math.Float32bits(math.Float32frombits(bits) + magic)
		return sign | uint16(sum-math.Float32bits(magic))
	}
	bits += 1<<(shift-1) - 1 + bits>>shift&1
	code := bits>>shift - uint32(127-f.bias)<<f.mantissa
	if code > uint32(f.largest) {
		return sign | f.above
	}
	return sign | uint16(code)
}

// unit is the smallest value above 0.
func (f *narrow) unit() float32 { return math.Float32frombits(uint32(127+1-f.bias-f.mantissa) << 23) }

// value is what a code stands for.
func (f *narrow) value(code uint16) float32 {
	sign := uint32(code>>f.sign&1) << 31
	code &= 1<<f.sign - 1
	mantissa, exponent := uint32(code)&(1<<f.mantissa-1), uint32(code)>>f.mantissa
	switch {
	case code > f.largest && code == f.infinite && f.infinite != f.nan:
		return math.Float32frombits(sign | f32Infinite)
	case code > f.largest:
		return math.Float32frombits(sign | f32Infinite | 1<<22 | mantissa<<(23-f.mantissa))
	case exponent == 0:
		return math.Float32frombits(math.Float32bits(float32(mantissa)*f.unit()) | sign)
	}
	return math.Float32frombits(sign | (exponent+uint32(127-f.bias))<<23 | mantissa<<(23-f.mantissa))
}

// roundBF16 is the upper half of an F32, rounded.
func roundBF16(x float32) uint16 {
	bits := math.Float32bits(x)
	if bits&^f32Sign > f32Infinite {
		return uint16(bits>>16) | 0x40
	}
	return uint16((bits + 0x7FFF + bits>>16&1) >> 16)
}
