package tcpingest

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/wire"
)

// TestBadTLS: whoever does not shake hands as it must is ended alone, and counted; the others go on.
func TestBadTLS(t *testing.T) {
	certs, strangers := ingesttest.NewCertificates(t), ingesttest.NewCertificates(t)
	tables := ingesttest.Tables{"t": ingesttest.NewTable(t, "t", "a:U64", 4, 4)}
	s, l := serveOn(t, "tcp", Config{Tables: tables, HandshakeTimeout: 5 * time.Second}, certs)
	push := func(cfg *tls.Config) error {
		c, err := tls.Dial("tcp", l.Addr().String(), cfg)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if err := wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: tables["t"].Spec()}); err != nil {
			return err
		}
		return wire.ReadReply(c, &wire.AcceptedPush{})
	}
	change := func(f func(*tls.Config)) *tls.Config {
		c := certs.Client.Clone()
		f(c)
		return c
	}
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	for _, tc := range []struct {
		name   string
		client *tls.Config
		target any // the client's own error; nil: the daemon's alert
		reason string
	}{
		{"no client certificate", change(func(c *tls.Config) { c.Certificates = nil }), nil, ingest.RefusedTLS},
		{"client certificate of another CA", change(func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &strangers.Client.Certificates[0], nil
			}
		}), nil, ingest.RefusedCertificate},
		{"expired client certificate", change(func(c *tls.Config) {
			c.Certificates = []tls.Certificate{ingesttest.Certify(t)(certs.CA.NewClient("late", time.Nanosecond))}
		}), nil, ingest.RefusedCertificate},
		{"server's certificate for a client", change(func(c *tls.Config) {
			c.Certificates = []tls.Certificate{ingesttest.Certify(t)(certs.CA.NewServer([]string{"x"}, time.Hour))}
		}), nil, ingest.RefusedCertificate},
		{"wrong protocol", change(func(c *tls.Config) { c.NextProtos = []string{"h2"} }), nil, ingest.RefusedTLS},
		{"no protocol", change(func(c *tls.Config) { c.NextProtos = nil }), nil, ingest.RefusedTLS},
		{"TLS 1.2", change(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), nil, ingest.RefusedTLS},
		{"wrong CA", change(func(c *tls.Config) { c.RootCAs = strangers.Client.RootCAs }), &unknown, ingest.RefusedByPeer},
		{"wrong name", change(func(c *tls.Config) { c.ServerName = "other.test" }), &name, ingest.RefusedByPeer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := s.Stats().Refused[tc.reason]
			err := push(tc.client)
			if err == nil {
				t.Fatal("was let in")
			}
			if refusal := (*wire.Refusal)(nil); errors.As(err, &refusal) {
				t.Fatalf("was answered: %v", err)
			}
			if tc.target != nil && !errors.As(err, tc.target) {
				t.Errorf("got %v, want a %T", err, tc.target)
			}
			awaitRefused(t, s, tc.reason, before+1)
			if err := push(certs.Client); err != nil {
				t.Errorf("a good client after that: %v", err)
			}
		})
	}
	t.Run("no TLS at all", func(t *testing.T) {
		before := s.Stats().Refused[ingest.RefusedTLS]
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: tables["t"].Spec()}); err != nil {
			t.Fatal(err)
		}
		answer, _ := io.ReadAll(c) // an alert, and perhaps a reset
		if len(answer) > 7 {
			t.Errorf("was told %q", answer)
		}
		awaitRefused(t, s, ingest.RefusedTLS, before+1)
	})
}

// TestExpiredServer: a client that looks at certificates does not take one that has expired, which is counted as its alert.
func TestExpiredServer(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	late := certs.Server.Clone()
	late.Certificates = []tls.Certificate{ingesttest.Certify(t)(certs.CA.NewServer([]string{certs.Client.ServerName, "127.0.0.1"}, time.Nanosecond))}
	s, l := serveOn(t, "tcp", Config{Tables: ingesttest.Tables{}}, &ingesttest.Certificates{CA: certs.CA, Server: late, Client: certs.Client})
	var invalid x509.CertificateInvalidError
	if _, err := tls.Dial("tcp", l.Addr().String(), certs.Client); !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
		t.Errorf("got %v, want that it has expired", err)
	}
	awaitRefused(t, s, ingest.RefusedByPeer, 1)
}

// awaitRefused waits until so many handshakes have been refused for a reason.
func awaitRefused(t *testing.T, s *Server, reason string, n uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d refused for %s", n, reason), s, func(st ingest.Stats) bool { return st.Refused[reason] >= n })
}

// eventually waits until the counts are as wanted.
func eventually(t *testing.T, what string, s *Server, cond func(ingest.Stats) bool) {
	t.Helper()
	for patience := time.Now().Add(time.Minute); !cond(s.Stats()); runtime.Gosched() {
		if time.Now().After(patience) {
			t.Fatalf("never: %s: %+v", what, s.Stats())
		}
	}
}

// TestSilentTLS: who connects and says nothing, or half a handshake, is let go after HandshakeTimeout.
func TestSilentTLS(t *testing.T) {
	for name, said := range map[string]string{"nothing": "", "half a record": "\x16\x03\x01\x02\x00\x01\x00"} {
		t.Run(name, func(t *testing.T) {
			s, l := serveOn(t, "tcp", Config{Tables: ingesttest.Tables{}, HandshakeTimeout: 50 * time.Millisecond}, ingesttest.NewCertificates(t))
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, said); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, c) // until it is closed
			awaitRefused(t, s, string(wire.CodeHandshakeTimeout), 1)
		})
	}
}

// TestBrokenRecords: bytes that are no record of the connection's end it as a reset, within a sample or not; what was acked before stays.
func TestBrokenRecords(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	tables := ingesttest.Tables{"t": ingesttest.NewTable(t, "t", "a:U64", 4, 4)}
	s, l := serveOn(t, "tcp", Config{Tables: tables}, certs)
	plain, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	c := tls.Client(plain, certs.Client)
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if err := wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: tables["t"].Spec()}); err != nil {
		t.Fatal(err)
	}
	if err := wire.ReadReply(c, &wire.AcceptedPush{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, 3*8)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if _, err := plain.Write(append([]byte{0x17, 3, 3, 0, 32}, make([]byte, 32)...)); err != nil {
		t.Fatal(err)
	}
	for s.Stats().Ended[ingest.EndReset] == 0 {
		runtime.Gosched()
	}
	if st := s.Stats(); st.Samples != 3 {
		t.Errorf("%d samples taken, want 3", st.Samples)
	}
}

// TestHalfARecord: a record that stops half-way is as good as silence: what came before it is acked, and the connection ends as an idle one does, or as one that stalled.
func TestHalfARecord(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	tables := ingesttest.Tables{"t": ingesttest.NewTable(t, "t", "a:U64", 4, 4)}
	s, l := serveOn(t, "tcp", Config{Tables: tables, StallTimeout: 100 * time.Millisecond, IdleTimeout: 100 * time.Millisecond}, certs)
	plain, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	cut := &cutting{Conn: plain}
	c := tls.Client(cut, certs.Client)
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if err := wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: tables["t"].Spec()}); err != nil {
		t.Fatal(err)
	}
	if err := wire.ReadReply(c, &wire.AcceptedPush{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, 3*8)); err != nil {
		t.Fatal(err)
	}
	cut.now = true
	if _, err := c.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	acks := make([]byte, 3)
	if _, err := io.ReadFull(c, acks); err != nil || acks[0] != wire.Ack || acks[2] != wire.Ack {
		t.Fatalf("acks % x, %v", acks, err)
	}
	mark := make([]byte, 1)
	if _, err := io.ReadFull(c, mark); err != nil || mark[0] != wire.NoticeMark {
		t.Fatalf("byte %#x, %v", mark[0], err)
	}
	notice, err := wire.ReadNotice(c)
	if err != nil || notice.Code != wire.CodeStalled && notice.Code != wire.CodeIdleTimeout {
		t.Fatalf("notice %v, %v", notice, err)
	}
	if st := s.Stats(); st.Samples != 3 || st.Ended[string(notice.Code)] != 1 {
		t.Errorf("counted %+v", st)
	}
}

// cutting writes half of what it is given, once told to.
type cutting struct {
	net.Conn
	now bool
}

func (c *cutting) Write(b []byte) (int, error) {
	if c.now {
		_, err := c.Conn.Write(b[:len(b)/2])
		return len(b), err
	}
	return c.Conn.Write(b)
}
