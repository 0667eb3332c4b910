package tcpingest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/wire"
)

// heapTaken is what f takes from the heap of this process, whether it is free again or not.
func heapTaken(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// decoderMax is the most that a connection takes where a window of so many bytes was agreed on: twice that window, and buffers.
func decoderMax(window int64) uint64 {
	return uint64(2*compress.Window(window) + 3*compress.BlockBytesMax)
}

// packed is so many bytes of zeros, compressed by an encoder.
func packed(t *testing.T, size int, encoder func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := encoder(&out)
	if err == nil {
		_, err = w.Write(make([]byte, size))
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstdWindow(bytes int) func(io.Writer) (io.WriteCloser, error) {
	return func(w io.Writer) (io.WriteCloser, error) {
		e, err := zstd.NewWriter(w, zstd.WithWindowSize(bytes), zstd.WithEncoderConcurrency(1))
		return flushed{e}, err
	}
}

// flushed flushes what it writes: of a frame that was not all there when it began, the header has the window.
type flushed struct{ *zstd.Encoder }

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.Encoder.Write(b)
	return n, errors.Join(err, f.Flush())
}

func s2Block(bytes int) func(io.Writer) (io.WriteCloser, error) {
	return func(w io.Writer) (io.WriteCloser, error) {
		return s2.NewWriter(w, s2.WriterBlockSize(bytes), s2.WriterConcurrency(1)), nil
	}
}

// TestCompressionLimits: what asks for no more than was agreed on is taken whole; what asks for more is ended before there is memory for it, is told why, and is counted.
func TestCompressionLimits(t *testing.T) {
	const samples, sample = 100, 1000
	refused := uint64(0)
	r := newCompressedRig(t, everyCompression)
	for _, tc := range []struct {
		name   string
		kind   wire.Compression
		window int64 // asked for
		stream []byte
		ok     bool
	}{
		{"the window that nobody asked for", wire.CompressionZstd, 0, packed(t, samples*sample, zstdWindow(1<<20)), true},
		{"a larger one", wire.CompressionZstd, 0, packed(t, samples*sample, zstdWindow(2<<20)), false},
		{"a smaller one than there is", wire.CompressionZstd, 4096, packed(t, samples*sample, zstdWindow(1<<20)), true},
		{"more than that", wire.CompressionZstd, 4096, packed(t, samples*sample, zstdWindow(2<<20)), false},
		{"the window asked for", wire.CompressionZstd, 4 << 20, packed(t, samples*sample, zstdWindow(4<<20)), true},
		{"more than was asked for", wire.CompressionZstd, 4 << 20, packed(t, samples*sample, zstdWindow(8<<20)), false},
		{"the largest window", wire.CompressionZstd, 16 << 20, packed(t, samples*sample, zstdWindow(8<<20)), true},
		{"above the largest", wire.CompressionZstd, 16 << 20, packed(t, samples*sample, zstdWindow(16<<20)), false},
		{"a window of 1 TiB in 6 bytes", wire.CompressionZstd, 16 << 20, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 30 << 3}, false},
		{"content of 1 TiB without a window", wire.CompressionZstd, 16 << 20, []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 1, 0, 0}, false},
		{"the largest block", wire.CompressionS2, 0, packed(t, samples*sample, s2Block(compress.BlockBytesMax)), true},
		{"above the largest block", wire.CompressionS2, 16 << 20, packed(t, 4<<20, s2Block(2*compress.BlockBytesMax)), false},
		{"a block of 4 GiB", wire.CompressionS2, 16 << 20, []byte("\xff\x06\x00\x00S2sTwO\x00\x0a\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\x0f\x00"), false},
	} {
		c, err := r.pushWindow(tc.kind, tc.window)
		if err != nil {
			t.Fatal(err)
		}
		var acks int
		var code wire.Code
		most := decoderMax(tc.window)
		if !tc.ok {
			refused++
			most = compress.BlockBytesMax
		}
		took := heapTaken(func() {
			_, _ = c.Write(tc.stream) // it may be ended before it has said all
			_ = c.(*net.TCPConn).CloseWrite()
			acks, code = r.ending(c)
		})
		switch {
		case tc.ok && (acks != samples || code != ""):
			t.Errorf("%s: %d acks, %q", tc.name, acks, code)
		case !tc.ok && (acks != 0 || code != wire.CodeBadCompression):
			t.Errorf("%s: %d acks, %q", tc.name, acks, code)
		}
		if took > most {
			t.Errorf("%s: took %d bytes from the heap, at most %d were expected", tc.name, took, most)
		}
		if n := r.server.Stats().Ended[string(wire.CodeBadCompression)]; n != refused {
			t.Errorf("%s: counted %d times %s, want %d", tc.name, n, wire.CodeBadCompression, refused)
		}
	}
}

// TestBombs: some kilobytes that become 64 MB are samples like others: all are taken and acked, and cost no memory beyond the connection's limit.
func TestBombs(t *testing.T) {
	const samples, sample = 64_000, 1000
	table := ingesttest.NewTable(t, "t", "a:F32[250]", 100, 20)
	finish := ingesttest.Drain(t, table)
	server, l := serveOn(t, "tcp", Config{Tables: ingesttest.Tables{"t": table}, Compression: everyCompression}, nil)
	r := &compressedRig{t, table, server, l}
	for _, kind := range everyCompression {
		var bomb bytes.Buffer
		w, err := compress.NewWriter(&bomb, kind, table.Spec())
		for range samples {
			if err == nil {
				_, err = w.Write(make([]byte, sample))
			}
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		if bomb.Len() > samples*sample/20 {
			t.Fatalf("%s: no bomb: %d bytes", kind, bomb.Len())
		}
		took := heapTaken(func() {
			c, err := r.push(kind)
			if err != nil {
				t.Fatal(err)
			}
			sent := make(chan error, 1)
			go func() {
				_, err := c.Write(bomb.Bytes())
				_ = c.(*net.TCPConn).CloseWrite()
				sent <- err
			}()
			acks, code := r.ending(c)
			if err := <-sent; acks != samples || code != "" || err != nil {
				t.Errorf("%s: %d acks, %q, %v", kind, acks, code, err)
			}
		})
		if most := decoderMax(0) + 4*samples; took > most { // ending keeps the acks, in a buffer that grows
			t.Errorf("%s: took %d bytes from the heap, at most %d were expected", kind, took, most)
		}
	}
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	taken := uint64(0)
	for _, n := range finish() {
		taken += n
	}
	if want := uint64(samples * len(everyCompression)); taken != want {
		t.Errorf("%d samples were taken of %d", taken, want)
	}
}
