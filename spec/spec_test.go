package spec

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
)

func must(t testing.TB, leaves ...Leaf) *Spec {
	t.Helper()
	s, err := New(leaves)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var digits = []Leaf{{"image", F32, []int64{8, 8}}, {"label", I32, nil}}

// wantError checks that err names every one of parts.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
}

func TestLayout(t *testing.T) {
	s := must(t, digits...)
	if s.SampleBytes() != 260 || s.Offset(0) != 0 || s.Offset(1) != 256 || s.NumLeaves() != 2 {
		t.Errorf("layout: %d bytes, offsets %d %d", s.SampleBytes(), s.Offset(0), s.Offset(1))
	}
	if got := s.LeafBytes(); !reflect.DeepEqual(got, []int64{256, 4}) {
		t.Errorf("LeafBytes %v", got)
	}
	if l := s.Leaf(0); l.Elements() != 64 || l.Bytes() != 256 || l.Type() != "F32[8,8]" {
		t.Errorf("leaf 0: %d elements, %d bytes, %s", l.Elements(), l.Bytes(), l.Type())
	}
	if l := s.Leaf(1); l.Elements() != 1 || l.Type() != "I32" {
		t.Errorf("leaf 1: %d elements, %s", l.Elements(), l.Type())
	}
}

func TestImmutable(t *testing.T) {
	shape := []int64{8, 8}
	s := must(t, Leaf{"image", F32, shape})
	shape[0] = 9
	s.Leaves()[0].Shape[0] = 9
	s.Leaves()[0].Name = "other"
	if s.Text() != "image:F32[8,8]" {
		t.Errorf("the spec changed to %s", s)
	}
}

func many(n int) []Leaf {
	leaves := make([]Leaf, n)
	for i := range leaves {
		leaves[i] = Leaf{fmt.Sprint(i), U8, nil}
	}
	return leaves
}

func dims(n int) []int64 {
	shape := make([]int64, n)
	for i := range shape {
		shape[i] = 1
	}
	return shape
}

func TestLimits(t *testing.T) {
	long := strings.Repeat("é", NameBytesMax/2)
	for name, leaves := range map[string][]Leaf{
		"scalar":         {{"x", BOOL, []int64{}}},
		"longest name":   {{long, U8, nil}},
		"most leaves":    many(LeavesMax),
		"most dims":      {{"x", U8, dims(DimsMax)}},
		"largest leaf":   {{"x", F64, []int64{1 << 29}}},
		"largest sample": {{"x", U8, []int64{1<<32 - 1}}, {"y", U8, nil}},
	} {
		t.Run("legal/"+name, func(t *testing.T) { must(t, leaves...) })
	}
	for name, c := range map[string]struct {
		leaves []Leaf
		says   string
	}{
		"none":           {nil, "no leaves"},
		"empty name":     {[]Leaf{{"", U8, nil}}, "name is empty"},
		"long name":      {[]Leaf{{long + "x", U8, nil}}, "129 bytes"},
		"not UTF-8":      {[]Leaf{{"a\xff", U8, nil}}, "not UTF-8"},
		"control":        {[]Leaf{{"a\nb", U8, nil}}, "U+000A"},
		"control C1":     {[]Leaf{{"a\u0085b", U8, nil}}, "U+0085"},
		"duplicate":      {[]Leaf{{"a", U8, nil}, {"b", U8, nil}, {"a", U8, nil}}, `leaves 0 and 2 are both named "a"`},
		"too many":       {many(LeavesMax + 1), "4097 leaves"},
		"too many dims":  {[]Leaf{{"x", U8, dims(DimsMax + 1)}}, "9 dimensions"},
		"no dtype":       {[]Leaf{{"x", 0, nil}}, "DType(0)"},
		"bad dtype":      {[]Leaf{{"x", F64 + 1, nil}}, "DType(16)"},
		"zero dim":       {[]Leaf{{"x", U8, []int64{3, 0}}}, "dimension 1 of shape [3,0] is 0"},
		"negative dim":   {[]Leaf{{"x", U8, []int64{-1}}}, "is -1"},
		"large leaf":     {[]Leaf{{"x", F64, []int64{1<<29 + 1}}}, "larger than a sample"},
		"overflow":       {[]Leaf{{"x", U8, []int64{1 << 32, 1 << 32}}}, "larger than a sample"},
		"overflow int64": {[]Leaf{{"x", F64, []int64{math.MaxInt64, math.MaxInt64, 2}}}, "larger than a sample"},
		"large sample":   {[]Leaf{{"x", U8, []int64{1 << 32}}, {"y", U8, nil}}, `leaf 1 ("y", U8)`},
	} {
		t.Run("refused/"+name, func(t *testing.T) {
			_, err := New(c.leaves)
			wantError(t, err, "spec: ", c.says)
		})
	}
}

func TestIllegalLeafHasNoBytes(t *testing.T) {
	for _, l := range []Leaf{{"x", 0, nil}, {"x", U8, []int64{0}}, {"x", F64, []int64{math.MaxInt64, 4}}} {
		if l.Bytes() != 0 || l.Elements() != 0 {
			t.Errorf("%v: %d bytes, %d elements", l, l.Bytes(), l.Elements())
		}
	}
}

func TestDTypes(t *testing.T) {
	if len(DTypes()) != 15 {
		t.Errorf("%d dtypes", len(DTypes()))
	}
	for _, d := range DTypes() {
		if got, err := ParseDType(d.String()); got != d || err != nil {
			t.Errorf("ParseDType(%v) = %v, %v", d, got, err)
		}
		if !strings.Contains(dtypeNames, d.String()) || d.Bytes() == 0 {
			t.Errorf("%v is not listed or has no size", d)
		}
	}
	for other, want := range map[string]string{
		"float32": "F32", "torch.bfloat16": "BF16", "np.uint8": "U8", "int64": "I64", "f16": "F16", "bool": "BOOL",
		"double": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "half": "F16", "bool_": "BOOL", "float": "F32",
	} {
		_, err := ParseDType(other)
		wantError(t, err, other, "is written "+want+" here")
	}
	for _, unknown := range []string{"", "complex64", "float7", strings.Repeat("x", 10000)} {
		_, err := ParseDType(unknown)
		wantError(t, err, "is not known", "F8_E5M2")
		if len(err.Error()) > 1000 {
			t.Errorf("the error has %d bytes", len(err.Error()))
		}
	}
}
