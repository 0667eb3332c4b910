//go:build linux

package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/wire"
)

// overConnections are the clients of tls:// and quic://.
var overConnections = []string{"Producer", "StepProducer", "Trainer", "GradReader", "Publisher", "Subscription"}

// openSecure opens each kind of client once, with these files.
func openSecure(ctx context.Context, t *testing.T, addr, what string, files TLS) error {
	t.Helper()
	m := stepManifest(t, raw("w", 8))
	var err error
	switch what {
	case "Producer":
		_, err = Dial(ctx, addr, Config{Table: "t", Spec: specOf(t, "a:U8"), TLS: files})
	case "StepProducer":
		_, err = DialSteps(ctx, addr, StepsConfig{Table: "t", Name: "n", Manifest: m, TLS: files})
	case "Trainer":
		_, err = Attach(ctx, addr, TrainerConfig{Table: "t", TLS: files})
	case "GradReader":
		_, err = OpenGrads(ctx, addr, GradConfig{Table: "t", TLS: files})
	case "Publisher":
		_, err = OpenPublisher(ctx, addr, PublisherConfig{Table: "t", Manifest: m, TLS: files})
	case "Subscription":
		_, err = Subscribe(ctx, addr, SubscribeConfig{Table: "t", TLS: files})
	default:
		t.Fatalf("no client %q", what)
	}
	return err
}

// TestUnbelieved: where certificates are not in order, on either side, each kind of client ends with the reason and with what to do, and does not try again.
func TestUnbelieved(t *testing.T) {
	s := newSecured(t, nil)
	expired := &secured{addr: map[string]string{}}
	expired.serve(t, nil, &tls.Config{Certificates: []tls.Certificate{pairOf(t)(s.ca.NewServer([]string{"127.0.0.1", "ingestd.test"}, time.Nanosecond)).TLS()}})
	strangers, err := devcert.NewAuthority("strangers", time.Hour)
	noError(t, err)
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	for what, c := range map[string]struct {
		daemon *secured
		change func(*TLS)
		target any            // what this client holds against the daemon; nil: it is the daemon that refuses
		alert  tls.AlertError // then: what it says
		says   string
	}{
		"daemon of another authority":  {s, func(c *TLS) { c.Authorities = "" }, &authority, 0, "TLS.Authorities"},
		"daemon of another name":       {s, func(c *TLS) { c.ServerName = "other.test" }, &name, 0, "TLS.ServerName"},
		"daemon that has expired":      {expired, func(*TLS) {}, &invalid, 0, "the daemon needs another certificate"},
		"client without a certificate": {s, func(c *TLS) { c.Certificate, c.Key = "", "" }, nil, 116, "TLS.Certificate, TLS.Key"},
		"client of another authority":  {s, func(c *TLS) { c.Certificate, c.Key = written(t)(strangers.NewClient("x", time.Hour)) }, nil, 48, "authority that the daemon does not know"},
		"client that has expired":      {s, func(c *TLS) { c.Certificate, c.Key = written(t)(s.ca.NewClient("x", time.Nanosecond)) }, nil, 45, "has expired"},
		"client with a server's":       {s, func(c *TLS) { c.Certificate, c.Key = written(t)(s.ca.NewServer([]string{"x"}, time.Hour)) }, nil, 42, "was it made for clients"},
	} {
		files := s.files
		c.change(&files)
		for _, scheme := range []string{"tls", "quic"} {
			for _, client := range overConnections {
				t.Run(strings.Join([]string{what, scheme, client}, "/"), func(t *testing.T) {
					err := openSecure(t.Context(), t, c.daemon.addr[scheme], client, files)
					refused := (*TLSRefusedError)(nil)
					switch {
					case err == nil || codeOf(err) != "":
						t.Fatalf("was answered: %v", err)
					case c.target != nil && (!errors.As(err, c.target) || errors.As(err, &refused)):
						t.Errorf("%v; want a %T", err, c.target)
					case c.target == nil && (!errors.As(err, &refused) || refused.Alert != c.alert):
						t.Errorf("%v; want the alert %d", err, c.alert)
					}
					if passing(err) || errors.Is(err, ErrDaemonGone) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "is the daemon running") {
						t.Errorf("%v; want what is final and says %q", err, c.says)
					}
				})
			}
		}
	}
}

func pairOf(t *testing.T) func(*devcert.Pair, error) *devcert.Pair {
	return func(p *devcert.Pair, err error) *devcert.Pair {
		t.Helper()
		noError(t, err)
		return p
	}
}

// TestBelieved: what is in order, or need not be, is let in, and a file that is none is said to be that.
func TestBelieved(t *testing.T) {
	s := newSecured(t, nil)
	for scheme, addr := range s.addr {
		t.Run(scheme, func(t *testing.T) {
			dial := func(change func(*TLS)) error {
				files := s.files
				change(&files)
				p, err := Dial(t.Context(), addr, Config{Table: "t", Spec: s.table.Spec(), TLS: files})
				if err == nil {
					p.Abort()
				}
				return err
			}
			if err := dial(func(c *TLS) { c.ServerName = "" }); err != nil { // the address is in the certificate, too
				t.Errorf("the address as name: %v", err)
			}
			if err := dial(func(c *TLS) { c.Authorities, c.ServerName, c.InsecureSkipVerify = "", "other.test", true }); err != nil {
				t.Errorf("with InsecureSkipVerify: %v", err)
			}
			for what, change := range map[string]func(*TLS){
				"authorities": func(c *TLS) { c.Authorities = c.Key },
				"certificate": func(c *TLS) { c.Key = c.Authorities },
			} {
				if err := dial(change); err == nil || !strings.Contains(err.Error(), what) || !passing(err) { // the file may be whole the next time
					t.Errorf("a file that is none of %s: %v", what, err)
				}
			}
		})
	}
}

// TestProtocolOfTLS: who does not agree on the protocol in TLS is no daemon, whether it says so or keeps silent.
func TestProtocolOfTLS(t *testing.T) {
	ca, err := devcert.NewAuthority("test", time.Hour)
	noError(t, err)
	certificate, _ := written(t)(&ca.Pair, nil)
	for _, protocols := range [][]string{nil, {"h2"}} {
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
			Certificates: []tls.Certificate{pairOf(t)(ca.NewServer([]string{"127.0.0.1"}, time.Hour)).TLS()}, NextProtos: protocols,
		})
		noError(t, err)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Read(make([]byte, 1)) // the handshake, and whatever comes after it
				_ = conn.Close()
			}
		}()
		for _, client := range overConnections {
			err := openSecure(t.Context(), t, "tls://"+l.Addr().String(), client, TLS{Authorities: certificate})
			refused := (*TLSRefusedError)(nil)
			if silent := protocols == nil; silent != errors.Is(err, wire.ErrProtocol) || silent == errors.As(err, &refused) || passing(err) || !strings.Contains(err.Error(), wire.ALPN) {
				t.Errorf("%s, where the protocols are %q: %v", client, protocols, err)
			}
		}
		_ = l.Close()
		<-ended
	}
}

// TestRemoteAlerts: those that judge the client are final, over TCP and QUIC, and others are not.
func TestRemoteAlerts(t *testing.T) {
	for n := range 256 {
		alert := tls.AlertError(n)
		_, judges := alertAdvice[alert]
		daemon, client := net.Pipe()
		go func() { // a record of the type alert, and in it: fatal, and which
			defer daemon.Close()
			_, _ = daemon.Read(make([]byte, 4096))
			_, _ = daemon.Write([]byte{21, 3, 3, 0, 2, 2, byte(alert)})
		}()
		overTCP := tls.Client(client, &tls.Config{ServerName: "x", MinVersion: tls.VersionTLS13}).HandshakeContext(t.Context())
		_ = client.Close()
		overQUIC := &quic.TransportError{Remote: true, ErrorCode: 0x100 + quic.TransportErrorCode(alert)}
		for _, err := range []error{overTCP, overQUIC} {
			refused := refusedTLS(fmt.Errorf("dial: %w", err))
			if (refused != nil) != judges || judges && (refused.Alert != alert || !errors.Is(refused, err)) {
				t.Errorf("alert %d, %v: %v", alert, err, refused)
			}
		}
		ours := &quic.TransportError{ErrorCode: 0x100 + quic.TransportErrorCode(alert)}
		another := &quic.TransportError{Remote: true, ErrorCode: 0x200 + quic.TransportErrorCode(alert)}
		if refusedTLS(ours) != nil || refusedTLS(another) != nil {
			t.Errorf("alert %d: what was no alert of the daemon's is taken for one", alert)
		}
	}
}

// TestRefusedOnReconnect: a producer whose certificate expires meanwhile ends with that at the next connection, after one try.
func TestRefusedOnReconnect(t *testing.T) {
	s := newSecured(t, nil)
	var dials atomic.Int32
	first := make(chan net.Conn, 1)
	cfg := Config{Table: "t", Spec: s.table.Spec(), TLS: s.files, Session: "s", ReconnectFrom: time.Microsecond, ReconnectTo: time.Microsecond}
	cfg.Dialer = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if dials.Add(1) == 1 {
			first <- conn
		}
		return conn, err
	}
	p, err := Dial(t.Context(), s.addr["tls"], cfg)
	noError(t, err)
	defer p.Abort()
	p.mu.Lock()
	p.target.cfg.Dialer = TLS{Authorities: s.files.Authorities, ServerName: s.files.ServerName}.dialer(cfg.Dialer) // as if the file had gone
	p.mu.Unlock()
	_ = (<-first).Close()
	<-p.ended
	refused := (*TLSRefusedError)(nil)
	if err := p.Push(t.Context(), s.sample(0)...); !errors.As(err, &refused) || dials.Load() != 2 {
		t.Errorf("after %d connections: %v", dials.Load(), err)
	}
}
