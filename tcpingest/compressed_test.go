package tcpingest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

var everyCompression = []wire.Compression{wire.CompressionS2, wire.CompressionZstd, wire.CompressionS2Shuffle, wire.CompressionZstdShuffle}

// compressing is a client's connection that compresses what follows its handshake, and flushes every write.
type compressing struct {
	ingesttest.Conn
	kind wire.Compression
	to   *compress.Writer
}

func (c *compressing) Compression() wire.Compression { return c.kind }

func (c *compressing) Begin(s *spec.Spec) (err error) {
	c.to, err = compress.NewWriter(c.Conn, c.kind, s)
	return err
}

func (c *compressing) Write(b []byte) (int, error) {
	if c.to == nil {
		return c.Conn.Write(b)
	}
	n, err := c.to.Write(b)
	if err == nil {
		err = c.to.Flush()
	}
	return n, err
}

func (c *compressing) CloseWrite() error {
	if c.to != nil {
		if err := c.to.Close(); err != nil {
			return err
		}
	}
	return c.Conn.CloseWrite()
}

// compressed makes all clients of a Start compress.
func compressedStart(kind wire.Compression, start ingesttest.Start) ingesttest.Start {
	return func(t *testing.T, tables ingest.Tables, limits ingesttest.Limits) (ingest.Transport, func(context.Context) (ingesttest.Conn, error)) {
		tr, dial := start(t, tables, limits)
		return tr, func(ctx context.Context) (ingesttest.Conn, error) {
			c, err := dial(ctx)
			if err != nil {
				return nil, err
			}
			return &compressing{Conn: c, kind: kind}, nil
		}
	}
}

func TestConformanceS2(t *testing.T) {
	ingesttest.Run(t, compressedStart(wire.CompressionS2, startOn("tcp", nil)))
}

func TestConformanceZstdOverTLS(t *testing.T) {
	ingesttest.Run(t, compressedStart(wire.CompressionZstd, startOn("tcp", ingesttest.NewCertificates(t))))
}

func TestShuffledSamples(t *testing.T) {
	for _, kind := range []wire.Compression{wire.CompressionS2Shuffle, wire.CompressionZstdShuffle} {
		for _, text := range []string{"a:U64", "a:U64,b:F32[100],c:I16[3]", "a:U64[20000],b:F32[40000]"} {
			t.Run(string(kind)+"/"+text, func(t *testing.T) {
				ingesttest.RunPush(t, compressedStart(kind, startOn("unix", nil)), text, 40)
			})
		}
	}
}

// compressedRig is a server with one table that nobody reads, and large enough for these tests.
type compressedRig struct {
	t      *testing.T
	table  *engine.Table
	server *Server
	l      net.Listener
}

func newCompressedRig(t *testing.T, offered []wire.Compression) *compressedRig {
	t.Helper()
	s, err := spec.ParseText("a:F32[250]")
	if err != nil {
		t.Fatal(err)
	}
	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = pool.Run(ctx) }()
	t.Cleanup(func() { stop(); <-ended })
	table, err := engine.New(engine.Config{Name: "t", Spec: s, BatchSize: 100, Batches: 20, Drainers: pool})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = table.Close(context.Background()) })
	server, l := serveOn(t, "tcp", Config{Tables: ingesttest.Tables{"t": table}, Compression: offered}, nil)
	return &compressedRig{t, table, server, l}
}

// push shakes hands.
func (r *compressedRig) push(kind wire.Compression) (net.Conn, error) { return r.pushWindow(kind, 0) }

// pushWindow is push that asks for a window in bytes.
func (r *compressedRig) pushWindow(kind wire.Compression, window int64) (net.Conn, error) {
	r.t.Helper()
	c, err := net.Dial("tcp", r.l.Addr().String())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = c.Close() })
	if err := wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: r.table.Spec(), Compression: kind, WindowBytes: window}); err != nil {
		r.t.Fatal(err)
	}
	var accepted wire.AcceptedPush
	if err := wire.ReadReply(c, &accepted); err != nil {
		return nil, err
	}
	if accepted.Compression != kind {
		r.t.Errorf("agreed to %q, asked for %q", accepted.Compression, kind)
	}
	return c, nil
}

// ending reads acks to the end, and the closing notice.
func (r *compressedRig) ending(c net.Conn) (acks int, code wire.Code) {
	r.t.Helper()
	b, err := io.ReadAll(c)
	if err != nil {
		r.t.Fatal(err)
	}
	said := bytes.TrimLeft(b, string(rune(wire.Ack)))
	acks = len(b) - len(said)
	if len(said) == 0 {
		return acks, ""
	}
	notice, err := wire.ReadNotice(bytes.NewReader(said[1:]))
	if err != nil || said[0] != wire.NoticeMark {
		r.t.Fatalf("%q, %v", said, err)
	}
	return acks, notice.Code
}

func TestCompressionThatIsNotOffered(t *testing.T) {
	for _, tc := range []struct {
		offered []wire.Compression
		asked   wire.Compression
		says    string // "": accepted
	}{
		{nil, wire.CompressionNone, ""},
		{nil, wire.CompressionS2, "`compression: [s2]`"},
		{[]wire.Compression{wire.CompressionS2}, wire.CompressionS2, ""},
		{[]wire.Compression{wire.CompressionS2}, wire.CompressionNone, ""},
		{[]wire.Compression{wire.CompressionS2}, wire.CompressionS2Shuffle, "not offered here, but s2"},
	} {
		_, err := newCompressedRig(t, tc.offered).push(tc.asked)
		refusal, refused := err.(*wire.Refusal)
		if refused != (tc.says != "") || refused && (refusal.Code != wire.CodeBadOption || !strings.Contains(refusal.Reason, tc.says)) {
			t.Errorf("offered %q, asked for %q: %v", tc.offered, tc.asked, err)
		}
	}
	if _, err := New(Config{Tables: ingesttest.Tables{}, Compression: []wire.Compression{"lz4"}}); err == nil {
		t.Error("a server offers lz4")
	}
}

// TestBadCompression: garbage and cut streams end their connection with a reason and are counted; what came whole before is kept, and others go on.
func TestBadCompression(t *testing.T) {
	r := newCompressedRig(t, everyCompression)
	other, err := r.push(wire.CompressionS2)
	if err != nil {
		t.Fatal(err)
	}
	sample := make([]byte, r.table.Spec().SampleBytes())
	bad := uint64(0)
	for _, kind := range everyCompression {
		var stream bytes.Buffer
		w, err := compress.NewWriter(&stream, kind, r.table.Spec())
		if err != nil {
			t.Fatal(err)
		}
		for i := range sample {
			sample[i] = byte(i * i)
		}
		write := func(b []byte) {
			_, err := w.Write(b)
			if err = errors.Join(err, w.Flush()); err != nil {
				t.Fatal(err)
			}
		}
		write(append(sample, sample...))
		whole := stream.Len() // two samples
		write(sample)
		for _, tc := range []struct {
			name string
			b    []byte
			acks int
		}{
			{"garbage", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), 0},
			{"garbage later", append(bytes.Clone(stream.Bytes()[:whole]), "\x03garbage that is no block \xff\xff\xff\xff"...), 2},
			{"cut in a block", stream.Bytes()[:stream.Len()-1], 2},
			{"cut in the first block", stream.Bytes()[:whole-1], 0},
		} {
			c, err := r.push(kind)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write(tc.b); err != nil {
				t.Fatal(err)
			}
			_ = c.(*net.TCPConn).CloseWrite()
			if acks, code := r.ending(c); acks != tc.acks || code != wire.CodeBadCompression {
				t.Errorf("%s, %s: %d acks, %q; want %d and %s", kind, tc.name, acks, code, tc.acks, wire.CodeBadCompression)
			}
			if bad++; r.server.Stats().Ended[string(wire.CodeBadCompression)] != bad {
				t.Errorf("%s, %s: counted %v", kind, tc.name, r.server.Stats().Ended)
			}
		}
	}
	w, err := compress.NewWriter(other, wire.CompressionS2, r.table.Spec())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(sample); err != nil || w.Close() != nil || other.(*net.TCPConn).CloseWrite() != nil {
		t.Fatal(err)
	}
	if acks, code := r.ending(other); acks != 1 || code != "" {
		t.Errorf("another producer: %d acks, %q", acks, code)
	}
}
