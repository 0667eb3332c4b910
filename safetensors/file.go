//go:build linux

package safetensors

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/ingestd/ingestd/tensor"
	"golang.org/x/sys/unix"
)

// File is an open file, or an index with its files.
type File struct {
	manifest *tensor.Manifest
	data     [][]byte // of each tensor
	maps     [][]byte
}

// Open opens a .safetensors file, an index (*.safetensors.index.json) with the files it names, or a folder that holds one of these.
func Open(path string) (*File, error) {
	path, err := find(path)
	if err != nil {
		return nil, err
	}
	b := &builder{file: &File{}, metadata: map[string]string{}}
	if filepath.Ext(path) == ".json" {
		err = b.addIndex(path)
	} else {
		err = b.add(path, nil)
	}
	if err == nil {
		b.file.manifest, err = tensor.NewManifest(b.tensors, b.metadata)
		if err != nil {
			err = &FormatError{path, err.Error()}
		}
	}
	if err != nil {
		return nil, errors.Join(err, b.file.Close())
	}
	return b.file, nil
}

type builder struct {
	file     *File
	tensors  []tensor.Tensor
	metadata map[string]string // of several files: the last one's word counts
}

func (b *builder) addIndex(path string) error {
	x, err := readIndex(path)
	if err != nil {
		return err
	}
	shards, err := x.shards()
	if err != nil {
		return &FormatError{path, err.Error()}
	}
	for _, shard := range shards {
		err := b.add(filepath.Join(filepath.Dir(path), shard), func(h *Header) error { return x.check(shard, h) })
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s: a file that the index names is missing: %w", path, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// add maps one file. check looks at its header.
func (b *builder) add(path string, check func(*Header) error) error {
	mapped, err := mapFile(path)
	if err != nil {
		return err
	}
	b.file.maps = append(b.file.maps, mapped)
	h, err := ReadHeader(bytes.NewReader(mapped), int64(len(mapped)))
	var format *FormatError
	if errors.As(err, &format) {
		return &FormatError{path, format.Reason}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if check != nil {
		if err := check(h); err != nil {
			return &FormatError{path, err.Error()}
		}
	}
	maps.Copy(b.metadata, h.Metadata)
	for _, e := range h.InOrder() {
		b.tensors = append(b.tensors, tensor.Tensor{Name: e.Name, DType: e.DType, Shape: e.Shape})
		b.file.data = append(b.file.data, mapped[h.DataOffset+e.Begin:h.DataOffset+e.End:h.DataOffset+e.End])
	}
	return nil
}

// mapFile maps a whole file, read-only.
func mapFile(path string) ([]byte, error) {
	if err := regular(path); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case info.Size() < 8:
		return nil, &FormatError{path, fmt.Sprintf("has %d bytes: it is empty or cut short", info.Size())}
	case int64(int(info.Size())) != info.Size():
		return nil, &FormatError{path, "is too large for this machine's address space"}
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", path, err)
	}
	return mapped, nil
}

// Manifest returns the tensors in the order in which they lie, with the metadata of the files.
func (f *File) Manifest() *tensor.Manifest { return f.manifest }

// Data returns the bytes of tensor i of the manifest: the mapped file itself, read-only, until Close.
func (f *File) Data(i int) []byte { return f.data[i] }

// Close unmaps the files. What Data returned must not be used any more.
func (f *File) Close() error {
	var err error
	for _, mapped := range f.maps {
		err = errors.Join(err, unix.Munmap(mapped))
	}
	f.maps, f.data = nil, nil
	return err
}
