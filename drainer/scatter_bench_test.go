package drainer

import (
	"context"
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
)

// scatter copies n concatenated samples into the columns of a run, as a transport does with a staging buffer.
func scatter(r *ring.Ring, run ring.Run, leafBytes []int64, from []byte) {
	for leaf, size := range leafBytes {
		col := r.RunColumn(run, leaf)
		at := int64(0)
		for k := 0; k < leaf; k++ {
			at += leafBytes[k]
		}
		for i := range int64(run.N) {
			copy(col[i*size:(i+1)*size], from[i*r.SampleBytes()+at:])
		}
	}
}

// cpuTime returns the processor time of this process so far.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkWhoScatters settles who places staged bytes: the goroutine that just received them ("receiver", what tcpingest does), or the drainer
// after a hand-over of the buffer ("drainer"). Receiving is played by a copy from a cold 64 MiB source, as the kernel would. Each iteration moves 256 KiB of
// samples of 1 KiB. What counts is cpu-ns/op: beside a daemon, the other cores belong to the trainers and the senders.
func BenchmarkWhoScatters(b *testing.B) {
	const stage = 256 << 10
	source := make([]byte, 64<<20)
	for _, leaves := range []int{1, 8, 40} {
		columns := make([]int64, leaves)
		for i := range columns {
			columns[i] = 1000 / int64(leaves)
		}
		setup := func(b *testing.B) (*ring.Ring, int64, int) {
			r := newRing(b, stage/1000, 16, columns...)
			b.SetBytes(stage)
			return r, 0, stage / int(r.SampleBytes())
		}
		recycle := func(r *ring.Ring) {
			for {
				batch, ok := r.TryLease()
				if !ok {
					return
				}
				r.Release(batch)
			}
		}
		b.Run(fmt.Sprintf("leaves=%d/receiver", leaves), func(b *testing.B) {
			r, at, n := setup(b)
			pool := NewPool(1)
			ctx, stop := context.WithCancel(b.Context())
			finished := make(chan struct{})
			go func() { _ = pool.Run(ctx); close(finished) }()
			s := pool.Open(r, StreamConfig{ID: 1})
			buf := make([]byte, stage)
			began := cpuTime(b)
			for b.Loop() {
				copy(buf, source[at:])
				at = (at + stage) % int64(len(source))
				for left := n; left > 0; {
					run, ok := s.TryReserve(left)
					if !ok { // the trainer's part is played by this goroutine, too
						recycle(r)
						runtime.Gosched()
						continue
					}
					scatter(r, run, columns, buf)
					s.Push(run, time.Unix(1, 0))
					left -= int(run.N)
					recycle(r)
				}
			}
			b.ReportMetric(float64(cpuTime(b)-began)/float64(b.N), "cpu-ns/op")
			stop()
			<-finished
		})
		b.Run(fmt.Sprintf("leaves=%d/drainer", leaves), func(b *testing.B) {
			r, at, n := setup(b)
			full, empty := spsc.New[[]byte](8), spsc.New[[]byte](8)
			for range 8 {
				empty.Put(make([]byte, stage))
			}
			finished := make(chan struct{})
			go func() {
				defer close(finished)
				next := uint64(0)
				var one [1][]byte
				for {
					if _, err := full.Pop(context.Background(), one[:]); err != nil {
						return
					}
					for left := n; left > 0; {
						run, ok := r.TryReserve(left)
						if !ok {
							b.Error("ring full")
							return
						}
						scatter(r, run, columns, one[0])
						r.Commit(run, 1, next, 1, ring.Mark{})
						next += uint64(run.N)
						left -= int(run.N)
						recycle(r)
					}
					empty.Put(one[0])
				}
			}()
			var one [1][]byte
			began := cpuTime(b)
			for b.Loop() {
				if _, err := empty.Pop(b.Context(), one[:]); err != nil {
					b.Fatal(err)
				}
				copy(one[0], source[at:])
				at = (at + stage) % int64(len(source))
				if err := full.Push(b.Context(), one[:]); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(cpuTime(b)-began)/float64(b.N), "cpu-ns/op")
			full.Close()
			<-finished
		})
	}
}
