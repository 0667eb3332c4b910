package safetensors

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/ingestd/ingestd/internal/strictjson"
	"github.com/ingestd/ingestd/tensor"
)

// DataAlign is what the data of files that Write makes starts on.
const DataAlign = 64

// Write writes the tensors of a manifest into one file. data returns the bytes of tensor i; it is called once for each, in the order in which they lie in the file, and what it
// returns must stay until the next call. The manifest must have no encodings.
//
// The file is there whole or not at all: it is written beside its place, to the disk, and then renamed, over a file that may be there.
//
// Tensors lie in the manifest's order without holes, as the format demands, unless that would put one where its elements are not aligned; then those of larger elements come
// first.
func Write(path string, m *tensor.Manifest, metadata map[string]string, data func(i int) []byte) error {
	header, places, err := newHeader(m, metadata)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".ingestd-*.safetensors")
	if err != nil {
		return err
	}
	err = errors.Join(writeAll(f, header, places, m, data), f.Chmod(0o644))
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return syncFolder(filepath.Dir(path))
}

// syncFolder makes the new name last.
func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

func writeAll(f io.Writer, header []byte, places []int, m *tensor.Manifest, data func(i int) []byte) error {
	w := bufio.NewWriterSize(f, 1<<20)
	if _, err := w.Write(header); err != nil {
		return err
	}
	for _, i := range places {
		b := data(i)
		if int64(len(b)) != m.EncodedBytes(i) {
			t := m.Tensor(i)
			return fmt.Errorf("tensor %s has %d bytes, %s needs %d", strictjson.Quote(t.Name), len(b), t.Type(), m.EncodedBytes(i))
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return w.Flush()
}

// newHeader returns what comes before the data, and the tensors in the order in which they lie.
func newHeader(m *tensor.Manifest, metadata map[string]string) (header []byte, places []int, err error) {
	places = make([]int, m.Len())
	for i := range places {
		places[i] = i
		t := m.Tensor(i)
		switch {
		case t.Encoding.Kind != tensor.Raw:
			return nil, nil, fmt.Errorf("tensor %s is encoded as %v; files hold tensors as they are, so decode it first", strictjson.Quote(t.Name), t.Encoding)
		case t.Name == metadataKey:
			return nil, nil, fmt.Errorf("a tensor may not be named %s in a file", metadataKey)
		}
	}
	if !aligned(m) {
		slices.SortStableFunc(places, func(a, b int) int { return cmp.Compare(element(m, b), element(m, a)) })
	}
	b := append(make([]byte, 8), '{')
	if len(metadata) > 0 {
		b = append(strictjson.AppendString(b, metadataKey), ":{"...)
		for k, key := range slices.Sorted(maps.Keys(metadata)) {
			if k > 0 {
				b = append(b, ',')
			}
			b = strictjson.AppendString(append(strictjson.AppendString(b, key), ':'), metadata[key])
		}
		b = append(b, "},"...)
	}
	at := int64(0)
	for k, i := range places {
		if k > 0 {
			b = append(b, ',')
		}
		t := m.Tensor(i)
		b = append(strictjson.AppendString(b, t.Name), `:{"dtype":"`...)
		b = append(append(b, t.DType.String()...), `","shape":`...)
		b = append(appendInts(b, t.Shape), `,"data_offsets":`...)
		b = append(appendInts(b, []int64{at, at + m.EncodedBytes(i)}), '}')
		at += m.EncodedBytes(i)
	}
	b = append(b, '}')
	for len(b)%DataAlign != 0 {
		b = append(b, ' ')
	}
	if len(b)-8 > HeaderBytesMax {
		return nil, nil, fmt.Errorf("the header would have %d bytes; at most %d are allowed, so shorten the metadata", len(b)-8, HeaderBytesMax)
	}
	binary.LittleEndian.PutUint64(b, uint64(len(b)-8))
	return b, places, nil
}

func element(m *tensor.Manifest, i int) int64 { return m.Tensor(i).DType.Bytes() }

// aligned says whether each tensor of the manifest would start on a multiple of its elements' size if they lay one after the other.
func aligned(m *tensor.Manifest) bool {
	at := int64(0)
	for i := range m.Len() {
		if at%element(m, i) != 0 {
			return false
		}
		at += m.EncodedBytes(i)
	}
	return true
}

func appendInts(dst []byte, all []int64) []byte {
	dst = append(dst, '[')
	for i, n := range all {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = strconv.AppendInt(dst, n, 10)
	}
	return append(dst, ']')
}
