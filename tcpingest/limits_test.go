package tcpingest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/sendfile"
	"github.com/ingestd/ingestd/wire"
)

// newerVersion is a hello of versions that this daemon does not speak.
func newerVersion(t *testing.T, hello *wire.Hello) []byte {
	t.Helper()
	text, err := wire.AppendHello(nil, hello)
	if err != nil {
		t.Fatal(err)
	}
	text[8], text[10] = 9, 9
	return text
}

// say writes, and fails the test if that does not go.
func say(t *testing.T, c io.Writer, what []byte) {
	t.Helper()
	if _, err := c.Write(what); err != nil {
		t.Fatal(err)
	}
}

// isRefused fails the test unless the peer is told a code.
func isRefused(t *testing.T, c io.Reader, code wire.Code) {
	t.Helper()
	var refusal *wire.Refusal
	if err := wire.ReadReply(c, &wire.AcceptedPush{}); !errors.As(err, &refusal) || refusal.Code != code {
		t.Fatalf("got %v, want a refusal for %s", err, code)
	}
}

// TestRefusedStay: any number of peers that are refused and stay take nobody's place, and no more than refusingMax of them are waited for.
func TestRefusedStay(t *testing.T) {
	tables, hello := numbers(t)
	s, l := serveOn(t, "tcp", Config{Tables: tables, MaxConnections: 2, LingerTimeout: time.Hour}, nil)
	wrong := newerVersion(t, hello)
	for range refusingMax + 20 {
		c := connect(t, l)
		say(t, c, wrong)
		isRefused(t, c, wire.CodeBadVersion)
	}
	eventually(t, "those beyond the limit are gone", s, func(st ingest.Stats) bool { return st.Open == refusingMax })
	for range 2 {
		c := connect(t, l)
		if err := wire.Greet(c, c, hello, nil, &wire.AcceptedPush{}); err != nil {
			t.Fatalf("an honest client: %v", err)
		}
	}
	// The third is above the limit, and there is no room left for telling it.
	turnedAway(t, l)
	stopped, stop := context.WithCancel(t.Context())
	stop()
	_ = s.Shutdown(stopped)
}

// TestRefusedKeepPlace: who is refused and stays keeps its place among the handshakes of its address, until it is gone.
func TestRefusedKeepPlace(t *testing.T) {
	tables, hello := numbers(t)
	door := doorTo()
	door.HalfOpen = bans.NewHalfOpen(bans.HalfOpenConfig{MaxPerAddress: 2, Loopback: true})
	s, l := serveOn(t, "tcp", Config{Tables: tables, Door: door, LingerTimeout: time.Hour}, nil)
	var stays []net.Conn
	wrong := newerVersion(t, hello)
	for range 2 {
		c := connect(t, l)
		say(t, c, wrong)
		isRefused(t, c, wire.CodeBadVersion)
		stays = append(stays, c)
		door.Table.ClearAll() // that it is slowed is not what this is about
	}
	turnedAway(t, l)
	if n := s.Stats().Refused[string(wire.CodeTooManyConnections)]; n != 1 {
		t.Errorf("%d are counted as too many, want 1", n)
	}
	_ = stays[0].Close()
	eventually(t, "it is gone", s, func(st ingest.Stats) bool { return st.Open == 1 })
	c := connect(t, l)
	if err := wire.Greet(c, c, hello, nil, &wire.AcceptedPush{}); err != nil {
		t.Errorf("in its place: %v", err)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	_ = s.Shutdown(stopped)
}

// large is a hello above wire.HelloBytesSmall, for table t of a server of leaves.
func large(t *testing.T) (ingesttest.Tables, *wire.Hello) {
	t.Helper()
	var leaves strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&leaves, ",leaf-with-a-long-name-%04d:U8[%d]", i, 1+i%2)
	}
	tables := ingesttest.Tables{"t": ingesttest.NewTable(t, "t", leaves.String()[1:], 2, 2)}
	return tables, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: tables["t"].Spec()}
}

// TestLargeHellos: only so many large hellos are read at a time of those who are not exempt; others wait for their turn, and small ones pass them.
func TestLargeHellos(t *testing.T) {
	tables, hello := large(t)
	text, err := wire.AppendHello(nil, hello)
	if err != nil || len(text) <= wire.HelloBytesSmall {
		t.Fatalf("the hello has %d bytes: %v", len(text), err)
	}
	door := doorTo()
	s, l := serveOn(t, "tcp", Config{Tables: tables, Door: door, HandshakeTimeout: time.Hour}, nil)
	var stays []net.Conn
	for range largeHellos {
		c := connect(t, l)
		say(t, c, text[:100])
		stays = append(stays, c)
	}
	for len(s.large) < largeHellos {
		eventually(t, "they are accepted", s, func(st ingest.Stats) bool { return st.Open == largeHellos })
	}
	honest := connect(t, l)
	say(t, honest, text)
	small := *hello
	small.Spec, small.Fingerprint = nil, hello.Spec.Fingerprint()
	c := connect(t, l)
	if err := wire.Greet(c, c, &small, nil, &wire.AcceptedPush{}); err != nil {
		t.Errorf("a small hello: %v", err)
	}
	if st := s.Stats(); st.Open != largeHellos+2 || len(s.large) != largeHellos {
		t.Errorf("%d connections are open, %d large hellos are read", st.Open, len(s.large))
	}
	_ = stays[0].Close()
	if err := wire.ReadReply(honest, &wire.AcceptedPush{}); err != nil {
		t.Errorf("the honest one: %v", err)
	}
	eventually(t, "all leave", s, func(st ingest.Stats) bool {
		for _, c := range stays {
			_ = c.Close()
		}
		return st.Open == 2 && len(s.large) == 0
	})
}

// TestLargeHelloWaits: who waits for its turn with a large hello is told so when the time for its handshake is over, which is no failure of its own, or when the daemon stops.
func TestLargeHelloWaits(t *testing.T) {
	tables, hello := large(t)
	text, err := wire.AppendHello(nil, hello)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		code    wire.Code
		timeout time.Duration
	}{{wire.CodeTooManyConnections, time.Second}, {wire.CodeShuttingDown, time.Hour}} {
		t.Run(string(tc.code), func(t *testing.T) {
			door := doorTo()
			s, l := serveOn(t, "tcp", Config{Tables: tables, Door: door, HandshakeTimeout: tc.timeout}, nil)
			for range largeHellos {
				s.large <- struct{}{}
			}
			c := connect(t, l)
			say(t, c, text[:100])
			if tc.code == wire.CodeShuttingDown {
				eventually(t, "it is there", s, func(st ingest.Stats) bool { return st.Open == 1 })
				go func() { _ = s.Shutdown(t.Context()) }()
			}
			isRefused(t, c, tc.code)
			if n := door.Table.Stats().Failures; n != 0 || len(s.large) != largeHellos {
				t.Errorf("%d failures, %d large hellos", n, len(s.large))
			}
		})
	}
	// Who is exempt waits for nobody.
	s, l := serveOn(t, "tcp", Config{Tables: tables}, nil)
	for range largeHellos {
		s.large <- struct{}{}
	}
	c := connect(t, l)
	if err := wire.Greet(c, c, hello, nil, &wire.AcceptedPush{}); err != nil {
		t.Error(err)
	}
}

func helloOf(t *testing.T, h *wire.Hello) []byte {
	t.Helper()
	text, err := wire.AppendHello(nil, h)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestRecordOfNothing: a record that stays incomplete between samples is no sample that stands still: what came before is acked, and the connection goes on when the rest comes.
func TestRecordOfNothing(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	tables, hello := numbers(t)
	s, l := serveOn(t, "tcp", Config{Tables: tables, StallTimeout: 20 * time.Millisecond, IdleTimeout: time.Hour}, certs)
	plain := connect(t, l)
	halves := &halving{Conn: plain}
	c := tls.Client(halves, certs.Client)
	if err := wire.Greet(c, c, hello, exporterOf(t, c), &wire.AcceptedPush{}); err != nil {
		t.Fatal(err)
	}
	say(t, c, make([]byte, 3*8))
	halves.now = true
	say(t, c, make([]byte, 8))
	if _, err := io.ReadFull(c, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	// It says so only when it has waited for the rest in vain.
	eventually(t, "it waits for the next sample", s, func(st ingest.Stats) bool {
		return len(st.Connections) == 1 && st.Connections[0].State == stateNames[stateWaitingForData]
	})
	say(t, plain, halves.rest)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("the fourth sample: %v", err)
	}
}

// exporterOf shakes hands first.
func exporterOf(t *testing.T, c *tls.Conn) []byte {
	t.Helper()
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	state := c.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(wire.ExporterLabel, nil, wire.ExporterBytes)
	if err != nil {
		t.Fatal(err)
	}
	return exporter
}

// halving writes half of what it is given, once told to, and keeps the rest.
type halving struct {
	net.Conn
	now  bool
	rest []byte
}

func (c *halving) Write(b []byte) (int, error) {
	if !c.now {
		return c.Conn.Write(b)
	}
	half := len(b) / 2
	c.rest = append(c.rest, b[half:]...)
	_, err := c.Conn.Write(b[:half])
	return len(b), err
}

// TestAbortOfTLS: who is cut off over TLS gets nothing more that was not sent yet, whether it reads or not.
func TestAbortOfTLS(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	tables, _ := numbers(t)
	full := make(chan struct{})
	_, l := serveOn(t, "tcp", Config{Tables: tables, Attach: func(c net.Conn, _ *wire.Hello) error {
		_ = c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		for block := make([]byte, 1<<20); ; {
			if _, err := c.Write(block); err != nil {
				break
			}
		}
		err := sendfile.Abort(c)
		close(full)
		return err
	}}, certs)
	plain := connect(t, l)
	c := tls.Client(plain, certs.Client)
	say(t, c, helloOf(t, &wire.Hello{Role: wire.RoleTrain, Table: "t"}))
	<-full
	if _, err := io.Copy(io.Discard, plain); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("its end is %v, want a reset", err)
	}
}

// TestCameTooLate: who connects to a server that is stopping is counted as that, not as one too many.
func TestCameTooLate(t *testing.T) {
	tables, _ := numbers(t)
	s, err := New(Config{Tables: tables})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := connect(t, l)
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.start(accepted, s.serveHello)
	if text, err := io.ReadAll(c); len(text) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it hears %q, %v", text, err)
	}
	if st := s.Stats(); st.Refused[string(wire.CodeShuttingDown)] != 1 || st.Refused[string(wire.CodeTooManyConnections)] != 0 || st.Open != 0 {
		t.Errorf("%+v", st)
	}
}
