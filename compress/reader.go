package compress

import (
	"bufio"
	"fmt"
	"io"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// What a stream may ask of its Reader.
const (
	BlockBytesMax  = 1 << 20 // of S2, uncompressed
	WindowBytesMin = 1 << 20 // of zstd, whatever was agreed
	WindowBytesMax = 8 << 20
)

// Window is the largest window of zstd that a stream may have where so many bytes may be without an ack.
func Window(agreed int64) int64 { return min(max(agreed, WindowBytesMin), WindowBytesMax) }

// aheadBytes is what a Reader reads ahead of what it needs, so that the small parts of a block cost no call each.
const aheadBytes = 32 << 10

// CorruptError says that compressed bytes are not what they should be: garbage, more than the limits, a wrong sum, or an end in the middle.
type CorruptError struct {
	Kind wire.Compression
	Err  error
}

func (e *CorruptError) Error() string { return fmt.Sprintf("the %s stream: %v", e.Kind, e.Err) }

// Unwrap returns what the decoder said.
func (e *CorruptError) Unwrap() error { return e.Err }

// Reader reads the samples of a compressed stream.
type Reader struct {
	kind wire.Compression
	raw  *noting
	from io.Reader // decoder, unshuffler
	zstd *zstd.Decoder
	err  error
}

// noting remembers why its reader ended, which decoders give other names.
type noting struct {
	io.Reader
	err error
}

func (n *noting) Read(b []byte) (int, error) {
	k, err := n.Reader.Read(b)
	if err != nil {
		n.err = err
	}
	return k, err
}

// NewReader reads samples of a spec from r. The kind must be one of wire's, other than none; agreed is the window in bytes that the handshake settled, see Window. It reads and
// allocates next to nothing before the first Read.
func NewReader(r io.Reader, kind wire.Compression, s *spec.Spec, agreed int64) (*Reader, error) {
	c := &Reader{kind: kind, raw: &noting{Reader: r}}
	ahead := bufio.NewReaderSize(c.raw, aheadBytes)
	method, shuffled := split(kind)
	switch method {
	case wire.CompressionS2:
		c.from = s2.NewReader(ahead, s2.ReaderMaxBlockSize(BlockBytesMax), s2.ReaderAllocBlock(64<<10))
	case wire.CompressionZstd:
		d, err := zstd.NewReader(ahead, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(uint64(Window(agreed))))
		if err != nil {
			return nil, fmt.Errorf("compress: %w", err)
		}
		c.zstd, c.from = d, d
	default:
		return nil, fmt.Errorf("compress: the compression %q is not known", kind)
	}
	if shuffled {
		c.from = newUnshuffler(c.from, s)
	}
	return c, nil
}

// Read waits for one byte at least, and so for the whole block that has it. io.EOF is the end of the samples; *CorruptError what is wrong with the bytes; any other error that of
// what it reads from. All of them stay.
func (c *Reader) Read(b []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.from.Read(b)
	if err == nil || n > 0 {
		return n, nil
	}
	switch {
	case c.raw.err != nil && c.raw.err != io.EOF:
		c.err = c.raw.err
	case err == io.EOF:
		c.err = io.EOF
	default:
		c.err = &CorruptError{c.kind, err}
	}
	return 0, c.err
}

// Close frees the decoder. It does not close what the Reader reads from.
func (c *Reader) Close() {
	if c.err == nil {
		c.err = io.ErrClosedPipe
	}
	if c.zstd != nil {
		c.zstd.Close()
	}
}

// split takes a kind apart.
func split(kind wire.Compression) (method wire.Compression, shuffled bool) {
	switch kind {
	case wire.CompressionS2Shuffle:
		return wire.CompressionS2, true
	case wire.CompressionZstdShuffle:
		return wire.CompressionZstd, true
	}
	return kind, false
}
