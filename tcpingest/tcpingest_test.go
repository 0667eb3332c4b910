package tcpingest

import (
	"context"
	"crypto/tls"
	"net"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startOn returns a Start for listeners of one network. Where TLS is not nil, listener and client speak it.
func startOn(network string, secure *ingesttest.Certificates) ingesttest.Start {
	return func(t *testing.T, tables ingest.Tables, limits ingesttest.Limits) (ingest.Transport, func(context.Context) (ingesttest.Conn, error)) {
		t.Helper()
		s, l := serveOn(t, network, Config{
			Tables:           tables,
			MaxConnections:   limits.MaxConnections,
			HandshakeTimeout: limits.HandshakeTimeout,
			IdleTimeout:      limits.IdleTimeout,
			StallTimeout:     limits.StallTimeout,
			AckTimeout:       limits.AckTimeout,
			Compression:      everyCompression,
		}, secure)
		return s, func(ctx context.Context) (ingesttest.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, network, l.Addr().String())
			if err != nil {
				return nil, err
			}
			if secure != nil {
				client := tls.Client(c, secure.Client)
				return client, client.HandshakeContext(ctx)
			}
			return c.(ingesttest.Conn), nil
		}
	}
}

// serveOn starts a server with one listener, until the test ends.
func serveOn(t *testing.T, network string, cfg Config, secure *ingesttest.Certificates) (*Server, net.Listener) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	if secure != nil {
		l = NewTLSListener(l, secure.Server)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		_ = s.Shutdown(context.Background())
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, l
}

func TestConformanceTCP(t *testing.T)  { ingesttest.Run(t, startOn("tcp", nil)) }
func TestConformanceUnix(t *testing.T) { ingesttest.Run(t, startOn("unix", nil)) }
func TestConformanceTLS(t *testing.T) {
	ingesttest.Run(t, startOn("tcp", ingesttest.NewCertificates(t)))
}
