package tcpingest

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// socketPair returns two connected unix stream sockets.
func socketPair(t testing.TB) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// bareStream is a Stream over a socket, with nothing between.
type bareStream struct {
	*net.UnixConn
	socket *socket
}

func newBareStream(t testing.TB, c *net.UnixConn) *bareStream {
	t.Helper()
	s, err := newSocket(c)
	if err != nil {
		t.Fatal(err)
	}
	return &bareStream{c, s}
}

func (b *bareStream) Ready() bool {
	n, err := b.socket.atHand()
	return n > 0 && err == nil
}
func (b *bareStream) HungUp() bool       { return b.socket.hungUp() }
func (b *bareStream) Offer(p []byte) int { return b.socket.offer(p) }

// TestReceivingDoesNotAllocate drives one session by hand, from bytes in a socket, or in a stream, to a batch given back, for each way of receiving.
func TestReceivingDoesNotAllocate(t *testing.T) {
	for name, tc := range map[string]struct {
		spec   string
		batch  int
		stream bool
	}{
		"direct":           {"a:U8[1024]", 16, false},
		"held":             {"a:U8[70000]", 1, false},
		"vectored":         {"a:U8[2048],b:U8[1024]", 8, false},
		"staged":           {"a:U8[100],b:F32,c:U8[20],d:I64", 32, false},
		"direct, stream":   {"a:U8[1024]", 16, true},
		"held, stream":     {"a:U8[70000]", 1, true},
		"vectored, stream": {"a:U8[2048],b:U8[1024]", 8, true},
		"staged, stream":   {"a:U8[100],b:F32,c:U8[20],d:I64", 32, true},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := spec.ParseText(tc.spec)
			if err != nil {
				t.Fatal(err)
			}
			pool := drainer.NewPool(1)
			ctx, stop := context.WithCancel(context.Background())
			var running sync.WaitGroup
			running.Go(func() { _ = pool.Run(ctx) })
			defer running.Wait()
			defer stop()
			table, err := engine.New(engine.Config{Name: "t", Spec: s, BatchSize: tc.batch, Batches: 4, Drainers: pool})
			if err != nil {
				t.Fatal(err)
			}
			server, err := New(Config{Tables: ingesttest.Tables{"t": table}})
			if err != nil {
				t.Fatal(err)
			}
			ours, theirs := socketPair(t)
			nc := netConn(ours)
			if tc.stream {
				nc = newBareStream(t, ours)
			}
			c, err := newConn(server, nc, 1)
			if err != nil {
				t.Fatal(err)
			}
			_, stream, accepted, refusal := ingest.OpenPush(ctx, server.cfg.Tables,
				&wire.Hello{Role: wire.RolePush, Table: "t", Spec: s, Ack: wire.AckQueued, Session: "s"}, server.window(), c.giveUp)
			if refusal != nil {
				t.Fatal(refusal)
			}
			ses := newSession(c, stream, newPlan(s), accepted)
			samples := make([]byte, int64(tc.batch)*s.SampleBytes())
			acks := make([]byte, tc.batch)
			trainer := table.NewTrainer()
			one := func() {
				if _, err := theirs.Write(samples); err != nil {
					t.Fatal(err)
				}
				for c.samples.Load()%uint64(tc.batch) != 0 || ses.unacked == 0 {
					if err := ses.round(); err != nil {
						t.Fatal(err)
					}
				}
				if err := ses.flushAcks(); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(theirs, acks); err != nil {
					t.Fatal(err)
				}
				b, err := trainer.Next(ctx)
				if err != nil {
					t.Fatal(err)
				}
				trainer.Release(b)
			}
			one() // buffers that are made once
			if n := testing.AllocsPerRun(200, one); n != 0 {
				t.Errorf("%v allocations per batch, want 0", n)
			}
			stream.Close()
			<-stream.Done()
			if err := table.Close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
