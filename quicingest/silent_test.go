package quicingest

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/wire"
)

// faint is a socket of which only so many more datagrams arrive, and which hears nothing after that.
type faint struct {
	net.PacketConn
	left atomic.Int64
}

func newFaint(t *testing.T, datagrams int64) *faint {
	t.Helper()
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	f := &faint{PacketConn: socket}
	f.left.Store(datagrams)
	return f
}

func (f *faint) WriteTo(b []byte, to net.Addr) (int, error) {
	if f.left.Add(-1) < 0 {
		return len(b), nil
	}
	return f.PacketConn.WriteTo(b, to)
}

func (f *faint) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := f.PacketConn.ReadFrom(b)
		if err != nil || f.left.Load() > 0 {
			return n, from, err
		}
	}
}

// initials sends the first packets of so many clients, which then say nothing more, and hear nothing.
func (s *site) initials(t *testing.T, n int) {
	t.Helper()
	socket := newFaint(t, 0)
	tr := &quic.Transport{Conn: socket}
	defer tr.Close()
	for range n {
		socket.left.Store(1)
		ctx, cancel := context.WithCancel(t.Context())
		var dialing sync.WaitGroup
		dialing.Go(func() {
			if _, err := tr.Dial(ctx, s.addr, s.certs.Client, clientQUIC); err == nil {
				t.Error("a connection out of one packet")
			}
		})
		until(t, "a first packet", func() bool { return socket.left.Load() <= 0 })
		cancel()
		dialing.Wait()
	}
}

// retried dials as a good client does and returns whether it had to show its address first.
func (s *site) retried(t *testing.T) bool {
	t.Helper()
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	sniff := &sniffer{PacketConn: socket}
	tr := &quic.Transport{Conn: sniff}
	defer tr.Close()
	c, err := tr.Dial(t.Context(), s.addr, s.certs.Client, clientQUIC)
	if err != nil {
		t.Fatal(err)
	}
	st, _ := s.push(t, c)
	_ = st.Close()
	_ = c.CloseWithError(quicconn.CodeDone, "")
	return sniff.retries.Load() > 0
}

// TestRetryUnderLoad: as long as RetryAbove clients are half-way through their handshakes, others show their address first, and get in; those who say nothing more are
// ended and counted.
func TestRetryUnderLoad(t *testing.T) {
	const above = 5
	s := newSite(t, func(c *Config) { c.RetryAbove = above })
	if s.retried(t) {
		t.Error("retried with nobody half-way")
	}
	s.initials(t, above-1)
	until(t, "handshakes", func() bool { return s.connections().HalfOpen >= above-1 })
	if s.retried(t) {
		t.Errorf("retried with %d half-way, want %d", above-1, above)
	}
	s.initials(t, 1)
	until(t, "one more handshake", func() bool { return s.connections().HalfOpen >= above })
	if !s.retried(t) {
		t.Errorf("not retried with %d half-way", above)
	}
	s.await(t, string(wire.CodeHandshakeTimeout), above)
	if n := s.connections().HalfOpen; n != 0 {
		t.Errorf("%d half-way", n)
	}
	if s.retried(t) {
		t.Error("retried when all have ended")
	}
	s.finish(t)
}

// TestFloodOfInitials: first packets without end make no more than RetryAbove connections, and others are served meanwhile.
func TestFloodOfInitials(t *testing.T) {
	const above = 8
	s := newSite(t, func(c *Config) { c.RetryAbove = above })
	finish := s.honest(t)
	s.initials(t, 300)
	if n := s.connections().HalfOpen; n > above || n == 0 {
		t.Errorf("%d half-way, want 1 to %d", n, above)
	}
	st, accepted := s.push(t, s.dial(t))
	send(t, st, 100, -1, nil)
	_ = st.Close()
	finish()
	if taken := s.finish(t); taken[accepted.Stream] != 100 {
		t.Errorf("%d samples taken, want 100", taken[accepted.Stream])
	}
}

// TestClientVanishes: a client that is gone without a word frees its session and its place when it was silent for IdleTimeout.
func TestClientVanishes(t *testing.T) {
	s := newSite(t, func(c *Config) {
		c.IdleTimeout = 2 * time.Second
		c.MaxConnections = 1
	})
	socket := newFaint(t, 1<<40)
	tr := &quic.Transport{Conn: socket}
	defer tr.Close()
	c, err := tr.Dial(t.Context(), s.addr, s.certs.Client, &quic.Config{KeepAlivePeriod: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	st, accepted := s.push(t, c)
	send(t, st, 100, -1, nil)
	socket.left.Store(0)
	until(t, "the end of the stream and its connection", func() bool { return s.Stats().Ended[ingest.EndReset] > 0 && s.connections().Ended[ingest.EndReset] > 0 })
	if st := s.Stats(); st.Open != 0 {
		t.Errorf("%d streams are open", st.Open)
	}
	var next *quic.Conn
	until(t, "its place", func() bool { // which is free when its goroutine has ended
		next, err = quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC)
		return err == nil
	})
	again, _ := s.push(t, next)
	send(t, again, 10, -1, nil)
	_ = next.CloseWithError(quicconn.CodeDone, "")
	if taken := s.finish(t); taken[accepted.Stream] != 100 {
		t.Errorf("%d samples taken, want 100", taken[accepted.Stream])
	}
}

// TestClientsOfTheDaemonBefore: a daemon in the place of one that was killed tells clients with the first packet that their connections are gone.
func TestClientsOfTheDaemonBefore(t *testing.T) {
	key := [32]byte{1, 2, 3}
	certs := ingesttest.NewCertificates(t)
	both := func(c *Config) { c.ResetKey, c.TLS = &key, certs.Server }
	before, after := newSite(t, both), newSite(t, both)
	between := newRouter(t, before.addr)
	c, err := quic.DialAddr(t.Context(), between.addr().String(), certs.Client, clientQUIC)
	if err != nil {
		t.Fatal(err)
	}
	st, _ := before.push(t, c)
	send(t, st, 10, -1, nil)
	between.lead(after.addr)
	if _, err := st.Write(make([]byte, 80)); err != nil {
		t.Fatal(err)
	}
	<-c.Context().Done()
	var reset *quic.StatelessResetError
	if why := context.Cause(c.Context()); !errors.As(why, &reset) {
		t.Errorf("the client's connection ended with %v", why)
	}
	before.finish(t)
	after.finish(t)
}

// TestIdleConnection: an idle peer that answers stays, and is closed when nobody has used its connection for as long as a stream may be without a sample.
func TestIdleConnection(t *testing.T) {
	s := newSite(t, func(c *Config) {
		c.Streams.IdleTimeout, c.Streams.LingerTimeout = time.Second, time.Millisecond
	})
	c := s.dial(t)
	st, _ := s.push(t, c)
	send(t, st, 10, -1, nil)
	_ = st.Close()
	if code := closedWith(t, c); code != quicconn.CodeIdle {
		t.Errorf("closed with %d", code)
	}
	until(t, "the end to be counted", func() bool { return s.connections().Ended[string(wire.CodeIdleTimeout)] > 0 })
	if got := s.Stats().Refused; got[string(wire.CodeHandshakeTimeout)] != 0 {
		t.Errorf("refused: %v", got)
	}
	s.finish(t)
}

// TestRefusedWhileStopping: who comes when the daemon stops is told so, and is counted as that.
func TestRefusedWhileStopping(t *testing.T) {
	s := newSite(t, nil)
	if s.retried(t) { // it serves
		t.Error("retried")
	}
	s.mu.Lock()
	s.stopping = true // as Shutdown has it, before the listener is closed
	s.mu.Unlock()
	_, err := quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC)
	var refused *quic.TransportError
	if !errors.As(err, &refused) || refused.ErrorCode != quic.ConnectionRefused {
		t.Errorf("got %v, want CONNECTION_REFUSED", err)
	}
	s.await(t, string(wire.CodeShuttingDown), 1)
	s.finish(t)
}
