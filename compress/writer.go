package compress

import (
	"fmt"
	"io"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// What a Writer makes: less than what a Reader takes, so that a block is not long under way, and stays in the cache.
const (
	writerBlockBytes  = 256 << 10      // of S2
	writerWindowBytes = WindowBytesMin // of zstd
)

// Writer compresses the samples of a stream.
type Writer struct {
	raw     *failing
	to      io.Writer // shuffler, encoder
	encoder interface {
		io.Writer
		Flush() error
		Close() error
	}
}

// failing remembers why its writer failed, which encoders may tell late or not at all.
type failing struct {
	io.Writer
	err error
}

func (f *failing) Write(b []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.Writer.Write(b)
	f.err = err
	return n, err
}

// NewWriter compresses samples of a spec to w. The kind must be one of wire's, other than none.
func NewWriter(w io.Writer, kind wire.Compression, s *spec.Spec) (*Writer, error) {
	c := &Writer{raw: &failing{Writer: w}}
	method, shuffled := split(kind)
	switch method {
	case wire.CompressionS2:
		c.encoder = s2.NewWriter(c.raw, s2.WriterConcurrency(1), s2.WriterBlockSize(writerBlockBytes))
	case wire.CompressionZstd:
		e, err := zstd.NewWriter(c.raw, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(writerWindowBytes),
			zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			return nil, fmt.Errorf("compress: %w", err)
		}
		c.encoder = e
	default:
		return nil, fmt.Errorf("compress: the compression %q is not known", kind)
	}
	if c.to = c.encoder; shuffled {
		c.to = newShuffler(c.encoder, s)
	}
	return c, nil
}

// Write takes the next bytes of the samples; they may end anywhere. What it wrote of them is known after Flush only.
func (c *Writer) Write(b []byte) (int, error) {
	if c.raw.err != nil {
		return 0, c.raw.err
	}
	return c.to.Write(b)
}

// Flush writes whatever is needed to read all samples that are whole.
func (c *Writer) Flush() error { return c.failed(c.encoder.Flush()) }

// Close writes the end of the stream, before which it is cut short. It does not close what the Writer writes to.
func (c *Writer) Close() error { return c.failed(c.encoder.Close()) }

// failed prefers what went wrong below the encoder.
func (c *Writer) failed(err error) error {
	if c.raw.err != nil {
		return c.raw.err
	}
	return err
}
