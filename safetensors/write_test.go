//go:build linux

package safetensors

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

func manifest(t testing.TB, tensors ...tensor.Tensor) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest(tensors, map[string]string{"of": "the manifest"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func contents(m *tensor.Manifest) func(i int) []byte {
	return func(i int) []byte {
		b := count(int(m.EncodedBytes(i)))
		for k := range b {
			b[k] ^= byte(i*31 + k>>8)
		}
		return b
	}
}

// roundTrip writes, reads back and compares by name.
func roundTrip(t *testing.T, m *tensor.Manifest, metadata map[string]string) *tensor.Manifest {
	t.Helper()
	path := filepath.Join(t.TempDir(), "out.safetensors")
	data := contents(m)
	if err := Write(path, m, metadata, data); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	header := binary.LittleEndian.Uint64(text)
	if (8+header)%64 != 0 || text[8] != '{' || strings.Trim(string(text[8 : 8+header][bytes.LastIndexByte(text[8:8+header], '}'):]), " ") != "}" {
		t.Errorf("a header of %d bytes: %s", header, text[8:8+header])
	}
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := f.Manifest()
	if got.Len() != m.Len() || !maps.Equal(got.Metadata(), metadata) {
		t.Fatalf("%d tensors, metadata %v", got.Len(), got.Metadata())
	}
	for i := range m.Len() {
		want := m.Tensor(i)
		k, ok := got.Index(want.Name)
		tensor := got.Tensor(k)
		if !ok || tensor.Type() != want.Type() || !bytes.Equal(f.Data(k), data(i)) {
			t.Errorf("tensor %q: %v, %s", want.Name, ok, tensor.Type())
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	return got
}

func TestWrite(t *testing.T) {
	var all []tensor.Tensor
	for _, d := range spec.DTypes() {
		all = append(all, tensor.Tensor{Name: "of " + d.String(), DType: d, Shape: []int64{3, 5}})
	}
	all = append(all, tensor.Tensor{Name: "scalar\"\\é", DType: spec.F64}, tensor.Tensor{Name: "none", DType: spec.F32, Shape: []int64{4, 0}})
	m := manifest(t, all...)
	got := roundTrip(t, m, map[string]string{"format": "pt", "a\n": "\x00\"é"})
	// Bytes before larger elements would leave these unaligned, so they come last.
	for i, at := 0, int64(0); i < got.Len(); i++ {
		size := got.Tensor(i).DType.Bytes()
		if at%size != 0 {
			t.Errorf("tensor %d, %s, lies at %d", i, got.Tensor(i).Name, at)
		}
		at += got.EncodedBytes(i)
	}
	if got.Equal(m) {
		t.Error("the order is the manifest's, and some are not aligned")
	}
	ordered := manifest(t, tensor.Tensor{Name: "z", DType: spec.F32, Shape: []int64{2}}, tensor.Tensor{Name: "b", DType: spec.F64}, tensor.Tensor{Name: "c", DType: spec.U8, Shape: []int64{7}},
		tensor.Tensor{Name: "a", DType: spec.U8})
	if !roundTrip(t, ordered, nil).Equal(ordered) {
		t.Error("an order in which all are aligned was not kept")
	}
	roundTrip(t, manifest(t, tensor.Tensor{Name: "none", DType: spec.F32, Shape: []int64{0}}), nil)
	for n := range 64 { // every length of the header before padding
		roundTrip(t, manifest(t, tensor.Tensor{Name: strings.Repeat("n", n+1), DType: spec.U8, Shape: []int64{int64(n)}}), nil)
	}
}

func TestWriteMany(t *testing.T) {
	var all []tensor.Tensor
	for i := range 10_000 {
		all = append(all, tensor.Tensor{Name: fmt.Sprint("layers.", i, ".w"), DType: spec.F32, Shape: []int64{int64(i % 3)}})
	}
	m := manifest(t, all...)
	if got := roundTrip(t, m, nil); got.Len() != 10_000 {
		t.Errorf("%d tensors", got.Len())
	}
}

func TestWriteRefuses(t *testing.T) {
	path := put(t, filepath.Join(t.TempDir(), "out.safetensors"), []byte("what was there"))
	plain := manifest(t, tensor.Tensor{Name: "a", DType: spec.F32, Shape: []int64{4}})
	for want, write := range map[string]func() error{
		`tensor "a" is encoded as bf16; files hold tensors as they are`: func() error {
			m := manifest(t, tensor.Tensor{Name: "a", DType: spec.F32, Shape: []int64{4}, Encoding: tensor.Encoding{Kind: tensor.BF16}})
			return Write(path, m, nil, contents(m))
		},
		"may not be named __metadata__": func() error {
			m := manifest(t, tensor.Tensor{Name: "__metadata__", DType: spec.F32, Shape: []int64{4}})
			return Write(path, m, nil, contents(m))
		},
		`tensor "a" has 15 bytes, F32[4] needs 16`: func() error { return Write(path, plain, nil, func(int) []byte { return make([]byte, 15) }) },
		"the header would have": func() error {
			return Write(path, plain, map[string]string{"x": strings.Repeat("x", HeaderBytesMax)}, contents(plain))
		},
		"no such file": func() error { return Write(filepath.Join(path+"x", "y.safetensors"), plain, nil, contents(plain)) },
	} {
		if err := write(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "what was there" {
		t.Errorf("a write that failed changed the file: %q, %v", b, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if err := Write(path, plain, nil, contents(plain)); err != nil {
		t.Errorf("replacing a file: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}
