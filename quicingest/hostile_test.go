package quicingest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
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

// dial connects to a site as a good client does.
func (s *site) dial(t *testing.T) *quic.Conn {
	t.Helper()
	c, err := quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.CloseWithError(quicconn.CodeDone, "") })
	return c
}

// honest has samples acked on a connection of its own while others misbehave; the function returned waits until so many more have been since it was called, and ends it.
func (s *site) honest(t *testing.T) (finish func()) {
	t.Helper()
	st, _ := s.push(t, s.dial(t))
	var acked atomic.Int64
	var enough atomic.Bool
	var pushing sync.WaitGroup
	pushing.Go(func() {
		b, acks := make([]byte, 10*8), make([]byte, 10)
		for !enough.Load() {
			if _, err := st.Write(b); err != nil {
				t.Error(err)
				return
			}
			if _, err := io.ReadFull(st, acks); err != nil {
				t.Error(err)
				return
			}
			acked.Add(10)
		}
	})
	return func() {
		t.Helper()
		from := acked.Load()
		until(t, "acks of an honest client", func() bool { return acked.Load() >= from+100 || t.Failed() })
		enough.Store(true)
		pushing.Wait()
		_ = st.Close()
	}
}

// await waits until a reason was counted so often.
func (s *site) await(t *testing.T, reason string, n uint64) {
	t.Helper()
	until(t, reason, func() bool { return s.Stats().Refused[reason] >= n })
}

// TestBadTLS: whoever does not shake hands as it must is ended alone, and counted; the others go on.
func TestBadTLS(t *testing.T) {
	s, strangers := newSite(t, nil), ingesttest.NewCertificates(t)
	finish := s.honest(t)
	change := func(f func(*tls.Config)) *tls.Config {
		c := s.certs.Client.Clone()
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
			c.Certificates = []tls.Certificate{ingesttest.Certify(t)(s.certs.CA.NewClient("late", time.Nanosecond))}
		}), nil, ingest.RefusedCertificate},
		{"wrong protocol", change(func(c *tls.Config) { c.NextProtos = []string{"h3"} }), nil, ingest.RefusedTLS},
		{"no protocol", change(func(c *tls.Config) { c.NextProtos = nil }), nil, ingest.RefusedTLS},
		{"wrong CA", change(func(c *tls.Config) { c.RootCAs = strangers.Client.RootCAs }), &unknown, ingest.RefusedByPeer},
		{"wrong name", change(func(c *tls.Config) { c.ServerName = "other.test" }), &name, ingest.RefusedByPeer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := s.Stats().Refused[tc.reason]
			c, err := quic.DialAddr(t.Context(), s.addr.String(), tc.client, clientQUIC)
			if err == nil {
				_, _, err = s.tryPush(t.Context(), c)
				_ = c.CloseWithError(quicconn.CodeDone, "")
			}
			if refusal := (*wire.Refusal)(nil); err == nil || errors.As(err, &refusal) {
				t.Fatalf("was let in: %v", err)
			}
			if tc.target != nil && !errors.As(err, tc.target) {
				t.Errorf("got %v, want a %T", err, tc.target)
			}
			s.await(t, tc.reason, before+1)
		})
	}
	finish()
	s.finish(t)
}

// TestTenThousandStreams: a client that opens streams as fast as it may, and says nonsense on each but the first, is answered on each and never has more than its limit.
func TestTenThousandStreams(t *testing.T) {
	const streams, limit = 10_000, 16
	s := newSite(t, func(c *Config) { c.StreamsPerConnection = limit })
	finish := s.honest(t)
	c := s.dial(t)
	met, _ := s.push(t, c) // a stranger's connection would not last that long
	_ = met.Close()
	var refused atomic.Int64
	most := make([]int, limit) // seen open by each, since more than one may look at a time
	var wg sync.WaitGroup
	for i := range limit {
		wg.Go(func() {
			for range streams / limit {
				open, err := c.OpenStreamSync(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				st := quicconn.New(c, open)
				_ = st.SetDeadline(time.Now().Add(time.Minute))
				_, _ = io.WriteString(st, "GET / HTTP/1.1\r\n")
				_ = st.CloseWrite()
				var refusal *wire.Refusal
				if err := wire.ReadReply(st, &wire.AcceptedPush{}); !errors.As(err, &refusal) || refusal.Code != wire.CodeBadMagic {
					t.Errorf("got %v, want %s", err, wire.CodeBadMagic)
				}
				_, _ = io.Copy(io.Discard, st)
				_ = st.Close()
				refused.Add(1)
				most[i] = max(most[i], s.Stats().Open)
			}
		})
	}
	wg.Wait()
	if got := s.Stats().Refused[string(wire.CodeBadMagic)]; got != streams || refused.Load() != streams {
		t.Errorf("%d refused, %d counted, want %d", refused.Load(), got, streams)
	}
	if n := slices.Max(most); n > 2*limit+1 { // those that have just been answered are counted until their goroutine has ended
		t.Errorf("%d streams at once", n)
	}
	for range limit { // none of them was taken away for good
		st, _, err := s.tryPush(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
	}
	if _, err := c.OpenStream(); err == nil {
		t.Errorf("there are %d streams, and another was opened", limit)
	}
	finish()
	s.finish(t)
}

// initial is an Initial packet of version 1 (RFC 9000, 17.2.2) of 1,200 bytes, as far as its first bytes go.
func initial() []byte {
	b := make([]byte, 1200)
	copy(b, []byte{0xc0, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x44, 0x96})
	return b
}

// TestStrayDatagrams: what belongs to no connection and begins none is counted, each one.
func TestStrayDatagrams(t *testing.T) {
	s := newSite(t, nil)
	finish := s.honest(t)
	socket, err := net.DialUDP("udp", nil, s.addr.(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	change := func(at int, to ...byte) []byte {
		b := initial()
		copy(b[at:], to)
		return b
	}
	const n = 4 // no more than quic-go's shortest queue holds
	kinds := map[string][]byte{
		"text":                          []byte("GET / HTTP/1.1"),
		"first bits 00":                 {0x3f, 1, 2, 3},
		"one byte":                      {0x40},
		"of no connection":              append([]byte{0x40}, make([]byte, 100)...),
		"small Initial":                 initial()[:1199],
		"Initial with a short ID":       change(5, 7),
		"Initial that is not all there": change(16, 0x7f, 0xff),
		"0-RTT":                         change(0, 0xd0),
		"Handshake":                     change(0, 0xe0),
		"another version":               change(1, 1, 2, 3, 4),
		"another version, small":        change(1, 1, 2, 3, 4)[:1199],
		"version negotiation":           change(1, 0, 0, 0, 0),
	}
	for name, b := range kinds {
		t.Run(name, func(t *testing.T) {
			before := s.Stats().Refused[ingest.RefusedDatagram]
			for range n {
				if _, err := socket.Write(b); err != nil {
					t.Fatal(err)
				}
			}
			s.await(t, ingest.RefusedDatagram, before+n)
		})
	}
	if got := s.Stats().Refused[ingest.RefusedDatagram]; got != uint64(len(kinds)*n) {
		t.Errorf("%d datagrams counted, want %d", got, len(kinds)*n)
	}
	if st := s.connections(); st.HalfOpen != 0 || st.Open != 1 {
		t.Errorf("%+v", st)
	}
	finish()
	s.finish(t)
}

// TestRandomDatagrams: what is not QUIC, and what only looks like it, costs its reading.
func TestRandomDatagrams(t *testing.T) {
	s := newSite(t, nil)
	finish := s.honest(t)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	socket, err := net.DialUDP("udp", nil, s.addr.(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for i := range 5000 {
		b := make([]byte, 1+rng.IntN(1400))
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		if i%3 == 0 && len(b) > 5 { // an Initial packet, as far as its first bytes go
			copy(b, initial()[:5])
		}
		_, _ = socket.Write(b)
	}
	s.await(t, ingest.RefusedDatagram, 1)
	finish()
	if n := s.connections().HalfOpen; n > 5 {
		t.Errorf("seed %#x: %d handshakes are half open", seed, n)
	}
	s.finish(t)
}

// TestResets: a stream that either side resets loses the sample that was under way, and nothing else.
func TestResets(t *testing.T) {
	for name, reset := range map[string]func(*quicconn.Conn){
		"sending": func(c *quicconn.Conn) { c.CancelWrite(7) },
		"both": func(c *quicconn.Conn) {
			c.CancelRead(7)
			c.CancelWrite(7)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, nil)
			finish := s.honest(t)
			st, accepted := s.push(t, s.dial(t))
			if _, err := st.Write(make([]byte, 3*8+4)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(st, make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			reset(st)
			until(t, "the end of the stream", func() bool { return s.Stats().Ended[ingest.EndReset] > 0 })
			finish()
			if st := s.Stats(); st.CutShort != 1 {
				t.Errorf("%d samples cut short, want 1", st.CutShort)
			}
			if taken := s.finish(t); taken[accepted.Stream] != 3 {
				t.Errorf("%d samples taken, want 3", taken[accepted.Stream])
			}
		})
	}
	t.Run("acks on their way", func(t *testing.T) {
		s := newSite(t, nil)
		st, accepted := s.push(t, s.dial(t))
		if _, err := st.Write(make([]byte, 3*8+4)); err != nil {
			t.Fatal(err)
		}
		until(t, "three samples", func() bool { return s.Stats().Samples >= 3 })
		st.CancelWrite(7)
		if acks, err := io.ReadAll(st); err != nil || len(acks) != 3 {
			t.Errorf("got acks % x, %v, want 3 and the end", acks, err)
		}
		if taken := s.finish(t); taken[accepted.Stream] != 3 {
			t.Errorf("%d samples taken, want 3", taken[accepted.Stream])
		}
	})
	t.Run("acks are not wanted", func(t *testing.T) {
		s := newSite(t, nil)
		st, accepted := s.push(t, s.dial(t))
		st.CancelRead(7)
		if _, err := st.Write(make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
		for s.Stats().Ended[ingest.EndReset] == 0 {
			_, _ = st.Write(make([]byte, 8)) // the first acks may go before the daemon has heard of it
			runtime.Gosched()
		}
		if taken := s.finish(t); taken[accepted.Stream] == 0 {
			t.Error("what was sent before is lost")
		}
	})
}

// TestUnusedConnection: a connection on which no stream is opened is closed, and one that was used is not, as long as IdleTimeout.
func TestUnusedConnection(t *testing.T) {
	s := newSite(t, func(c *Config) { c.Streams.HandshakeTimeout = 500 * time.Millisecond })
	used := s.dial(t)
	st, _ := s.push(t, used)
	unused := s.dial(t)
	<-unused.Context().Done()
	var closed *quic.ApplicationError
	if err := context.Cause(unused.Context()); !errors.As(err, &closed) || closed.ErrorCode != quicconn.CodeIdle {
		t.Errorf("closed with %v", err)
	}
	_ = st.CloseWrite()
	if _, err := io.Copy(io.Discard, st); err != nil {
		t.Fatal(err)
	}
	if again, _, err := s.tryPush(t.Context(), used); err != nil {
		t.Errorf("a connection without a stream just now: %v", err)
	} else {
		_ = again.Close()
	}
	s.finish(t)
}

// TestTooManyConnections: those above the limit are refused before they cost a handshake, and counted; a place that comes free is taken.
func TestTooManyConnections(t *testing.T) {
	s := newSite(t, func(c *Config) { c.MaxConnections = 2 })
	first, second := s.dial(t), s.dial(t)
	_, err := quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC)
	var refused *quic.TransportError
	if !errors.As(err, &refused) || refused.ErrorCode != quic.ConnectionRefused {
		t.Fatalf("got %v, want CONNECTION_REFUSED", err)
	}
	if n := s.Stats().Refused[string(wire.CodeTooManyConnections)]; n == 0 {
		t.Error("not counted")
	}
	_ = first.CloseWithError(quicconn.CodeDone, "")
	for third := (*quic.Conn)(nil); third == nil; {
		third, _ = quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC)
		if third != nil {
			_ = third.CloseWithError(quicconn.CodeDone, "")
		}
	}
	st, _ := s.push(t, second)
	_ = st.Close()
	s.finish(t)
}

// sniffer counts Retry packets that a client gets.
type sniffer struct {
	net.PacketConn
	retries atomic.Int64
}

func (s *sniffer) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := s.PacketConn.ReadFrom(b)
	if n > 0 && b[0]&0xf0 == 0xf0 { // long header, type Retry of version 1
		s.retries.Add(1)
	}
	return n, from, err
}

// TestRetry: with a negative RetryAbove, all clients show that they are at their address, and then get in.
func TestRetry(t *testing.T) {
	s := newSite(t, func(c *Config) { c.RetryAbove = -1 })
	if !s.retried(t) {
		t.Error("no retry")
	}
	s.finish(t)
}

// TestNoEarlyData: a client that keeps what it could resume with gets nothing to resume, so that nothing can be replayed.
func TestNoEarlyData(t *testing.T) {
	s := newSite(t, nil)
	cfg := s.certs.Client.Clone()
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(10)
	for range 3 {
		c, err := quic.DialAddrEarly(t.Context(), s.addr.String(), cfg, clientQUIC)
		if err != nil {
			t.Fatal(err)
		}
		st, _ := s.push(t, c)
		_ = st.Close()
		if state := c.ConnectionState(); state.Used0RTT || state.TLS.DidResume {
			t.Errorf("0-RTT %v, resumed %v", state.Used0RTT, state.TLS.DidResume)
		}
		_ = c.CloseWithError(quicconn.CodeDone, "")
	}
	s.finish(t)
}

// TestManySegmentsPerSend: the kernel cuts what is sent (GSO), where it can.
func TestManySegmentsPerSend(t *testing.T) {
	s := newSite(t, nil)
	if c := s.dial(t); !c.ConnectionState().GSO {
		t.Error("GSO is off on a kernel that has it since 4.18")
	}
	s.finish(t)
}
