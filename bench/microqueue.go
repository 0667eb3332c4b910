package bench

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/ingestd/ingestd/spsc"
)

// Elements are of the size that the engine queues; the queue is as long as a stream's.
const (
	queueCapacity = 1024
	queueBatch    = 32
)

type element struct{ a, b uint64 }

// queueContests are the queue beside a channel and a mutex ring, between two goroutines.
func queueContests() []contest {
	return []contest{
		{
			name: "spsc single", unit: "element", atLeast: map[string]float64{"channel": 2},
			entries: []entry{{"spsc", spscSingles}, {"channel", channelSingles}, {"mutex ring", mutexElements(1)}},
		},
		{
			name: fmt.Sprintf("spsc batch %d", queueBatch), unit: "element", atLeast: map[string]float64{"channel": 5},
			entries: []entry{{"spsc", spscBatches}, {"channel", channelSingles}, {"mutex ring", mutexElements(queueBatch)}},
		},
	}
}

// between runs a producer and a consumer of n elements and returns how long both took.
func between(produce, consume func()) time.Duration {
	begin := time.Now()
	var producer sync.WaitGroup
	producer.Go(produce)
	consume()
	producer.Wait()
	return time.Since(begin)
}

func spscSingles(n int) time.Duration {
	ctx := context.Background()
	q := spsc.New[element](queueCapacity)
	return between(func() {
		one := make([]element, 1)
		for i := range n {
			one[0].a = uint64(i)
			if q.Put(one[0]) {
				continue
			}
			if err := q.Push(ctx, one); err != nil {
				panic(err)
			}
		}
	}, func() {
		one := make([]element, 1)
		for i := range n {
			e, ok := q.Take()
			if !ok {
				if _, err := q.Pop(ctx, one); err != nil {
					panic(err)
				}
				e = one[0]
			}
			checkOrder(e.a, i)
		}
	})
}

func spscBatches(n int) time.Duration {
	q := spsc.New[element](queueCapacity)
	return between(func() {
		var buf [queueBatch]element
		for i := 0; i < n; {
			k := min(queueBatch, n-i)
			for j := range buf[:k] {
				buf[j].a = uint64(i + j)
			}
			if err := q.Push(context.Background(), buf[:k]); err != nil {
				panic(err)
			}
			i += k
		}
	}, func() {
		var buf [queueBatch]element
		for i := 0; i < n; {
			k, err := q.Pop(context.Background(), buf[:])
			if err != nil {
				panic(err)
			}
			for _, e := range buf[:k] {
				checkOrder(e.a, i)
				i++
			}
		}
	})
}

func channelSingles(n int) time.Duration {
	c := make(chan element, queueCapacity)
	return between(func() {
		for i := range n {
			c <- element{uint64(i), 0}
		}
	}, func() {
		for i := range n {
			checkOrder((<-c).a, i)
		}
	})
}

// mutexElements is a ring under a mutex, batch elements to a lock.
func mutexElements(batch int) func(n int) time.Duration {
	return func(n int) time.Duration {
		r := newMutexRing()
		return between(func() {
			buf := make([]element, batch)
			for i := 0; i < n; {
				k := min(batch, n-i)
				for j := range buf[:k] {
					buf[j].a = uint64(i + j)
				}
				r.push(buf[:k])
				i += k
			}
		}, func() {
			buf := make([]element, batch)
			for i := 0; i < n; {
				for _, e := range buf[:r.pop(buf)] {
					checkOrder(e.a, i)
					i++
				}
			}
		})
	}
}

func checkOrder(got uint64, want int) {
	if got != uint64(want) {
		panic(fmt.Sprintf("bench: element %d came where %d was due", got, want))
	}
}

// mutexRing is the twin: the same ring with a lock and conditions.
type mutexRing struct {
	mu             sync.Mutex
	filled, freed  sync.Cond
	slots          [queueCapacity]element
	pushed, popped int
}

func newMutexRing() *mutexRing {
	r := &mutexRing{}
	r.filled.L, r.freed.L = &r.mu, &r.mu
	return r
}

func (r *mutexRing) push(items []element) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range items {
		for r.pushed-r.popped == queueCapacity {
			r.freed.Wait()
		}
		r.slots[r.pushed%queueCapacity] = e
		r.pushed++
	}
	r.filled.Signal()
}

func (r *mutexRing) pop(into []element) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.pushed == r.popped {
		r.filled.Wait()
	}
	n := min(len(into), r.pushed-r.popped)
	for i := range n {
		into[i] = r.slots[r.popped%queueCapacity]
		r.popped++
	}
	r.freed.Signal()
	return n
}
