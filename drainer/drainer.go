package drainer

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
)

// Limits of the pool.
const (
	DrainersMax = 64
	// QueueRuns is how many filled runs a stream's queue holds. A run is up to one read of the transport, so a few suffice
	// for a drainer to find work for its whole visit.
	QueueRuns = 64
	visitRuns = 16 // descriptors taken from a queue at a time
)

// filled is what travels through a stream's queue: slots whose bytes are in place.
type filled struct {
	run     ring.Run
	first   uint64 // number of the first sample in its stream
	arrival uint64 // Unix nanoseconds
}

// Pool is a fixed set of drainers shared by all tables.
type Pool struct {
	drainers []*drainer
}

// NewPool returns a pool of n drainers; n is brought into 1 to DrainersMax. Run starts them.
func NewPool(n int) *Pool {
	n = min(max(n, 1), DrainersMax)
	p := &Pool{drainers: make([]*drainer, n)}
	for i := range p.drainers {
		p.drainers[i] = &drainer{seat: park.NewWaiter()}
	}
	return p
}

// Run runs the drainers until ctx ends; what is in the queues by then is still committed.
func (p *Pool) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, d := range p.drainers {
		wg.Go(func() { d.run(ctx) })
	}
	wg.Wait()
	return nil
}

// Open gives a new stream of r to the drainer that has the fewest. With flushAtEnd, the end of the stream publishes the batch being filled.
func (p *Pool) Open(r *ring.Ring, id uint64, flushAtEnd bool) *Stream {
	best := p.drainers[0]
	for _, d := range p.drainers[1:] {
		if d.owned.Load() < best.owned.Load() {
			best = d
		}
	}
	s := &Stream{
		id:         id,
		ring:       r,
		queue:      spsc.New[filled](QueueRuns),
		seat:       park.NewWaiter(),
		flushAtEnd: flushAtEnd,
		done:       make(chan struct{}),
	}
	best.owned.Add(1)
	best.mu.Lock()
	best.arrived = append(best.arrived, s)
	best.mu.Unlock()
	best.someArrived.Store(true)
	s.queue.NotifyPush(&best.work) // wakes the drainer, too
	return s
}

// drainer is one goroutine and the streams it owns.
type drainer struct {
	work  park.Event // woken by every push to one of its queues
	owned atomic.Int64
	seat  *park.Waiter

	streams []*Stream // owned by the goroutine
	turn    int
	buffer  [visitRuns]filled

	someArrived atomic.Bool
	mu          sync.Mutex
	arrived     []*Stream // opened and not yet adopted
}

func (d *drainer) run(ctx context.Context) {
	for {
		if d.pass() {
			continue
		}
		d.work.Add(d.seat)
		if d.pass() {
			d.work.Remove(d.seat)
			continue
		}
		if err := d.seat.Wait(ctx); err != nil {
			d.work.Remove(d.seat)
			d.pass()
			return
		}
	}
}

// pass visits every stream once, beginning with another one each time, and tells whether there was anything to do.
func (d *drainer) pass() bool {
	worked := d.someArrived.Load() && d.adopt()
	ended := false
	for i := range d.streams {
		s := d.streams[(d.turn+i)%len(d.streams)]
		if d.visit(s) {
			worked = true
		}
		ended = ended || s.ended
	}
	d.turn++
	if ended {
		d.remove()
		worked = true
	}
	return worked
}

func (d *drainer) adopt() bool {
	d.someArrived.Store(false)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.streams = append(d.streams, d.arrived...)
	any := len(d.arrived) > 0
	clear(d.arrived)
	d.arrived = d.arrived[:0]
	return any
}

// visit commits what is in the stream's queue now, and no more.
func (d *drainer) visit(s *Stream) bool {
	closed := s.queue.Closed() // before Len: what was pushed before Close must be found
	found := s.queue.Len()
	if found == 0 {
		s.ended = closed
		return false
	}
	samples := uint64(0)
	for found > 0 {
		n := s.queue.TryPop(d.buffer[:min(found, visitRuns)])
		for _, f := range d.buffer[:n] {
			s.ring.Commit(f.run, s.id, f.first, f.arrival)
			samples += uint64(f.run.N)
		}
		found -= n
	}
	// The drainer is the only writer of committed.
	s.committed.Store(s.committed.Load() + samples)
	s.settled.Wake()
	return true
}

// remove lets go of the streams that have ended.
func (d *drainer) remove() {
	keep := d.streams[:0]
	for _, s := range d.streams {
		if !s.ended {
			keep = append(keep, s)
			continue
		}
		if s.flushAtEnd {
			s.ring.Flush()
		}
		d.owned.Add(-1)
		close(s.done)
	}
	clear(d.streams[len(keep):])
	d.streams = keep
}
