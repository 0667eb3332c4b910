package tensor

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"unicode"
	"unicode/utf8"

	"github.com/ingestd/ingestd/internal/strictjson"
	"github.com/ingestd/ingestd/spec"
)

// What a manifest may be at most.
const (
	TensorsMax   = 65_536
	DimsMax      = 8
	DimMax       = 1 << 40 // one dimension
	NameBytesMax = 512
	MetadataMax  = 1024
	TextBytesMax = 2_000_000 // of the JSON form
	DataBytesMax = 1 << 40   // of all tensors, with what lies between them
)

// Align is what every tensor and every chunk starts on, in flat bytes.
const Align = 256

// Tensor is one named array of a manifest: row-major and little-endian.
type Tensor struct {
	Name     string
	DType    spec.DType // of the elements, before the encoding
	Shape    []int64    // empty for a scalar; a dimension may be 0
	Encoding Encoding
}

// Elements is the product of the shape: 1 for a scalar. It is 0 if the shape is not legal.
func (t *Tensor) Elements() int64 {
	n, err := t.elements()
	if err != nil {
		return 0
	}
	return n
}

// Type is dtype, shape and encoding as text: F32[512,64] bf16.
func (t *Tensor) Type() string {
	b := []byte(t.DType.String())
	if len(t.Shape) > 0 {
		b = appendShape(b, t.Shape)
	}
	if t.Encoding.Kind != Raw {
		b = append(append(b, ' '), t.Encoding.String()...)
	}
	return string(b)
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

// elements checks the shape and multiplies without overflow.
func (t *Tensor) elements() (int64, error) {
	if len(t.Shape) > DimsMax {
		return 0, fmt.Errorf("the shape has %d dimensions; at most %d are allowed, so merge some", len(t.Shape), DimsMax)
	}
	n, empty, large := int64(1), false, false
	for i, d := range t.Shape {
		switch {
		case d < 0 || d > DimMax:
			return 0, fmt.Errorf("dimension %d of shape %s is %d; each must be 0 to %d", i, appendShape(nil, t.Shape), d, int64(DimMax))
		case d == 0:
			empty = true
		case n > DimMax/d:
			large = true
		default:
			n *= d
		}
	}
	switch {
	case empty:
		return 0, nil
	case large:
		return 0, fmt.Errorf("shape %s has more than %d elements", appendShape(nil, t.Shape), int64(DimMax))
	}
	return n, nil
}

// encodedBytes checks the whole tensor but its name.
func (t *Tensor) encodedBytes() (int64, error) {
	if t.DType.Bytes() == 0 {
		return 0, fmt.Errorf("%v is not a dtype; the dtypes are %v", t.DType, spec.DTypes())
	}
	n, err := t.elements()
	if err != nil {
		return 0, err
	}
	return t.Encoding.bytes(t.DType, n)
}

// Manifest says which tensors a stream has, and where they lie. It is immutable.
type Manifest struct {
	tensors     []Tensor
	offsets     []int64
	ends        []int64 // offset + encoded bytes
	dataBytes   int64
	index       map[string]int
	metadata    map[string]string
	fingerprint spec.Fingerprint
}

// NewManifest returns the manifest of these tensors, which it copies, or says which one breaks which rule.
func NewManifest(tensors []Tensor, metadata map[string]string) (*Manifest, error) {
	m, err := newManifest(tensors, metadata)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return m, nil
}

// FromMap returns the manifest of tensors by name, in the order of their names. Where a Tensor has a name of its own, it must be that of its key.
func FromMap(tensors map[string]Tensor, metadata map[string]string) (*Manifest, error) {
	list := make([]Tensor, 0, len(tensors))
	for _, name := range slices.Sorted(maps.Keys(tensors)) {
		t := tensors[name]
		if t.Name != "" && t.Name != name {
			return nil, fmt.Errorf("manifest: the tensor under %s is named %s", strictjson.Quote(name), strictjson.Quote(t.Name))
		}
		t.Name = name
		list = append(list, t)
	}
	return NewManifest(list, metadata)
}

func newManifest(tensors []Tensor, metadata map[string]string) (*Manifest, error) {
	switch {
	case len(tensors) == 0:
		return nil, errors.New("no tensors; there must be at least one")
	case len(tensors) > TensorsMax:
		return nil, fmt.Errorf("%d tensors; at most %d are allowed", len(tensors), TensorsMax)
	}
	m := &Manifest{
		tensors: slices.Clone(tensors), offsets: make([]int64, len(tensors)), ends: make([]int64, len(tensors)),
		index: make(map[string]int, len(tensors)), metadata: maps.Clone(metadata),
	}
	for i := range m.tensors {
		t := &m.tensors[i]
		t.Shape = append(make([]int64, 0, len(t.Shape)), t.Shape...)
		if err := checkName(t.Name); err != nil {
			return nil, fmt.Errorf("tensor %d: %w", i, err)
		}
		if first, again := m.index[t.Name]; again {
			return nil, fmt.Errorf("tensors %d and %d are both named %s; names must differ", first, i, strictjson.Quote(t.Name))
		}
		m.index[t.Name] = i
		n, err := t.encodedBytes()
		if err != nil {
			return nil, fmt.Errorf("tensor %d (%s): %w", i, strictjson.Quote(t.Name), err)
		}
		m.offsets[i] = m.dataBytes
		m.ends[i] = m.dataBytes + n
		m.dataBytes = roundUp(m.ends[i])
		if m.dataBytes > DataBytesMax {
			return nil, fmt.Errorf("with tensor %d (%s) the tensors are larger than they may be together (%d bytes)", i, strictjson.Quote(t.Name), int64(DataBytesMax))
		}
	}
	if err := checkMetadata(metadata); err != nil {
		return nil, err
	}
	if len(metadata) == 0 {
		m.metadata = nil
	}
	if n := len(m.JSON()); n > TextBytesMax {
		return nil, fmt.Errorf("the JSON has %d bytes; at most %d are allowed, so shorten metadata or names", n, TextBytesMax)
	}
	m.fingerprint = m.sum()
	return m, nil
}

func roundUp(n int64) int64 { return (n + Align - 1) / Align * Align }

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty")
	case len(name) > NameBytesMax:
		return fmt.Errorf("the name %s has %d bytes; at most %d are allowed", strictjson.Quote(name), len(name), NameBytesMax)
	case !utf8.ValidString(name):
		return fmt.Errorf("the name %q is not UTF-8", name)
	}
	for _, r := range name {
		if unicode.IsControl(r) {
			return fmt.Errorf("the name %s holds the control character %U; take it out", strictjson.Quote(name), r)
		}
	}
	return nil
}

func checkMetadata(metadata map[string]string) error {
	if len(metadata) > MetadataMax {
		return fmt.Errorf("the metadata has %d entries; at most %d are allowed", len(metadata), MetadataMax)
	}
	for key, value := range metadata {
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return fmt.Errorf("the metadata entry %s is not UTF-8", strictjson.Quote(key))
		}
	}
	return nil
}

// Len is the number of tensors.
func (m *Manifest) Len() int { return len(m.tensors) }

// Tensor returns tensor i. Its Shape belongs to the manifest: read it only.
func (m *Manifest) Tensor(i int) Tensor { return m.tensors[i] }

// Index finds a tensor by its name.
func (m *Manifest) Index(name string) (int, bool) {
	i, ok := m.index[name]
	return i, ok
}

// Metadata returns a copy of the metadata, nil if there is none.
func (m *Manifest) Metadata() map[string]string { return maps.Clone(m.metadata) }

// Offset is the flat offset at which tensor i starts, a multiple of Align.
func (m *Manifest) Offset(i int) int64 { return m.offsets[i] }

// EncodedBytes is the size of tensor i as it is stored and sent.
func (m *Manifest) EncodedBytes(i int) int64 { return m.ends[i] - m.offsets[i] }

// DataBytes is the size of all tensors with what lies between them, a multiple of Align. It is 0 if all are empty.
func (m *Manifest) DataBytes() int64 { return m.dataBytes }

// At returns the tensor that holds the byte at a flat offset, or, if that lies between tensors, the next one; Len() if there is none.
func (m *Manifest) At(flat int64) int {
	return sort.Search(len(m.ends), func(i int) bool { return m.ends[i] > flat })
}

// Fingerprint identifies the tensors, their order and their encodings; metadata does not count.
func (m *Manifest) Fingerprint() spec.Fingerprint { return m.fingerprint }

// Equal says whether both have the same tensors in the same order.
func (m *Manifest) Equal(o *Manifest) bool { return m.fingerprint == o.fingerprint }
