package tensorfile

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"

	"github.com/ingestd/ingestd/spec"
)

// tensor is one entry of a .safetensors header.
type tensor struct {
	DType   *string `json:"dtype"`
	Shape   []int64 `json:"shape"`
	Offsets []int64 `json:"data_offsets"`
}

func openSafetensors(f *os.File, size int64) ([]counted, error) {
	var prefix [8]byte
	if err := readAll(io.NewSectionReader(f, 0, size), prefix[:]); err != nil {
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
	if err := readAll(io.NewSectionReader(f, 8, size-8), text); err != nil {
		return nil, err
	}
	data := 8 + int64(length)
	return parseTensors(f, text, data, size-data)
}

// parseTensors reads the header entry by entry, so that the order of the leaves is the file's, and a name that comes twice is seen.
func parseTensors(f io.ReaderAt, text []byte, data, dataBytes int64) ([]counted, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return nil, formatErrorf("the header is not a JSON object: not a .safetensors file, or damaged")
	}
	var all []counted
	var spans [][2]int64
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, formatErrorf("the header is damaged: %v", err)
		}
		name := key.(string) // the decoder accepts nothing else as a key
		if name == "__metadata__" {
			var free map[string]string
			if err := dec.Decode(&free); err != nil {
				return nil, formatErrorf("__metadata__ is not a map of strings: %v", err)
			}
			continue
		}
		var t tensor
		if err := dec.Decode(&t); err != nil {
			return nil, formatErrorf("tensor %q: %v", cut(name), err)
		}
		if len(all) == spec.LeavesMax {
			return nil, formatErrorf("more than %d tensors; that many leaves are allowed", spec.LeavesMax)
		}
		c, err := t.column(f, name, data, dataBytes)
		if err != nil {
			return nil, named(err, cut(name))
		}
		all = append(all, c)
		spans = append(spans, [2]int64(t.Offsets))
	}
	if _, err := dec.Token(); err != nil {
		return nil, formatErrorf("the header is damaged: %v", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, formatErrorf("the header is damaged: something follows the JSON object")
	}
	return all, checkSpans(spans, dataBytes)
}

// column checks an entry against the file.
func (t *tensor) column(f io.ReaderAt, name string, data, dataBytes int64) (counted, error) {
	if t.DType == nil || t.Shape == nil || len(t.Offsets) != 2 {
		return counted{}, formatErrorf("dtype, shape or the two data_offsets are missing")
	}
	dtype, err := spec.ParseDType(*t.DType)
	if err != nil {
		return counted{}, formatErrorf("%v", err)
	}
	for _, d := range t.Shape {
		if d < 0 {
			return counted{}, formatErrorf("shape %v has a negative axis", t.Shape)
		}
	}
	a := &array{element: element{dtype: dtype, bytes: dtype.Bytes()}, shape: t.Shape}
	n, err := a.size()
	if err != nil {
		return counted{}, err
	}
	begin, end := t.Offsets[0], t.Offsets[1]
	switch {
	case begin < 0 || end < begin || end > dataBytes:
		return counted{}, formatErrorf("its data is said to be at %d to %d, the file has %d bytes of data: it is cut short or damaged", begin, end, dataBytes)
	case end-begin != n:
		return counted{}, formatErrorf("%s of shape %v needs %d bytes, its data_offsets span %d", dtype, t.Shape, n, end-begin)
	}
	return arrayColumn(name, a, section(f, data+begin, n))
}

// checkSpans: the tensors cover the data without holes and overlaps, as the format demands.
func checkSpans(spans [][2]int64, dataBytes int64) error {
	slices.SortFunc(spans, func(a, b [2]int64) int { return int(min(max(a[0]-b[0], -1), 1)) })
	at := int64(0)
	for _, span := range spans {
		if span[0] != at {
			return formatErrorf("the tensors overlap or leave a hole at byte %d of the data: the file is damaged", min(at, span[0]))
		}
		at = span[1]
	}
	if at != dataBytes {
		return formatErrorf("%d bytes follow the last tensor: the file is damaged", dataBytes-at)
	}
	return nil
}
