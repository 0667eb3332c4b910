package tcpingest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/wire"
)

var here = netip.MustParseAddr("127.0.0.1")

// doorTo is a door that counts this machine, too.
func doorTo() *bans.Door {
	return &bans.Door{Table: bans.New(bans.Config{Loopback: true}), HalfOpen: bans.NewHalfOpen(bans.HalfOpenConfig{Loopback: true})}
}

func connect(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

func numbers(t *testing.T) (ingesttest.Tables, *wire.Hello) {
	t.Helper()
	tables := ingesttest.Tables{"t": ingesttest.NewTable(t, "t", "a:U64", 4, 4)}
	return tables, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: tables["t"].Spec()}
}

// How a peer of TestDoor goes.
const (
	ends   = 0         // it ends its side
	dies   = 1 << iota // its connection is reset
	late               // after more than passing by takes
	shakes             // it says what it says when TLS is done
)

// TestDoor: what is a failed handshake of an address and what is not, and that no place stays taken.
func TestDoor(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	tables, hello := numbers(t)
	text, err := wire.AppendHello(nil, hello)
	if err != nil {
		t.Fatal(err)
	}
	unknown := *hello
	unknown.Table = "other"
	elsewhere, err := wire.AppendHello(nil, &unknown)
	if err != nil {
		t.Fatal(err)
	}
	newer := append([]byte(nil), text...)
	newer[8], newer[10] = 9, 9 // the versions that it speaks
	for _, c := range []struct {
		name   string
		secure *ingesttest.Certificates
		said   []byte
		how    int
		failed uint64
	}{
		{"nothing", nil, nil, ends, 0},
		{"nothing, and a reset", nil, nil, dies, 0},
		{"nothing, and goes late", nil, nil, ends | late, 1},
		{"nothing, and a reset late", nil, nil, dies | late, 1},
		{"half a hello", nil, text[:len(text)/2], ends, 1},
		{"half a hello, and a reset", nil, text[:len(text)/2], dies, 1},
		{"HTTP", nil, []byte("GET / HTTP/1.1\r\n\r\n"), ends, 1},
		{"another version", nil, newer, ends, 1},
		{"a role that there is not", nil, bytes.Replace(text, []byte(`"push"`), []byte(`"pusk"`), 1), ends, 1},
		{"a table that there is not", nil, elsewhere, ends, 0},
		{"a hello", nil, text, ends, 0},
		{"TLS: nothing", certs, nil, ends, 0},
		{"TLS: nothing, and goes late", certs, nil, ends | late, 1},
		{"TLS: a hello in the clear", certs, text, ends, 1},
		{"TLS: its first message", certs, firstOfTLS(t, certs.Client), ends, 1},
		{"TLS: a handshake, and no hello", certs, nil, ends | shakes, 1},
		{"TLS: a handshake, and a reset", certs, nil, dies | shakes, 1},
		{"TLS: a handshake, and half a hello", certs, text[:len(text)/2], ends | shakes, 1},
		{"TLS: a handshake, and a hello", certs, text, ends | shakes, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			door := doorTo()
			cfg := Config{Tables: tables, Door: door, passingBy: time.Hour}
			if c.how&late != 0 {
				cfg.passingBy = 1
			}
			s, l := serveOn(t, "tcp", cfg, c.secure)
			plain := connect(t, l)
			conn := plain.(ingesttest.Conn)
			if c.how&shakes != 0 {
				client := tls.Client(plain, c.secure.Client)
				if err := client.Handshake(); err != nil {
					t.Fatal(err)
				}
				conn = client
			}
			if _, err := conn.Write(c.said); err != nil {
				t.Fatal(err)
			}
			if c.how&dies != 0 {
				eventually(t, "it was accepted", s, func(st ingest.Stats) bool { return st.Accepted == 1 })
				_ = plain.(*net.TCPConn).SetLinger(0)
				_ = plain.Close()
				eventually(t, "its end was seen", s, func(st ingest.Stats) bool { return st.Open == 0 })
			} else if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, conn)
			_ = s.Shutdown(context.Background()) // all of it is counted when it returns
			if got := door.Table.Stats().Failures; got != c.failed {
				t.Errorf("%d failures, want %d", got, c.failed)
			}
			if open, _, _ := door.HalfOpen.Stats(); open != 0 {
				t.Errorf("%d handshakes are still under way", open)
			}
		})
	}
}

// firstOfTLS is what a client says first.
func firstOfTLS(t *testing.T, cfg *tls.Config) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() { _ = tls.Client(theirs, cfg).Handshake() }()
	first := make([]byte, 16<<10)
	n, err := ours.Read(first)
	if err != nil {
		t.Fatal(err)
	}
	_ = ours.Close()
	return first[:n]
}

// TestSuccessClears: whose handshake failed is slowed, and forgotten when it is let in.
func TestSuccessClears(t *testing.T) {
	tables, hello := numbers(t)
	door := doorTo()
	_, l := serveOn(t, "tcp", Config{Tables: tables, Door: door}, nil)
	door.Table.Failed(here)
	door.Table.Failed(here)
	c := connect(t, l)
	if err := wire.Greet(c, c, hello, nil, &wire.AcceptedPush{}); err != nil {
		t.Fatal(err)
	}
	if st := door.Table.Stats(); st.Addresses != 0 || st.Slowed != 1 || st.Cleared != 1 {
		t.Errorf("%+v", st)
	}
}

// turnedAway fails the test unless a connection is closed without a word.
func turnedAway(t *testing.T, l net.Listener) {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return // it was reset before it was there
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if text, err := io.ReadAll(c); len(text) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it hears %q, %v", text, err)
	}
}

// TestTurnedAway: a banned address is closed without a word, and counted.
func TestTurnedAway(t *testing.T) {
	tables, _ := numbers(t)
	door := doorTo()
	for range bans.FailuresMax {
		door.Table.Failed(here)
	}
	for name, secure := range map[string]*ingesttest.Certificates{"tcp": nil, "tls": ingesttest.NewCertificates(t)} {
		t.Run(name, func(t *testing.T) {
			s, l := serveOn(t, "tcp", Config{Tables: tables, Door: door}, secure)
			turnedAway(t, l)
			if st := s.Stats(); st.Refused[string(wire.CodeBanned)] != 1 || st.Open != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestStopWhileWaiting: neither who is slowed nor who owes a proof holds the end up; both are told why, and it is no failure of theirs.
func TestStopWhileWaiting(t *testing.T) {
	tables, hello := numbers(t)
	token, lines, err := auth.NewEntry("a", []string{"push"}, []string{"*"})
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := auth.Parse([]byte("tokens:\n" + lines))
	if err != nil {
		t.Fatal(err)
	}
	stops := func(t *testing.T, s *Server, c net.Conn, door *bans.Door) {
		t.Helper()
		before := door.Table.Stats().Failures
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		var refusal *wire.Refusal
		if err := wire.ReadReply(c, &wire.AcceptedPush{}); !errors.As(err, &refusal) || refusal.Code != wire.CodeShuttingDown {
			t.Errorf("it is told %v", err)
		}
		if after := door.Table.Stats().Failures; after != before {
			t.Errorf("%d failures are counted", after-before)
		}
	}
	t.Run("slowed", func(t *testing.T) {
		door := doorTo()
		for range bans.FailuresMax - 1 {
			door.Table.Failed(here)
		}
		s, l := serveOn(t, "tcp", Config{Tables: tables, Door: door}, nil)
		c := connect(t, l)
		for s.Stats().Open == 0 {
			runtime.Gosched()
		}
		stops(t, s, c, door)
		if door.Table.Check(here).Wait == 0 {
			t.Error("it was not ended early")
		}
	})
	t.Run("proof", func(t *testing.T) {
		door := doorTo()
		s, l := serveOn(t, "tcp", Config{Tables: tables, Door: door, Gate: auth.NewGate(auth.GateConfig{Tokens: tokens})}, nil)
		c := connect(t, l)
		h := *hello
		h.SetToken(token)
		h.Nonce = wire.NewNonce()
		text, err := wire.AppendHello(nil, &h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(text); err != nil {
			t.Fatal(err)
		}
		header := make([]byte, 16)
		if _, err := io.ReadFull(c, header); err != nil { // the challenge has come
			t.Fatal(err)
		}
		rest := make([]byte, int(header[12])|int(header[13])<<8)
		if _, err := io.ReadFull(c, rest); err != nil {
			t.Fatal(err)
		}
		stops(t, s, c, door)
	})
}

// TestTokenInStats: the connection of who was let in says with which token.
func TestTokenInStats(t *testing.T) {
	tables, hello := numbers(t)
	token, lines, err := auth.NewEntry("named", []string{"push"}, []string{"*"})
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := auth.Parse([]byte("tokens:\n" + lines))
	if err != nil {
		t.Fatal(err)
	}
	certs := ingesttest.NewCertificates(t)
	s, l := serveOn(t, "tcp", Config{Tables: tables, Gate: auth.NewGate(auth.GateConfig{Tokens: tokens})}, certs)
	c := tls.Client(connect(t, l), certs.Client)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	state := c.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(wire.ExporterLabel, nil, wire.ExporterBytes)
	if err != nil {
		t.Fatal(err)
	}
	hello.SetToken(token)
	if err := wire.Greet(c, c, hello, exporter, &wire.AcceptedPush{}); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); len(st.Connections) != 1 || st.Connections[0].Token != "named" {
		t.Errorf("%+v", st.Connections)
	}
	// The same over another connection, with what that one exports: no relay.
	other := tls.Client(connect(t, l), certs.Client)
	if err := other.Handshake(); err != nil {
		t.Fatal(err)
	}
	var refusal *wire.Refusal
	if err := wire.Greet(other, other, hello, exporter, &wire.AcceptedPush{}); !errors.As(err, &refusal) && !errors.Is(err, wire.ErrDaemonUnproven) {
		t.Errorf("a proof that is bound to another connection: %v", err)
	}
}
