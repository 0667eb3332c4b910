package tcpingest

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
)

// TestEchoProtocol speaks echo 0.1 as its own workers do: read the arrays, send samples with 32 in flight, read one byte for each.
func TestEchoProtocol(t *testing.T) {
	s, err := spec.ParseText("obs:U8[84,84],action:I32,reward:F32,pair:F64[2,1]")
	if err != nil {
		t.Fatal(err)
	}
	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	defer running.Wait()
	defer stop()
	table, err := engine.New(engine.Config{Name: "replay", Spec: s, BatchSize: 10, Batches: 4, Drainers: pool})
	if err != nil {
		t.Fatal(err)
	}
	server, err := New(Config{Tables: ingesttest.Tables{"replay": table}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	running.Go(func() {
		if err := server.ServeEcho(context.Background(), l, table); err != nil {
			t.Error(err)
		}
	})
	trainer := table.NewTrainer()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))

	// ECHO, version 1, 4 arrays: (1 byte, 84x84), (4 bytes, scalar), (4 bytes, scalar), (8 bytes, 2x1).
	want, _ := hex.DecodeString("4543484f" + "01" + "04000000" +
		"01000000" + "02000000" + "54000000" + "54000000" +
		"04000000" + "00000000" +
		"04000000" + "00000000" +
		"08000000" + "02000000" + "02000000" + "01000000")
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the server said %x (%v), want %x", got, err, want)
	}

	const samples, inFlight = 200, 32
	size := int(s.SampleBytes())
	sample := func(n int) []byte {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(n*31 + i)
		}
		return b
	}
	acked := 0
	ack := make([]byte, inFlight)
	for n := range samples {
		if n-acked == inFlight {
			k, err := c.Read(ack)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(ack[:k], bytes.Repeat([]byte{1}, k)) {
				t.Fatalf("acks % x", ack[:k])
			}
			acked += k
		}
		if _, err := c.Write(sample(n)); err != nil {
			t.Fatal(err)
		}
		if n%10 == 9 {
			b, err := trainer.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for row := range b.Count {
				whole := sample(n - 9 + row)
				for leaf := range s.NumLeaves() {
					at, bytesOf := s.Offset(leaf), s.Leaf(leaf).Bytes()
					if !bytes.Equal(b.Column(leaf)[int64(row)*bytesOf:int64(row+1)*bytesOf], whole[at:at+bytesOf]) {
						t.Fatalf("sample %d leaf %d is wrong", n-9+row, leaf)
					}
				}
			}
			trainer.Release(b)
		}
	}
	_ = c.(*net.TCPConn).CloseWrite()
	rest, err := io.ReadAll(c)
	if err != nil || len(rest)+acked != samples {
		t.Fatalf("%d acks in all, error %v, want %d", len(rest)+acked, err, samples)
	}
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := table.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestEchoRefusesShapesItCannotSay(t *testing.T) {
	s, err := spec.ParseText("a:U8[4294967296]")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := echoHello(s); err == nil {
		t.Fatal("a dimension above 32 bits was accepted")
	}
}

func TestConfig(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no tables, no error")
	}
	for name, change := range map[string]func(*Config){
		"negative timeout":     func(c *Config) { c.StallTimeout = -1 },
		"negative window":      func(c *Config) { c.WindowBytes = -1 },
		"negative connections": func(c *Config) { c.MaxConnections = -1 },
	} {
		c := Config{Tables: ingesttest.Tables{}}
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
