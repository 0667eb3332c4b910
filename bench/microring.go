package bench

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/ring"
)

// ringShape is the ring of a contest: samples of one leaf, placed in runs of a given length by some goroutines, each of which also leases and releases what
// is published.
type ringShape struct {
	sample  int
	run     int // samples placed at once; divides batch
	writers int
	batch   int
	batches int
}

// ringContests are the ring's whole cycle (reserve, copy, commit, publish, lease, release) beside the same life of a batch under a mutex, and beside the
// copying alone.
func ringContests() []contest {
	var out []contest
	for _, s := range []ringShape{
		{sample: 64, run: 1, writers: 1, batch: 256, batches: 8},
		{sample: 64, run: 1, writers: 2, batch: 256, batches: 8},
		{sample: kib, run: 1, writers: 1, batch: 256, batches: 8},
		{sample: kib, run: 1, writers: 2, batch: 256, batches: 8},
		{sample: kib, run: 64, writers: 1, batch: 256, batches: 8},
		{sample: kib, run: 64, writers: 2, batch: 256, batches: 8},
		{sample: 16 * kib, run: 4, writers: 1, batch: 64, batches: 4},
		{sample: 256 * kib, run: 1, writers: 1, batch: 8, batches: 4},
	} {
		name := fmt.Sprintf("ring %s by %d", sizeText(int64(s.sample)), s.run)
		if s.writers > 1 {
			name += fmt.Sprintf(", %d writers", s.writers)
		}
		out = append(out, contest{
			name: name, unit: "sample",
			entries: []entry{{"ring", s.ringCycle}, {"mutex ring", s.mutexCycle}, {"plain copy", s.copyCycle}},
		})
	}
	return out
}

// placer places up to want samples of source and returns how many those were, 0 when there was no room.
type placer func(source []byte, want int) int

// together runs the writers, which place n samples between them in runs of at most s.run.
func (s ringShape) together(n int, writer func(i int) placer) time.Duration {
	var wait sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(n))
	begin := time.Now()
	for i := range s.writers {
		wait.Go(func() {
			place := writer(i)
			source := make([]byte, s.sample*s.run)
			for i := range source {
				source[i] = byte(i)
			}
			for {
				// A share of the work at a time, so that the counter is not what is measured.
				share := int(min(4096, int64(n)/int64(s.writers)+1))
				took := left.Add(-int64(share)) + int64(share)
				for todo := int(min(took, int64(share))); todo > 0; {
					placed := place(source, min(todo, s.run))
					if todo -= placed; placed == 0 {
						runtime.Gosched()
					}
				}
				if took <= int64(share) {
					return
				}
			}
		})
	}
	wait.Wait()
	return time.Since(begin)
}

func (s ringShape) ringCycle(n int) time.Duration {
	layout := ring.Layout{BatchSize: s.batch, Batches: s.batches, Columns: []int64{int64(s.sample)}, Table: "bench"}
	size, err := layout.Bytes()
	if err != nil {
		panic(err)
	}
	memory, err := newMemory(size)
	if err != nil {
		panic(err)
	}
	defer memory.Close()
	r, err := ring.Format(memory.Bytes(), layout)
	if err != nil {
		panic(err)
	}
	place := func(source []byte, want int) int {
		run, ok := r.TryReserve(want)
		if ok {
			copy(r.RunColumn(run, 0), source)
			r.Commit(run, 1, run.Position, 1, ring.Mark{})
		}
		if b, leased := r.TryLease(); leased {
			r.Release(b)
		}
		return int(run.N)
	}
	return s.together(n, func(int) placer { return place })
}

func (s ringShape) mutexCycle(n int) time.Duration {
	memory, err := newMemory(int64(s.sample * s.batch * s.batches))
	if err != nil {
		panic(err)
	}
	defer memory.Close()
	mem := memory.Bytes()
	r := newMutexBatches(s.batch, s.batches)
	place := func(source []byte, want int) int {
		place, row, k := r.reserve(want)
		if k > 0 {
			copy(mem[(place*s.batch+row)*s.sample:], source[:k*s.sample])
			r.commit(place, row, k)
		}
		if place, ok := r.lease(); ok {
			r.release(place)
		}
		return k
	}
	return s.together(n, func(int) placer { return place })
}

// copyCycle only copies, each writer into its part of a batch's worth of memory: what the ring's order of freed places comes down to.
func (s ringShape) copyCycle(n int) time.Duration {
	memory, err := newMemory(int64(s.sample * s.batch * s.writers))
	if err != nil {
		panic(err)
	}
	defer memory.Close()
	mem := memory.Bytes()
	return s.together(n, func(i int) placer {
		part := mem[i*s.sample*s.batch : (i+1)*s.sample*s.batch]
		at := 0
		return func(source []byte, want int) int {
			copy(part[at:], source[:want*s.sample])
			if at += len(source); at == len(part) {
				at = 0
			}
			return want
		}
	})
}

// mutexBatches is the twin: the same life of a batch, with one lock around every step but the copy.
type mutexBatches struct {
	mu                         sync.Mutex
	batch                      int
	open, row                  int // place being filled, -1 for none
	done                       []int
	free, published            []int
	streams, numbers, arrivals []uint64
}

func newMutexBatches(batch, batches int) *mutexBatches {
	r := &mutexBatches{batch: batch, open: -1, done: make([]int, batches)}
	n := batch * batches
	r.streams, r.numbers, r.arrivals = make([]uint64, n), make([]uint64, n), make([]uint64, n)
	for i := range batches {
		r.free = append(r.free, i)
	}
	return r
}

func (r *mutexBatches) reserve(n int) (place, row, k int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open < 0 {
		last := len(r.free) - 1
		if last < 0 {
			return 0, 0, 0
		}
		r.open, r.row, r.free = r.free[last], 0, r.free[:last]
		r.done[r.open] = 0
	}
	place, row, k = r.open, r.row, min(n, r.batch-r.row)
	if r.row += k; r.row == r.batch {
		r.open = -1
	}
	return place, row, k
}

func (r *mutexBatches) commit(place, row, k int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := place*r.batch + row; i < place*r.batch+row+k; i++ {
		r.streams[i], r.numbers[i], r.arrivals[i] = 1, uint64(i), 1
	}
	if r.done[place] += k; r.done[place] == r.batch {
		r.published = append(r.published, place)
	}
}

func (r *mutexBatches) lease() (place int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.published) == 0 {
		return 0, false
	}
	place = r.published[0]
	r.published = r.published[:copy(r.published, r.published[1:])]
	return place, true
}

func (r *mutexBatches) release(place int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free = append(r.free, place)
}
