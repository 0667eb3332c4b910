package tensorfile

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/ingestd/ingestd/spec"
)

// ChunkBytes is about how many bytes Next reads at once; a chunk holds at least one sample.
const ChunkBytes = 1 << 20

// column is one leaf of the samples in a file.
type column struct {
	leaf   spec.Leaf
	bytes  int64 // of the leaf in one sample
	bare   bool  // the format gives it no name, so that it may take the one wanted
	open   func() (io.ReadCloser, error)
	reader io.ReadCloser // nil until the first Next
	buffer []byte
}

// Source gives samples in their order.
type Source struct {
	name    string
	spec    *spec.Spec
	samples int64     // -1: not known
	columns []*column // of files that keep each leaf in one piece
	raw     *rawInput // of inputs that keep samples one after another
	file    io.Closer
	next    int64 // number of the next sample
	chunk   Chunk
}

// Chunk is a few samples. Either Samples holds them one after another, or Columns has one leaf each for all of them; with one leaf both do.
type Chunk struct {
	First   int64 // number of the first sample in the source
	Count   int
	Samples []byte
	Columns [][]byte
}

// Open opens a file of samples. want may be nil; it gives the leaves' names, order and dtypes where the file does not, and a
// file that is none of the known formats is read as raw samples of it.
func Open(path string, want *spec.Spec) (*Source, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	s, err := open(f, path, want)
	if err != nil {
		_ = f.Close()
		return nil, named(err, path)
	}
	return s, nil
}

// named puts the file's name into a FormatError that has none, or before what it has.
func named(err error, name string) error {
	var e *FormatError
	if errors.As(err, &e) {
		file := name
		if e.File != "" {
			file += ": " + e.File
		}
		return &FormatError{File: file, Reason: e.Reason}
	}
	return fmt.Errorf("%s: %w", name, err)
}

func open(f *os.File, path string, want *spec.Spec) (*Source, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return nil, formatErrorf("is a folder: name a .npy, .npz or .safetensors file")
	}
	regular := info.Mode().IsRegular()
	var columns []counted
	switch ext := strings.ToLower(filepath.Ext(path)); {
	case ext != ".npy" && ext != ".npz" && ext != ".safetensors":
		if want == nil {
			return nil, formatErrorf("is none of .npy, .npz and .safetensors: raw samples need --spec")
		}
		size := int64(-1)
		if regular {
			size = info.Size()
		}
		return newRaw(f, f, path, size, want)
	case !regular:
		return nil, formatErrorf("is a pipe or a device; a %s file must be a regular one", ext)
	case ext == ".npy":
		columns, err = openNPY(f, info.Size())
	case ext == ".npz":
		columns, err = openNPZ(f, info.Size())
	default:
		columns, err = openSafetensors(f, info.Size())
	}
	if err != nil {
		return nil, err
	}
	return assemble(columns, f, path, want)
}

// arrayColumn makes a column of an array: its first axis counts the samples, the others are the leaf's shape.
func arrayColumn(name string, a *array, open func() (io.ReadCloser, error)) (counted, error) {
	if len(a.shape) == 0 {
		return counted{}, formatErrorf("is a single number without axes: the first axis must count the samples")
	}
	rows := a.bytes
	for _, d := range a.shape[1:] {
		if d == 0 {
			return counted{}, formatErrorf("shape %v has nothing in it", a.shape)
		}
		if rows > spec.SampleBytesMax/d {
			return counted{}, formatErrorf("one sample of shape %v is larger than %d bytes", a.shape[1:], int64(spec.SampleBytesMax))
		}
		rows *= d
	}
	c := &column{leaf: spec.Leaf{Name: name, DType: a.dtype, Shape: a.shape[1:]}, bytes: rows, open: open}
	return counted{c, a.shape[0]}, nil
}

// counted is a column with the length of its first axis.
type counted struct {
	*column
	samples int64
}

// checkCounts: all columns have the same number of samples, and it is not 0.
func checkCounts(all []counted) error {
	if len(all) == 0 {
		return formatErrorf("holds no array")
	}
	for _, c := range all {
		if c.samples != all[0].samples {
			return formatErrorf("%q has %d samples and %q %d: all arrays must have the same first axis", all[0].leaf.Name, all[0].samples, c.leaf.Name, c.samples)
		}
	}
	if all[0].samples == 0 {
		return formatErrorf("holds no samples: its first axis is 0 long")
	}
	return nil
}

func assemble(all []counted, f io.Closer, name string, want *spec.Spec) (*Source, error) {
	err := checkCounts(all)
	if err != nil {
		return nil, err
	}
	s := &Source{name: name, file: f, samples: all[0].samples}
	for _, c := range all {
		s.columns = append(s.columns, c.column)
	}
	if err := s.resolve(want); err != nil {
		return nil, err
	}
	leaves := make([]spec.Leaf, len(s.columns))
	for i, c := range s.columns {
		leaves[i] = c.leaf
	}
	if s.spec, err = spec.New(leaves); err != nil {
		return nil, formatErrorf("%v", err)
	}
	if want != nil {
		err = s.Select(want)
	}
	return s, err
}

// resolve gives leaves that are only so many bytes their dtype, from want.
func (s *Source) resolve(want *spec.Spec) error {
	types := map[string]spec.DType{}
	if want != nil {
		for _, leaf := range want.Leaves() {
			types[leaf.Name] = leaf.DType
		}
		if s.bare() && want.NumLeaves() == 1 {
			types[s.columns[0].leaf.Name] = want.Leaf(0).DType
		}
	}
	for _, c := range s.columns {
		if c.leaf.DType != 0 {
			continue
		}
		size := c.bytes
		for _, d := range c.leaf.Shape {
			size /= d
		}
		dtype, ok := types[c.leaf.Name]
		if !ok || dtype.Bytes() != size {
			return formatErrorf("the elements of %q are %d bytes without a type (numpy has no BF16 and F8): say what they are with --spec, such as %s:%v%s",
				c.leaf.Name, size, c.leaf.Name, map[int64]spec.DType{1: spec.F8_E4M3, 2: spec.BF16}[size], shapeText(c.leaf.Shape))
		}
		c.leaf.DType = dtype
	}
	return nil
}

func shapeText(shape []int64) string {
	if len(shape) == 0 {
		return ""
	}
	return strings.ReplaceAll(fmt.Sprint(shape), " ", ",")
}

func (s *Source) bare() bool { return len(s.columns) == 1 && s.columns[0].bare }

// Name is the file's path, or what stands for it.
func (s *Source) Name() string { return s.name }

// Spec is the layout of the samples as they are given.
func (s *Source) Spec() *spec.Spec { return s.spec }

// Samples is how many samples there are, or -1 if only reading tells.
func (s *Source) Samples() int64 { return s.samples }

// Select puts the leaves in want's order, and lets an array without a name take the name of want's only leaf. It returns a *spec.MismatchError if they
// are not want's leaves. It must come before the first Next.
func (s *Source) Select(want *spec.Spec) error {
	if s.raw != nil {
		return spec.Check(s.spec, want)
	}
	if s.bare() && want.NumLeaves() == 1 && s.columns[0].leaf.Type() == want.Leaf(0).Type() {
		s.columns[0].leaf.Name = want.Leaf(0).Name
		s.spec = want
		return nil
	}
	by := map[string]*column{}
	for _, c := range s.columns {
		by[c.leaf.Name] = c
	}
	ordered := make([]*column, 0, len(s.columns))
	for i := range want.NumLeaves() {
		c := by[want.Leaf(i).Name]
		if c == nil || c.leaf.Type() != want.Leaf(i).Type() {
			return spec.Check(s.spec, want)
		}
		ordered = append(ordered, c)
	}
	if len(ordered) != len(s.columns) {
		return spec.Check(s.spec, want)
	}
	s.columns, s.spec = ordered, want
	return nil
}

// Next reads the next samples, at most most of them (0: as many as a chunk holds). It returns io.EOF after the last.
func (s *Source) Next(most int) (*Chunk, error) {
	n := max(ChunkBytes/s.spec.SampleBytes(), 1)
	if most > 0 {
		n = min(n, int64(most))
	}
	if s.samples >= 0 {
		n = min(n, s.samples-s.next)
	}
	if n == 0 {
		return nil, io.EOF
	}
	s.chunk = Chunk{First: s.next, Count: int(n), Columns: s.chunk.Columns[:0]}
	if s.raw != nil {
		if err := s.raw.read(s, n); err != nil {
			return nil, err
		}
	} else if err := s.readColumns(n); err != nil {
		return nil, err
	}
	s.next += int64(s.chunk.Count)
	return &s.chunk, nil
}

func (s *Source) readColumns(n int64) error {
	for _, c := range s.columns {
		if c.reader == nil {
			r, err := c.open()
			if err != nil {
				return named(err, s.name)
			}
			c.reader = r
		}
		want := n * c.bytes
		if int64(cap(c.buffer)) < want {
			c.buffer = make([]byte, want)
		}
		c.buffer = c.buffer[:want]
		if k, err := io.ReadFull(c.reader, c.buffer); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return &FormatError{File: s.name, Reason: fmt.Sprintf("the data of %q ends inside sample %d of %d: the file is cut short, or changed while it was read",
					c.leaf.Name, s.next+int64(k)/c.bytes, s.samples)}
			}
			return fmt.Errorf("%s: reading %q: %w", s.name, c.leaf.Name, err)
		}
		if s.next+n == s.samples {
			if err := atEnd(c.reader); err != nil {
				return &FormatError{File: s.name, Reason: fmt.Sprintf("the data of %q is damaged: %v", c.leaf.Name, err)}
			}
		}
		s.chunk.Columns = append(s.chunk.Columns, c.buffer)
	}
	if len(s.columns) == 1 {
		s.chunk.Samples = s.columns[0].buffer
	}
	return nil
}

// atEnd reads past the last byte, where a compressed member checks its sum.
func atEnd(r io.Reader) error {
	var one [1]byte
	switch n, err := r.Read(one[:]); {
	case n > 0:
		return errors.New("it goes on after the last sample")
	case err != nil && err != io.EOF:
		return err
	}
	return nil
}

// Sample returns the leaves of sample i of the chunk, appended to dst; it needs Columns.
func (c *Chunk) Sample(dst [][]byte, s *spec.Spec, i int) [][]byte {
	for k, col := range c.Columns {
		n := int(s.Offset(k)) // offsets differ by the leaves' sizes
		end := int(s.SampleBytes())
		if k+1 < s.NumLeaves() {
			end = int(s.Offset(k + 1))
		}
		size := end - n
		dst = append(dst, col[i*size:(i+1)*size])
	}
	return dst
}

// Rewind starts over with the first sample; inputs that cannot, such as pipes, return an error.
func (s *Source) Rewind() error {
	if s.raw != nil {
		if err := s.raw.rewind(); err != nil {
			return named(err, s.name)
		}
	}
	for _, c := range s.columns {
		if c.reader != nil {
			_ = c.reader.Close()
			c.reader = nil
		}
	}
	s.next = 0
	return nil
}

// Close closes the file.
func (s *Source) Close() error {
	for _, c := range s.columns {
		if c.reader != nil {
			_ = c.reader.Close()
		}
	}
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// section reads a part of a file that keeps no position of its own.
func section(r io.ReaderAt, off, n int64) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(r, off, n)), nil }
}

func openNPY(f *os.File, size int64) ([]counted, error) {
	a, header, err := readNPYHeader(bufio.NewReader(io.NewSectionReader(f, 0, size)))
	if err != nil {
		return nil, err
	}
	n, err := a.size()
	if err != nil {
		return nil, err
	}
	if have := size - header; have != n {
		return nil, wrongLength(a, n, have)
	}
	c, err := arrayColumn(".", a, section(f, header, n))
	if err != nil {
		return nil, err
	}
	c.bare = true
	return []counted{c}, nil
}

func wrongLength(a *array, want, have int64) error {
	if have > want {
		return formatErrorf("%d bytes follow the array of shape %v: it holds more than one array, or is damaged; save several arrays as .npz", have-want, a.shape)
	}
	return formatErrorf("has %d bytes of data, shape %v needs %d: it is cut short", have, a.shape, want)
}
