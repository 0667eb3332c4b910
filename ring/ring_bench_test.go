package ring

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
)

// Twins: the life of samples (reserve, copy, commit, lease, read, release) in the ring, in the same ring of batches under one mutex, and the bare copies.
// Ratios, not times, are what to compare:
//
//	go test -run '^$' -bench . ./ring
//
// `ingestd bench micro` does so on mapped memory, with medians of interleaved runs.

// cycle is one shape of the work: writers copy samples of one leaf into runs of slots, and one trainer takes every batch. With no writers, one goroutine does all.
type cycle struct {
	writers int
	sample  int // bytes
	run     int // slots reserved at once
	batch   int
	batches int
}

func (c cycle) String() string {
	if c.writers == 0 {
		return fmt.Sprintf("alone/%dBx%d", c.sample, c.run)
	}
	return fmt.Sprintf("writers=%d/%dBx%d", c.writers, c.sample, c.run)
}

var cycles = []cycle{
	{0, 64, 1, 256, 8},
	{0, 64, 64, 256, 8},
	{0, 1 << 10, 1, 256, 8},
	{0, 1 << 10, 64, 256, 8},
	{0, 16 << 10, 4, 64, 4},
	{0, 256 << 10, 1, 8, 4},
	{4, 64, 16, 256, 8},
	{4, 1 << 10, 16, 256, 8},
}

// twin is one contender. move moves n samples and returns how many bytes the trainer saw, and a sum over one byte of each row.
type twin struct {
	name string
	move func(tb testing.TB, c cycle, n int) (bytes, sum uint64)
}

var twins = []twin{{"ring", moveRing}, {"mutex", moveMutex}, {"copy", moveCopy}}

// source is what every sample of a writer holds; the first byte tells the writer.
func (c cycle) source(writer int) []byte {
	b := make([]byte, c.sample*c.run)
	for i := range b {
		b[i] = byte(i)
	}
	for at := 0; at < len(b); at += c.sample {
		b[at] = byte(writer + 1)
	}
	return b
}

// share is how many of n samples a writer has.
func (c cycle) share(writer, n int) int {
	w := max(c.writers, 1)
	share := n / w
	if writer == 0 {
		share += n % w
	}
	return share
}

// want is what must come out.
func (c cycle) want(n int) (bytes, sum uint64) {
	for w := range max(c.writers, 1) {
		sum += uint64(w+1) * uint64(c.share(w, n))
	}
	return uint64(n) * uint64(c.sample), sum
}

// read is the trainer's part: it looks at each row once.
func (c cycle) read(column []byte) (bytes, sum uint64) {
	for at := 0; at < len(column); at += c.sample {
		sum += uint64(column[at])
	}
	return uint64(len(column)), sum
}

// between runs the writers, each with its share of n samples, and the trainer beside them.
func (c cycle) between(n int, write func(writer, n int), end func(), train func() (bytes, sum uint64)) (bytes, sum uint64) {
	var writing sync.WaitGroup
	for w := range c.writers {
		writing.Go(func() { write(w, c.share(w, n)) })
	}
	go func() {
		writing.Wait()
		end()
	}()
	return train()
}

func moveRing(tb testing.TB, c cycle, n int) (bytes, sum uint64) {
	r := newRing(tb, c.batch, c.batches, int64(c.sample))
	r.Poison = false
	touch(r.mem[r.geo.dataOffset:])
	fill := func(run Run, writer int, first uint64, from []byte) {
		copy(r.RunColumn(run, 0), from)
		r.Commit(run, uint64(writer), first, 1, Mark{})
	}
	take := func(b Batch) {
		k, s := c.read(b.Column(0))
		bytes, sum = bytes+k, sum+s
		r.Release(b)
	}
	restart(tb)
	if c.writers == 0 {
		from := c.source(0)
		for i := 0; i < n; {
			run, ok := r.TryReserve(min(c.run, n-i))
			if !ok {
				tb.Fatal("the ring is full, though every batch was released")
			}
			fill(run, 0, uint64(i), from)
			i += int(run.N)
			if b, ok := r.TryLease(); ok {
				take(b)
			}
		}
		r.Flush()
		if b, ok := r.TryLease(); ok {
			take(b)
		}
		return bytes, sum
	}
	return c.between(n, func(writer, n int) {
		seat, from := park.NewWaiter(), c.source(writer)
		for i := 0; i < n; {
			run, err := r.Reserve(tb.Context(), seat, min(c.run, n-i))
			if err != nil {
				tb.Error(err)
				return
			}
			fill(run, writer, uint64(i), from)
			i += int(run.N)
		}
	}, func() { r.Flush(); r.Close() }, func() (uint64, uint64) {
		seat := park.NewWaiter()
		for {
			b, err := r.Lease(tb.Context(), seat)
			if err != nil {
				return bytes, sum
			}
			take(b)
		}
	})
}

// mutexRing is the twin: the same batches, with their slots' words, published in order of their numbers, under one lock.
type mutexRing struct {
	mu           sync.Mutex
	space, ready sync.Cond
	c            cycle
	places       []mutexPlace
	free         []int
	live         []int // places in order of their batches' numbers: leased from the front, filled at the back
	row          int   // next one of the last live place
	closed       bool
}

type mutexPlace struct {
	column                     []byte
	streams, numbers, arrivals []uint64
	done                       int
}

func newMutexRing(c cycle) *mutexRing {
	m := &mutexRing{c: c, places: make([]mutexPlace, c.batches), row: c.batch}
	m.space.L, m.ready.L = &m.mu, &m.mu
	for i := range m.places {
		words := make([]uint64, 3*c.batch)
		m.places[i] = mutexPlace{
			column:  touch(AlignedBytes(int64(c.sample * c.batch))),
			streams: words[:c.batch], numbers: words[c.batch : 2*c.batch], arrivals: words[2*c.batch:],
		}
		m.free = append(m.free, i)
	}
	return m
}

// reserve takes up to n rows of the place being filled, waiting for one if it must.
func (m *mutexRing) reserve(n int) (place, row, k int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.row == m.c.batch {
		if last := len(m.free) - 1; last >= 0 {
			m.live, m.free, m.row = append(m.live, m.free[last]), m.free[:last], 0
			m.places[m.live[len(m.live)-1]].done = 0
			break
		}
		m.space.Wait()
	}
	place, row, k = m.live[len(m.live)-1], m.row, min(n, m.c.batch-m.row)
	m.row += k
	return place, row, k
}

func (m *mutexRing) commit(place, row, k, writer int, first uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &m.places[place]
	for i := row; i < row+k; i++ {
		p.streams[i], p.numbers[i], p.arrivals[i] = uint64(writer), first+uint64(i-row), 1
	}
	if p.done += k; p.done == m.c.batch {
		m.ready.Signal()
	}
}

// lease takes the oldest place if it is full, or has all there will be; it waits for one if it may. -1 says that there is none.
func (m *mutexRing) lease(wait bool) (place, rows int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		if len(m.live) > 0 {
			if p := m.live[0]; m.places[p].done == m.c.batch || m.closed {
				m.live = m.live[:copy(m.live, m.live[1:])]
				return p, m.places[p].done
			}
		} else if m.closed {
			return -1, 0
		}
		if !wait {
			return -1, 0
		}
		m.ready.Wait()
	}
}

func (m *mutexRing) release(place int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.free = append(m.free, place)
	m.space.Broadcast()
}

func (m *mutexRing) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.ready.Broadcast()
}

func moveMutex(tb testing.TB, c cycle, n int) (bytes, sum uint64) {
	m := newMutexRing(c)
	write := func(writer, first, n int, from []byte) int {
		place, row, k := m.reserve(n)
		copy(m.places[place].column[row*c.sample:], from[:k*c.sample])
		m.commit(place, row, k, writer, uint64(first))
		return k
	}
	train := func(wait bool) (uint64, uint64) {
		for {
			place, rows := m.lease(wait)
			if place < 0 {
				return bytes, sum
			}
			k, s := c.read(m.places[place].column[:rows*c.sample])
			bytes, sum = bytes+k, sum+s
			m.release(place)
		}
	}
	restart(tb)
	if c.writers == 0 {
		from := c.source(0)
		for i := 0; i < n; {
			i += write(0, i, min(c.run, n-i), from)
			train(false)
		}
		m.close()
		return train(false)
	}
	return c.between(n, func(writer, n int) {
		from := c.source(writer)
		for i := 0; i < n; {
			i += write(writer, i, min(c.run, n-i), from)
		}
	}, m.close, func() (uint64, uint64) { return train(true) })
}

// moveCopy only copies, and reads, each writer in a batch's worth of memory of its own: what the ring's last-freed-first order comes down to.
func moveCopy(tb testing.TB, c cycle, n int) (bytes, sum uint64) {
	columns := make([][]byte, max(c.writers, 1))
	for i := range columns {
		columns[i] = touch(AlignedBytes(int64(c.sample * c.batch)))
	}
	var mu sync.Mutex
	work := func(writer, n int) {
		column, from, at := columns[writer], c.source(writer), 0
		took, added := uint64(0), uint64(0)
		for i := 0; i < n; {
			k := min(c.run, n-i, c.batch-at)
			copy(column[at*c.sample:], from[:k*c.sample])
			i += k
			if at += k; at == c.batch || i == n {
				b, s := c.read(column[:at*c.sample])
				took, added, at = took+b, added+s, 0
			}
		}
		mu.Lock()
		defer mu.Unlock()
		bytes, sum = bytes+took, sum+added
	}
	restart(tb)
	if c.writers == 0 {
		work(0, n)
		return bytes, sum
	}
	done := make(chan struct{})
	return c.between(n, work, func() { close(done) }, func() (uint64, uint64) {
		<-done
		return bytes, sum
	})
}

// touch has the system put pages under b, so that it does not do so during the measurement.
func touch(b []byte) []byte {
	for at := 0; at < len(b); at += 4096 {
		b[at] = 0xFF
	}
	return b
}

// restart takes the making of memory out of a benchmark's time.
func restart(tb testing.TB) {
	if b, ok := tb.(*testing.B); ok {
		b.ResetTimer()
	}
}

// BenchmarkCycle: one operation is one sample.
func BenchmarkCycle(b *testing.B) {
	for _, c := range cycles {
		perSample := map[string]float64{}
		for _, w := range twins {
			b.Run(c.String()+"/"+w.name, func(b *testing.B) {
				b.SetBytes(int64(c.sample))
				b.ReportAllocs()
				bytes, sum := w.move(b, c, b.N)
				if wantBytes, wantSum := c.want(b.N); bytes != wantBytes || sum != wantSum {
					b.Fatalf("%d bytes with sum %d came out, want %d and %d", bytes, sum, wantBytes, wantSum)
				}
				perSample[w.name] = float64(b.Elapsed()) / float64(b.N)
				if ours := perSample["ring"]; ours > 0 && w.name != "ring" {
					b.ReportMetric(perSample[w.name]/ours, "ring/this") // our rate to this one's
				}
			})
		}
	}
}

// TestTwinsSmoke runs each contender once at a small size and prints the ratios it happens to see; it judges nothing but what comes out, since a shared
// machine and the race detector make any bound a coin toss.
func TestTwinsSmoke(t *testing.T) {
	for _, c := range cycles {
		n := 3*c.batch*c.batches + c.run + 1 // every place several times, and a batch cut short
		took := map[string]time.Duration{}
		for _, w := range twins {
			runtime.GC()
			began := time.Now()
			bytes, sum := w.move(t, c, n)
			took[w.name] = time.Since(began)
			if wantBytes, wantSum := c.want(n); bytes != wantBytes || sum != wantSum {
				t.Errorf("%v/%s: %d bytes with sum %d came out of %d samples, want %d and %d", c, w.name, bytes, sum, n, wantBytes, wantSum)
			}
		}
		t.Logf("%v: %v for %d samples (a mutex ring %v, bare copies %v; making the memory included)", c, took["ring"], n, took["mutex"], took["copy"])
	}
}
