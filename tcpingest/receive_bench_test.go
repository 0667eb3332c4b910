package tcpingest

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// receiving is one connection over loopback with a sender that floods it, one session driven by hand and one trainer.
type receiving struct {
	session *session
	close   func()
}

func equalLeaves(n, bytes int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, ",l%d:U8[%d]", i, bytes)
	}
	return b.String()[1:]
}

func startReceiving(t testing.TB, text string, change func(*plan)) *receiving {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	s, err := spec.ParseText(text)
	must(err)
	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	table, err := engine.New(engine.Config{Name: "t", Spec: s, BatchSize: int(max(2, (2<<20)/s.SampleBytes())), Batches: 8, Drainers: pool})
	must(err)
	running.Go(func() {
		trainer := table.NewTrainer()
		for {
			b, err := trainer.Next(context.Background())
			if err != nil {
				return
			}
			trainer.Release(b)
		}
	})
	server, err := New(Config{Tables: ingesttest.Tables{"t": table}})
	must(err)
	l, err := Listen(ctx, "tcp", "127.0.0.1:0")
	must(err)
	theirs, err := net.Dial("tcp", l.Addr().String())
	must(err)
	ours, err := l.Accept()
	must(err)
	must(l.Close())
	running.Go(func() {
		// Whole samples, about 256 KiB at a time.
		buf := make([]byte, max(1, readBytes/s.SampleBytes())*s.SampleBytes())
		for err := error(nil); err == nil; {
			_, err = theirs.Write(buf)
		}
	})
	running.Go(func() { _, _ = io.Copy(io.Discard, onlyReader{theirs}) })
	c, err := newConn(server, ours.(*net.TCPConn), 1)
	must(err)
	_, stream, accepted, refusal := ingest.OpenPush(ctx, server.cfg.Tables, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: s, Ack: wire.AckQueued}, server.window(), c.giveUp)
	if refusal != nil {
		t.Fatal(refusal)
	}
	p := newPlan(s)
	if change != nil {
		change(p)
	}
	return &receiving{session: newSession(c, stream, p, accepted), close: func() {
		_ = ours.Close()
		_ = theirs.Close()
		stream.Close()
		<-stream.Done()
		if err := table.Close(context.Background()); err != nil {
			t.Error(err)
		}
		stop()
		running.Wait()
	}}
}

// receive takes n samples or a few more.
func (r *receiving) receive(n uint64) error {
	for until := r.session.samples.Load() + n; r.session.samples.Load() < until; {
		if err := r.session.round(); err != nil {
			return err
		}
	}
	return nil
}

// ways are the contenders for each shape; "chosen" is what newPlan picks.
var ways = []struct {
	name   string
	change func(*plan)
}{
	{"chosen", nil},
	{"vectored", func(p *plan) {
		p.way, p.atOnce = vectored, max(1, min(readBytes/p.sample, vectorsMax/int64(len(p.leaves))))
	}},
	{"staged", func(p *plan) { p.way, p.atOnce = staged, max(1, readBytes/p.sample) }},
	{"one-by-one", func(p *plan) { p.atOnce = 1 }},
}

var benchShapes = []struct{ leaves, bytes int }{
	{1, 64}, {1, 1 << 10}, {1, 16 << 10}, {1, 256 << 10}, {1, 4 << 20},
	{8, 128}, {8, 512}, {8, 1 << 10}, {8, 2 << 10}, {8, 32 << 10},
	{40, 25}, {40, 400}, {40, 1 << 10}, {40, 6 << 10},
}

func cpuTime(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkReceive is where the constants of plan.go come from: every way of receiving, on each side of each threshold. The sender is in this process, so
// cpu-s/GB counts it as well, the same for all ways of one shape.
func BenchmarkReceive(b *testing.B) {
	for _, shape := range benchShapes {
		for _, way := range ways {
			if skipsWay(way.name, shape.leaves, shape.bytes) {
				continue
			}
			b.Run(fmt.Sprintf("leaves=%d/bytes=%d/%s", shape.leaves, shape.bytes, way.name), func(b *testing.B) {
				r := startReceiving(b, equalLeaves(shape.leaves, shape.bytes), way.change)
				defer r.close()
				b.SetBytes(int64(shape.leaves * shape.bytes))
				if err := r.receive(1); err != nil {
					b.Fatal(err)
				}
				b.ResetTimer()
				began := cpuTime(b)
				if err := r.receive(uint64(b.N)); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric((cpuTime(b)-began).Seconds()*1e9/(float64(b.N)*float64(shape.leaves*shape.bytes)), "cpu-s/GB")
			})
		}
	}
}

// skipsWay leaves out what cannot be: a large sample does not fit a staging buffer.
func skipsWay(way string, leaves, bytes int) bool {
	return way == "staged" && leaves*bytes > readBytes
}

// TestEveryWayReceives runs the benchmark's body once for each shape and way.
func TestEveryWayReceives(t *testing.T) {
	for _, shape := range benchShapes {
		for _, way := range ways {
			if skipsWay(way.name, shape.leaves, shape.bytes) {
				continue
			}
			r := startReceiving(t, equalLeaves(shape.leaves, shape.bytes), way.change)
			if err := r.receive(3); err != nil {
				t.Errorf("%d leaves of %d bytes, %s: %v", shape.leaves, shape.bytes, way.name, err)
			}
			r.close()
		}
	}
}
