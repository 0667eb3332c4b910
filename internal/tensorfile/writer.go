package tensorfile

import (
	"archive/zip"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/ingestd/ingestd/spec"
)

// Writer writes a .npz file whose arrays have the sample axis first. A .npy header needs the number of samples, which only the end tells, so the leaves are
// spooled to unnamed files beside the target and put together by Close. Until then the target does not exist, and it is never there in part.
type Writer struct {
	path    string
	spec    *spec.Spec
	spools  []*spool
	samples int64
}

type spool struct {
	file *os.File
	*bufio.Writer
}

// Create begins a .npz file. It fails at once where the folder cannot be written or the file exists.
func Create(path string, s *spec.Spec) (*Writer, error) {
	if filepath.Ext(path) != ".npz" {
		return nil, fmt.Errorf("%s: the name must end in .npz, the one format that is written", path)
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("%s: %w: delete it or choose another name", path, os.ErrExist)
	}
	w := &Writer{path: path, spec: s}
	for range s.NumLeaves() {
		f, err := unnamed(filepath.Dir(path))
		if err != nil {
			w.Abort()
			return nil, err
		}
		w.spools = append(w.spools, &spool{f, bufio.NewWriterSize(f, 256<<10)})
	}
	return w, nil
}

// unnamed makes a file that vanishes when it is closed, however the process ends.
func unnamed(folder string) (*os.File, error) {
	f, err := os.CreateTemp(folder, ".ingestd-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Append writes the rows of one column per leaf; all must have the same number of rows.
func (w *Writer) Append(rows int, column func(leaf int) []byte) error {
	for i, sp := range w.spools {
		if _, err := sp.Write(column(i)); err != nil {
			return fmt.Errorf("%s: %w", w.path, err)
		}
	}
	w.samples += int64(rows)
	return nil
}

// Samples is how many rows were appended.
func (w *Writer) Samples() int64 { return w.samples }

// Close puts the file together and gives it its name.
func (w *Writer) Close() error {
	defer w.Abort()
	f, err := os.CreateTemp(filepath.Dir(w.path), ".ingestd-*.npz")
	if err != nil {
		return err
	}
	err = errors.Join(w.assemble(f), f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		// Unlike Rename, Link does not replace what has appeared meanwhile.
		err = os.Link(f.Name(), w.path)
	}
	return errors.Join(err, os.Remove(f.Name()))
}

func (w *Writer) assemble(f *os.File) error {
	out := bufio.NewWriterSize(f, 256<<10)
	archive := zip.NewWriter(out)
	for i, sp := range w.spools {
		leaf := w.spec.Leaf(i)
		name := leaf.Name
		if name == "." {
			name = numpyOnly
		}
		member, err := archive.CreateHeader(&zip.FileHeader{Name: name + ".npy", Method: zip.Store, Modified: time.Now()})
		if err != nil {
			return err
		}
		header, err := npyHeader(descrOf[leaf.DType], append([]int64{w.samples}, leaf.Shape...))
		if err != nil {
			return err
		}
		if _, err := member.Write(header); err != nil {
			return err
		}
		if err := sp.Flush(); err != nil {
			return err
		}
		if _, err := io.Copy(member, io.NewSectionReader(sp.file, 0, w.samples*leaf.Bytes())); err != nil {
			return err
		}
	}
	return errors.Join(archive.Close(), out.Flush())
}

// Abort drops what was written. After Close it does nothing.
func (w *Writer) Abort() {
	for _, sp := range w.spools {
		_ = sp.file.Close()
	}
	w.spools = nil
}
