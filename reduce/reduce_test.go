package reduce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

var allKinds = []Kind{F32, F16, BF16, F8E4M3, F8E5M2}

// special are bits of float32 with which arithmetic goes wrong first.
var special = []uint32{
	0, 1 << 31, 1, 0x80000001, 0x007fffff, 0x00800000, 0x3f800000, 0xbf800000, 0x7f7fffff, 0xff7fffff, 0x7f800000, 0xff800000,
	0x7fc00000, 0xffc00000, 0x7f800001, 0xff800001, 0x7fc12345, 0xffedcba9, 0x33800000, 0x4b800000,
}

func floats(r *rand.Rand, n int) []float32 {
	all := make([]float32, n)
	for i := range all {
		bits := r.Uint32()
		switch r.IntN(4) {
		case 0:
			bits = special[r.IntN(len(special))]
		case 1:
			bits = math.Float32bits(float32(r.NormFloat64()))
		}
		all[i] = math.Float32frombits(bits)
	}
	return all
}

// bytesOf is what lies in the ring: elements of a kind, starting anywhere.
func bytesOf(r *rand.Rand, n int, kind Kind) []byte {
	from := r.IntN(64)
	all := make([]byte, from+n*kind.Bytes())[from:]
	for i := range all {
		all[i] = byte(r.Uint32())
	}
	if kind == F32 {
		for i, x := range floats(r, n) {
			binary.LittleEndian.PutUint32(all[4*i:], math.Float32bits(x))
		}
	}
	return all
}

func lengths(r *rand.Rand) []int {
	var all []int
	for n := range 140 {
		all = append(all, n)
	}
	for range 20 {
		all = append(all, r.IntN(5000))
	}
	return all
}

func wantSame(t *testing.T, what string, got, want []float32) {
	t.Helper()
	for i := range want {
		if g, w := math.Float32bits(got[i]), math.Float32bits(want[i]); g != w {
			t.Fatalf("%s: element %d of %d is %#08x (%v), want %#08x (%v)", what, i, len(want), g, got[i], w, want[i])
		}
	}
}

var scales = []float32{1, 0.25, 3.0e-5, 1e-38, 1e38, 1e-45, 0, -2, float32(math.Inf(1)), math.Float32frombits(0x7fc00123)}

// TestKernelsAreWhatGoDoes compares the two builds bit by bit. Where there are no kernels it compares Go with itself, which the log says.
func TestKernelsAreWhatGoDoes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d, kernels: %v", seed, setBlocks(make([]float32, 32), make([]byte, 128), F32, 1) > 0)
	r := rand.New(rand.NewPCG(seed, 0))
	for _, n := range lengths(r) {
		before := floats(r, n)
		for _, kind := range allKinds {
			for _, scale := range []float32{1, scales[r.IntN(len(scales))]} {
				src := bytesOf(r, n, kind)
				got, want := slices.Clone(before), slices.Clone(before)
				Add(got, src, kind, scale)
				addGo(want, src, kind, scale)
				wantSame(t, fmt.Sprintf("seed %d: Add of %d %v times %v", seed, n, kind, scale), got, want)
				Set(got, src, kind, scale)
				setGo(want, src, kind, scale)
				wantSame(t, fmt.Sprintf("seed %d: Set of %d %v times %v", seed, n, kind, scale), got, want)
			}
		}
		for _, by := range append(floats(r, 2), 3, 8) {
			got, want := slices.Clone(before), slices.Clone(before)
			Divide(got, by)
			divideGo(want, by)
			wantSame(t, fmt.Sprintf("seed %d: Divide of %d by %v", seed, n, by), got, want)
		}
		srcs := make([][]byte, r.IntN(SumMax+1))
		for i := range srcs {
			srcs[i] = bytesOf(r, n, F32)
		}
		got, want := slices.Clone(before), slices.Clone(before)
		AddAll(got, srcs...)
		for _, src := range srcs {
			addGo(want, src, F32, 1)
		}
		wantSame(t, fmt.Sprintf("seed %d: AddAll of %d times %d", seed, len(srcs), n), got, want)
		Sum(got, srcs...)
		clear(want)
		for i, src := range srcs {
			if i == 0 {
				setGo(want, src, F32, 1)
				continue
			}
			addGo(want, src, F32, 1)
		}
		wantSame(t, fmt.Sprintf("seed %d: Sum of %d times %d", seed, len(srcs), n), got, want)
	}
}

// TestEveryPairOfSpecialValues adds, in the kernels, each special value to each, against arithmetic of 53 bits, which rounds a sum, a product and a quotient
// of 24 bits as 24 bits do.
func TestEveryPairOfSpecialValues(t *testing.T) {
	var a []float32
	var b []byte
	for _, x := range special {
		for _, y := range special {
			a = append(a, math.Float32frombits(x))
			b = binary.LittleEndian.AppendUint32(b, y)
		}
	}
	got, quotient := slices.Clone(a), slices.Clone(a)
	Add(got, b, F32, 1)
	for i := range a {
		y := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		want := float32(float64(a[i]) + float64(y))
		switch {
		case a[i] != a[i]:
			want = math.Float32frombits(math.Float32bits(a[i]) | 1<<22)
		case y != y:
			want = math.Float32frombits(math.Float32bits(y) | 1<<22)
		case want != want:
			want = math.Float32frombits(0xffc00000)
		}
		wantSame(t, fmt.Sprintf("%v + %v", a[i], y), got[i:i+1], []float32{want})
		one := [64]float32{}
		for j := range one {
			one[j] = quotient[i]
		}
		Divide(one[:], y)
		if want := float32(float64(a[i]) / float64(y)); want == want {
			wantSame(t, fmt.Sprintf("%v / %v", a[i], y), one[40:41], []float32{want})
		} else if one[40] == one[40] {
			t.Errorf("%v / %v is %v", a[i], y, one[40])
		}
	}
}

// narrow is the value of a 16 or 8 bit format, from its definition: bits of exponent and fraction, and whether the largest exponent is for infinity and NaN.
func narrow(bits uint32, exponentBits, fractionBits int, ieee bool) float64 {
	fraction := bits & (1<<fractionBits - 1)
	exponent := int(bits >> fractionBits & (1<<exponentBits - 1))
	sign := 1 - 2*float64(bits>>(exponentBits+fractionBits)&1)
	bias, top := 1<<(exponentBits-1)-1, 1<<exponentBits-1
	switch {
	case exponent == top && ieee && fraction == 0:
		return math.Inf(int(sign))
	case exponent == top && (ieee || fraction == 1<<fractionBits-1):
		return math.NaN()
	case exponent == 0:
		return math.Copysign(math.Ldexp(float64(fraction), 1-bias-fractionBits), sign)
	}
	return sign * math.Ldexp(1+float64(fraction)/float64(uint32(1)<<fractionBits), exponent-bias)
}

// TestEveryNarrowValue decodes all values of the narrow kinds.
func TestEveryNarrowValue(t *testing.T) {
	for _, c := range []struct {
		kind               Kind
		exponent, fraction int
		ieee               bool
	}{{F16, 5, 10, true}, {BF16, 8, 7, true}, {F8E4M3, 4, 3, false}, {F8E5M2, 5, 2, true}} {
		n := 1 << (8 * c.kind.Bytes())
		var src []byte
		for i := range n {
			src = append(src, []byte{byte(i), byte(i >> 8)}[:c.kind.Bytes()]...)
		}
		for _, scale := range []float32{1, 0.3} {
			if c.kind.Bytes() == 2 && scale != 1 {
				continue // they have none
			}
			kernels, plain := make([]float32, n), make([]float32, n)
			Set(kernels, src, c.kind, scale)
			setGo(plain, src, c.kind, scale)
			for i := range n {
				want := float32(narrow(uint32(i), c.exponent, c.fraction, c.ieee) * float64(scale))
				for _, got := range []float32{kernels[i], plain[i]} {
					if math.Float32bits(got) != math.Float32bits(want) && (want == want || got == got) {
						t.Fatalf("%v %#x times %v is %v, want %v", c.kind, i, scale, got, want)
					}
				}
			}
		}
	}
}

// TestOrder: a sum that another order of additions would give otherwise.
func TestOrder(t *testing.T) {
	const n = 100
	of := func(x float32) (b []byte) {
		for range n {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
		}
		return b
	}
	dst := make([]float32, n)
	Sum(dst, of(1e8), of(3), of(3), of(-1e8))
	for i, x := range dst { // 1e8 + 3 is 1e8 + 0 or + 8 in 24 bits
		if x != 0 {
			t.Fatalf("element %d is %v", i, x)
		}
	}
	Sum(dst, of(3), of(3), of(1e8), of(-1e8))
	if dst[0] != 8 || dst[n-1] != 8 {
		t.Fatalf("%v and %v", dst[0], dst[n-1])
	}
}

func TestSparse(t *testing.T) {
	entries := func(pairs ...any) (b []byte) {
		for i := 0; i < len(pairs); i += 2 {
			b = binary.LittleEndian.AppendUint32(b, uint32(pairs[i].(int)))
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(pairs[i+1].(float64))))
		}
		return b
	}
	dst := make([]float32, 5)
	for range 2 {
		if err := AddSparse(dst, entries(0, 1.5, 4, -2.0, Unused, 7.0)); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(dst, []float32{3, 0, 0, 0, -4}) {
		t.Errorf("%v", dst)
	}
	for _, bad := range []int{5, 6, 1 << 31, Unused - 1} {
		b := entries(1, 1.0, bad, 1.0)
		for what, err := range map[string]error{"AddSparse": AddSparse(dst, b), "CheckSparse": CheckSparse(b, len(dst))} {
			var wrong *IndexError
			if !errors.As(err, &wrong) || wrong.Entry != 1 || wrong.Index != uint32(bad) || wrong.Elements != 5 {
				t.Errorf("%s of index %d: %v", what, bad, err)
			}
		}
	}
	if err := CheckSparse(entries(4, 1.0, Unused, 0.0), 5); err != nil {
		t.Error(err)
	}
	if err := CheckSparse(entries(0, 1.0), 0); err == nil {
		t.Error("an index into nothing was taken")
	}
}

func TestWrongSizesPanic(t *testing.T) {
	for what, f := range map[string]func(){
		"a byte too many":  func() { Add(make([]float32, 4), make([]byte, 17), F32, 1) },
		"a byte too few":   func() { Set(make([]float32, 4), make([]byte, 7), F16, 1) },
		"no kind":          func() { Set(nil, nil, 0, 1) },
		"no kind above":    func() { Add(nil, nil, F8E5M2+1, 1) },
		"too many sources": func() { Sum(nil, make([][]byte, SumMax+1)...) },
		"a short source":   func() { AddAll(make([]float32, 2), make([]byte, 8), make([]byte, 4)) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", what)
				}
			}()
			f()
		}()
	}
	Sum(nil, make([][]byte, SumMax)...)
}

func TestNothingIsAllocated(t *testing.T) {
	dst, src := make([]float32, 100), make([]byte, 400)
	sources := [][]byte{src, src, src}
	if n := testing.AllocsPerRun(10, func() {
		for _, kind := range allKinds {
			Add(dst, src[:100*kind.Bytes()], kind, 1)
			Set(dst, src[:100*kind.Bytes()], kind, 1)
		}
		Sum(dst, sources...)
		Divide(dst, 3)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
