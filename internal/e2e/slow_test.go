//go:build linux && !race

package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/wire"
)

// slow is what a peer that never comes to the end of something has to work with.
type slow struct {
	*server
	tls   *tls.Config
	hello []byte // with a token
}

// dial opens a connection to an address of the daemon; over TLS it does not shake hands yet.
func (s *slow) dial(address string) *producer {
	s.t.Helper()
	network, at := "tcp", address[strings.Index(address, "://")+len("://"):]
	if strings.HasPrefix(address, "unix://") {
		network = "unix"
	}
	c, err := new(net.Dialer).DialContext(s.t.Context(), network, at)
	check(s.t, err)
	s.t.Cleanup(func() { _ = c.Close() })
	p := &producer{Conn: c, t: s.t}
	check(s.t, p.SetDeadline(time.Now().Add(patience)))
	return p
}

// secure opens a connection of TLS.
func (s *slow) secure() *producer {
	s.t.Helper()
	p := s.dial(s.TLS)
	c := tls.Client(p.Conn, s.tls)
	check(s.t, c.HandshakeContext(s.t.Context()))
	return &producer{Conn: c, t: s.t}
}

// stream opens a connection of QUIC and a stream of it.
func (s *slow) stream() *producer {
	s.t.Helper()
	c, err := quic.DialAddr(s.t.Context(), strings.TrimPrefix(s.QUIC, "quic://"), s.tls, nil)
	check(s.t, err)
	s.t.Cleanup(func() { _ = c.CloseWithError(quicconn.CodeDone, "") })
	st, err := c.OpenStreamSync(s.t.Context())
	check(s.t, err)
	p := &producer{Conn: quicconn.New(c, st), t: s.t}
	check(s.t, p.SetDeadline(time.Now().Add(patience)))
	return p
}

// challenged is a connection that owes the proof of its token.
func (s *slow) challenged() *producer {
	s.t.Helper()
	p := s.dial(s.TCP)
	p.write(s.hello)
	var challenge *wire.Challenge
	if err := wire.ReadReply(p, &p.accepted); !errors.As(err, &challenge) {
		s.t.Fatalf("got %v, want a challenge", err)
	}
	return p
}

// TestSlowloris: at every stage a peer that stands still, or says a byte now and then, is ended when that stage's time is over, is counted by reason, and fails where it is a stranger; it
// disturbs nobody meanwhile.
func TestSlowloris(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	certs := filepath.Join(k.dir, "certs")
	certify(t, certs)
	authority, err := os.ReadFile(filepath.Join(certs, "ca.pem"))
	check(t, err)
	d := serve(t, []table{small}, "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0", "--tokens", k.path(), "--bans-loopback", "--bans-kernel=false",
		"--tls-cert", filepath.Join(certs, "server.pem"), "--tls-key", filepath.Join(certs, "server.key"), "--handshake-timeout", "2s", "--stall-timeout", "1s")
	d.push(small.name, endless, 1000, "--token-file", k.file("worker"))
	d.pull(small.name)
	d.moves(small.name, 1)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	hello := d.hello(small)
	hello.SetToken(k.tokens["worker"])
	hello.Nonce = wire.NewNonce()
	text, err := wire.AppendHello(nil, hello)
	check(t, err)
	large := append(bytes.Clone(text[:12]), 0, 0, 32, 0) // a body of 2 MiB
	const late, stalled = string(wire.CodeHandshakeTimeout), string(wire.CodeStalled)
	refused := func(s *status) uint64 { return s.Producers.Refused[late] }
	for _, tc := range []struct {
		name     string
		begin    func(s *slow) *producer
		dribbles []byte // after that; nil: it stands still
		counted  func(s *status) uint64
		stranger bool
	}{
		{"tcp: silence", func(s *slow) *producer { return s.dial(s.TCP) }, nil, refused, true},
		{"tcp: a hello", func(s *slow) *producer { return s.dial(s.TCP) }, text, refused, true},
		{"tcp: a large hello", func(s *slow) *producer { return s.dial(s.TCP) }, large, refused, true},
		{"tcp: a proof", func(s *slow) *producer { return s.challenged() }, wire.AppendProof(nil, wire.Proof{}), refused, true},
		{"tcp: no proof", func(s *slow) *producer { return s.challenged() }, nil, refused, true},
		{"unix: silence", func(s *slow) *producer { return s.dial(s.Unix) }, nil, refused, false},
		{"tls: silence", func(s *slow) *producer { return s.dial(s.TLS) }, nil, refused, true},
		{"tls: a client hello", func(s *slow) *producer { return s.dial(s.TLS) }, []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), refused, true},
		{"tls: nothing after the handshake", func(s *slow) *producer { return s.secure() }, nil, refused, true},
		{"tls: a hello", func(s *slow) *producer { return s.secure() }, text, refused, true},
		{"quic: a hello", func(s *slow) *producer { return s.stream() }, text, refused, true},
		{"half a sample", func(s *slow) *producer {
			p := s.dial(s.Unix) // where its user needs no token
			p.layout = small.layout(s.t)
			check(s.t, wire.WriteHello(p, s.server.hello(small)))
			check(s.t, wire.ReadReply(p, &p.accepted))
			p.write(p.samples(1)[:50])
			return p
		}, nil, func(s *status) uint64 { return s.Producers.Ended[stalled] }, false},
		{"admin: a header", func(s *slow) *producer { return s.dial(s.Admin) }, []byte("GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n"), func(s *status) uint64 {
			return s.Access.Admin.Refused[late]
		}, false},
		{"admin: silence", func(s *slow) *producer { return s.dial(s.Admin) }, nil, func(s *status) uint64 { return s.Access.Admin.Refused[late] }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := d.in(t)
			before := d.status()
			s := &slow{d, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", NextProtos: []string{wire.ALPN}, MinVersion: tls.VersionTLS13}, text}
			c := tc.begin(s)
			if tc.dribbles != nil {
				c.dribble(tc.dribbles...)
			}
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("it is not ended")
			}
			_ = c.Close()
			d.await("it is counted", func(s *status) bool { return tc.counted(s) > tc.counted(before) })
			d.await("its place is free", func(s *status) bool { return s.Access.HalfOpen.Open == 0 && s.Producers.Open == 1 })
			if failed := d.status().Access.Bans.Failures > before.Access.Bans.Failures; failed != tc.stranger {
				t.Errorf("a failure of its address: %v", failed)
			}
			d.moves(small.name, 1)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, d.Admin+"/bans?all=true", nil)
			check(t, err)
			answer, err := d.http.Do(req)
			check(t, err)
			check(t, answer.Body.Close())
		})
	}
}
