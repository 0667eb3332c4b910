package spec

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode"
	"unicode/utf8"
)

// What a spec may be at most.
const (
	LeavesMax      = 4096
	DimsMax        = 8
	NameBytesMax   = 128
	SampleBytesMax = 1 << 32
	TextBytesMax   = 2 << 20 // of the text form and of the JSON form
)

// Leaf is one array of a sample. In memory and on the wire it is row-major and little-endian.
type Leaf struct {
	Name  string // a path such as obs/image
	DType DType
	Shape []int64 // empty for a scalar
}

// Elements is the product of the shape: 1 for a scalar, 0 if the shape is not legal.
func (l Leaf) Elements() int64 {
	if l.DType.Bytes() == 0 {
		return 0
	}
	return l.Bytes() / l.DType.Bytes()
}

// Bytes is the size of the leaf in one sample, 0 if dtype or shape is not legal.
func (l Leaf) Bytes() int64 {
	bytes, err := l.size()
	if err != nil {
		return 0
	}
	return bytes
}

// Type is dtype and shape as text: F32[8,8], or I32 for a scalar.
func (l Leaf) Type() string { return string(l.appendType(nil)) }

func (l Leaf) appendType(dst []byte) []byte {
	dst = append(dst, l.DType.String()...)
	if len(l.Shape) == 0 {
		return dst
	}
	return appendShape(dst, l.Shape)
}

func appendShape(dst []byte, shape []int64) []byte {
	dst = append(dst, '[')
	for i, d := range shape {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = strconv.AppendInt(dst, d, 10)
	}
	return append(dst, ']')
}

// size checks dtype and shape and multiplies without overflow.
func (l Leaf) size() (int64, error) {
	if !l.DType.legal() {
		return 0, fmt.Errorf("%v is not a dtype; the dtypes are %s", l.DType, dtypeNames)
	}
	if len(l.Shape) > DimsMax {
		return 0, fmt.Errorf("the shape has %d dimensions; at most %d are allowed, so merge some", len(l.Shape), DimsMax)
	}
	bytes := l.DType.Bytes()
	for i, d := range l.Shape {
		if d < 1 {
			return 0, fmt.Errorf("dimension %d of shape %s is %d; each must be at least 1 (leave an empty leaf out)",
				i, appendShape(nil, l.Shape), d)
		}
		if d > SampleBytesMax/bytes {
			return 0, fmt.Errorf("%s is larger than a sample may be (%d bytes); split the leaf over several samples",
				l.Type(), int64(SampleBytesMax))
		}
		bytes *= d
	}
	return bytes, nil
}

// Spec is the fixed layout of one sample: its leaves, one after another. It is immutable.
type Spec struct {
	leaves      []Leaf
	offsets     []int64
	sampleBytes int64
	fingerprint Fingerprint
}

// New returns the spec of these leaves, which it copies, or says which leaf breaks which limit.
func New(leaves []Leaf) (*Spec, error) {
	if len(leaves) == 0 {
		return nil, errors.New("spec: no leaves; a sample has at least one")
	}
	if len(leaves) > LeavesMax {
		return nil, fmt.Errorf("spec: %d leaves; at most %d are allowed, so merge some", len(leaves), LeavesMax)
	}
	s := &Spec{leaves: make([]Leaf, len(leaves)), offsets: make([]int64, len(leaves))}
	names := make(map[string]int, len(leaves))
	for i, l := range leaves {
		if err := checkName(l.Name); err != nil {
			return nil, fmt.Errorf("spec: leaf %d: %w", i, err)
		}
		if first, dup := names[l.Name]; dup {
			return nil, fmt.Errorf("spec: leaves %d and %d are both named %q; names must differ", first, i, l.Name)
		}
		names[l.Name] = i
		bytes, err := l.size()
		if err != nil {
			return nil, fmt.Errorf("spec: leaf %d (%q): %w", i, l.Name, err)
		}
		if bytes > SampleBytesMax-s.sampleBytes {
			return nil, fmt.Errorf("spec: with leaf %d (%q, %s) a sample is larger than %d bytes; split it over several samples",
				i, l.Name, l.Type(), int64(SampleBytesMax))
		}
		s.leaves[i], s.offsets[i] = l.clone(), s.sampleBytes
		s.sampleBytes += bytes
	}
	s.fingerprint = fingerprint(s.leaves)
	return s, nil
}

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty; a sample that is a single array is named \".\"")
	case len(name) > NameBytesMax:
		return fmt.Errorf("the name %s has %d bytes; at most %d are allowed", quoteShort(name), len(name), NameBytesMax)
	case !utf8.ValidString(name):
		return fmt.Errorf("the name %q is not UTF-8", name)
	}
	for _, r := range name {
		if unicode.IsControl(r) {
			return fmt.Errorf("the name %q holds the control character %U; take it out", name, r)
		}
	}
	return nil
}

func (l Leaf) clone() Leaf {
	shape := make([]int64, len(l.Shape))
	copy(shape, l.Shape)
	l.Shape = shape
	return l
}

// Leaves returns a copy of the leaves in order.
func (s *Spec) Leaves() []Leaf {
	leaves := slices.Clone(s.leaves)
	for i := range leaves {
		leaves[i] = leaves[i].clone()
	}
	return leaves
}

// NumLeaves is the number of leaves.
func (s *Spec) NumLeaves() int { return len(s.leaves) }

// Leaf returns leaf i. Its Shape belongs to the spec: read it only.
func (s *Spec) Leaf(i int) Leaf { return s.leaves[i] }

// Offset is where leaf i starts in the concatenated sample, in bytes.
func (s *Spec) Offset(i int) int64 { return s.offsets[i] }

// LeafBytes returns the size of each leaf in one sample, in order.
func (s *Spec) LeafBytes() []int64 {
	bytes := make([]int64, len(s.leaves))
	for i, l := range s.leaves {
		bytes[i] = l.Bytes()
	}
	return bytes
}

// SampleBytes is the size of one sample: all leaves concatenated.
func (s *Spec) SampleBytes() int64 { return s.sampleBytes }

// Fingerprint is the hash of the spec's canonical encoding; equal specs and no others have equal ones.
func (s *Spec) Fingerprint() Fingerprint { return s.fingerprint }

// Equal says whether both have the same leaves in the same order.
func (s *Spec) Equal(o *Spec) bool { return s.fingerprint == o.fingerprint }

// String is Text.
func (s *Spec) String() string { return s.Text() }
