package lossynet

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/tcpingest"
)

// dial makes a client's connection to a daemon on the other side.
type dial = func(context.Context) (ingesttest.Conn, error)

// transports are what the suite runs with, each as it is used between machines.
var transports = map[string]func(t *testing.T, l *Link, cfg tcpingest.Config) (ingest.Transport, dial){
	"TCP": func(t *testing.T, l *Link, cfg tcpingest.Config) (ingest.Transport, dial) {
		s, address := serveTCP(t, l, cfg, nil)
		return s, func(ctx context.Context) (ingesttest.Conn, error) { return dialTCP(ctx, l, address) }
	},
	"TLS": func(t *testing.T, l *Link, cfg tcpingest.Config) (ingest.Transport, dial) {
		certs := ingesttest.NewCertificates(t)
		s, address := serveTCP(t, l, cfg, certs.Server)
		return s, func(ctx context.Context) (ingesttest.Conn, error) {
			c, err := dialTCP(ctx, l, address)
			if err != nil {
				return nil, err
			}
			secure := tls.Client(c, certs.Client)
			return secure, secure.HandshakeContext(ctx)
		}
	},
	"QUIC": serveQUIC,
}

// forEver is longer than whatever a busy machine needs: no test of these is about the limit.
const forEver = 2 * time.Minute

// orForEver is a limit of time that a test has asked for, or none.
func orForEver(asked time.Duration) time.Duration {
	if asked == 0 {
		return forEver
	}
	return asked
}

// dialTCP connects, on side A.
func dialTCP(ctx context.Context, l *Link, address string) (*net.TCPConn, error) {
	return In(l.A, func() (*net.TCPConn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	})
}

// served ends a server with the test.
func served(t *testing.T, s ingest.Transport, serve func() error) {
	ended := make(chan error, 1)
	go func() { ended <- serve() }()
	t.Cleanup(func() {
		_ = s.Shutdown(context.Background())
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// serveTCP serves on side B, with TLS where that is not nil.
func serveTCP(t *testing.T, l *Link, cfg tcpingest.Config, secure *tls.Config) (ingest.Transport, string) {
	t.Helper()
	s, err := tcpingest.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := In(l.B, func() (net.Listener, error) { return tcpingest.Listen(t.Context(), "tcp", l.B.HostPort(0)) })
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if secure != nil {
		listener = tcpingest.NewTLSListener(listener, secure)
	}
	served(t, s, func() error { return s.Serve(context.Background(), listener) })
	return s, address
}

// serveQUIC serves on side B. All clients have one socket on side A, and a connection each.
func serveQUIC(t *testing.T, l *Link, cfg tcpingest.Config) (ingest.Transport, dial) {
	t.Helper()
	certs := ingesttest.NewCertificates(t)
	s, err := quicingest.New(quicingest.Config{TLS: certs.Server, Streams: cfg, HandshakeTimeout: forEver, IdleTimeout: forEver})
	if err != nil {
		t.Fatal(err)
	}
	socket, err := In(l.B, func() (*net.UDPConn, error) {
		return quicingest.Listen(t.Context(), l.B.HostPort(0), slog.New(slog.DiscardHandler))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	served(t, s, func() error { return s.Serve(context.Background(), socket) })
	own, err := In(l.A, func() (*net.UDPConn, error) {
		return quicingest.Listen(t.Context(), l.A.HostPort(0), slog.New(slog.DiscardHandler))
	})
	if err != nil {
		t.Fatal(err)
	}
	clients := &quic.Transport{Conn: own}
	t.Cleanup(func() {
		if err := errors.Join(clients.Close(), own.Close()); err != nil {
			t.Error(err)
		}
	})
	return s, func(ctx context.Context) (ingesttest.Conn, error) {
		c, err := clients.Dial(ctx, socket.LocalAddr(), certs.Client, &quic.Config{
			HandshakeIdleTimeout: forEver, MaxIdleTimeout: forEver, KeepAlivePeriod: 5 * time.Second, MaxIncomingStreams: -1, MaxIncomingUniStreams: -1,
		})
		if err != nil {
			return nil, err
		}
		st, err := c.OpenStreamSync(ctx)
		return &owner{quicconn.New(c, st), c}, err
	}
}

// owner is a stream that has a connection of its own.
type owner struct {
	*quicconn.Conn
	of *quic.Conn
}

func (o *owner) Close() error { return o.of.CloseWithError(quicconn.CodeDone, "") }

// TestConformance: TCP, TLS and QUIC pass the suite over links that lose, delay and reorder packets.
func TestConformance(t *testing.T) {
	var all sync.WaitGroup
	for _, tc := range []struct {
		name       string
		conditions Conditions
		network    ingesttest.Network
	}{
		{"1 % loss", Conditions{Loss: 0.01}, ingesttest.Network{Lossy: true}},
		{"reordering", Conditions{Late: 0.1, LateBy: 5 * time.Millisecond}, ingesttest.Network{}},
		{"50 ms, loss and reordering", Conditions{Delay: 50 * time.Millisecond, Loss: 0.01, Late: 0.1, LateBy: 10 * time.Millisecond}, ingesttest.Network{Slow: true, Lossy: true}},
	} {
		for name, transport := range transports {
			all.Go(func() {
				t.Run(name+" over "+tc.name, func(t *testing.T) { over(t, tc.conditions, tc.network, transport) })
			})
		}
	}
	all.Wait()
}

// over runs the suite over a link of the test's own, which must have done what it is for.
func over(t *testing.T, c Conditions, n ingesttest.Network, transport func(*testing.T, *Link, tcpingest.Config) (ingest.Transport, dial)) {
	l, err := Start(c)
	if errors.Is(err, ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	ingesttest.RunOver(t, func(t *testing.T, tables ingest.Tables, limits ingesttest.Limits) (ingest.Transport, func(context.Context) (ingesttest.Conn, error)) {
		return transport(t, l, tcpingest.Config{
			Tables: tables, MaxConnections: limits.MaxConnections,
			HandshakeTimeout: orForEver(limits.HandshakeTimeout), IdleTimeout: orForEver(limits.IdleTimeout),
			StallTimeout: orForEver(limits.StallTimeout), AckTimeout: orForEver(limits.AckTimeout),
			LingerTimeout: 3 * time.Second, // of clients that do not read, there are some
		})
	}, n)
	ab, ba, err := l.Stats()
	if err := errors.Join(err, l.Close()); err != nil {
		t.Fatal(err)
	}
	t.Logf("from clients %+v, from the daemon %+v", ab, ba)
	for _, st := range []Stats{ab, ba} {
		if (st.Lost > 0) != (c.Loss > 0) || (st.Overtaken > 0) != (c.Late > 0) || st.Dropped > 0 {
			t.Errorf("a link with %+v did %+v and %+v", c, ab, ba)
		}
	}
}
