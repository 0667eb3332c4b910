package quicingest

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// rateRig is a connection whose sender floods it, to a daemon or to a bare loop that only reads and acks.
type rateRig struct {
	conn  net.Conn
	close func()
}

// rateWindow is what the sender has under way.
const rateWindow = 8 << 20

var rateSizes = []int{64 << 10, 4 << 20}

// bareRead is what any receiver must do: read as much as there is, and ack whole samples.
func bareRead(c net.Conn, sample int) {
	b, part := make([]byte, 256<<10), 0
	acks := make([]byte, len(b))
	for i := range acks {
		acks[i] = wire.Ack
	}
	for {
		n, err := c.Read(b)
		part += n
		if _, failed := c.Write(acks[:part/sample]); failed != nil || err != nil {
			return
		}
		part %= sample
	}
}

// flood pushes n samples, keeping to the window, and returns when all are acked.
func flood(c net.Conn, sample, n int) error {
	window := make(chan struct{}, max(2, rateWindow/sample))
	failed := make(chan error, 1)
	go func() {
		b := make([]byte, cap(window))
		for got := 0; got < n; {
			k, err := c.Read(b)
			if err != nil {
				failed <- err
				return
			}
			for range k {
				<-window
			}
			got += k
		}
		failed <- nil
	}()
	b := make([]byte, sample)
	for range n {
		select {
		case window <- struct{}{}:
		case err := <-failed:
			return err
		}
		if _, err := c.Write(b); err != nil {
			return err
		}
	}
	return <-failed
}

// startRate connects to one of the contenders.
func startRate(t testing.TB, transport string, sample int, bare bool) *rateRig {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	certs := ingesttest.NewCertificates(t)
	table := ingesttest.NewTable(t, "t", fmt.Sprintf("a:U8[%d]", sample), max(2, (4<<20)/sample), 4)
	finish := ingesttest.Drain(t, table)
	streams := tcpingest.Config{Tables: ingesttest.Tables{"t": table}, WindowBytes: rateWindow}
	var running sync.WaitGroup
	var addr net.Addr
	var stop func()
	if transport == "tls" {
		l, err := tcpingest.Listen(t.Context(), "tcp", "127.0.0.1:0")
		must(err)
		addr = l.Addr()
		s, err := tcpingest.New(streams)
		must(err)
		secure := tcpingest.NewTLSListener(l, certs.Server)
		stop = func() { _, _ = l.Close(), s.Shutdown(context.Background()) }
		running.Go(func() {
			if !bare {
				_ = s.Serve(context.Background(), secure)
				return
			}
			if c, err := secure.Accept(); err == nil {
				bareRead(c, sample)
				_ = c.Close()
			}
		})
	} else {
		s, err := New(Config{TLS: certs.Server, Streams: streams})
		must(err)
		socket, err := Listen(t.Context(), "127.0.0.1:0", s.cfg.Streams.Log)
		must(err)
		addr = socket.LocalAddr()
		stop = func() { _, _ = s.Shutdown(context.Background()), socket.Close() }
		running.Go(func() {
			if !bare {
				_ = s.Serve(context.Background(), socket)
				return
			}
			l, err := quic.Listen(socket, tcpingest.TLSConfig(certs.Server), s.quic)
			if err != nil {
				return
			}
			defer l.Close()
			c, err := l.Accept(context.Background())
			if err != nil {
				return
			}
			if st, err := c.AcceptStream(context.Background()); err == nil {
				bareRead(quicconn.New(c, st), sample)
			}
			_ = c.CloseWithError(quicconn.CodeDone, "")
		})
	}
	var conn net.Conn
	if transport == "tls" {
		c, err := tls.Dial("tcp", addr.String(), certs.Client)
		must(err)
		conn = c
	} else {
		c, err := quic.DialAddr(t.Context(), addr.String(), certs.Client, clientQUIC)
		must(err)
		st, err := c.OpenStreamSync(t.Context())
		must(err)
		conn = &owner{quicconn.New(c, st), c}
	}
	if !bare {
		must(wire.WriteHello(conn, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: table.Spec(), WindowBytes: rateWindow}))
		must(wire.ReadReply(conn, &wire.AcceptedPush{}))
	}
	return &rateRig{conn: conn, close: func() {
		_ = conn.Close()
		stop()
		running.Wait()
		finish()
	}}
}

func cpuTime(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRate compares a daemon over TLS and QUIC with a loop that only reads and acks. Sender and receiver are in this process, so cpu-s/GB counts both.
func BenchmarkRate(b *testing.B) {
	for _, transport := range []string{"tls", "quic"} {
		for _, sample := range rateSizes {
			for _, name := range []string{"bare", "ingestd"} {
				b.Run(fmt.Sprintf("%s/bytes=%d/%s", transport, sample, name), func(b *testing.B) {
					r := startRate(b, transport, sample, name == "bare")
					defer r.close()
					b.SetBytes(int64(sample))
					b.ResetTimer()
					began := cpuTime(b)
					if err := flood(r.conn, sample, b.N); err != nil {
						b.Fatal(err)
					}
					b.ReportMetric((cpuTime(b)-began).Seconds()*1e9/(float64(b.N)*float64(sample)), "cpu-s/GB")
				})
			}
		}
	}
}

// TestRate runs the benchmark's body once for each contender.
func TestRate(t *testing.T) {
	for _, transport := range []string{"tls", "quic"} {
		for _, sample := range rateSizes {
			for _, bare := range []bool{false, true} {
				r := startRate(t, transport, sample, bare)
				if err := flood(r.conn, sample, 3); err != nil {
					t.Errorf("%s, %d bytes, bare %v: %v", transport, sample, bare, err)
				}
				r.close()
			}
		}
	}
}
