package safetensors

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/ingestd/ingestd/internal/strictjson"
	"github.com/ingestd/ingestd/spec"
)

// HeaderBytesMax is the longest header that is read, as the format says.
const HeaderBytesMax = 100_000_000

// dimsMax bounds what is kept of a shape; users of a file have lower limits.
const dimsMax = 64

const metadataKey = "__metadata__"

// FormatError says what in a file cannot be used.
type FormatError struct {
	File   string // path, empty where it is not known
	Reason string
}

func (e *FormatError) Error() string {
	if e.File == "" {
		return e.Reason
	}
	return e.File + ": " + e.Reason
}

func formatErrorf(format string, args ...any) error {
	return &FormatError{Reason: fmt.Sprintf(format, args...)}
}

// Entry is one tensor of a header.
type Entry struct {
	Name       string
	DType      spec.DType
	Shape      []int64 // each 0 or more
	Begin, End int64   // in the data
}

// Header is what a file says of itself. It has been checked: the entries cover the data without holes and overlaps.
type Header struct {
	Entries    []Entry // in the order of the text
	Metadata   map[string]string
	DataOffset int64 // of the data in the file
}

// ReadHeader reads and checks the header of a file of so many bytes. Errors are *FormatError, or r's.
func ReadHeader(r io.ReaderAt, size int64) (*Header, error) {
	if size < 8 {
		return nil, formatErrorf("has %d bytes: it is empty or cut short", size)
	}
	var prefix [8]byte
	if _, err := r.ReadAt(prefix[:], 0); err != nil {
		return nil, err
	}
	length := binary.LittleEndian.Uint64(prefix[:])
	switch {
	case length > HeaderBytesMax:
		return nil, formatErrorf("the header says it is %d bytes long; at most %d are read: not a .safetensors file?", length, HeaderBytesMax)
	case int64(length) > size-8:
		return nil, formatErrorf("the header should be %d bytes, the file has %d: it is cut short", length, size-8)
	}
	text := make([]byte, length)
	if _, err := r.ReadAt(text, 8); err != nil {
		return nil, err
	}
	return parseHeader(text, 8+int64(length), size-8-int64(length))
}

func parseHeader(text []byte, dataOffset, dataBytes int64) (*Header, error) {
	if len(text) == 0 || text[0] != '{' {
		return nil, formatErrorf("the header is not a JSON object: not a .safetensors file, or damaged")
	}
	h := &Header{DataOffset: dataOffset}
	r := strictjson.New(text)
	seen := map[string]bool{}
	err := r.Map(func(name string) error {
		if seen[name] {
			return fmt.Errorf("%s is there twice", strictjson.Quote(name))
		}
		seen[name] = true
		if name == metadataKey {
			metadata, err := readMetadata(r)
			h.Metadata = metadata
			return err
		}
		e, err := readEntry(r, dataBytes)
		if err != nil {
			return fmt.Errorf("tensor %s: %w", strictjson.Quote(name), err)
		}
		e.Name = name
		h.Entries = append(h.Entries, e)
		return nil
	})
	if err == nil {
		err = r.End()
	}
	if err != nil {
		return nil, formatErrorf("the header is damaged: %v", err)
	}
	return h, checkSpans(h.Entries, dataBytes)
}

func readMetadata(r *strictjson.Reader) (map[string]string, error) {
	metadata := map[string]string{}
	err := r.Map(func(key string) error {
		if _, again := metadata[key]; again {
			return fmt.Errorf("%s is there twice", strictjson.Quote(key))
		}
		value, err := r.String()
		metadata[key] = value
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s is not a map of strings: %w", metadataKey, err)
	}
	return metadata, nil
}

var entryFields = []string{"dtype", "shape", "data_offsets"}

// readEntry reads one entry and checks it against the file.
func readEntry(r *strictjson.Reader, dataBytes int64) (e Entry, err error) {
	var offsets []int64
	err = r.Fields(entryFields, nil, func(field string) error {
		switch field {
		case "dtype":
			name, err := r.String()
			if err != nil {
				return err
			}
			e.DType, err = spec.ParseDType(name)
			return err
		case "shape":
			return readInts(r, &e.Shape, dimsMax)
		}
		return readInts(r, &offsets, 2)
	})
	if err != nil {
		return e, err
	}
	n, err := e.bytes()
	switch {
	case err != nil:
		return e, err
	case len(offsets) != 2:
		return e, fmt.Errorf("data_offsets must be two numbers, where the data begins and ends")
	}
	e.Begin, e.End = offsets[0], offsets[1]
	switch {
	case e.Begin < 0 || e.End < e.Begin || e.End > dataBytes:
		return e, fmt.Errorf("its data is said to be at %d to %d, the file has %d bytes of data: it is cut short or damaged", e.Begin, e.End, dataBytes)
	case e.End-e.Begin != n:
		return e, fmt.Errorf("%v of shape %v needs %d bytes, its data_offsets span %d", e.DType, e.Shape, n, e.End-e.Begin)
	}
	return e, nil
}

func readInts(r *strictjson.Reader, into *[]int64, most int) error {
	*into = []int64{}
	return r.Array(func() error {
		if len(*into) == most {
			return fmt.Errorf("more than %d numbers", most)
		}
		n, err := r.Int()
		*into = append(*into, n)
		return err
	})
}

// bytes multiplies shape and element size without overflow.
func (e *Entry) bytes() (int64, error) {
	n, empty, large := e.DType.Bytes(), false, false
	for _, d := range e.Shape {
		switch {
		case d < 0:
			return 0, fmt.Errorf("shape %v has a negative axis", e.Shape)
		case d == 0:
			empty = true
		case n > (1<<63-1)/d:
			large = true
		default:
			n *= d
		}
	}
	switch {
	case empty:
		return 0, nil
	case large:
		return 0, fmt.Errorf("shape %v is larger than any file", e.Shape)
	}
	return n, nil
}

// order is how entries lie: empty ones before what starts at the same place, by name where nothing else tells.
func order(a, b Entry) int {
	return cmp.Or(cmp.Compare(a.Begin, b.Begin), cmp.Compare(a.End, b.End), cmp.Compare(a.Name, b.Name))
}

// InOrder returns the entries in the order in which they lie.
func (h *Header) InOrder() []Entry {
	entries := slices.Clone(h.Entries)
	slices.SortFunc(entries, order)
	return entries
}

// checkSpans: the tensors cover the data without holes and overlaps, as the format demands.
func checkSpans(entries []Entry, dataBytes int64) error {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, order)
	at, before := int64(0), ""
	for _, e := range entries {
		switch {
		case e.Begin < at:
			return formatErrorf("the tensors %s and %s overlap at byte %d of the data: the file is damaged", strictjson.Quote(before), strictjson.Quote(e.Name), e.Begin)
		case e.Begin > at:
			return formatErrorf("there is a hole of %d bytes at byte %d of the data, before tensor %s: the file is damaged", e.Begin-at, at, strictjson.Quote(e.Name))
		}
		at, before = e.End, e.Name
	}
	if at != dataBytes {
		return formatErrorf("%d bytes follow the last tensor: the file is damaged", dataBytes-at)
	}
	return nil
}
