package tensor

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

// format is a narrow format by its definition: what the tests hold the code against.
type format struct {
	name           string
	exponent, bias int
	mantissa       int
	infinite       bool // the largest exponent is for infinity and NaN; else only the very last code is NaN
	clamps         bool // what is too large becomes the largest finite value
	round          func(float32) uint16
	value          func(uint16) float32
}

var formats = []format{
	{"bf16", 8, 127, 7, true, false, roundBF16, func(c uint16) float32 { return math.Float32frombits(uint32(c) << 16) }},
	{"f16", 5, 15, 10, true, false, halfFormat.round, halfFormat.value},
	{"e4m3", 4, 7, 3, false, true, e4m3Format.round, e4m3Format.value},
	{"e5m2", 5, 15, 2, true, true, e5m2Format.round, e5m2Format.value},
}

// signBit is where the sign is.
func (f *format) signBit() uint16 { return 1 << (f.exponent + f.mantissa) }

// exact is what a code means, in float64, which holds every value of every format.
func (f *format) exact(code uint16) float64 {
	sign := 1.0
	if code&f.signBit() != 0 {
		sign = -1
	}
	code &= f.signBit() - 1
	m, e := float64(code&(1<<f.mantissa-1)), int(code>>f.mantissa)
	switch last := e == 1<<f.exponent-1; {
	case last && f.infinite && m == 0:
		return math.Inf(int(sign))
	case last && f.infinite, code == f.signBit()-1:
		return math.NaN()
	case e == 0:
		return sign * math.Ldexp(m, 1-f.bias-f.mantissa)
	default:
		return sign * math.Ldexp(m+float64(int(1)<<f.mantissa), e-f.bias-f.mantissa)
	}
}

// TestNarrowEveryCode: each code means what the format says, and is what its value is rounded to.
func TestNarrowEveryCode(t *testing.T) {
	for _, f := range formats {
		for code := range uint32(f.signBit()) * 2 {
			want, got := f.exact(uint16(code)), f.value(uint16(code))
			if math.IsNaN(want) {
				back := f.round(got)
				if got == got || !math.IsNaN(f.exact(back)) || back&f.signBit() != uint16(code)&f.signBit() {
					t.Fatalf("%s: code %#x is NaN, decoded %v, back %#x", f.name, code, got, back)
				}
				continue
			}
			if float64(got) != want || math.Signbit(float64(got)) != math.Signbit(want) {
				t.Fatalf("%s: code %#x is %v, decoded %v", f.name, code, want, got)
			}
			if back := f.round(got); uint32(back) != code && (f.name != "e5m2" || !math.IsInf(want, 0)) {
				t.Fatalf("%s: code %#x is %v, which became %#x", f.name, code, want, back)
			}
		}
	}
}

// TestNarrowTies: half-way between two neighbours lies the even one; a hair beside it, the nearer one.
func TestNarrowTies(t *testing.T) {
	for _, f := range formats {
		for low := uint16(0); ; low++ {
			a, b := f.exact(low), f.exact(low+1)
			top := math.IsInf(b, 0) || math.IsNaN(b)
			if top {
				b = a + (a - f.exact(low-1)) // where the next value would be
			}
			middle := (a + b) / 2
			half := float32(middle)
			if float64(half) != middle {
				t.Fatalf("%s: %v is no F32", f.name, middle)
			}
			over := low + 1
			if top && f.clamps {
				over = low
			}
			even := low
			if low&1 != 0 {
				even = over
			}
			for _, c := range []struct {
				x    float32
				want uint16
			}{{half, even}, {math.Nextafter32(half, 0), low}, {math.Nextafter32(half, float32(math.Inf(1))), over}} {
				if got := f.round(c.x); got != c.want {
					t.Fatalf("%s: %v, between codes %#x and %#x, became %#x, want %#x", f.name, c.x, low, low+1, got, c.want)
				}
				if got := f.round(-c.x); got != c.want|f.signBit() {
					t.Fatalf("%s: %v became %#x, want the sign and %#x", f.name, -c.x, got, c.want)
				}
			}
			if top {
				break
			}
		}
	}
}

func TestNarrowRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 30_000 {
		x := math.Float32frombits(r.Uint32())
		if x != x {
			continue
		}
		for _, f := range formats {
			code := f.round(x)
			got := f.exact(code)
			if math.IsInf(got, 0) || math.Abs(float64(x)) >= math.Abs(f.exact(f.largest())) {
				continue // TestNarrowTies and TestSpecials
			}
			for _, other := range []uint16{code - 1, code + 1} {
				if v := f.exact(other); math.Abs(v-float64(x)) < math.Abs(got-float64(x)) {
					t.Fatalf("%s: %v became %v, and %v is nearer", f.name, x, got, v)
				}
			}
		}
	}
}

func (f *format) largest() uint16 {
	code := f.signBit() - 1
	for x := f.exact(code); math.IsNaN(x) || math.IsInf(x, 0); x = f.exact(code) {
		code--
	}
	return code
}

var (
	inf = float32(math.Inf(1))
	nan = float32(math.NaN())
)

func encoded(t testing.TB, e Encoding, x []float32) []byte {
	t.Helper()
	tensor := f32("x", int64(len(x)), e)
	n, err := tensor.encodedBytes()
	if err != nil {
		t.Fatal(err)
	}
	dst := bytes.Repeat([]byte{0xEE}, int(n))
	if err := Encode(dst, &tensor, x); err != nil {
		t.Fatal(err)
	}
	return dst
}

func decoded(t testing.TB, e Encoding, b []byte, n int) []float32 {
	t.Helper()
	tensor := f32("x", int64(n), e)
	x := make([]float32, n)
	if err := Decode(x, &tensor, b); err != nil {
		t.Fatal(err)
	}
	return x
}

func same(a, b []float32) bool {
	return slices.EqualFunc(a, b, func(a, b float32) bool { return math.Float32bits(a) == math.Float32bits(b) || a != a && b != b })
}

// TestEncodeRoundsAsOne: the loops over many elements, which have the common cases of rounding in them, do what rounding one does.
func TestEncodeRoundsAsOne(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	for _, kind := range []EncodingKind{BF16, F16, F8E4M3, F8E5M2} {
		f := formats[kind-BF16]
		var x []float32
		for code := range f.signBit() { // all that is exact, all ties, and what is next to them
			for _, v := range []float32{f.value(code), (f.value(code) + f.value(code+1)) / 2} {
				x = append(x, v, -v, math.Nextafter32(v, 0), -math.Nextafter32(v, inf))
			}
		}
		for range 100_000 {
			x = append(x, math.Float32frombits(r.Uint32()), float32(r.NormFloat64()))
		}
		largest := float32(0)
		if kind == F8E4M3 || kind == F8E5M2 {
			largest = f.value(f.largest())
			for i := range x { // so that the scale is 1
				if x[i] > largest || x[i] < -largest {
					x[i] = largest
				}
			}
			x = append(x, inf, -inf, nan, largest, -largest)
		}
		b := encoded(t, Encoding{Kind: kind}, x)
		if largest != 0 {
			b = b[ScaleBytes:]
		}
		for i, v := range x {
			got := uint16(b[i*len(b)/len(x)])
			if largest == 0 {
				got = binary.LittleEndian.Uint16(b[2*i:])
			}
			if want := f.round(v); got != want {
				t.Fatalf("%v: %v became %#x, want %#x", Encoding{Kind: kind}, v, got, want)
			}
		}
	}
}

func TestSpecials(t *testing.T) {
	x := []float32{0, float32(math.Copysign(0, -1)), 1, -1, inf, -inf, nan, math.MaxFloat32, math.SmallestNonzeroFloat32, math.Float32frombits(0x7F800001), math.Float32frombits(0xFF800001)}
	if got := decoded(t, Encoding{}, encoded(t, Encoding{}, x), len(x)); !same(got, x) {
		t.Errorf("raw: %v", got)
	}
	if b := encoded(t, Encoding{}, x); binary.LittleEndian.Uint32(b[4*9:]) != 0x7F800001 {
		t.Errorf("raw: a signalling NaN became %x", b[4*9:4*10])
	}
	want := []float32{0, float32(math.Copysign(0, -1)), 1, -1, inf, -inf, nan, inf, 0, nan, nan}
	for _, kind := range []EncodingKind{BF16, F16} {
		b := encoded(t, Encoding{Kind: kind}, x)
		if got := decoded(t, Encoding{Kind: kind}, b, len(x)); !same(got, want) {
			t.Errorf("%v: %v", kind, got)
		}
		quiet, sign := uint16(0x40), uint16(0x8000)
		if kind == F16 {
			quiet = 0x200
		}
		if a, b := binary.LittleEndian.Uint16(b[2*9:]), binary.LittleEndian.Uint16(b[2*10:]); a&quiet == 0 || b&quiet == 0 || a&sign != 0 || b&sign == 0 {
			t.Errorf("%v: signalling NaNs became %x and %x", kind, a, b)
		}
	}
	// 448 is the largest, so the scale is 1.
	small := []float32{448, -448, inf, -inf, nan, 1.0625, 1.1875, 0x1p-9, 0x1p-10, 0x1.8p-9, 0, 432}
	want8 := []float32{448, -448, nan, nan, nan, 1, 1.25, 0x1p-9, 0, 0x1p-8, 0, 448} // 432 lies between 416 and 448, codes 7D and 7E
	if b := encoded(t, Encoding{Kind: F8E4M3}, small); !same(decoded(t, Encoding{Kind: F8E4M3}, b, len(small)), want8) {
		t.Errorf("e4m3: %v", decoded(t, Encoding{Kind: F8E4M3}, b, len(small)))
	} else if !bytes.Equal(b[:4], []byte{0, 0, 0x80, 0x3F}) || !bytes.Equal(b[4:ScaleBytes], make([]byte, ScaleBytes-4)) || b[ScaleBytes+2] != 0x7F || b[ScaleBytes+3] != 0xFF {
		t.Errorf("e4m3: % x", b)
	}
	small = []float32{57344, inf, -inf, nan, 1.125, 1.375, 0x1p-16, 0x1p-17, 53248}
	want8 = []float32{57344, inf, -inf, nan, 1, 1.5, 0x1p-16, 0, 49152} // 53248 lies between 49152 and 57344, codes 7A and 7B
	if b := encoded(t, Encoding{Kind: F8E5M2}, small); !same(decoded(t, Encoding{Kind: F8E5M2}, b, len(small)), want8) {
		t.Errorf("e5m2: %v", decoded(t, Encoding{Kind: F8E5M2}, b, len(small)))
	}
}

func TestScale(t *testing.T) {
	for _, c := range []struct {
		x     []float32
		scale map[EncodingKind]float32
	}{
		{[]float32{1, -896, 3}, map[EncodingKind]float32{F8E4M3: 2, F8E5M2: float32(896) / 57344}},
		{[]float32{0, 0}, map[EncodingKind]float32{F8E4M3: 1, F8E5M2: 1}},
		{[]float32{inf, nan}, map[EncodingKind]float32{F8E4M3: 1, F8E5M2: 1}},
		{[]float32{inf, 448, nan}, map[EncodingKind]float32{F8E4M3: 1, F8E5M2: float32(448) / 57344}},
		{[]float32{math.MaxFloat32}, map[EncodingKind]float32{F8E4M3: float32(math.MaxFloat32) / 448, F8E5M2: float32(math.MaxFloat32) / 57344}},
		{[]float32{0x1p-120 * 448}, map[EncodingKind]float32{F8E4M3: 0x1p-120, F8E5M2: 1}},
		{[]float32{math.Nextafter32(0x1p-120*448, 0)}, map[EncodingKind]float32{F8E4M3: 1, F8E5M2: 1}},
		{[]float32{0.1, 0.3}, map[EncodingKind]float32{F8E4M3: float32(0.3) / 448, F8E5M2: float32(0.3) / 57344}},
	} {
		for kind, want := range c.scale {
			b := encoded(t, Encoding{Kind: kind}, c.x)
			scale := math.Float32frombits(binary.LittleEndian.Uint32(b))
			if scale != want {
				t.Errorf("%v of %v: scale %v, want %v", kind, c.x, scale, want)
			}
			f := formats[2]
			if kind == F8E5M2 {
				f = formats[3]
			}
			for i, x := range c.x {
				if got, want := uint16(b[ScaleBytes+i]), f.round(x/scale); got != want {
					t.Errorf("%v of %v: element %d is %#x, want %#x", kind, c.x, i, got, want)
				}
			}
		}
	}
}

// topReference sorts.
func topReference(x []float32, k int) []byte {
	order := make([]int, len(x))
	for i := range order {
		order[i] = i
	}
	size := func(i int) float64 {
		if x[i] != x[i] {
			return math.MaxFloat64
		}
		return math.Min(math.Abs(float64(x[i])), math.MaxFloat64/2)
	}
	slices.SortStableFunc(order, func(a, b int) int {
		switch {
		case size(a) > size(b):
			return -1
		case size(a) < size(b):
			return 1
		}
		return 0
	})
	order = order[:k]
	slices.Sort(order)
	var b []byte
	for _, i := range order {
		b = binary.LittleEndian.AppendUint32(b, uint32(i))
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x[i]))
	}
	return b
}

func TestTopK(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for round := range 300 {
		x := make([]float32, 1+r.IntN(200))
		for i := range x {
			switch round % 4 {
			case 0:
				x[i] = float32(r.NormFloat64())
			case 1: // many of equal magnitude
				x[i] = float32(r.IntN(5) - 2)
			case 2: // NaN, Inf, subnormals, all exponents
				x[i] = math.Float32frombits(r.Uint32())
			case 3:
				x[i] = []float32{nan, -nan, math.Float32frombits(0x7F800001), inf, -inf, 0, 1}[r.IntN(7)]
			}
		}
		k := 1 + r.IntN(len(x))
		got := encoded(t, Encoding{Kind: TopK, K: k}, x)
		if want := topReference(x, k); !bytes.Equal(got, want) {
			t.Fatalf("round %d: top %d of %v:\n% x\n% x", round, k, x, got, want)
		}
	}
	x := []float32{3, -1, nan, 0}
	if got := decoded(t, Encoding{Kind: TopK, K: 2}, encoded(t, Encoding{Kind: TopK, K: 2}, x), 4); !same(got, []float32{3, 0, nan, 0}) {
		t.Errorf("got %v", got)
	}
}

func TestDecodeRefuses(t *testing.T) {
	top := f32("x", 3, Encoding{Kind: TopK, K: 2})
	pairs := make([]byte, 16)
	binary.LittleEndian.PutUint32(pairs[8:], 3)
	if err := Decode(make([]float32, 3), &top, pairs); err == nil || !strings.Contains(err.Error(), "entry 1 is of element 3; there are 3") {
		t.Errorf("got %v", err)
	}
	binary.LittleEndian.PutUint32(pairs[8:], NoIndex)
	if err := Decode(make([]float32, 3), &top, pairs); err != nil {
		t.Errorf("an unused entry: %v", err)
	}
	ints := Tensor{Name: "i", DType: spec.I32, Shape: []int64{1}}
	for _, err := range []error{
		Decode(make([]float32, 1), &ints, make([]byte, 4)), Encode(make([]byte, 4), &ints, make([]float32, 1)),
		Decode(make([]float32, 2), &top, pairs), Decode(make([]float32, 3), &top, pairs[:8]), Encode(pairs[:8], &top, make([]float32, 3)),
		Encode(pairs, &top, make([]float32, 4)),
	} {
		if err == nil {
			t.Error("a wrong length or dtype was taken")
		}
	}
	for _, dtype := range []spec.DType{spec.F16, spec.BF16} {
		plain := Tensor{Name: "p", DType: dtype, Shape: []int64{2}}
		kind := map[spec.DType]EncodingKind{spec.F16: F16, spec.BF16: BF16}[dtype]
		x := make([]float32, 2)
		if err := Decode(x, &plain, encoded(t, Encoding{Kind: kind}, []float32{1.5, -2})); err != nil || !slices.Equal(x, []float32{1.5, -2}) {
			t.Errorf("%v: %v, %v", dtype, x, err)
		}
	}
	for kind := Raw; kind < TopK; kind++ {
		if b := encoded(t, Encoding{Kind: kind}, nil); len(b) != 0 || len(decoded(t, Encoding{Kind: kind}, b, 0)) != 0 {
			t.Errorf("%v: an empty tensor has %d bytes", kind, len(b))
		}
	}
}

func TestFeedback(t *testing.T) {
	top := f32("x", 4, Encoding{Kind: TopK, K: 1})
	f, err := NewFeedback(&top)
	if err != nil {
		t.Fatal(err)
	}
	send := func(gradient ...float32) string {
		t.Helper()
		b := make([]byte, PairBytes)
		if err := f.Encode(b, gradient); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(binary.LittleEndian.Uint32(b), " ", math.Float32frombits(binary.LittleEndian.Uint32(b[4:])))
	}
	if err := f.Commit(); err == nil {
		t.Error("a commit of nothing passed")
	}
	for i, step := range []struct {
		gradient []float32
		want     string
		commit   bool
		residual []float32
	}{
		{[]float32{1, -3, 2, 0}, "1 -3", true, []float32{1, 0, 2, 0}},
		{[]float32{0.5, 1, -1, 0}, "0 1.5", false, []float32{1, 0, 2, 0}}, // aborted
		{[]float32{0.5, 1, -1, 0}, "0 1.5", true, []float32{0, 1, 1, 0}},
		{[]float32{0, 0, 0, 0}, "1 1", true, []float32{0, 0, 1, 0}},
		{[]float32{0, nan, 9, inf}, "1 NaN", true, []float32{0, 0, 10, inf}},
		{[]float32{0, 0, 0, -inf}, "3 NaN", true, []float32{0, 0, 10, 0}},
	} {
		if got := send(step.gradient...); got != step.want {
			t.Errorf("step %d: sent %s, want %s", i, got, step.want)
		}
		if step.commit {
			if err := f.Commit(); err != nil {
				t.Fatal(err)
			}
		} else {
			f.Rollback()
		}
		if !same(f.Residual(), step.residual) {
			t.Errorf("step %d: residual %v, want %v", i, f.Residual(), step.residual)
		}
	}
	raw := f32("x", 4, Encoding{})
	if _, err := NewFeedback(&raw); err == nil {
		t.Error("error feedback without topk")
	}
	if err := f.Encode(make([]byte, 8), make([]float32, 3)); err == nil {
		t.Error("a gradient of another length was taken")
	}
	b, gradient := make([]byte, PairBytes), []float32{1, 2, 3, 4}
	if n := testing.AllocsPerRun(10, func() { _ = f.Encode(b, gradient) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkEncode(b *testing.B) {
	x := make([]float32, 1<<20)
	for i := range x {
		x[i] = float32(rand.NormFloat64())
	}
	for _, e := range []Encoding{{}, {Kind: BF16}, {Kind: F16}, {Kind: F8E4M3}, {Kind: F8E5M2}, {Kind: TopK, K: 1 << 13}} {
		t := f32("x", int64(len(x)), e)
		n, err := t.encodedBytes()
		if err != nil {
			b.Fatal(err)
		}
		dst := make([]byte, n)
		b.Run(strings.TrimPrefix(t.Type(), "F32"), func(b *testing.B) {
			b.SetBytes(4 << 20)
			for b.Loop() {
				if err := Encode(dst, &t, x); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
