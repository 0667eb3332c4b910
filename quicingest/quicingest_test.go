package quicingest

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// until waits until something is so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	for !so() {
		select {
		case <-late:
			t.Fatalf("waited in vain for %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

// serve starts a server with one socket, until the test ends.
func serve(t *testing.T, cfg Config) (*Server, net.Addr) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	socket, err := Listen(t.Context(), "127.0.0.1:0", s.cfg.Streams.Log)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), socket) }()
	stop := sync.OnceFunc(func() {
		_ = s.Shutdown(context.Background())
		_ = s.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return s, socket.LocalAddr()
}

// owner is a stream that has a connection of its own.
type owner struct {
	*quicconn.Conn
	of *quic.Conn
}

func (o *owner) Close() error { return o.of.CloseWithError(quicconn.CodeDone, "") }

var clientQUIC = &quic.Config{KeepAlivePeriod: 5 * time.Second, MaxIncomingStreams: -1, MaxIncomingUniStreams: -1}

// start returns a Start: shared is one connection for all streams.
func start(shared bool) ingesttest.Start {
	return func(t *testing.T, tables ingest.Tables, limits ingesttest.Limits) (ingest.Transport, func(context.Context) (ingesttest.Conn, error)) {
		t.Helper()
		certs := ingesttest.NewCertificates(t)
		s, addr := serve(t, Config{TLS: certs.Server, Streams: tcpingest.Config{
			Tables:           tables,
			MaxConnections:   limits.MaxConnections,
			HandshakeTimeout: limits.HandshakeTimeout,
			IdleTimeout:      limits.IdleTimeout,
			StallTimeout:     limits.StallTimeout,
			AckTimeout:       limits.AckTimeout,
		}})
		dial := func(ctx context.Context) (*quic.Conn, error) {
			return quic.DialAddr(ctx, addr.String(), certs.Client, clientQUIC)
		}
		if !shared {
			return s, func(ctx context.Context) (ingesttest.Conn, error) {
				c, err := dial(ctx)
				if err != nil {
					return nil, err
				}
				st, err := c.OpenStreamSync(ctx)
				return &owner{quicconn.New(c, st), c}, err
			}
		}
		var one *quic.Conn
		t.Cleanup(func() {
			if one != nil {
				_ = one.CloseWithError(quicconn.CodeDone, "")
			}
		})
		return s, func(ctx context.Context) (ingesttest.Conn, error) {
			if one == nil || one.Context().Err() != nil { // the daemon closes it when it was idle
				c, err := dial(ctx)
				if err != nil {
					return nil, err
				}
				one = c
			}
			st, err := one.OpenStreamSync(ctx)
			return quicconn.New(one, st), err
		}
	}
}

func TestConformance(t *testing.T)              { ingesttest.Run(t, start(false)) }
func TestConformanceOneConnection(t *testing.T) { ingesttest.Run(t, start(true)) }
