//go:build linux

package safetensors

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func put(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func refused(t *testing.T, path, want string) {
	t.Helper()
	f, err := Open(path)
	if err == nil {
		_ = f.Close()
	}
	var typed *FormatError
	if !errors.As(err, &typed) || typed.File == "" || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

func TestOpen(t *testing.T) {
	folder := t.TempDir()
	path := put(t, filepath.Join(folder, "m.safetensors"),
		file(`{"b":{"dtype":"U8","shape":[2,3],"data_offsets":[4,10]},"__metadata__":{"k":"v"},"z":{"dtype":"I8","shape":[0],"data_offsets":[4,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}`, count(10)))
	for _, path := range []string{path, folder} {
		f, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		m := f.Manifest()
		if got := string(m.JSON()); got != `{"tensors":[{"name":"a","dtype":"F32","shape":[]},{"name":"z","dtype":"I8","shape":[0]},{"name":"b","dtype":"U8","shape":[2,3]}],"metadata":{"k":"v"}}` {
			t.Error(got)
		}
		for i, want := range [][]byte{count(4), {}, count(10)[4:]} {
			if got := f.Data(i); !bytes.Equal(got, want) || int64(len(got)) != m.EncodedBytes(i) || cap(got) != len(got) {
				t.Errorf("tensor %d: % x", i, got)
			}
		}
		if err := errors.Join(f.Close(), f.Close()); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	folder := t.TempDir()
	refused(t, folder, "neither an index")
	refused(t, put(t, filepath.Join(folder, "empty.safetensors"), nil), "empty or cut short")
	refused(t, put(t, filepath.Join(folder, "cut.safetensors"), file(`{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}`, count(5))), "cut short")
	refused(t, folder, "2 files that end in .safetensors")
	// What the format allows and a manifest does not.
	refused(t, put(t, filepath.Join(folder, "none.safetensors"), file(`{}`, nil)), "no tensors")
	refused(t, put(t, filepath.Join(folder, "name.safetensors"), file(`{"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}`, count(1))), "the name is empty")
	refused(t, put(t, filepath.Join(folder, "axes.safetensors"), file(`{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}`, count(1))), "9 dimensions")
	pipe := filepath.Join(folder, "pipe.safetensors")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, pipe, "no regular file")
	if err := os.Rename(pipe, filepath.Join(folder, "pipe"+IndexSuffix)); err != nil {
		t.Fatal(err)
	}
	refused(t, folder, "no regular file")
	if _, err := Open(filepath.Join(folder, "other.safetensors")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// sharded is a folder with an index and two shards.
func sharded(t *testing.T, weightMap string) (folder, index string) {
	t.Helper()
	folder = t.TempDir()
	put(t, filepath.Join(folder, "m-2.safetensors"), file(`{"__metadata__":{"format":"pt","x":"2"},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}`, []byte("aaa")))
	put(t, filepath.Join(folder, "m-1.safetensors"), file(`{"__metadata__":{"format":"pt","x":"1"},"c":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}`, []byte("ccb")))
	return folder, put(t, filepath.Join(folder, "m"+IndexSuffix), []byte(`{"metadata":{"total_size":6,"more":[1.5e3,null,true,{"a":"b"}]},"weight_map":`+weightMap+`}`))
}

const rightMap = `{"a":"m-2.safetensors","b":"m-1.safetensors","c":"m-1.safetensors"}`

func TestSharded(t *testing.T) {
	folder, index := sharded(t, rightMap)
	for _, path := range []string{folder, index} {
		f, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		var all strings.Builder
		m := f.Manifest()
		for i := range m.Len() {
			all.WriteString(m.Tensor(i).Name + "=" + string(f.Data(i)) + " ")
		}
		if all.String() != "c=cc b=b a=aaa " || m.Metadata()["format"] != "pt" || m.Metadata()["x"] != "2" || len(m.Metadata()) != 2 {
			t.Errorf("%s, %v", all.String(), m.Metadata())
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestShardedRefuses(t *testing.T) {
	for weightMap, want := range map[string]string{
		`{}`:                       "or an empty one",
		`[]`:                       "want an object",
		`{"a":`:                    "damaged",
		`{"a":"m-2.safetensors"}x`: "damaged",
		`{"a":1}`:                  "want a string",
		`{"a":"m-2.safetensors","a":"m-2.safetensors"}`:                                             `tensor "a" is there twice`,
		rightMap + `,"weight_map":{}`:                                                               `"weight_map" is there twice`,
		`{"a":"m-2.safetensors","b":"m-1.safetensors"}`:                                             `m-1.safetensors: has the tensor "c", which the index does not name`,
		`{"a":"m-2.safetensors","b":"m-1.safetensors","c":"m-2.safetensors"}`:                       `has the tensor "c", which the index says is in "m-2.safetensors"`,
		`{"a":"m-2.safetensors","b":"m-1.safetensors","c":"m-1.safetensors","d":"m-1.safetensors"}`: `m-1.safetensors: lacks the tensor "d", which the index says is here`,
		`{"a":"../m-2.safetensors"}`:                                                                "must lie beside their index",
		`{"a":"/m-2.safetensors"}`:                                                                  "must lie beside their index",
		`{"a":"x\\m-2.safetensors"}`:                                                                "must lie beside their index",
		`{"a":".."}`:                                                                                "must lie beside their index",
		`{"a":""}`:                                                                                  "must lie beside their index",
		`{"a":"m\u0000"}`:                                                                           "must lie beside their index",
	} {
		_, index := sharded(t, weightMap)
		refused(t, index, want)
	}
	_, index := sharded(t, `{"a":"m-2.safetensors","b":"m-3.safetensors"}`)
	if _, err := Open(index); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "m-3.safetensors") || !strings.Contains(err.Error(), "is missing") {
		t.Errorf("got %v", err)
	}
	// The same name in both.
	folder, index := sharded(t, `{"a":"m-2.safetensors"}`)
	put(t, filepath.Join(folder, "m-2.safetensors"), file(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}`, []byte("ab")))
	put(t, index, []byte(`{"weight_map":`+rightMap+`}`))
	refused(t, index, `has the tensor "b", which the index says is in "m-1.safetensors"`)
	put(t, filepath.Join(folder, "n"+IndexSuffix), nil)
	refused(t, folder, "2 files that end in .safetensors.index.json")
	deep := strings.Repeat("[", 100) + strings.Repeat("]", 100)
	refused(t, put(t, filepath.Join(folder, "deep.json"), []byte(`{"x":`+deep+`,"weight_map":`+rightMap+`}`)), "nested deeper")
	var many strings.Builder
	for i := range shardsMax {
		fmt.Fprintf(&many, `,"%d":"%d"`, i, i)
	}
	most := []byte(`{"weight_map":{` + many.String()[1:] + `}}`)
	if x, err := parseIndex(most); err != nil {
		t.Fatal(err)
	} else if names, err := x.shards(); err != nil || len(names) != shardsMax {
		t.Errorf("%d shards: %v", len(names), err)
	}
	refused(t, put(t, filepath.Join(folder, "many.json"), []byte(`{"weight_map":{"x":"x"`+many.String()+`}}`)), "names 4097 files; at most 4096")
}

// TestFileIsMapped: what Data returns is the file, not a copy.
func TestFileIsMapped(t *testing.T) {
	path := put(t, filepath.Join(t.TempDir(), "m.safetensors"), file(`{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}`, count(6)))
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	info, err := other.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.WriteAt([]byte{99}, info.Size()-6); err != nil {
		t.Fatal(err)
	}
	if f.Data(0)[0] != 99 {
		t.Error("the data is a copy")
	}
}
