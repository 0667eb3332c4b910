package safetensors

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

// file puts a file together from its parts.
func file(header string, data []byte) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), data...)
}

func count(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func TestReadHeader(t *testing.T) {
	text := `{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3,2],"data_offsets":[6,18]},"z":{"shape":[0,7],"dtype":"F32","data_offsets":[6,6]},` +
		`"a":{"dtype":"U16","shape":[3],"data_offsets":[0,6]},"scalar":{"data_offsets":[18,26],"dtype":"F64","shape":[]}}   `
	b := file(text, count(26))
	h, err := ReadHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	want := &Header{
		Entries:  []Entry{{"b", spec.BF16, []int64{3, 2}, 6, 18}, {"z", spec.F32, []int64{0, 7}, 6, 6}, {"a", spec.U16, []int64{3}, 0, 6}, {"scalar", spec.F64, []int64{}, 18, 26}},
		Metadata: map[string]string{"format": "pt"}, DataOffset: int64(8 + len(text)),
	}
	if !reflect.DeepEqual(h, want) {
		t.Errorf("got  %+v\nwant %+v", h, want)
	}
	var names []string
	for _, e := range h.InOrder() {
		names = append(names, e.Name)
	}
	if strings.Join(names, " ") != "a z b scalar" {
		t.Errorf("order %v", names)
	}
}

func TestReadHeaderRefuses(t *testing.T) {
	one := func(entry string) []byte { return file(`{"a":`+entry+`}`, count(6)) }
	two := func(a, b string) []byte {
		return file(`{"a":{"dtype":"U8","shape":`+a+`},"b":{"dtype":"U8","shape":`+b+`}}`, count(6))
	}
	long := func(n uint64) []byte { return append(binary.LittleEndian.AppendUint64(nil, n), make([]byte, 10)...) }
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"empty":           {nil, "has 0 bytes: it is empty or cut short"},
		"seven bytes":     {count(7), "has 7 bytes"},
		"header over max": {long(HeaderBytesMax + 1), "at most 100000000 are read"},
		"header at max":   {long(HeaderBytesMax), "the file has 10: it is cut short"},
		"huge header":     {long(1<<64 - 1), "at most 100000000 are read"},
		"cut header":      {long(11), "should be 11 bytes, the file has 10"},
		"no header":       {long(0), "not a JSON object"},
		"not json":        {file("hello", nil), "not a JSON object"},
		"array":           {file("[]", nil), "not a JSON object"},
		"blank first":     {file(" {}", nil), "not a JSON object"},
		"zeros":           {long(10), "not a JSON object"},
		"junk after":      {file(`{} x`, nil), "follows the end"},
		"zeros after":     {file("{}\x00", nil), "follows the end"},
		"unclosed":        {file(`{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}`, count(6)), "the header is damaged: it ends too early"},
		"not UTF-8":       {file("{\"\xff\":{}}", nil), "not UTF-8"},
		"missing field":   {one(`{"dtype":"U8","shape":[6]}`), `tensor "a": the field "data_offsets" is missing`},
		"unknown field":   {one(`{"dtype":"U8","shape":[6],"data_offsets":[0,6],"x":1}`), `"x" is unknown`},
		"field twice":     {one(`{"dtype":"U8","dtype":"U8","shape":[6],"data_offsets":[0,6]}`), `"dtype" is there twice`},
		"null":            {one(`null`), "want an object, found null"},
		"dtype":           {one(`{"dtype":"C64","shape":[6],"data_offsets":[0,6]}`), `tensor "a": "dtype": dtype "C64" is not known`},
		"negative":        {one(`{"dtype":"U8","shape":[-6],"data_offsets":[0,6]}`), "negative axis"},
		"overflow":        {one(`{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,6]}`), "larger than any file"},
		"too short":       {one(`{"dtype":"U16","shape":[6],"data_offsets":[0,6]}`), "needs 12 bytes, its data_offsets span 6"},
		"too long":        {one(`{"dtype":"U8","shape":[5],"data_offsets":[0,6]}`), "needs 5 bytes, its data_offsets span 6"},
		"beyond the file": {one(`{"dtype":"U8","shape":[7],"data_offsets":[0,7]}`), "the file has 6 bytes of data: it is cut short"},
		"backwards":       {one(`{"dtype":"U8","shape":[6],"data_offsets":[6,0]}`), "cut short or damaged"},
		"before the data": {one(`{"dtype":"U8","shape":[6],"data_offsets":[-3,3]}`), "cut short or damaged"},
		"one offset":      {one(`{"dtype":"U8","shape":[6],"data_offsets":[6]}`), "must be two numbers"},
		"three offsets":   {one(`{"dtype":"U8","shape":[6],"data_offsets":[0,6,6]}`), "more than 2 numbers"},
		"fraction":        {one(`{"dtype":"U8","shape":[6.5],"data_offsets":[0,6]}`), "without fraction"},
		"many axes":       {one(`{"dtype":"U8","shape":[` + strings.Repeat("1,", 64) + `6],"data_offsets":[0,6]}`), "more than 64 numbers"},
		"hole":            {one(`{"dtype":"U8","shape":[5],"data_offsets":[1,6]}`), `a hole of 1 bytes at byte 0 of the data, before tensor "a"`},
		"hole between":    {two(`[2],"data_offsets":[0,2]`, `[3],"data_offsets":[3,6]`), `a hole of 1 bytes at byte 2 of the data, before tensor "b"`},
		"left over":       {one(`{"dtype":"U8","shape":[5],"data_offsets":[0,5]}`), "1 bytes follow"},
		"no tensors":      {file(`{}`, count(6)), "6 bytes follow"},
		"overlap":         {two(`[4],"data_offsets":[0,4]`, `[4],"data_offsets":[2,6]`), `"a" and "b" overlap at byte 2`},
		"empty inside":    {two(`[6],"data_offsets":[0,6]`, `[0],"data_offsets":[3,3]`), `"a" and "b" overlap at byte 3`},
		"same place":      {two(`[6],"data_offsets":[0,6]`, `[6],"data_offsets":[0,6]`), `"a" and "b" overlap at byte 0`},
		"name twice": {file(`{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"U8","shape":[3],"data_offsets":[3,6]}}`, count(6)),
			`"a" is there twice`},
		"metadata":       {file(`{"__metadata__":{"a":1}}`, nil), "__metadata__ is not a map of strings"},
		"metadata twice": {file(`{"__metadata__":{},"__metadata__":{}}`, nil), `"__metadata__" is there twice`},
		"entry twice":    {file(`{"__metadata__":{"a":"","a":""}}`, nil), `"a" is there twice`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadHeader(bytes.NewReader(c.file), int64(len(c.file)))
			var typed *FormatError
			if !errors.As(err, &typed) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func FuzzReadHeader(f *testing.F) {
	f.Add([]byte(`{"a":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]},"__metadata__":{"x":"y"}}`), uint16(6))
	f.Add([]byte(`{"a":{"dtype":"F16","shape":[],"data_offsets":[4,6]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"c":{"dtype":"I64","shape":[0],"data_offsets":[4,4]}} `), uint16(6))
	f.Fuzz(func(t *testing.T, header []byte, size uint16) {
		b := file(string(header), make([]byte, size))
		h, err := ReadHeader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		used := make([]int, size)
		for _, e := range h.Entries {
			n := e.DType.Bytes()
			for _, d := range e.Shape {
				n *= d
			}
			if e.End-e.Begin != n {
				t.Fatalf("%+v spans something else than its %d bytes", e, n)
			}
			for i := e.Begin; i < e.End; i++ {
				used[i]++
			}
		}
		for i, n := range used {
			if n != 1 {
				t.Fatalf("byte %d is of %d tensors", i, n)
			}
		}
	})
}
