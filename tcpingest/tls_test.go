package tcpingest

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
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
	}{
		{"no client certificate", change(func(c *tls.Config) { c.Certificates = nil }), nil},
		{"client certificate of another CA", change(func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &strangers.Client.Certificates[0], nil
			}
		}), nil},
		{"expired client certificate", change(func(c *tls.Config) {
			c.Certificates = []tls.Certificate{ingesttest.Certify(t)(certs.CA.NewClient("late", time.Nanosecond))}
		}), nil},
		{"server's certificate for a client", change(func(c *tls.Config) {
			c.Certificates = []tls.Certificate{ingesttest.Certify(t)(certs.CA.NewServer([]string{"x"}, time.Hour))}
		}), nil},
		{"wrong protocol", change(func(c *tls.Config) { c.NextProtos = []string{"h2"} }), nil},
		{"TLS 1.2", change(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), nil},
		{"wrong CA", change(func(c *tls.Config) { c.RootCAs = strangers.Client.RootCAs }), &unknown},
		{"wrong name", change(func(c *tls.Config) { c.ServerName = "other.test" }), &name},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := s.Stats().Refused[ingest.RefusedTLS]
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
			awaitRefused(s, before+1)
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
		awaitRefused(s, before+1)
	})
}

// awaitRefused waits until so many handshakes have failed.
func awaitRefused(s *Server, n uint64) {
	for s.Stats().Refused[ingest.RefusedTLS] < n {
		runtime.Gosched()
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
			awaitRefused(s, 1)
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
