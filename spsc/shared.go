package spsc

import (
	"fmt"
	"math/bits"
	"sync/atomic"
)

// The shared form of the queue, as docs/segment-format.md ("Channel") gives it.
const (
	// SharedCapacityMin and SharedCapacityMax bound the descriptors of a shared queue; the capacity is a power of two.
	SharedCapacityMin = 2
	SharedCapacityMax = 1 << 16

	offsetProduced = 0
	offsetConsumed = 64
	offsetWaiting  = 128
	offsetClosed   = 192
	offsetSlots    = 256

	// DescBytes is the size of one descriptor.
	DescBytes = 16
)

// Desc is one descriptor: two words whose meaning is the user's. What a peer sent is to be checked before it is believed.
type Desc struct{ A, B uint64 }

// CorruptError says that the other side of a shared queue stored a value that no correct one can: end that peer.
type CorruptError struct {
	Word     string // "produced" or "consumed"
	Got      uint64
	Min, Max uint64 // what it could have been
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("the peer spoiled its queue: %s reads %d, which can only be from %d to %d; end this peer, the queue cannot be used further",
		e.Word, e.Got, e.Min, e.Max)
}

// SharedBytes returns the length of a shared queue of that capacity, a multiple of 64 from capacity 4 on. The capacity must be legal.
func SharedBytes(capacity int) int { return offsetSlots + DescBytes*capacity }

// FormatShared makes mem an empty queue. Its maker calls it once, before anybody else sees the memory.
func FormatShared(mem []byte, capacity int) error {
	if _, err := viewShared(mem, capacity); err != nil {
		return err
	}
	clear(mem[:SharedBytes(capacity)])
	return nil
}

func checkShared(mem []byte, capacity int) error {
	if capacity < SharedCapacityMin || capacity > SharedCapacityMax || bits.OnesCount(uint(capacity)) != 1 {
		return fmt.Errorf("shared queue of %d descriptors: the capacity must be a power of two from %d to %d", capacity, SharedCapacityMin,
			SharedCapacityMax)
	}
	if len(mem) < SharedBytes(capacity) {
		return fmt.Errorf("shared queue of %d descriptors needs %d bytes, got %d", capacity, SharedBytes(capacity), len(mem))
	}
	return nil
}

// shared is a queue's memory seen as its words. The other process may store anything in any of them at any time, so each load is
// taken into a local and checked before it is used.
type shared struct {
	produced *atomic.Uint64
	consumed *atomic.Uint64
	waiting  *atomic.Uint32
	closed   *atomic.Uint32
	slots    []Desc
}

// Producer is the pushing side of a shared queue, used by one goroutine.
type Producer struct {
	shared
	at           uint64 // our own count: what the memory says of it is never read back
	consumedSeen uint64
}

// NewProducer returns the producing side of a queue that FormatShared made.
func NewProducer(mem []byte, capacity int) (*Producer, error) {
	s, err := viewShared(mem, capacity)
	if err != nil {
		return nil, err
	}
	return &Producer{shared: s}, nil
}

// TryPush pushes as many of items as there is room for and returns how many those were. Afterwards the caller looks at
// ConsumerWaiting. The error is a *CorruptError, and then nothing was pushed.
func (p *Producer) TryPush(items []Desc) (int, error) {
	capacity := uint64(len(p.slots))
	if capacity-(p.at-p.consumedSeen) < uint64(len(items)) {
		seen := p.consumed.Load() // edge(shared-consume): acquire - slots below it are ours to overwrite.
		if seen < p.consumedSeen || seen > p.at {
			return 0, &CorruptError{Word: "consumed", Got: seen, Min: p.consumedSeen, Max: p.at}
		}
		p.consumedSeen = seen
	}
	n := int(min(capacity-(p.at-p.consumedSeen), uint64(len(items))))
	if n == 0 {
		return 0, nil
	}
	first := copy(p.slots[p.at&(capacity-1):], items[:n])
	copy(p.slots, items[first:n])
	p.at += uint64(n)
	p.produced.Store(p.at) // edge(shared-produce): release - the descriptors are in their slots before this store is seen.
	return n, nil
}

// Pushed returns how many descriptors were pushed so far.
func (p *Producer) Pushed() uint64 { return p.at }

// Taken returns how many of them the consumer says it is done with. The error is a *CorruptError.
func (p *Producer) Taken() (uint64, error) {
	seen := p.consumed.Load() // edge(shared-consume): acquire - what the consumer did before it stored this count is done.
	if seen < p.consumedSeen || seen > p.at {
		return p.consumedSeen, &CorruptError{Word: "consumed", Got: seen, Min: p.consumedSeen, Max: p.at}
	}
	p.consumedSeen = seen
	return seen, nil
}

// ConsumerWaiting reports whether the consumer sleeps or is about to, so that its eventfd must be written. Asked after a push or
// Close; a hostile consumer can cost its producer useless writes with it, and nothing else.
func (p *Producer) ConsumerWaiting() bool {
	return p.waiting.Load() != 0 // edge(shared-wait): acquire - reading 0 here means that the consumer will see what we stored before.
}

// Close says that nothing follows what was pushed.
func (p *Producer) Close() {
	p.closed.Store(1) // edge(shared-close): release - produced has its last value before this store is seen.
}

// Consumer is the taking side of a shared queue, used by one goroutine.
type Consumer struct {
	shared
	at           uint64 // our own count of the descriptors copied out
	done         uint64 // and of those the producer was told of; at most at
	producedSeen uint64
}

// NewConsumer returns the consuming side of a queue that FormatShared made.
func NewConsumer(mem []byte, capacity int) (*Consumer, error) {
	s, err := viewShared(mem, capacity)
	if err != nil {
		return nil, err
	}
	return &Consumer{shared: s}, nil
}

// TryPop takes up to len(into) descriptors, oldest first, and returns how many there were. Their content is whatever the producer
// wrote. The error is a *CorruptError, and then nothing was taken.
func (c *Consumer) TryPop(into []Desc) (int, error) {
	n, err := c.Peek(into)
	if n > 0 {
		c.Done(n)
	}
	return n, err
}

// Peek is TryPop that does not tell the producer yet: the next Peek goes on behind these, and Done says that so many are dealt with. It is for a queue
// whose consumed count is a promise.
func (c *Consumer) Peek(into []Desc) (int, error) {
	capacity := uint64(len(c.slots))
	if c.producedSeen-c.at < uint64(len(into)) {
		seen := c.produced.Load() // edge(shared-produce): acquire - the descriptors below it are complete.
		if seen < c.producedSeen || seen > c.done+capacity {
			return 0, &CorruptError{Word: "produced", Got: seen, Min: c.producedSeen, Max: c.done + capacity}
		}
		c.producedSeen = seen
	}
	n := int(min(c.producedSeen-c.at, uint64(len(into))))
	if n == 0 {
		return 0, nil
	}
	first := copy(into[:n], c.slots[c.at&(capacity-1):])
	copy(into[first:n], c.slots)
	c.at += uint64(n)
	return n, nil
}

// Done tells the producer that the oldest n descriptors that Peek gave out are dealt with: what was done for them is seen by whoever sees the count. More than
// were given out panics.
func (c *Consumer) Done(n int) {
	if n < 0 || uint64(n) > c.at-c.done {
		panic(fmt.Sprintf("spsc: Done of %d descriptors, %d are looked at and not done", n, c.at-c.done))
	}
	c.done += uint64(n)
	c.consumed.Store(c.done) // edge(shared-consume): release - the descriptors were copied out, and what they ask for was done, before this store is seen.
}

// SetWaiting announces that the consumer is going to sleep, or that it woke. After SetWaiting(true) it must look once more, for
// descriptors and for Closed, before it sleeps.
func (c *Consumer) SetWaiting(waiting bool) {
	var v uint32
	if waiting {
		v = 1
	}
	c.waiting.Store(v) // edge(shared-wait): release - a full fence: what the producer stored before reading 0 here is seen by our next look.
}

// Closed reports whether the producer closed the queue. It has ended when Closed was true before TryPop found nothing.
func (c *Consumer) Closed() bool {
	return c.closed.Load() != 0 // edge(shared-close): acquire - after true, produced has its last value.
}
