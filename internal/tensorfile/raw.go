package tensorfile

import (
	"errors"
	"fmt"
	"io"

	"github.com/ingestd/ingestd/spec"
)

// rawInput reads samples that lie one after another.
type rawInput struct {
	r      io.Reader
	seeker io.Seeker // nil for pipes
	buffer []byte
	have   []byte // read, and not yet given: less than a sample
}

// Raw gives the samples of spec s that r holds one after another, such as standard input.
func Raw(r io.Reader, name string, s *spec.Spec) *Source {
	return &Source{name: name, spec: s, samples: -1, raw: &rawInput{r: r}}
}

func newRaw(r io.ReadSeeker, file io.Closer, name string, size int64, s *spec.Spec) (*Source, error) {
	src := &Source{name: name, spec: s, samples: -1, file: file, raw: &rawInput{r: r}}
	if size < 0 {
		return src, nil
	}
	src.raw.seeker = r
	src.samples = size / s.SampleBytes()
	switch {
	case size == 0:
		return nil, formatErrorf("is empty")
	case size%s.SampleBytes() != 0:
		return nil, formatErrorf("has %d bytes: %d samples of %d bytes and %d bytes more; is the spec right?", size, src.samples, s.SampleBytes(), size%s.SampleBytes())
	}
	return src, nil
}

// read fills the chunk with 1 to n samples: as many as are there, so that samples from a pipe do not wait for later ones.
func (in *rawInput) read(s *Source, n int64) error {
	size := s.spec.SampleBytes()
	if int64(len(in.buffer)) < n*size {
		in.buffer = append(make([]byte, 0, n*size), in.have...)[:n*size]
	} else {
		copy(in.buffer, in.have)
	}
	got := len(in.have)
	if int64(got) < size {
		k, err := io.ReadAtLeast(in.r, in.buffer[got:n*size], int(size)-got)
		got += k
		switch {
		case err == nil:
		case got == 0 && errors.Is(err, io.EOF) && s.samples < 0:
			return io.EOF
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return &FormatError{File: s.name, Reason: fmt.Sprintf("ends inside sample %d, after %d of its %d bytes; is the spec right?", s.next, got, size)}
		default:
			return fmt.Errorf("reading %s: %w", s.name, err)
		}
	}
	count := int64(got) / size
	s.chunk.Count = int(count)
	s.chunk.Samples = in.buffer[:count*size]
	in.have = in.buffer[count*size : got]
	return nil
}

func (in *rawInput) rewind() error {
	if in.seeker == nil {
		return errors.New("it is a pipe and cannot be read twice: repeat needs a file")
	}
	in.have = nil
	_, err := in.seeker.Seek(0, io.SeekStart)
	return err
}
