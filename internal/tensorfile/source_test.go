package tensorfile

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ingestd/ingestd/spec"
)

type member struct {
	name string
	data []byte
}

func npz(t testing.TB, method uint16, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, m := range members {
		f, err := w.CreateHeader(&zip.FileHeader{Name: m.name, Method: method})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(m.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func twoArrays(t testing.TB, method uint16) []byte {
	return npz(t, method,
		member{"x.npy", npy("\x01\x00", dict("<u2", "(4, 3)"), count(24))},
		member{"y.npy", npy("\x01\x00", dict("|u1", "(4,)"), []byte{100, 101, 102, 103})})
}

func TestNPZ(t *testing.T) {
	want := []byte{0, 1, 2, 3, 4, 5, 100, 6, 7, 8, 9, 10, 11, 101, 12, 13, 14, 15, 16, 17, 102, 18, 19, 20, 21, 22, 23, 103}
	for _, method := range []uint16{zip.Store, zip.Deflate} {
		path := write(t, "a.npz", twoArrays(t, method))
		s, err := Open(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if s.Spec().Text() != "x:U16[3],y:U8" || s.Samples() != 4 {
			t.Errorf("spec %s, %d samples", s.Spec().Text(), s.Samples())
		}
		for _, most := range []int{0, 1, 3} {
			if got, err := readSource(s, most); err != nil || !bytes.Equal(got, want) {
				t.Errorf("most %d: %v, %v", most, err, got)
			}
			if err := s.Rewind(); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.Close()
		// The table has the leaves in another order.
		s, err = Open(path, mustSpec(t, "y:U8,x:U16[3]"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := readSource(s, 0); err != nil || !bytes.HasPrefix(got, []byte{100, 0, 1, 2, 3, 4, 5, 101}) {
			t.Errorf("reordered: %v, %v", err, got)
		}
		_ = s.Close()
		var mismatch *spec.MismatchError
		for _, other := range []string{"x:U16[3]", "x:I16[3],y:U8", "x:U16[3],y:U8,z:U8"} {
			if _, err = Open(path, mustSpec(t, other)); !errors.As(err, &mismatch) {
				t.Errorf("%s: got %v, want a mismatch", other, err)
			}
		}
	}
}

func TestBadNPZ(t *testing.T) {
	array := npy("\x01\x00", dict("<u2", "(4, 3)"), count(24))
	whole := twoArrays(t, zip.Store)
	damaged := bytes.Clone(whole)
	damaged[bytes.Index(damaged, count(24))+20] ^= 1
	method := bytes.Clone(whole)
	for at := range method {
		if string(method[at:min(at+4, len(method))]) == "PK\x01\x02" {
			method[at+10] = 99
		}
	}
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"not a zip":     {[]byte("hello"), "zip"},
		"cut":           {whole[:len(whole)-10], "zip"},
		"no arrays":     {npz(t, zip.Store), "no array"},
		"other member":  {npz(t, zip.Store, member{"readme.txt", nil}), "readme.txt: is not an array"},
		"bad member":    {npz(t, zip.Store, member{"x.npy", []byte("junk.....")}), "x.npy: starts with"},
		"object":        {npz(t, zip.Store, member{"x.npy", npy("\x01\x00", dict("|O", "(4,)"), nil)}), "pickle"},
		"counts differ": {npz(t, zip.Store, member{"x.npy", array}, member{"y.npy", npy("\x01\x00", dict("|u1", "(3,)"), count(3))}), "same first axis"},
		"twice":         {npz(t, zip.Store, member{"x.npy", array}, member{"x.npy", array}), "x"},
		"short data":    {npz(t, zip.Deflate, member{"x.npy", array[:len(array)-1]}), "cut short"},
		"method":        {method, "method 99"},
		"damaged":       {damaged, "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(write(t, "bad.npz", c.file), nil)
			if err == nil {
				_, err = readSource(s, 1)
				_ = s.Close()
			}
			var typed *FormatError
			if !errors.As(err, &typed) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func tensors(header string, data []byte) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), data...)
}

func TestSafetensors(t *testing.T) {
	header := `{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3,2],"data_offsets":[6,18]},"a":{"dtype":"U16","shape":[3],"data_offsets":[0,6]}}   `
	s, err := Open(write(t, "a.safetensors", tensors(header, count(18))), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.Spec().Text() != "b:BF16[2],a:U16" || s.Samples() != 3 {
		t.Errorf("spec %s, %d samples", s.Spec().Text(), s.Samples())
	}
	want := []byte{6, 7, 8, 9, 0, 1, 10, 11, 12, 13, 2, 3, 14, 15, 16, 17, 4, 5}
	if got, err := readSource(s, 2); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, %v", err, got)
	}
	_ = s.Close()
}

func TestBadSafetensors(t *testing.T) {
	one := func(entry string) []byte { return tensors(`{"a":`+entry+`}`, count(6)) }
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"empty":          {nil, "empty or cut short"},
		"huge header":    {[]byte("\xff\xff\xff\xff\xff\xff\xff\x7f{}"), "at most"},
		"cut header":     {[]byte("\xff\x00\x00\x00\x00\x00\x00\x00{}"), "cut short"},
		"not json":       {tensors("hello", nil), "not a JSON object"},
		"array":          {tensors("[]", nil), "not a JSON object"},
		"no tensor":      {tensors("{}", nil), "no array"},
		"junk after":     {tensors(`{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}} x`, count(6)), "follows"},
		"unclosed":       {tensors(`{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}`, count(6)), "damaged"},
		"missing field":  {one(`{"dtype":"U8","shape":[6]}`), "missing"},
		"unknown field":  {one(`{"dtype":"U8","shape":[6],"data_offsets":[0,6],"x":1}`), "is unknown"},
		"dtype":          {one(`{"dtype":"C64","shape":[6],"data_offsets":[0,6]}`), "not known"},
		"negative":       {one(`{"dtype":"U8","shape":[-6],"data_offsets":[0,6]}`), "negative"},
		"overflow":       {one(`{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,6]}`), "larger than any file"},
		"span too small": {one(`{"dtype":"U16","shape":[6],"data_offsets":[0,6]}`), "needs 12 bytes"},
		"out of file":    {one(`{"dtype":"U8","shape":[7],"data_offsets":[0,7]}`), "cut short"},
		"backwards":      {one(`{"dtype":"U8","shape":[6],"data_offsets":[6,0]}`), "cut short or damaged"},
		"fraction":       {one(`{"dtype":"U8","shape":[6.5],"data_offsets":[0,6]}`), "a"},
		"hole":           {one(`{"dtype":"U8","shape":[5],"data_offsets":[1,6]}`), "hole"},
		"left over":      {one(`{"dtype":"U8","shape":[5],"data_offsets":[0,5]}`), "1 bytes follow"},
		"scalar":         {tensors(`{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}`, count(1)), "first axis"},
		"overlap": {tensors(`{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}`, count(6)),
			"overlap"},
		"twice": {tensors(`{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"U8","shape":[3],"data_offsets":[3,6]}}`, count(6)),
			"is there twice"},
		"metadata": {tensors(`{"__metadata__":{"a":1}}`, nil), "map of strings"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(write(t, "bad.safetensors", c.file), nil)
			var typed *FormatError
			if !errors.As(err, &typed) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestRaw(t *testing.T) {
	s := mustSpec(t, "a:U8[3],b:U16")
	data := count(20)
	for _, r := range []io.Reader{bytes.NewReader(data), iotest.OneByteReader(bytes.NewReader(data)), iotest.DataErrReader(bytes.NewReader(data))} {
		if got, err := readSource(Raw(r, "standard input", s), 0); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%v, %v", err, got)
		}
	}
	for _, n := range []int{1, 4, 6, 19} {
		got, err := readSource(Raw(bytes.NewReader(data[:n]), "standard input", s), 0)
		var typed *FormatError
		if !errors.As(err, &typed) || !strings.Contains(err.Error(), "inside sample") || len(got) != n/5*5 {
			t.Errorf("%d bytes: %v, %v", n, err, got)
		}
	}
	boom := errors.New("boom")
	if _, err := readSource(Raw(iotest.ErrReader(boom), "standard input", s), 0); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	if err := Raw(bytes.NewReader(nil), "standard input", s).Rewind(); err == nil {
		t.Error("a pipe was read twice")
	}
	path := write(t, "a.bin", data)
	f, err := Open(path, s)
	if err != nil || f.Samples() != 4 {
		t.Fatal(err, f.Samples())
	}
	for range 2 {
		if got, err := readSource(f, 3); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%v, %v", err, got)
		}
		if err := f.Rewind(); err != nil {
			t.Fatal(err)
		}
	}
	_ = f.Close()
	for _, bad := range []struct {
		path string
		spec *spec.Spec
		want string
	}{
		{path, nil, "--spec"},
		{write(t, "b.bin", data[:7]), s, "2 bytes more"},
		{write(t, "c.bin", nil), s, "empty"},
		{t.TempDir(), s, "folder"},
		{filepath.Join(t.TempDir(), "none.npy"), s, "no such file"},
	} {
		if _, err := Open(bad.path, bad.spec); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("got %v, want %q", err, bad.want)
		}
	}
}

// TestFileShrinksWhileRead: what was checked at Open may be gone at Next.
func TestFileShrinksWhileRead(t *testing.T) {
	path := write(t, "a.npy", npy("\x01\x00", dict("<f4", "(3, 2)"), count(24)))
	s, err := Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Truncate(path, 80); err != nil {
		t.Fatal(err)
	}
	var typed *FormatError
	if _, err := readSource(s, 1); !errors.As(err, &typed) {
		t.Errorf("got %v", err)
	}
}

func TestWriterRoundTrip(t *testing.T) {
	for _, text := range []string{".:F32[2]", "x:U16[3],y:BF16,z/(0):BOOL[1,1,1,1,1,1,1,2]"} {
		s := mustSpec(t, text)
		path := filepath.Join(t.TempDir(), "out.npz")
		w, err := Create(path, s)
		if err != nil {
			t.Fatal(err)
		}
		const batches, rows = 3, 5
		for range batches {
			if err := w.Append(rows, func(leaf int) []byte { return count(rows * int(s.Leaf(leaf).Bytes())) }); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error("the file is there before it is whole")
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := Open(path, s)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readSource(r, 0)
		if err != nil || r.Samples() != batches*rows || int64(len(got)) != batches*rows*s.SampleBytes() {
			t.Errorf("%v: %d samples, %d bytes", err, r.Samples(), len(got))
		}
		_ = r.Close()
		if _, err := Create(path, s); !errors.Is(err, os.ErrExist) {
			t.Errorf("an existing file was opened for writing: %v", err)
		}
		entries, err := os.ReadDir(filepath.Dir(path))
		if err != nil || len(entries) != 1 {
			t.Errorf("left behind: %v", entries)
		}
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(npy("\x01\x00", dict("<f4", "(3, 2)"), count(24)))
	f.Add(npy("\x01\x00", dict("|V2", "(3, 4)"), count(24)))
	f.Add(twoArrays(f, zip.Store))
	f.Add(tensors(`{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}`, count(6)))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, ext := range []string{".npy", ".npz", ".safetensors"} {
			s, err := Open(write(t, "a"+ext, data), nil)
			if err != nil {
				continue
			}
			if s.Spec().SampleBytes() <= int64(len(data)) {
				_, _ = readSource(s, 0)
			}
			_ = s.Close()
		}
	})
}
