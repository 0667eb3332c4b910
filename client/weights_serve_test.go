//go:build linux

package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// weightsDaemon serves one table of weights, "w", over one listener.
type weightsDaemon struct {
	store  *weights.Store
	server *weights.Server
	addr   string
	tls    TLS // what a client of tls:// and quic:// has
}

// serveWeights runs a daemon until the end of the test, which fails if anything of it is left over.
func serveWeights(t testing.TB, network string, server weights.ServerConfig, store weights.StoreConfig) *weightsDaemon {
	t.Helper()
	if network == "tls" || network == "quic" {
		return serveSecureWeights(t, network, server, store)
	}
	ignore := goleak.IgnoreCurrent()
	store.Table = "w"
	s, err := weights.NewStore(store)
	if err != nil {
		t.Fatal(err)
	}
	server.Stores = map[string]*weights.Store{"w": s}
	d := &weightsDaemon{store: s}
	if d.server, err = weights.NewServer(server); err != nil {
		t.Fatal(err)
	}
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	d.addr = "tcp://" + l.Addr().String()
	if network == "unix" {
		d.addr = "unix://" + address
	}
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				hello, err := wire.ReadHello(conn)
				if err != nil {
					conn.Close()
					return
				}
				_ = d.server.Serve(ctx, conn, hello) // what the client hears is looked at
			})
		}
	})
	t.Cleanup(func() {
		stop()
		l.Close()
		serving.Wait()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, ignore)
	})
	return d
}

// vectors makes a manifest of U8 vectors of these lengths.
func vectors(t testing.TB, sizes ...int64) *tensor.Manifest {
	t.Helper()
	tensors := make([]tensor.Tensor, len(sizes))
	for i, n := range sizes {
		tensors[i] = tensor.Tensor{Name: fmt.Sprintf("layers.%d.w", i), DType: spec.U8, Shape: []int64{n}}
	}
	m, err := tensor.NewManifest(tensors, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// tensorContent is what tensor i holds in a version of the weights: every 8 bytes say where they belong.
func tensorContent(version uint64, i int, n int64) []byte {
	b := make([]byte, (n+7)/8*8)
	seed := version*0x9e3779b97f4a7c15 ^ uint64(i)<<40
	for at := 0; at < len(b); at += 8 {
		x := (seed + uint64(at)) * 0xbf58476d1ce4e5b9
		binary.LittleEndian.PutUint64(b[at:], x^x>>31)
	}
	return b[:n]
}

// versions says which version of each tensor a generation has.
type versions func(i int) uint64

func all(version uint64) versions { return func(int) uint64 { return version } }

func (v versions) data(m *tensor.Manifest) func(i int) []byte {
	return func(i int) []byte { return tensorContent(v(i), i, m.EncodedBytes(i)) }
}

// wantWeights fails the test unless w has these versions of its tensors and verifies.
func wantWeights(t testing.TB, w *Weights, v versions) {
	t.Helper()
	m := w.Manifest()
	for i := range m.Len() {
		if string(w.At(i)) != string(tensorContent(v(i), i, m.EncodedBytes(i))) {
			t.Fatalf("generation %d: tensor %d is not version %d", w.Generation(), i, v(i))
		}
	}
	if err := w.Verify(); err != nil {
		t.Fatal(err)
	}
}

func patient(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // far above what anything here takes
	t.Cleanup(cancel)
	return ctx
}

func publisherOf(t testing.TB, d *weightsDaemon, m *tensor.Manifest) *Publisher {
	t.Helper()
	p, err := OpenPublisher(patient(t), d.addr, PublisherConfig{Table: "w", Manifest: m, Stream: true, TLS: d.tls})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return p
}

func publishAll(t testing.TB, p *Publisher, v versions) Published {
	t.Helper()
	done, err := p.Publish(patient(t), v.data(p.Manifest()))
	if err != nil {
		t.Fatal(err)
	}
	return done
}

func subscribed(t testing.TB, addr string, cfg SubscribeConfig) *Subscription {
	t.Helper()
	cfg.Table, cfg.Stream = "w", true
	s, err := Subscribe(patient(t), addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newer(t testing.TB, s *Subscription, than uint64) *Weights {
	t.Helper()
	w, err := s.Wait(patient(t), than)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func remoteStats(t testing.TB, s *Subscription) RemoteStats {
	t.Helper()
	st, ok := s.RemoteStats()
	if !ok {
		t.Fatal("the subscription maps memory")
	}
	return st
}
