//go:build linux && !race

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/wire"
)

// another is an address of this machine that only strangers have.
var another = net.IPv4(127, 0, 0, 2)

// TestKernelBans: the kernel drops what a banned address sends to connect over TCP, TLS and QUIC, and counts it; who was connected and who comes from elsewhere is not
// disturbed; when the ban is cleared, the same attempts to connect succeed.
func TestKernelBans(t *testing.T) {
	t.Parallel()
	certs := filepath.Join(t.TempDir(), "certs")
	certify(t, certs)
	d := serve(t, []table{small}, "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0", "--bans-loopback",
		"--tls-cert", filepath.Join(certs, "server.pem"), "--tls-key", filepath.Join(certs, "server.key"))
	secure := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "127.0.0.1", NextProtos: []string{wire.ALPN}}
	text, err := os.ReadFile(filepath.Join(certs, "ca.pem"))
	check(t, err)
	secure.RootCAs.AppendCertsFromPEM(text)
	d.pull(small.name)
	beside := d.push(small.name, endless, 1000)

	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: another}, Timeout: patience}
	dial := func(address string) (*producer, error) {
		_, hostPort, _ := strings.Cut(address, "://")
		c, err := from.DialContext(t.Context(), "tcp", hostPort)
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return &producer{Conn: c, t: t, layout: small.layout(t)}, err
	}
	var early []*producer // all of them are there before the first fails, so that none has to wait
	for range bans.FailuresMax + 1 {
		c, err := dial(d.TCP)
		check(t, err)
		early = append(early, c)
	}
	moving, err := dialQUIC(t, d.QUIC, secure)
	check(t, err)
	stream, err := moving.OpenStreamSync(t.Context())
	check(t, err)
	connected := []*producer{early[0], {Conn: quicconn.New(moving, stream), t: t, layout: small.layout(t)}}
	for _, c := range connected {
		check(t, c.SetDeadline(time.Now().Add(patience)))
		check(t, wire.Greet(c, c, d.hello(small), nil, &c.accepted))
	}
	for _, c := range early[1:] {
		c.write([]byte("this is no hello"))
	}
	d.await("the kernel knows of the ban", func(s *status) bool { return s.Access.Bans.Kernel != nil && s.Access.Bans.Kernel.Addresses == 1 })

	came := map[string]chan error{"tcp": make(chan error, 1), "tls": make(chan error, 1), "quic": make(chan error, 1)}
	for scheme, address := range map[string]string{"tcp": d.TCP, "tls": d.TLS} {
		go func() {
			_, err := dial(address)
			came[scheme] <- err
		}()
	}
	go func() {
		_, err := dialQUIC(t, d.QUIC, secure)
		came["quic"] <- err
	}()
	d.await("packets are dropped", func(s *status) bool {
		return s.Access.Bans.Kernel.DroppedTCP >= 2 && s.Access.Bans.Kernel.DroppedQUIC >= 1
	})
	d.push(small.name, 3, 0).ends(exitOK) // of who is not banned
	for _, c := range connected {
		c.write(c.samples(2))
		if _, err := io.ReadFull(c, make([]byte, 2)); err != nil { // its acks
			t.Errorf("who was connected before, from %v: %v", c.LocalAddr(), err)
		}
	}
	d.moves(small.name, 1)
	if !beside.running() {
		t.Error("the producer that was there is gone")
	}
	for scheme, result := range came {
		select {
		case err := <-result:
			t.Errorf("%s: who is banned hears of it: %v", scheme, err)
		default:
		}
	}
	seen := start(t, "status", "--addr", d.Admin)
	seen.ends(exitOK)
	says(t, seen.out.String(), "1 of them banned", "the kernel turns 1 of those away")
	if n := d.metric(`ingestd_kernel_dropped_total{transport="tcp"}`); n < 2 {
		t.Errorf("%v dropped", n)
	}

	p := start(t, "bans", "clear", "127.0.0.2", "--json", "--addr", d.Admin)
	p.ends(exitOK)
	if n := result[daemon.BansCleared](p).Cleared; n != 1 {
		t.Errorf("%d cleared", n)
	}
	for scheme, result := range came {
		if err := <-result; err != nil {
			t.Errorf("%s, after the ban: %v", scheme, err)
		}
	}
	d.await("the kernel drops nothing", func(s *status) bool { return s.Access.Bans.Kernel.Addresses == 0 })
}

// TestKernelBansAdmin: an admin endpoint that others reach is a listener like the others.
func TestKernelBansAdmin(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("boss", "admin", "*")
	d := serve(t, []table{small}, "--admin", "0.0.0.0:0", "--tokens", k.path(), "--bans-loopback")
	_, port, err := net.SplitHostPort(strings.TrimPrefix(d.Admin, "http://"))
	check(t, err)
	ask := func(args ...string) *process {
		p := start(t, append(args, "--json", "--addr", "127.0.0.1:"+port, "--token-file", k.file("boss"))...)
		p.ends(exitOK)
		return p
	}
	kernel := func() *daemon.KernelStatus { return result[daemon.Status](ask("status")).Access.Bans.Kernel }
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: another}, Timeout: patience}
	var strangers []net.Conn
	for range bans.FailuresMax {
		c, err := from.DialContext(t.Context(), "tcp", strings.TrimPrefix(d.TCP, "tcp://"))
		check(t, err)
		defer c.Close()
		strangers = append(strangers, c)
	}
	for _, c := range strangers {
		_, err := c.Write([]byte("this is no hello"))
		check(t, err)
	}
	eventually(t, "the kernel knows of the ban", func() bool { return kernel().Addresses == 1 })
	came := make(chan error, 1)
	go func() {
		c, err := from.DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		if err == nil {
			err = c.Close()
		}
		came <- err
	}()
	eventually(t, "a SYN is dropped", func() bool { return kernel().DroppedTCP >= 1 })
	ask("bans", "clear", "--all")
	check(t, <-came)
}

// dialQUIC makes a connection from the other address.
func dialQUIC(t *testing.T, to string, secure *tls.Config) (*quic.Conn, error) {
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: another})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = socket.Close() })
	addr, err := net.ResolveUDPAddr("udp", strings.TrimPrefix(to, "quic://"))
	if err != nil {
		return nil, err
	}
	tr := &quic.Transport{Conn: socket}
	t.Cleanup(func() { _ = tr.Close() })
	return tr.Dial(t.Context(), addr, secure, &quic.Config{HandshakeIdleTimeout: patience})
}
