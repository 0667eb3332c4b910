package tensor

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/ingestd/ingestd/spec"
)

// Encode writes the elements x of a tensor into dst, as its encoding says; the tensor's dtype must be F32. dst has the tensor's encoded bytes, x its elements; other lengths are
// errors. With TopK nothing is carried over to the next step; Feedback does that.
func Encode(dst []byte, t *Tensor, x []float32) error {
	if err := t.checkLengths(dst, x); err != nil {
		return err
	}
	switch t.Encoding.Kind {
	case Raw:
		for i, v := range x {
			binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(v))
		}
	case BF16:
		for i, v := range x {
			binary.LittleEndian.PutUint16(dst[2*i:], roundBF16(v))
		}
	case F16:
		encodeHalf(dst, x)
	case F8E4M3:
		encode8(dst, &e4m3Format, x)
	case F8E5M2:
		encode8(dst, &e5m2Format, x)
	case TopK:
		encodeTop(dst, x)
	}
	return nil
}

func (t *Tensor) checkLengths(encoded []byte, x []float32) error {
	n, err := t.encodedBytes()
	switch {
	case err != nil:
		return fmt.Errorf("tensor %q: %w", t.Name, err)
	case t.DType != spec.F32:
		return fmt.Errorf("tensor %q: its elements are %v, not F32", t.Name, t.DType)
	case int64(len(encoded)) != n:
		return fmt.Errorf("tensor %q: %d bytes for %s, which has %d", t.Name, len(encoded), t.Type(), n)
	case int64(len(x)) != t.Elements():
		return fmt.Errorf("tensor %q: %d elements for %s, which has %d", t.Name, len(x), t.Type(), t.Elements())
	}
	return nil
}

// encodeHalf has the common case of halfFormat.round, a value that is normal in both formats and does not become infinity, in the loop.
func encodeHalf(dst []byte, x []float32) {
	const least, above = (127 - 14) << 23, (127 + 15) << 23
	dst = dst[:2*len(x)]
	for i, v := range x {
		bits := math.Float32bits(v)
		code := uint16(bits >> 16 & 0x8000)
		if bits &^= f32Sign; bits-least < above-least {
			code |= uint16((bits+0xFFF+bits>>13&1)>>13 - (127-15)<<10)
		} else {
			code = halfFormat.round(v)
		}
		binary.LittleEndian.PutUint16(dst[2*i:], code)
	}
}

// encode8 writes the scale and one byte per element.
func encode8(dst []byte, f *narrow, x []float32) {
	if len(x) == 0 {
		return
	}
	largest := uint32(0) // finite, as bits: magnitudes compare as their bits do
	for _, v := range x {
		if bits := math.Float32bits(v) &^ f32Sign; bits > largest && bits < f32Infinite {
			largest = bits
		}
	}
	scale := math.Float32frombits(largest) / f.value(f.largest)
	if scale < 0x1p-120 {
		scale = 1
	}
	clear(dst[:ScaleBytes])
	binary.LittleEndian.PutUint32(dst, math.Float32bits(scale))
	// The common cases of round, normal and not of the largest exponent, and below the normal ones, are in the loop.
	shift, least := 23-f.mantissa, uint32(127+1-f.bias)<<23
	span := uint32(f.largest>>f.mantissa-1) << 23
	half, rebias := uint32(1)<<(shift-1)-1, uint32(127-f.bias)<<f.mantissa
	magic := float32(1<<23) * f.unit()
	dst = dst[ScaleBytes:][:len(x)]
	for i, v := range x {
		y := v / scale
		bits := math.Float32bits(y)
		sign := byte(bits >> 24 & 0x80)
		switch bits &^= f32Sign; {
		case bits-least < span:
			dst[i] = sign | byte((bits+half+bits>>(shift&31)&1)>>(shift&31)-rebias)
		case bits < least:
			dst[i] = sign | byte(math.Float32bits(math.Float32frombits(bits)+magic)-math.Float32bits(magic))
		default:
			dst[i] = byte(f.round(y))
		}
	}
}

// Decode writes the elements of a tensor into dst: of F32 with any encoding, and of F16 and BF16. It is the plain form of what package reduce does while it adds. A top-k entry
// whose index is out of range is an error, and dst then holds a part.
func Decode(dst []float32, t *Tensor, encoded []byte) error {
	plain := *t
	kind := t.Encoding.Kind
	if kind == Raw && (t.DType == spec.F16 || t.DType == spec.BF16) {
		plain.DType = spec.F32
		kind = F16
		if t.DType == spec.BF16 {
			kind = BF16
		}
		plain.Encoding.Kind = kind
	}
	if err := plain.checkLengths(encoded, dst); err != nil {
		return err
	}
	switch kind {
	case Raw:
		for i := range dst {
			dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(encoded[4*i:]))
		}
	case BF16:
		for i := range dst {
			dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(encoded[2*i:])) << 16)
		}
	case F16:
		for i := range dst {
			dst[i] = halfFormat.value(binary.LittleEndian.Uint16(encoded[2*i:]))
		}
	case F8E4M3:
		decode8(dst, &e4m3Format, encoded)
	case F8E5M2:
		decode8(dst, &e5m2Format, encoded)
	case TopK:
		return decodeTop(dst, t, encoded)
	}
	return nil
}

func decode8(dst []float32, f *narrow, encoded []byte) {
	if len(dst) == 0 {
		return
	}
	scale := math.Float32frombits(binary.LittleEndian.Uint32(encoded))
	for i := range dst {
		dst[i] = f.value(uint16(encoded[ScaleBytes+i])) * scale
	}
}

func decodeTop(dst []float32, t *Tensor, encoded []byte) error {
	clear(dst)
	for at := 0; at < len(encoded); at += PairBytes {
		i := binary.LittleEndian.Uint32(encoded[at:])
		if i == NoIndex {
			return nil
		}
		if uint64(i) >= uint64(len(dst)) {
			return fmt.Errorf("tensor %q: entry %d is of element %d; there are %d", t.Name, at/PairBytes, i, len(dst))
		}
		dst[i] += math.Float32frombits(binary.LittleEndian.Uint32(encoded[at+4:]))
	}
	return nil
}
