package client_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// breaking is a connection that ends after so many bytes were written.
type breaking struct {
	*net.TCPConn
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.left < len(p) {
		n, _ := b.TCPConn.Write(p[:b.left])
		b.left = 0
		_ = b.TCPConn.Close()
		return n, io.ErrClosedPipe
	}
	b.left -= len(p)
	return b.TCPConn.Write(p)
}

// TestCompressedProducer pushes to a real daemon's transport over connections that break: every sample comes once, in order.
func TestCompressedProducer(t *testing.T) {
	for _, kind := range []wire.Compression{wire.CompressionS2, wire.CompressionZstd, wire.CompressionS2Shuffle, wire.CompressionZstdShuffle} {
		for _, text := range []string{"n:U64,x:F32[50]", "n:U64[20000]"} {
			t.Run(string(kind)+"/"+text, func(t *testing.T) { compressedProducer(t, kind, text) })
		}
	}
}

func compressedProducer(t *testing.T, kind wire.Compression, text string) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	layout, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	pool := drainer.NewPool(1)
	poolCtx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = pool.Run(poolCtx) }()
	defer func() { stop(); <-ended }()
	const samples = 60
	table, err := engine.New(engine.Config{Name: "t", Spec: layout, BatchSize: 10, Batches: 2 * samples / 10, Drainers: pool})
	if err != nil {
		t.Fatal(err)
	}
	server, err := tcpingest.New(tcpingest.Config{Tables: ingesttest.Tables{"t": table}, Compression: []wire.Compression{kind}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := tcpingest.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), l) }()
	dials := 0
	p, err := client.Dial(ctx, "tcp://"+l.Addr().String(), client.Config{Table: "t", Spec: layout, Session: "s", Compression: kind,
		Dialer: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if dials++; dials > 3 {
				return c, nil
			}
			return &breaking{c.(*net.TCPConn), 900 + 400*dials}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	sample := make([]byte, layout.SampleBytes())
	for i := range samples {
		for k := range sample { // random, so that it stays large
			sample[k] = byte(r.Uint32())
		}
		sample[0] = byte(i)
		if _, err := p.PushMany(ctx, 1, sample); err != nil {
			t.Fatal(err)
		}
		if i == 0 { // arrives without more to come
			if err := p.Flush(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := p.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if n := p.Stats().Reconnects; n < 1 {
		t.Error("no connection broke")
	}
	if err := errors.Join(server.Shutdown(ctx), <-served); err != nil {
		t.Error(err)
	}
	trainer := table.NewTrainer()
	for n := 0; n < samples; {
		b, err := trainer.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		size := int(layout.Leaf(0).Bytes())
		for row := range b.Count {
			if got := b.Column(0)[row*size]; got != byte(n) {
				t.Fatalf("sample %d came when %d was due", got, n)
			}
			n++
		}
		trainer.Release(b)
	}
	trainer.Close()
	if err := table.Close(ctx); err != nil {
		t.Error(err)
	}
}
