package tcpingest

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startOn returns a Start for listeners of one network.
func startOn(network string) ingesttest.Start {
	return func(t *testing.T, tables ingest.Tables, limits ingesttest.Limits) (ingest.Transport, func(context.Context) (ingesttest.Conn, error)) {
		t.Helper()
		s, err := New(Config{
			Tables:           tables,
			MaxConnections:   limits.MaxConnections,
			HandshakeTimeout: limits.HandshakeTimeout,
			IdleTimeout:      limits.IdleTimeout,
			StallTimeout:     limits.StallTimeout,
			AckTimeout:       limits.AckTimeout,
		})
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
		served := make(chan error, 1)
		go func() { served <- s.Serve(context.Background(), l) }()
		t.Cleanup(func() {
			_ = s.Shutdown(context.Background())
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
		return s, func(ctx context.Context) (ingesttest.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, network, l.Addr().String())
			if err != nil {
				return nil, err
			}
			return c.(ingesttest.Conn), nil
		}
	}
}

func TestConformanceTCP(t *testing.T)  { ingesttest.Run(t, startOn("tcp")) }
func TestConformanceUnix(t *testing.T) { ingesttest.Run(t, startOn("unix")) }
