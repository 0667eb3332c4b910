package compress

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

var kinds = []wire.Compression{wire.CompressionS2, wire.CompressionZstd, wire.CompressionS2Shuffle, wire.CompressionZstdShuffle}

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// samples is n samples of bytes that compress somewhat.
func samples(s *spec.Spec, n int) []byte {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, int64(n)*s.SampleBytes())
	for i := range b {
		if b[i] = byte(i / 7); i%3 == 0 {
			b[i] = byte(r.Uint32())
		}
	}
	return b
}

func newWriter(t testing.TB, w io.Writer, kind wire.Compression, s *spec.Spec) *Writer {
	t.Helper()
	z, err := NewWriter(w, kind, s)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func newReader(t testing.TB, r io.Reader, kind wire.Compression, s *spec.Spec) *Reader {
	t.Helper()
	return newReaderOf(t, r, kind, s, WindowBytesMax)
}

// newReaderOf is newReader where a window was agreed on.
func newReaderOf(t testing.TB, r io.Reader, kind wire.Compression, s *spec.Spec, agreed int64) *Reader {
	t.Helper()
	z, err := NewReader(r, kind, s, agreed)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(z.Close)
	return z
}

// pack compresses in pieces, flushing after each, and ends the stream.
func pack(t testing.TB, kind wire.Compression, s *spec.Spec, b []byte, piece int) []byte {
	t.Helper()
	var out bytes.Buffer
	w := newWriter(t, &out, kind, s)
	for len(b) > 0 {
		n, err := w.Write(b[:min(piece, len(b))])
		if err == nil {
			err = w.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
		b = b[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestRoundTrip(t *testing.T) {
	for _, text := range []string{
		"a:U8", "a:F32[7],b:U8[3],c:F64[2,2],d:I16", "a:F32[16384]", "a:F32[16385],b:BF16[40000]", "a:U8[100000],b:F64[9000],c:I32",
	} {
		s := mustSpec(t, text)
		want := samples(s, max(3, int(200_000/s.SampleBytes())))
		for _, kind := range kinds {
			for _, piece := range []int{1 << 20, 70_001, 4096 + 13} {
				t.Run(fmt.Sprintf("%s/%s/%d", text, kind, piece), func(t *testing.T) {
					packed := pack(t, kind, s, want, piece)
					for name, r := range map[string]io.Reader{"whole": bytes.NewReader(packed), "half": iotest.HalfReader(bytes.NewReader(packed)), "last with its error": iotest.DataErrReader(bytes.NewReader(packed))} {
						got, err := io.ReadAll(newReader(t, r, kind, s))
						if err != nil || !bytes.Equal(got, want) {
							t.Errorf("%s: %d bytes of %d, error %v", name, len(got), len(want), err)
						}
					}
				})
			}
		}
	}
}

// TestFlushedSamplesArrive: what was flushed is there without another byte.
func TestFlushedSamplesArrive(t *testing.T) {
	s := mustSpec(t, "a:F32[3],b:U8")
	want := samples(s, 50)
	size := int(s.SampleBytes())
	for _, kind := range kinds {
		r, w := io.Pipe()
		z := newReader(t, r, kind, s)
		written := make(chan error, 1)
		next := make(chan struct{})
		go func() {
			c, err := NewWriter(w, kind, s)
			for i := 0; err == nil && i < len(want); i += size {
				if _, err = c.Write(want[i : i+size]); err == nil {
					err = c.Flush()
				}
				<-next
			}
			written <- err
		}()
		got := make([]byte, size)
		for i := 0; i < len(want); i += size {
			if _, err := io.ReadFull(z, got); err != nil || !bytes.Equal(got, want[i:i+size]) {
				t.Fatalf("%s: sample at %d: %x, error %v", kind, i, got, err)
			}
			next <- struct{}{}
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
	}
}

// TestCutAnywhere: a stream that ends early gives only bytes that were written, and never panics. The end is clean only where every byte before is.
func TestCutAnywhere(t *testing.T) {
	s := mustSpec(t, "a:F32[30],b:I64[4]")
	want := samples(s, 12)
	for _, kind := range kinds {
		packed := pack(t, kind, s, want, 3*int(s.SampleBytes()))
		clean := 0
		for cut := range len(packed) {
			got, err := io.ReadAll(newReader(t, bytes.NewReader(packed[:cut]), kind, s))
			if !bytes.HasPrefix(want, got) {
				t.Fatalf("%s cut at %d: other bytes than were written", kind, cut)
			}
			var bad *CorruptError
			switch {
			case err == nil:
				clean++
			case !errors.As(err, &bad) || bad.Kind != kind:
				t.Fatalf("%s cut at %d: %v", kind, cut, err)
			}
		}
		if clean > 6 { // nothing at all, and for S2 the ends of its chunks: the identifier, and 4 blocks
			t.Errorf("%s: %d cuts of %d passed as a clean end", kind, clean, len(packed))
		}
	}
}

// TestDamage: any one bit that is wrong is noticed, or changes nothing.
func TestDamage(t *testing.T) {
	s := mustSpec(t, "a:F32[30],b:I64[4]")
	want := samples(s, 3)
	for _, kind := range kinds {
		packed := pack(t, kind, s, want, len(want))
		noticed := 0
		for i := range packed {
			packed[i] ^= 1 << (i % 8)
			got, err := io.ReadAll(newReader(t, bytes.NewReader(packed), kind, s))
			packed[i] ^= 1 << (i % 8)
			if err != nil {
				noticed++
			} else if !bytes.Equal(got, want) {
				t.Fatalf("%s: a wrong bit in byte %d went unnoticed", kind, i)
			}
		}
		if noticed < len(packed)*9/10 {
			t.Errorf("%s: noticed %d of %d", kind, noticed, len(packed))
		}
	}
}

// TestErrorsOfTheConnectionStay: they are told from corruption, and come again.
func TestErrorsOfTheConnectionStay(t *testing.T) {
	s := mustSpec(t, "a:F32[3000]")
	for _, kind := range kinds {
		packed := pack(t, kind, s, samples(s, 3), 1<<20)
		r := newReader(t, io.MultiReader(bytes.NewReader(packed[:len(packed)/2]), iotest.ErrReader(os.ErrDeadlineExceeded)), kind, s)
		for range 2 {
			if _, err := io.Copy(io.Discard, r); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v", kind, err)
			}
		}
	}
}

// zeros is an endless stream of zeros, of which so many are left.
type zeros int64

func (z *zeros) Read(b []byte) (int, error) {
	n := int(min(int64(len(b)), int64(*z)))
	clear(b[:n])
	if *z -= zeros(n); n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// allocated is what f allocates, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestBombsCostTime: 64 MiB of zeros come out of a few kilobytes, and cost no more memory than the limits say.
func TestBombsCostTime(t *testing.T) {
	const size = 64 << 20
	s := mustSpec(t, "a:F32[1024]")
	for _, kind := range kinds {
		var bomb bytes.Buffer
		w := newWriter(t, &bomb, kind, s)
		z := zeros(size)
		if _, err := io.Copy(w, &z); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if bomb.Len() > size/20 {
			t.Fatalf("%s: no bomb: %d bytes", kind, bomb.Len())
		}
		got := allocated(func() {
			if n, err := io.Copy(io.Discard, newReader(t, &bomb, kind, s)); n != size || err != nil {
				t.Errorf("%s: %d bytes, error %v", kind, n, err)
			}
		})
		if got > memoryMax(0) {
			t.Errorf("%s: allocated %d bytes", kind, got)
		}
	}
}

// memoryMax is the most a Reader may allocate: the window twice at most, and blocks.
func memoryMax(agreed int64) uint64 {
	return uint64(min(2*Window(agreed), Window(agreed)+BlockBytesMax) + 2*BlockBytesMax)
}

// TestWindow has both sides of both limits.
func TestWindow(t *testing.T) {
	for agreed, want := range map[int64]int64{
		0: 1 << 20, 1: 1 << 20, 1<<20 - 1: 1 << 20, 1 << 20: 1 << 20, 1<<20 + 1: 1<<20 + 1, 8<<20 - 1: 8<<20 - 1, 8 << 20: 8 << 20, 8<<20 + 1: 8 << 20, 1 << 40: 8 << 20,
	} {
		if got := Window(agreed); got != want {
			t.Errorf("where %d bytes were agreed on the window may be %d, want %d", agreed, got, want)
		}
	}
}

// TestLimits has both sides of each: as much as may be asked for is given, more is refused before it is allocated.
func TestLimits(t *testing.T) {
	s := mustSpec(t, "a:U8[1000]")
	b := samples(s, 9000)
	pack := func(make func(w io.Writer) io.WriteCloser) []byte {
		var out bytes.Buffer
		w := make(&out)
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	s2Of := func(block int) []byte {
		return pack(func(w io.Writer) io.WriteCloser {
			return s2.NewWriter(w, s2.WriterBlockSize(block), s2.WriterConcurrency(1))
		})
	}
	zstdOf := func(window int) []byte {
		return pack(func(w io.Writer) io.WriteCloser {
			e, err := zstd.NewWriter(w, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
			if err != nil {
				t.Fatal(err)
			}
			return e
		})
	}
	for _, tc := range []struct {
		name   string
		kind   wire.Compression
		agreed int64
		b      []byte
		ok     bool
	}{
		{"blocks at the limit", wire.CompressionS2, 1, s2Of(BlockBytesMax), true},
		{"blocks above", wire.CompressionS2, 16 << 20, s2Of(2 * BlockBytesMax), false},
		{"window at the limit", wire.CompressionZstd, 16 << 20, zstdOf(WindowBytesMax), true},
		{"window above", wire.CompressionZstd, 16 << 20, zstdOf(2 * WindowBytesMax), false},
		{"window as agreed", wire.CompressionZstd, 2 << 20, zstdOf(2 << 20), true},
		{"window above what was agreed", wire.CompressionZstd, 2 << 20, zstdOf(4 << 20), false},
		{"the least window", wire.CompressionZstd, 1, zstdOf(WindowBytesMin), true},
		{"window above the least", wire.CompressionZstd, 1, zstdOf(2 * WindowBytesMin), false},
		{"one segment as large as the window", wire.CompressionZstd, 1, segment(WindowBytesMin), true},
		{"one segment above", wire.CompressionZstd, 1, segment(WindowBytesMin + 1), false},
		{"a window of 1 TiB in 6 bytes", wire.CompressionZstd, 16 << 20, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 30 << 3}, false},
		{"a block said to be 4 GiB", wire.CompressionS2, 16 << 20, []byte("\xff\x06\x00\x00S2sTwO\x00\x0a\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\x0f\x00"), false},
		{"the other's", wire.CompressionZstd, 16 << 20, s2Of(BlockBytesMax), false},
		{"no stream at all", wire.CompressionS2, 16 << 20, []byte("GET / HTTP/1.1\r\n\r\n"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var err error
			n := allocated(func() { _, err = io.Copy(io.Discard, newReaderOf(t, bytes.NewReader(tc.b), tc.kind, s, tc.agreed)) })
			var bad *CorruptError
			if tc.ok && err != nil || !tc.ok && !errors.As(err, &bad) {
				t.Errorf("got %v", err)
			}
			if n > memoryMax(tc.agreed) {
				t.Errorf("allocated %d bytes, at most %d were expected", n, memoryMax(tc.agreed))
			}
		})
	}
	for _, kind := range []wire.Compression{"", "lz4"} {
		if _, err := NewReader(nil, kind, s, 0); err == nil {
			t.Errorf("a reader of kind %q", kind)
		}
		if _, err := NewWriter(nil, kind, s); err == nil {
			t.Errorf("a writer of kind %q", kind)
		}
	}
}

// segment is a frame of zstd without a window: its content, zeros, is all that may be looked back at.
func segment(size int) []byte {
	b := binary.LittleEndian.AppendUint32([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0}, uint32(size)) // single segment, content size in 4 bytes
	for size > 0 {
		n := min(size, 128<<10)
		size -= n
		header := uint32(n)<<3 | 1<<1 // a block of one byte, repeated
		if size == 0 {
			header |= 1
		}
		b = append(b, byte(header), byte(header>>8), byte(header>>16), 0)
	}
	return b
}

// TestNothingIsAllocatedPerSample once a stream runs.
func TestNothingIsAllocatedPerSample(t *testing.T) {
	s := mustSpec(t, "a:F32[250],b:I64")
	b := samples(s, 64)
	for _, kind := range kinds {
		var pipe bytes.Buffer
		w, r := newWriter(t, &pipe, kind, s), newReader(t, onlyReader{&pipe}, kind, s)
		got := make([]byte, len(b))
		one := func() {
			_, err := w.Write(b)
			if err == nil {
				err = w.Flush()
			}
			if err == nil {
				_, err = io.ReadFull(r, got)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for range 100 {
			one()
		}
		if n := testing.AllocsPerRun(100, one); n > 2 { // of 64 samples: what the libraries need for a block
			t.Errorf("%s: %v allocations for 64 samples", kind, n)
		}
	}
}

// onlyReader hides that a buffer knows its length.
type onlyReader struct{ io.Reader }

// reference is the docs' definition of the shuffle, word for word.
func reference(s *spec.Spec, sample []byte) []byte {
	var out []byte
	for i := range s.NumLeaves() {
		l := s.Leaf(i)
		leaf := sample[s.Offset(i) : s.Offset(i)+l.Bytes()]
		for len(leaf) > 0 {
			piece := leaf[:min(65536, len(leaf))]
			leaf = leaf[len(piece):]
			e := int(l.DType.Bytes())
			for j := range e {
				for i := range len(piece) / e {
					out = append(out, piece[i*e+j])
				}
			}
		}
	}
	return out
}

func TestShuffleIsAsTheDocsSay(t *testing.T) {
	s := mustSpec(t, "a:F32[20000],b:U8[5],c:I16[3],d:F64[9000],e:F32")
	sample := samples(s, 1)
	var out bytes.Buffer
	sh := newShuffler(&out, s)
	if _, err := sh.Write(sample); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), reference(s, sample)) {
		t.Error("the shuffle differs from the docs")
	}
}

func FuzzReader(f *testing.F) {
	s := mustSpec(f, "a:F32[20],b:U8[3]")
	for i, kind := range kinds {
		f.Add(byte(i), pack(f, kind, s, samples(s, 5), 100))
	}
	f.Add(byte(1), binary.LittleEndian.AppendUint32(nil, 0x184D2A50))
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		r, err := NewReader(bytes.NewReader(b), kinds[int(kind)%len(kinds)], s, int64(kind)<<17)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		n, err := io.Copy(io.Discard, io.LimitReader(r, 64<<20))
		var bad *CorruptError
		if err != nil && !errors.As(err, &bad) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	})
}
