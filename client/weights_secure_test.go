//go:build linux

package client

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// serveSecureWeights is serveWeights over TLS or QUIC, with certificates of both sides, through the transports of a daemon.
func serveSecureWeights(t testing.TB, network string, server weights.ServerConfig, store weights.StoreConfig) *weightsDaemon {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	store.Table = "w"
	s, err := weights.NewStore(store)
	noError(t, err)
	server.Stores = map[string]*weights.Store{"w": s}
	d := &weightsDaemon{store: s}
	d.server, err = weights.NewServer(server)
	noError(t, err)
	certs, dir := ingesttest.NewCertificates(t), t.TempDir()
	d.tls.ServerName = "ingestd.test"
	d.tls.Authorities, _, err = certs.CA.Write(dir, "ca")
	noError(t, err)
	pair, err := certs.CA.NewClient("reader", time.Hour)
	noError(t, err)
	d.tls.Certificate, d.tls.Key, err = pair.Write(dir, "client")
	noError(t, err)

	ctx, stop := context.WithCancel(context.Background())
	streams := tcpingest.Config{Tables: ingesttest.Tables{}, Attach: func(conn net.Conn, hello *wire.Hello) error { return d.server.Serve(ctx, conn, hello) }}
	ended := make(chan error, 1)
	var shutdown func(context.Context) error
	if network == "tls" {
		overTCP, err := tcpingest.New(streams)
		noError(t, err)
		l, err := tcpingest.Listen(t.Context(), "tcp", "127.0.0.1:0")
		noError(t, err)
		d.addr, shutdown = "tls://"+l.Addr().String(), overTCP.Shutdown
		go func() { ended <- overTCP.Serve(context.Background(), tcpingest.NewTLSListener(l, certs.Server)) }()
	} else {
		overUDP, err := quicingest.New(quicingest.Config{Streams: streams, TLS: certs.Server})
		noError(t, err)
		socket, err := quicingest.Listen(t.Context(), "127.0.0.1:0", slog.New(slog.DiscardHandler))
		noError(t, err)
		d.addr, shutdown = "quic://"+socket.LocalAddr().String(), func(ctx context.Context) error { return errors.Join(overUDP.Shutdown(ctx), overUDP.Close()) }
		go func() { ended <- overUDP.Serve(context.Background(), socket) }()
	}
	t.Cleanup(func() {
		stop()
		if err := errors.Join(shutdown(context.Background()), <-ended, s.Close()); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, ignore)
	})
	return d
}

// TestLastAnswerArrives: a reader that takes one generation and leaves at once has been sent it, whatever the way, also if another one is on its way by then.
func TestLastAnswerArrives(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "tls", "quic"} {
		t.Run(network, func(t *testing.T) {
			d := serveWeights(t, network, weights.ServerConfig{}, weights.StoreConfig{})
			p := publisherOf(t, d, vectors(t, 3000))
			const readers = 20
			for n := range uint64(readers) {
				publishAll(t, p, all(n))
				s, err := Subscribe(patient(t), d.addr, SubscribeConfig{Table: "w", Stream: true, TLS: d.tls})
				noError(t, err)
				w := newer(t, s, n)
				wantWeights(t, w, all(n))
				w.Release()
				noError(t, s.Close())
			}
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for ctx := patient(t); len(d.server.Stats().Remote) > 0; { // the last one is leaving
				select {
				case <-tick.C:
				case <-ctx.Done():
					t.Fatalf("%+v", d.server.Stats())
				}
			}
			if st := d.server.Stats().Sent; st.Generations != readers || st.Broken != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestGivesUpWaiting: a publisher that waits for a place and gives up is told at once for whom it waited, whatever the way, and may begin again over the same connection.
func TestGivesUpWaiting(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "tls", "quic"} {
		t.Run(network, func(t *testing.T) {
			d := serveWeights(t, network, weights.ServerConfig{}, weights.StoreConfig{Generations: 2})
			p := publisherOf(t, d, vectors(t, 3000))
			publishAll(t, p, all(1))
			r, err := d.store.OpenReader(weights.Who{Client: "holder"})
			noError(t, err)
			defer r.Close()
			held, err := r.Wait(patient(t), 0)
			noError(t, err)
			publishAll(t, p, all(2))
			conn := p.sink.(*streamed).dialog.conn
			var pinned *PinnedError
			for wait := 100 * time.Millisecond; pinned == nil; wait *= 2 { // until the daemon had the time to say who pins
				ctx, cancel := context.WithCancel(t.Context())
				timer := time.AfterFunc(wait, cancel)
				_, err = p.Begin(ctx, 0)
				timer.Stop()
				cancel()
				if errors.As(err, &pinned); !errors.Is(err, context.Canceled) || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("%v", err)
				}
			}
			if len(pinned.Pins) != 1 || pinned.Pins[0].Who.Client != "holder" {
				t.Errorf("%v", err)
			}
			held.Release()
			publishAll(t, p, all(3))
			if p.sink.(*streamed).dialog.conn != conn {
				t.Error("it took another connection")
			}
		})
	}
}
