package drainer

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/internal/failpoint"
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

// StreamConfig says what a new stream is.
type StreamConfig struct {
	ID uint64 // as it stands beside the samples in the ring; of a session, the session's

	// Session, if not nil, counts the stream's samples: the stream begins with the session's next one, and each commit stores in the segment how many there are.
	// Its stream before must be Done.
	Session *ring.Session

	FlushAtEnd bool // the end of the stream publishes the batch being filled

	// Check, if not nil, looks at the samples before they are pushed.
	Check Checker

	// Full, if not nil, makes of the error of a Reserve that ran out of time one that says whom it waited for.
	Full func(error) error
}

// Open gives a new stream of r to the drainer that has the fewest.
func (p *Pool) Open(r *ring.Ring, cfg StreamConfig) *Stream {
	best := p.drainers[0]
	for _, d := range p.drainers[1:] {
		if d.owned.Load() < best.owned.Load() {
			best = d
		}
	}
	s := &Stream{
		cfg:     cfg,
		ring:    r,
		queue:   spsc.New[filled](QueueRuns),
		drainer: best,
		seat:    park.NewWaiter(),
		done:    make(chan struct{}),
	}
	if cfg.Session != nil {
		s.held = cfg.Session.Held()
	}
	if cfg.Check != nil {
		s.columns = make([][]byte, len(r.Layout().Columns))
	}
	s.next = s.held
	s.pushed.Store(s.held)
	s.committed.Store(s.held)
	best.owned.Add(1)
	best.mu.Lock()
	best.arrived = append(best.arrived, s)
	best.mu.Unlock()
	best.someArrived.Store(true)
	best.work.Wake()
	return s
}

// drainer is one goroutine and the streams it owns. Its queues have one consumer at a time: who holds the baton. Mostly that is the goroutine, but a
// sender that finds the baton free empties its own queue at once (help), since waking the goroutine for it costs about a tenth of
// receiving 256 KiB.
type drainer struct {
	work  park.Event // woken when there is something that no holder of the baton will see
	owned atomic.Int64
	seat  *park.Waiter

	baton  atomic.Bool
	missed atomic.Bool // somebody wanted the baton and did not get it: the holder wakes the goroutine when it lets go

	streams []*Stream // the baton holder's, as all up to the next empty line
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

// take gets the baton unless somebody holds it, who then knows that there is more to do.
func (d *drainer) take() bool {
	// edge(baton): acquire - after this swap, queues, streams and buffer are ours.
	if d.baton.CompareAndSwap(false, true) {
		return true
	}
	d.missed.Store(true)
	return d.baton.CompareAndSwap(false, true) // it may have been let go before missed was seen
}

func (d *drainer) letGo() {
	// edge(baton): release - what we did with queues and streams comes before the next holder's turn.
	d.baton.Store(false)
	if d.missed.Load() {
		d.work.Wake()
	}
}

// help commits what is in one stream's queue, on behalf of its sender.
func (d *drainer) help(s *Stream) {
	if d.take() {
		d.visit(s)
		d.letGo()
	}
}

// pass visits every stream once, beginning with another one each time, and tells whether there was anything to do.
func (d *drainer) pass() bool {
	if !d.take() {
		return false
	}
	defer d.letGo()
	d.missed.Store(false)
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
			var mark ring.Mark
			if s.cfg.Session != nil {
				mark = s.cfg.Session.Mark(f.first + uint64(f.run.N))
			}
			s.ring.Commit(f.run, s.cfg.ID, f.first, f.arrival, mark)
			samples += uint64(f.run.N)
			failpoint.Hit("drainer/visit/committed")
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
		if s.cfg.FlushAtEnd {
			s.ring.Flush()
		}
		d.owned.Add(-1)
		close(s.done)
	}
	clear(d.streams[len(keep):])
	d.streams = keep
}
