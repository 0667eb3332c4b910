//go:build linux && !race

package shm

import (
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
)

// handOver publishes n batches and reads them through an attachment, both in this process.
func handOver(tb testing.TB, n int) time.Duration {
	d := startDaemon(tb, 16, ServerConfig{})
	d.ring.Poison = false
	a := d.attach(8)
	start := time.Now()
	published := make(chan error, 1)
	go func() {
		for range n {
			run, err := d.ring.Reserve(tb.Context(), d.seat, testBatchSize)
			if err != nil {
				published <- err
				return
			}
			d.ring.Commit(run, 1, 0, 1, ring.Mark{})
		}
		published <- nil
	}()
	for range n {
		b, err := a.Next(tb.Context())
		check(tb, err)
		a.Release(b)
	}
	took := time.Since(start)
	check(tb, <-published)
	return took
}

// handOverChannel is the twin: batches named by their number go to a reader through a Go channel, and come back through another.
func handOverChannel(n int) time.Duration {
	deliver, giveback := make(chan uint64, 8), make(chan uint64, 8)
	go func() {
		held := 0
		for i := range n {
			if held == 8 {
				<-giveback
				held--
			}
			deliver <- uint64(i)
			held++
		}
		close(deliver)
	}()
	start := time.Now()
	for i := range deliver {
		giveback <- i
	}
	return time.Since(start)
}

// BenchmarkHandOver is the cost of one batch from its publication to its release by an attached trainer, whatever its size, beside that
// of two Go channels, which need no kernel but end at the process. Compare the ratio.
func BenchmarkHandOver(b *testing.B) {
	ours := handOver(b, b.N)
	channel := handOverChannel(b.N)
	b.ReportMetric(float64(ours)/float64(b.N), "ns/batch")
	b.ReportMetric(float64(channel)/float64(b.N), "ns/batch-channel")
	b.ReportMetric(float64(ours)/float64(channel), "x-channel")
}

func TestHandOverSmoke(t *testing.T) {
	const n = 200
	t.Logf("%v for %d batches, two channels: %v", handOver(t, n), n, handOverChannel(n))
}

// Attachments that come and go leave nothing behind: no descriptor, no goroutine, no grant.
func TestManyAttachments(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 4, ServerConfig{})
	for range 200 {
		a := d.attach(2)
		check(t, d.publish(t.Context(), 1))
		b, err := a.Next(t.Context())
		check(t, err)
		a.Release(b)
		check(t, a.Close())
		check(t, <-d.served)
	}
	if st := d.server.Stats(); st.Attached != 200 || st.Detached != 200 || st.GivenBack != 200 {
		t.Errorf("stats: %+v", st)
	}
}
