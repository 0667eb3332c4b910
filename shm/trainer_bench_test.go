//go:build linux && !race

package shm

import (
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/wire"
)

// BenchmarkDeadTrainer is the time from the kernel's closing of a trainer's socket until another trainer of its group, which waits, has the batch that it
// held. The baseline is the same close seen by a goroutine that does nothing but read the socket.
func BenchmarkDeadTrainer(b *testing.B) {
	d := startDaemon(b, 4, ServerConfig{})
	heir, err := d.fifo.Join(wire.GroupDefault, sampler.Who{})
	check(b, err)
	seat, got := park.NewWaiter(), make(chan time.Time)
	var back, bare []time.Duration
	for b.Loop() {
		victim := d.raw(1)
		check(b, d.publish(b.Context(), 1))
		_, err := victim.Next(b.Context())
		check(b, err)
		d.eventually("it holds all it may", func(s Stats) bool { return s.Trainers[0].State == StateAtLimit })
		var batch ring.Batch
		go func() {
			batch, _ = heir.Next(b.Context(), seat)
			got <- time.Now()
		}()
		d.eventually("the heir waits", func(Stats) bool { return d.fifo.Stats().Sleeping == 1 })
		start := time.Now()
		check(b, victim.conn.CloseWrite()) // what the kernel does for a process that ends
		back = append(back, (<-got).Sub(start))
		heir.Release(batch)
		<-d.served
		check(b, victim.free())
		bare = append(bare, bareClose(b, got))
	}
	report := func(what string, all []time.Duration) {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, what+"-p50-µs")
		b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, what+"-p99-µs")
	}
	report("back", back)
	report("bare", bare)
	b.ReportMetric(0, "ns/op") // mostly the attaching
}

// bareClose measures how long a reader takes to see the end of a unix socket.
func bareClose(b *testing.B, got chan time.Time) time.Duration {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@" + b.Name(), Net: "unix"})
	check(b, err)
	defer l.Close()
	dialed, err := net.Dial("unix", l.Addr().String())
	check(b, err)
	defer dialed.Close()
	conn, err := l.Accept()
	check(b, err)
	defer conn.Close()
	reading := make(chan struct{})
	go func() {
		var one [1]byte
		_, _ = conn.Read(one[:])
		close(reading)
		_, _ = conn.Read(one[:])
		got <- time.Now()
	}()
	_, err = dialed.Write([]byte{1})
	check(b, err)
	<-reading
	runtime.Gosched() // into its second Read
	start := time.Now()
	check(b, dialed.(*net.UnixConn).CloseWrite())
	return (<-got).Sub(start)
}
