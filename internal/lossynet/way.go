package lossynet

import (
	"container/heap"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"time"
)

// heldMax is how many bytes may be on their way in one direction.
const heldMax = 64 << 20

// packet is one on its way.
type packet struct {
	due    time.Time
	number uint64 // in the order in which they were sent
	bytes  []byte
}

// packets is a heap: first what is due first, and of those what was sent first.
type packets []packet

func (p packets) Len() int      { return len(p) }
func (p packets) Swap(i, j int) { p[i], p[j] = p[j], p[i] }
func (p packets) Less(i, j int) bool {
	if !p[i].due.Equal(p[j].due) {
		return p[i].due.Before(p[j].due)
	}
	return p[i].number < p[j].number
}
func (p *packets) Push(x any) { *p = append(*p, x.(packet)) }
func (p *packets) Pop() any {
	last := len(*p) - 1
	one := (*p)[last]
	(*p)[last] = packet{}
	*p = (*p)[:last]
	return one
}

// way is one direction of a link.
type way struct {
	from, to *Side
	Conditions
	running sync.WaitGroup
	news    chan struct{} // a packet is the first that is due

	mu        sync.Mutex
	rng       *rand.Rand
	held      packets
	heldBytes int
	spare     [][]byte  // memory of packets, to be used again
	idleAt    time.Time // when the wire has sent what it was given
	latest    uint64    // number of the latest packet delivered
	stats     Stats
	ended     bool
	err       error // the first one
}

func newWay(from, to *Side, c *Conditions, source rand.Source) *way {
	return &way{from: from, to: to, Conditions: *c, rng: rand.New(source), news: make(chan struct{}, 1)}
}

func (w *way) start() {
	w.running.Go(w.read)
	w.running.Go(w.deliver)
}

func (w *way) snapshot() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// wait waits until the way has ended, which it does when its devices are closed.
func (w *way) wait() error {
	w.running.Wait()
	return w.err
}

// fail keeps the first error that is not the devices' end.
func (w *way) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil && !errors.Is(err, os.ErrClosed) {
		w.err = err
	}
}

// read takes packets from one device, and hands those to the other that need not wait.
func (w *way) read() {
	defer w.end()
	buf := make([]byte, mtu)
	for {
		n, err := w.from.tun.Read(buf)
		if err != nil {
			w.fail(err)
			return
		}
		if n > 0 && buf[0]>>4 == 4 && w.take(buf[:n]) {
			w.write(buf[:n])
		}
	}
}

// end tells deliver that nothing more comes.
func (w *way) end() {
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()
	w.wake()
}

func (w *way) wake() {
	select {
	case w.news <- struct{}{}:
	default:
	}
}

func (w *way) write(b []byte) {
	if _, err := w.to.tun.Write(b); err != nil {
		w.fail(err)
	}
}

// take decides what becomes of a packet, and tells whether it is to be delivered at once.
func (w *way) take(b []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Packets++
	if w.rng.Float64() < w.Loss {
		w.stats.Lost++
		return false
	}
	p := packet{number: w.stats.Packets}
	if w.Delay == 0 && w.Late == 0 && w.Rate == 0 {
		w.count(&p)
		return true
	}
	now := time.Now()
	p.due = now
	if w.Rate > 0 {
		if w.idleAt.Before(now) {
			w.idleAt = now
		}
		if w.idleAt.Sub(now) > w.QueueTime {
			w.stats.Dropped++
			return false
		}
		w.idleAt = w.idleAt.Add(time.Duration(float64(len(b)) / float64(w.Rate) * float64(time.Second)))
		p.due = w.idleAt
	}
	p.due = p.due.Add(w.Delay)
	if w.rng.Float64() < w.Late {
		p.due = p.due.Add(time.Duration(w.rng.Float64() * float64(w.LateBy)))
	}
	if !p.due.After(now) {
		w.count(&p)
		return true
	}
	if w.heldBytes += len(b); w.heldBytes > heldMax {
		w.heldBytes -= len(b)
		w.stats.Dropped++
		return false
	}
	p.bytes = append(w.memory(), b...)
	heap.Push(&w.held, p)
	if w.held[0].number == p.number {
		w.wake()
	}
	return false
}

// count notes that a packet is delivered. Called with mu held.
func (w *way) count(p *packet) {
	w.stats.Delivered++
	if p.number < w.latest {
		w.stats.Overtaken++
	}
	w.latest = max(w.latest, p.number)
}

// memory is for a packet. Called with mu held.
func (w *way) memory() []byte {
	if last := len(w.spare) - 1; last >= 0 {
		b := w.spare[last]
		w.spare = w.spare[:last]
		return b[:0]
	}
	return make([]byte, 0, mtu)
}

// deliver hands packets over when they are due.
func (w *way) deliver() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var due []packet
	for {
		var wait time.Duration
		var ended bool
		due, wait, ended = w.due(due[:0])
		if ended {
			return
		}
		for i := range due {
			w.write(due[i].bytes)
		}
		w.giveBack(due)
		if len(due) > 0 {
			continue // writing takes time
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-w.news:
		}
	}
}

// due returns the packets whose time has come, appended to some, and else how long it is until the next one's has.
func (w *way) due(some []packet) (due []packet, wait time.Duration, ended bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	for len(w.held) > 0 && !w.held[0].due.After(now) {
		p := heap.Pop(&w.held).(packet)
		w.count(&p)
		w.heldBytes -= len(p.bytes)
		some = append(some, p)
	}
	wait = time.Hour
	if len(w.held) > 0 {
		wait = w.held[0].due.Sub(now)
	}
	return some, wait, w.ended
}

// giveBack keeps the memory of packets that are delivered for others.
func (w *way) giveBack(done []packet) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range done {
		w.spare = append(w.spare, done[i].bytes)
		done[i] = packet{}
	}
}
