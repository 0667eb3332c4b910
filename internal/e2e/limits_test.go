//go:build linux && !race

package e2e

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/wire"
)

// TestTenThousandConnects: 10,000 connections, one after another at each of a few clients, well-behaved and not: the daemon serves on, and what they took of
// memory, descriptors and goroutines comes back.
func TestTenThousandConnects(t *testing.T) {
	t.Parallel()
	const warm, connects, clients = 600, 10_000, 4
	var acked, refused atomic.Uint64
	d := serve(t, []table{small}, "--log-level", "warn")
	beside := d.pair(small.name, 1000)
	kinds := []func(){
		func() { _ = d.connect().Close() },
		func() { d.connect().die() },
		func() {
			c := d.connect()
			c.write([]byte("GET / HTTP/1.1\r\n\r\n"))
			c.refusal(wire.CodeBadMagic)
			_ = c.Close()
			refused.Add(1)
		},
		func() {
			c, err := new(net.Dialer).DialContext(t.Context(), "unix", strings.TrimPrefix(d.Unix, "unix://"))
			check(t, err)
			check(t, wire.WriteHello(c, &wire.Hello{Role: wire.RoleTrain, Table: "nope"}))
			_, _ = io.ReadAll(c)
			check(t, c.Close())
		},
		func() { // half a sample follows
			c := d.join(small)
			c.write(c.samples(2)[:3*c.layout.SampleBytes()/2])
			_, err := io.ReadFull(c, make([]byte, 1))
			check(t, err)
			c.die()
			acked.Add(1)
		},
		func() {
			c := d.join(small)
			c.write(c.samples(1))
			c.shut()
			if acks, notice, err := c.ending(); acks != 1 || notice != nil || err != nil {
				t.Errorf("%d acks, notice %v, error %v", acks, notice, err)
			}
			_ = c.Close()
			acked.Add(1)
		},
	}
	burst := func(n int) {
		var wg sync.WaitGroup
		for k := range clients {
			wg.Go(func() {
				for i := k; i < n; i += clients {
					kinds[i%len(kinds)]()
				}
			})
		}
		wg.Wait()
	}
	burst(warm) // what is made once, is made now
	d.await("they are gone", func(s *status) bool { return s.Producers.Open == 1 })
	descriptors, goroutines, heap := d.descriptors(), d.metric("go_goroutines"), d.heap()
	burst(connects)
	eventually(t, "descriptors come back", func() bool { return d.descriptors() <= descriptors })
	eventually(t, "goroutines come back", func() bool { return d.metric("go_goroutines") <= goroutines })
	const perConnect = 64 // bytes; what is kept of each would be more
	eventually(t, "memory comes back", func() bool { return d.heap() < heap+connects*perConnect })
	t.Logf("heap before %.0f KiB, after %.0f KiB; goroutines %.0f; descriptors %d", heap/1024, d.heap()/1024, goroutines, descriptors)
	if own := d.memory("RssAnon"); own > 64<<20 {
		t.Errorf("the daemon holds %d MiB beside its ring", own>>20)
	}
	s := d.status()
	if s.Producers.Accepted < connects || s.Producers.AcceptErrors > 0 || s.Producers.Refused["bad_magic"] != refused.Load() || tableOf(s, small.name).Streams != 1 {
		t.Errorf("%+v", s.Producers)
	}
	d.finish(map[string]uint64{small.name: acked.Load()}, beside)
}

// heap collects the daemon's garbage and returns what is left.
func (d *server) heap() float64 {
	d.t.Helper()
	d.get("/debug/pprof/heap?gc=1")
	return d.metric("go_memstats_heap_alloc_bytes")
}

// TestOutOfDescriptors: a daemon that may open no more files counts it, serves those that it has, and takes new ones as soon as it can again.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	most := uint64(d.descriptors() + 10)
	check(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most}, nil))
	var waiting []*producer
	for range 20 {
		waiting = append(waiting, d.connect())
	}
	d.await("it has run out", func(s *status) bool { return s.Producers.AcceptErrors > 0 })
	d.logs("cannot accept; trying again", "too many open files")
	d.moves(small.name, 32) // the pair goes on
	for _, c := range waiting {
		check(t, c.Close())
	}
	run(t, exitOK, "push", "--addr", d.TCP, "--table", small.name, "--generate", "5")
	eventually(t, "those that are gone are forgotten", func() bool { return d.status().Producers.Open == 1 })
	d.finish(map[string]uint64{small.name: 5}, beside)
}

// TestNoDescriptorsForTrainer: a trainer for whom the daemon has no descriptors left is told so, and may try again.
func TestNoDescriptorsForTrainer(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	var old unix.Rlimit
	check(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, nil, &old))
	most := uint64(d.descriptors() + 2) // the connection, and one of the three that its channel takes
	check(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: old.Max}, nil))
	says(t, run(t, exitRefused, "pull", "--addr", d.Unix, "--table", small.name), "internal", "too many open files", "ulimit -n")
	check(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, &old, nil))
	if n := d.metric(`ingestd_refused_total{reason="internal",transport="shm"}`); n != 1 {
		t.Errorf("counted %v times", n)
	}
	d.finish(nil, beside)
}

// TestMemoryBound: at any size of samples the daemon holds its ring, 64 MiB, and 512 KiB per connection, at most.
func TestMemoryBound(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		table
		connections int
		samples     int64
	}{
		{table{"1KiB", "x:U8[1024]", 64, 64}, 16, 4000},
		{table{"1KiB-40-leaves", manyLeaves(40), 64, 64}, 16, 2000},
		{table{"64MiB", "x:U8[67108864]", 1, 4}, 4, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := serve(t, []table{tc.table})
			pull := d.pull(tc.name, "--gapless", "--samples", fmt.Sprint(int64(tc.connections)*tc.samples))
			var pushes []*process
			for range tc.connections {
				pushes = append(pushes, d.push(tc.name, tc.samples, 0, "--spec", tc.spec))
			}
			own := int64(0)
			for _, p := range append(pushes, pull) {
				eventually(t, "it is done", func() bool {
					own = max(own, d.memory("RssAnon"))
					return !p.running()
				})
				p.ends(exitOK)
			}
			if in, out := tc.samples*int64(tc.connections), result[pulled](pull); out.Samples != uint64(in) || out.Wrong+out.Gaps+out.Disorder > 0 {
				t.Errorf("%d samples pushed: %+v", in, out)
			}
			extra := int64(64<<20 + tc.connections*512<<10)
			bound := tableOf(d.status(), tc.name).SegmentBytes + extra
			peak := d.memory("VmHWM") + d.memory("HugetlbPages")
			t.Logf("peak %.1f MiB, bound %.1f MiB; beside the ring %.1f MiB", float64(peak)/(1<<20), float64(bound)/(1<<20), float64(own)/(1<<20))
			if peak > bound || own > extra {
				t.Errorf("peak %d bytes, bound %d; beside the ring %d, bound %d", peak, bound, own, extra)
			}
		})
	}
}

func manyLeaves(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, ",l%d:U8[%d]", i, 25+i%2)
	}
	return b.String()[1:]
}
