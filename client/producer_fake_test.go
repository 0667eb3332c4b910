package client

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// fake is the daemon's end of one connection.
type fake struct {
	net.Conn
	t           testing.TB
	hello       *wire.Hello
	sampleBytes int
	received    int // samples checked so far
}

// options say what the fake daemon agrees to.
type options struct {
	network       string // tcp (default) or unix
	windowSamples int64  // default 1<<20
	windowBytes   int64  // default 1<<40
	held          int    // samples of the session
	tight         bool   // the sockets hold little, so that writes block early
}

// breaking serves every connection, one after another, ends it, and counts them.
func breaking(t *testing.T, serve func(net.Conn)) (addr string, connections func() int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var n atomic.Int64
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			serve(conn)
			conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return "tcp://" + l.Addr().String(), func() int { return int(n.Load()) }
}

// listen starts a listener for one connection, which serve handles, and returns its address. The test waits for serve.
func listen(t *testing.T, network string, serve func(net.Conn)) string {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		serve(conn)
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		goleak.VerifyNone(t, ignore)
	})
	if network == "unix" {
		return "unix://" + address
	}
	return "tcp://" + l.Addr().String()
}

// fakeDaemon accepts one producer and runs script for it.
func fakeDaemon(t *testing.T, o options, script func(f *fake)) string {
	t.Helper()
	if o.network == "" {
		o.network = "tcp"
	}
	return listen(t, o.network, func(conn net.Conn) { acceptPush(t, o, conn, script) })
}

func acceptPush(t testing.TB, o options, conn net.Conn, script func(f *fake)) {
	if o.windowSamples == 0 {
		o.windowSamples = 1 << 20
	}
	if o.windowBytes == 0 {
		o.windowBytes = 1 << 40
	}
	if o.tight {
		tighten(conn)
	}
	hello, err := wire.ReadHello(conn)
	if err != nil {
		t.Errorf("fake daemon: %v", err)
		return
	}
	reply := &wire.AcceptedPush{Table: hello.Table, Fingerprint: hello.Spec.Fingerprint(), Stream: 1, Ack: hello.Ack,
		WindowSamples: o.windowSamples, WindowBytes: o.windowBytes, Held: uint64(o.held)}
	if err := wire.WriteAccepted(conn, reply); err != nil {
		t.Errorf("fake daemon: %v", err)
		return
	}
	script(&fake{Conn: conn, t: t, hello: hello, sampleBytes: int(hello.Spec.SampleBytes())})
}

// sampleByte is what byte i of sample n of any stream is: every sample proves itself.
func sampleByte(n, i int) byte {
	return byte(uint64(n+1)*0x9E3779B97F4A7C15>>56) ^ byte(i) ^ byte(i>>8)
}

func makeSamples(first, n, sampleBytes int) []byte {
	b := make([]byte, n*sampleBytes)
	for i := range b {
		b[i] = sampleByte(first+i/sampleBytes, i%sampleBytes)
	}
	return b
}

// leavesOf cuts a sample into its leaves.
func leavesOf(s *spec.Spec, sample []byte) [][]byte {
	var leaves [][]byte
	for _, bytes := range s.LeafBytes() {
		leaves, sample = append(leaves, sample[:bytes]), sample[bytes:]
	}
	return leaves
}

// take reads and checks n samples.
func (f *fake) take(n int) {
	b := make([]byte, f.sampleBytes)
	for range n {
		if _, err := io.ReadFull(f, b); err != nil {
			f.t.Errorf("fake daemon: sample %d: %v", f.received, err)
			return
		}
		f.checkSample(b)
	}
}

func (f *fake) checkSample(b []byte) {
	for i, c := range b {
		if c != sampleByte(f.received, i) {
			f.t.Errorf("fake daemon: sample %d, byte %d is %#02x, want %#02x", f.received, i, c, sampleByte(f.received, i))
			break
		}
	}
	f.received++
}

func (f *fake) ack(n int) {
	if n == 0 {
		return // the producer may be gone
	}
	if _, err := f.Write([]byte(strings.Repeat("\x01", n))); err != nil {
		f.t.Errorf("fake daemon: ack: %v", err)
	}
}

// serveAll takes and acks samples, as many at once as are there, until the producer closes its side.
func (f *fake) serveAll() {
	buf := make([]byte, max(1<<20, f.sampleBytes))
	have := 0
	for {
		n, err := f.Read(buf[have:])
		have += n
		whole := have / f.sampleBytes
		for i := range whole {
			f.checkSample(buf[i*f.sampleBytes : (i+1)*f.sampleBytes])
		}
		f.ack(whole)
		have = copy(buf, buf[whole*f.sampleBytes:have])
		if err != nil {
			if err != io.EOF || have > 0 {
				f.t.Errorf("fake daemon: ended with %d bytes of a sample: %v", have, err)
			}
			return
		}
	}
}

func tighten(conn net.Conn) {
	c := conn.(interface {
		SetReadBuffer(bytes int) error
		SetWriteBuffer(bytes int) error
	})
	c.SetReadBuffer(64 << 10)
	c.SetWriteBuffer(64 << 10)
}

// dialTight is a Config.Dialer whose sockets hold little.
func dialTight(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err == nil {
		tighten(conn)
	}
	return conn, err
}

// notice sends a closing notice.
func (f *fake) notice(code wire.Code, reason string) {
	f.Write(wire.AppendNotice(nil, &wire.Notice{Code: code, Reason: reason}))
}

func specOf(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func dial(t *testing.T, addr string, cfg Config) *Producer {
	t.Helper()
	cfg.Table = "t"
	p, err := Dial(t.Context(), addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Abort)
	return p
}

func push(t *testing.T, p *Producer, first, n int) {
	t.Helper()
	for i := range n {
		sample := makeSamples(first+i, 1, int(p.sampleBytes))
		if err := p.Push(t.Context(), leavesOf(p.spec, sample)...); err != nil {
			t.Fatalf("sample %d: %v", first+i, err)
		}
		clear(sample) // it is ours again
	}
}

func closeWell(t *testing.T, p *Producer) {
	t.Helper()
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p.Acked() != p.Sent() {
		t.Errorf("%d samples acked of %d", p.Acked(), p.Sent())
	}
}

// soon is a context that ends by itself while a call blocks.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func wantIs(t *testing.T, err error, targets ...error) {
	t.Helper()
	for _, target := range targets {
		if !errors.Is(err, target) {
			t.Errorf("got %v; want an error that is %v", err, target)
		}
	}
}
