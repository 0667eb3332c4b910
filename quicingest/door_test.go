package quicingest

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/wire"
)

var here = netip.MustParseAddr("127.0.0.1")

// guarded gives a daemon a door that looks at addresses of this machine, too, with so many handshakes of each.
func guarded(perAddress int) func(*Config) {
	return func(c *Config) {
		c.Streams.Door = &bans.Door{
			Table:    bans.New(bans.Config{Loopback: true}),
			HalfOpen: bans.NewHalfOpen(bans.HalfOpenConfig{Loopback: true, MaxPerAddress: perAddress}),
		}
	}
}

// dialFrom connects from an address of this machine, without looking at whether that works.
func (s *site) dialFrom(t *testing.T, host string, secure *tls.Config) (*quic.Conn, error) {
	t.Helper()
	socket, err := net.ListenPacket("udp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: socket}
	t.Cleanup(func() {
		_ = tr.Close()
		_ = socket.Close()
	})
	return tr.Dial(t.Context(), s.addr, secure, clientQUIC)
}

// closedWith waits until the daemon has closed a connection and returns its code.
func closedWith(t *testing.T, c *quic.Conn) quic.ApplicationErrorCode {
	t.Helper()
	select {
	case <-c.Context().Done():
	case <-time.After(time.Minute):
		t.Fatal("the connection stays")
	}
	var closed *quic.ApplicationError
	if err := context.Cause(c.Context()); !errors.As(err, &closed) || !closed.Remote {
		t.Fatalf("closed with %v", err)
	}
	return closed.ErrorCode
}

// nonsense says what is no hello on a stream, and reads the answer.
func nonsense(t *testing.T, c *quic.Conn) error {
	t.Helper()
	open, err := c.OpenStreamSync(t.Context())
	if err != nil {
		return err
	}
	st := quicconn.New(c, open)
	defer st.Close()
	if _, err := st.Write([]byte("this is no hello")); err != nil {
		return err
	}
	_ = st.CloseWrite()
	text, err := io.ReadAll(st)
	if err == nil && len(text) == 0 {
		err = io.EOF
	}
	return err
}

// TestDoor: each stream is a handshake of its address. Once that is banned, neither new streams nor new connections are begun, and what goes on on one goes on.
func TestDoor(t *testing.T) {
	s := newSite(t, guarded(16))
	finish := s.honest(t)
	known := s.dial(t)
	st, _ := s.push(t, known)
	c := s.dial(t)
	if err := nonsense(t, c); err != nil {
		t.Errorf("it hears nothing: %v", err)
	}
	if n := s.door.Table.Stats().Failures; n != 1 {
		t.Fatalf("%d failures", n)
	}
	for range bans.FailuresMax - 1 {
		s.door.Table.Failed(here)
	}
	if _, _, err := s.tryPush(t.Context(), known); err == nil {
		t.Error("a stream of a banned address is served")
	}
	if err := nonsense(t, c); err == nil {
		t.Error("a stranger is answered whose address is banned")
	}
	if code := closedWith(t, c); code != quicconn.CodeConnections {
		t.Errorf("a stranger's connection is closed with %d", code)
	}
	if c, err := s.dialFrom(t, "127.0.0.1", s.certs.Client); err == nil {
		_ = c.CloseWithError(quicconn.CodeDone, "")
		t.Error("a connection of a banned address is begun")
	}
	s.await(t, string(wire.CodeBanned), 4) // two streams, two connections
	send(t, st, 20, -1, nil)
	_ = st.Close()
	finish()
	s.finish(t)
}

// TestStrangersPerAddress: an address has so many connections on which nobody was let in, and others do not suffer from it.
func TestStrangersPerAddress(t *testing.T) {
	const most = 4
	for name, retryAbove := range map[string]int{"not verified": 64, "verified": -1} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, func(c *Config) {
				guarded(most)(c)
				c.MaxConnections, c.RetryAbove = 2*most, retryAbove
			})
			var strangers []*quic.Conn
			for range most {
				c, err := s.dialFrom(t, "127.0.0.1", s.certs.Client)
				if err != nil {
					t.Fatal(err)
				}
				strangers = append(strangers, c)
			}
			until(t, "strangers", func() bool { return s.connections().Strangers >= most })
			c, err := s.dialFrom(t, "127.0.0.1", s.certs.Client)
			var refused *quic.TransportError
			switch {
			case retryAbove < 0 && (!errors.As(err, &refused) || refused.ErrorCode != quic.ConnectionRefused):
				t.Errorf("one more: got %v, want CONNECTION_REFUSED", err)
			case retryAbove > 0 && err != nil:
				t.Errorf("one more: %v", err)
			case err == nil:
				if code := closedWith(t, c); code != quicconn.CodeConnections {
					t.Errorf("one more is closed with %d", code)
				}
			}
			s.await(t, string(wire.CodeTooManyConnections), 1)
			other, err := s.dialFrom(t, "127.0.0.2", s.certs.Client)
			if err != nil {
				t.Fatalf("another address: %v", err)
			}
			if st, _, err := s.tryPush(t.Context(), other); err != nil {
				t.Errorf("another address: %v", err)
			} else {
				_ = st.Close()
			}
			st, _ := s.push(t, strangers[0]) // who is let in is no stranger
			last, err := s.dialFrom(t, "127.0.0.1", s.certs.Client)
			if err != nil {
				t.Fatal(err)
			}
			if st, _, err := s.tryPush(t.Context(), last); err != nil {
				t.Errorf("a place that came free: %v", err)
			} else {
				_ = st.Close()
			}
			if n := s.connections().Strangers; n != most-1 {
				t.Errorf("%d strangers, want %d", n, most-1)
			}
			_ = st.Close()
			s.finish(t)
		})
	}
}

// TestStrangersLeave: a connection on which nobody was let in ends soon, whatever is done on it.
func TestStrangersLeave(t *testing.T) {
	open := func(t *testing.T, c *quic.Conn) *quic.Stream {
		t.Helper()
		st, err := c.OpenStreamSync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	for _, tc := range []struct {
		name   string
		do     func(*testing.T, *quic.Conn)
		failed bool // the connection has: what is said on streams is judged there
	}{
		{"no stream", func(*testing.T, *quic.Conn) {}, true},
		{"the end of a stream", func(t *testing.T, c *quic.Conn) { _ = open(t, c).Close() }, false},
		{"half a hello", func(t *testing.T, c *quic.Conn) { _, _ = open(t, c).Write([]byte("ING")) }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t, func(c *Config) {
				guarded(16)(c)
				c.Streams.HandshakeTimeout = 300 * time.Millisecond
				c.Streams.LingerTimeout = time.Hour // for which who is refused may hold its stream
			})
			c, err := s.dialFrom(t, "127.0.0.1", s.certs.Client)
			if err != nil {
				t.Fatal(err)
			}
			tc.do(t, c)
			if code := closedWith(t, c); code != quicconn.CodeIdle {
				t.Errorf("closed with %d", code)
			}
			s.await(t, string(wire.CodeHandshakeTimeout), 1)
			until(t, "the end of the connection", func() bool { return s.connections().Open == 0 })
			if n := s.door.Table.Stats().Failures; tc.failed && n != 1 {
				t.Errorf("%d failures, want 1", n)
			}
			s.finish(t)
		})
	}
	t.Run("it closes", func(t *testing.T) {
		s := newSite(t, guarded(16))
		c, err := s.dialFrom(t, "127.0.0.1", s.certs.Client)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWithError(quicconn.CodeDone, "")
		until(t, "the end to be counted", func() bool { return s.connections().Ended[ingest.EndClean] > 0 })
		if n := s.door.Table.Stats().Failures; n != 1 {
			t.Errorf("%d failures, want 1", n)
		}
		s.finish(t)
	})
}

// TestFailedHandshakes: a handshake that failed at something only the owner of the address can have sent is held against the address, and so is every one of an address
// that was verified.
func TestFailedHandshakes(t *testing.T) {
	strangers := ingesttest.NewCertificates(t)
	for name, tc := range map[string]struct {
		change     func(*tls.Config)
		retryAbove int
		reason     string
		failures   uint64
	}{
		"no certificate": {func(c *tls.Config) { c.Certificates = nil }, 64, ingest.RefusedTLS, bans.FailuresMax},
		"certificate of another authority": {func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &strangers.Client.Certificates[0], nil
			}
		}, 64, ingest.RefusedCertificate, bans.FailuresMax},
		"another protocol":                     {func(c *tls.Config) { c.NextProtos = []string{"h3"} }, 64, ingest.RefusedTLS, 0},
		"another protocol, verified":           {func(c *tls.Config) { c.NextProtos = []string{"h3"} }, -1, ingest.RefusedTLS, bans.FailuresMax},
		"another authority expected":           {func(c *tls.Config) { c.RootCAs = strangers.Client.RootCAs }, 64, ingest.RefusedByPeer, 0},
		"another authority expected, verified": {func(c *tls.Config) { c.RootCAs = strangers.Client.RootCAs }, -1, ingest.RefusedByPeer, bans.FailuresMax},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, func(c *Config) {
				guarded(16)(c)
				c.RetryAbove = tc.retryAbove
			})
			secure := s.certs.Client.Clone()
			tc.change(secure)
			for n := range uint64(bans.FailuresMax) {
				if c, err := s.dialFrom(t, "127.0.0.1", secure); err == nil { // the client is done before the daemon has looked
					<-c.Context().Done()
				}
				s.await(t, tc.reason, n+1)
			}
			until(t, "the handshakes to end", func() bool { return s.connections().HalfOpen == 0 })
			if n := s.door.Table.Stats().Failures; n != tc.failures {
				t.Errorf("%d failures, want %d", n, tc.failures)
			}
			c, err := s.dialFrom(t, "127.0.0.1", s.certs.Client)
			if tc.failures == 0 {
				if err != nil {
					t.Fatal(err)
				}
				st, _ := s.push(t, c)
				_ = st.Close()
				s.finish(t)
				return
			}
			var refused *quic.TransportError
			if !errors.As(err, &refused) || refused.ErrorCode != quic.ConnectionRefused {
				t.Errorf("got %v, want CONNECTION_REFUSED", err)
			}
			s.await(t, string(wire.CodeBanned), 1)
			s.finish(t)
		})
	}
}
