package safetensors

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ingestd/ingestd/internal/strictjson"
)

// shardsMax is how many files one index may name.
const shardsMax = 4096

// IndexSuffix is how the names of indexes end.
const IndexSuffix = ".safetensors.index.json"

// index says which tensor is in which shard.
type index struct {
	shardOf map[string]string
	count   map[string]int // tensors of each shard
}

// readIndex reads an index. Its metadata, and what else it has beside the map of weights, says nothing that the shards do not.
func readIndex(path string) (*index, error) {
	if err := regular(path); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var text bytes.Buffer
	if n, err := io.CopyN(&text, f, HeaderBytesMax+1); err == nil {
		return nil, &FormatError{path, fmt.Sprintf("the index has more than %d bytes; at most %d are read", n-1, HeaderBytesMax)}
	} else if err != io.EOF {
		return nil, err
	}
	x, err := parseIndex(text.Bytes())
	if err != nil {
		return nil, &FormatError{path, err.Error()}
	}
	return x, nil
}

func parseIndex(text []byte) (*index, error) {
	const field = "weight_map"
	x := &index{count: map[string]int{}}
	r := strictjson.New(text)
	err := r.Map(func(key string) error {
		if key != field {
			return r.Ignore()
		}
		if x.shardOf != nil {
			return fmt.Errorf("%q is there twice", field)
		}
		x.shardOf = map[string]string{}
		return r.Map(func(tensor string) error {
			if _, again := x.shardOf[tensor]; again {
				return fmt.Errorf("tensor %s is there twice", strictjson.Quote(tensor))
			}
			shard, err := r.String()
			x.shardOf[tensor] = shard
			x.count[shard]++
			return err
		})
	})
	if err == nil {
		err = r.End()
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("the index is damaged: %w", err)
	case len(x.shardOf) == 0:
		return nil, fmt.Errorf("the index has no %q, or an empty one", field)
	}
	return x, nil
}

// shards returns the names of the files, in order, all of which lie beside the index.
func (x *index) shards() ([]string, error) {
	if len(x.count) > shardsMax {
		return nil, fmt.Errorf("the index names %d files; at most %d are read", len(x.count), shardsMax)
	}
	sorted := slices.Sorted(maps.Keys(x.count))
	for _, name := range sorted {
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\\\x00") || filepath.VolumeName(name) != "" {
			return nil, fmt.Errorf("the index names the file %s; shards must lie beside their index, without a path", strictjson.Quote(name))
		}
	}
	return sorted, nil
}

// check: a shard has the tensors that the index says, and no others.
func (x *index) check(shard string, h *Header) error {
	for _, e := range h.Entries {
		switch want, ok := x.shardOf[e.Name]; {
		case !ok:
			return fmt.Errorf("has the tensor %s, which the index does not name", strictjson.Quote(e.Name))
		case want != shard:
			return fmt.Errorf("has the tensor %s, which the index says is in %s", strictjson.Quote(e.Name), strictjson.Quote(want))
		}
	}
	if x.count[shard] == len(h.Entries) {
		return nil
	}
	has := map[string]bool{}
	for _, e := range h.Entries {
		has[e.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(x.shardOf)) {
		if x.shardOf[name] == shard && !has[name] {
			return fmt.Errorf("lacks the tensor %s, which the index says is here", strictjson.Quote(name))
		}
	}
	return nil
}

// regular refuses what cannot be read or mapped at any place, before opening it could block.
func regular(path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = &FormatError{path, "is no regular file"}
	}
	return err
}

// find returns the file to open: path itself, or what a folder holds: its only index, else its only .safetensors file.
func find(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil || !info.IsDir() {
		return path, err
	}
	for _, suffix := range []string{IndexSuffix, ".safetensors"} {
		all, err := os.ReadDir(path)
		if err != nil {
			return "", err
		}
		var found []string
		for _, entry := range all {
			if strings.HasSuffix(entry.Name(), suffix) {
				found = append(found, entry.Name())
			}
		}
		switch len(found) {
		case 0:
			continue
		case 1:
			return filepath.Join(path, found[0]), nil
		}
		return "", &FormatError{path, fmt.Sprintf("the folder has %d files that end in %s, such as %s and %s: name one", len(found), suffix, found[0], found[1])}
	}
	return "", &FormatError{path, "the folder has neither an index (*" + IndexSuffix + ") nor a .safetensors file"}
}
