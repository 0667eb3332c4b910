package spsc

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"
)

// Twins: the same traffic through our queue, a Go channel and a ring under a mutex. Ratios, not times, are what to compare:
//
//	go test -run '^$' -bench . ./spsc
//
// What the project wants: at least 5 times a channel's rate in batches of 32, and at least 2 times for single elements.
const (
	twinCapacity = 1024
	twinBatch    = 32
)

// twin moves n elements from one goroutine to another.
type twin struct {
	name string
	move func(n, batch int)
}

func twins() []twin {
	return []twin{
		{"spsc", func(n, batch int) { moveQueue(New[uint64](twinCapacity), n, batch) }},
		{"channel", moveChannel},
		{"mutex", func(n, batch int) { newMutexRing(twinCapacity).move(n, batch) }},
	}
}

func moveQueue(q *Queue[uint64], n, batch int) {
	ctx := context.Background()
	go func() {
		items := make([]uint64, batch)
		for sent := 0; sent < n; sent += batch {
			for i := range items {
				items[i] = uint64(sent + i)
			}
			if batch == 1 && q.Put(items[0]) {
				continue
			}
			if q.Push(ctx, items) != nil {
				return
			}
		}
	}()
	into := make([]uint64, batch)
	for got := 0; got < n; {
		if batch == 1 {
			if v, ok := q.Take(); ok {
				if v != uint64(got) {
					panic("out of order")
				}
				got++
				continue
			}
		}
		k, err := q.Pop(ctx, into)
		if err != nil || into[0] != uint64(got) {
			panic("out of order")
		}
		got += k
	}
}

func moveChannel(n, batch int) {
	c := make(chan uint64, twinCapacity)
	go func() {
		for sent := range roundUp(n, batch) {
			c <- uint64(sent)
		}
	}()
	for got := range roundUp(n, batch) {
		if v := <-c; v != uint64(got) {
			panic("out of order")
		}
	}
}

func roundUp(n, to int) int { return (n + to - 1) / to * to }

// mutexRing is the textbook bounded buffer.
type mutexRing struct {
	mu             sync.Mutex
	notFull, some  sync.Cond
	slots          []uint64
	pushed, popped int
}

func newMutexRing(capacity int) *mutexRing {
	r := &mutexRing{slots: make([]uint64, capacity)}
	r.notFull.L, r.some.L = &r.mu, &r.mu
	return r
}

func (r *mutexRing) push(items []uint64) {
	r.mu.Lock()
	for len(items) > 0 {
		for r.pushed-r.popped == len(r.slots) {
			r.notFull.Wait()
		}
		for len(items) > 0 && r.pushed-r.popped < len(r.slots) {
			r.slots[r.pushed%len(r.slots)] = items[0]
			items = items[1:]
			r.pushed++
		}
		r.some.Signal()
	}
	r.mu.Unlock()
}

func (r *mutexRing) pop(into []uint64) int {
	r.mu.Lock()
	for r.pushed == r.popped {
		r.some.Wait()
	}
	n := 0
	for n < len(into) && r.popped < r.pushed {
		into[n] = r.slots[r.popped%len(r.slots)]
		n++
		r.popped++
	}
	r.notFull.Signal()
	r.mu.Unlock()
	return n
}

func (r *mutexRing) move(n, batch int) {
	go func() {
		items := make([]uint64, batch)
		for sent := 0; sent < n; sent += batch {
			for i := range items {
				items[i] = uint64(sent + i)
			}
			r.push(items)
		}
	}()
	into := make([]uint64, batch)
	for got := 0; got < n; {
		k := r.pop(into)
		if into[0] != uint64(got) {
			panic("out of order")
		}
		got += k
	}
}

func BenchmarkTwins(b *testing.B) {
	for _, batch := range []int{1, twinBatch} {
		perElement := map[string]float64{}
		for _, w := range twins() {
			b.Run(fmt.Sprintf("batch=%d/%s", batch, w.name), func(b *testing.B) {
				b.ReportAllocs()
				w.move(b.N, batch)
				perElement[w.name] = float64(b.Elapsed()) / float64(b.N)
				if base := perElement["channel"]; base > 0 && w.name != "channel" {
					b.ReportMetric(base/perElement[w.name], "x-channel")
				}
			})
		}
		if ours, channel, mutex := perElement["spsc"], perElement["channel"], perElement["mutex"]; ours > 0 && channel > 0 && mutex > 0 {
			b.Logf("batch %d: %.1f times a channel, %.1f times a mutex ring", batch, channel/ours, mutex/ours)
		}
	}
}

// BenchmarkShared is the descriptor queue on heap memory; between processes see the measurements of shm.
func BenchmarkShared(b *testing.B) {
	for _, batch := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) { moveShared(b, b.N, batch) })
	}
}

func moveShared(tb testing.TB, n, batch int) {
	_, p, c := sharedPair(tb, twinCapacity)
	go func() {
		items := make([]Desc, batch)
		for sent := 0; sent < n; {
			k, _ := p.TryPush(items[:min(batch, n-sent)])
			if sent += k; k == 0 {
				runtime.Gosched()
			}
		}
	}()
	into := make([]Desc, batch)
	for got := 0; got < n; {
		k, err := c.TryPop(into)
		if err != nil {
			tb.Fatal(err)
		}
		if got += k; k == 0 {
			runtime.Gosched()
		}
	}
}

// TestTwinsSmoke runs each twin once at a small size and prints the ratios it happens to see; it judges nothing but the order of the
// elements, since a shared machine and the race detector make any bound a coin toss.
func TestTwinsSmoke(t *testing.T) {
	const n = 1 << 15
	for _, batch := range []int{1, twinBatch} {
		took := map[string]time.Duration{}
		for _, w := range twins() {
			start := time.Now()
			w.move(n, batch)
			took[w.name] = time.Since(start)
		}
		t.Logf("batch %d: %v for %d elements, %.1f times a channel, %.1f times a mutex ring", batch, took["spsc"], n,
			float64(took["channel"])/float64(took["spsc"]), float64(took["mutex"])/float64(took["spsc"]))
	}
	moveShared(t, n, 16)
}
