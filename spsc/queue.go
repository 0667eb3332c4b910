package spsc

import (
	"fmt"
	"reflect"
	"sync/atomic"

	"github.com/ingestd/ingestd/internal/park"
)

// CapacityMax is the most elements a Queue holds.
const CapacityMax = 1 << 30

// lineBytes keeps two words from sharing a cache line; two lines of 64 bytes, since the prefetcher of x86 fetches them in pairs.
const lineBytes = 128

// Queue is a bounded queue from one producing goroutine to one consuming goroutine.
type Queue[T any] struct {
	_ [lineBytes]byte

	// The producer's line.
	produced     atomic.Uint64 // elements pushed so far; written by the producer only
	consumedSeen uint64        // consumed as the producer last read it

	_ [lineBytes - 16]byte

	// The consumer's line.
	consumed     atomic.Uint64 // elements taken so far; written by the consumer only
	producedSeen uint64        // produced as the consumer last read it

	_ [lineBytes - 16]byte

	// Read by both sides and seldom written.
	slots    []T
	mask     uint64
	scrub    bool // T holds pointers: overwrite what was taken, so that the collector may have it
	closed   atomic.Bool
	notify   atomic.Pointer[park.Event]
	pushed   park.Event // the consumer waits here
	popped   park.Event // the producer waits here
	pushSeat *park.Waiter
	popSeat  *park.Waiter
}

// New returns an empty queue for capacity elements, a power of two from 2 to CapacityMax; anything else panics.
func New[T any](capacity int) *Queue[T] {
	if capacity < 2 || capacity > CapacityMax || capacity&(capacity-1) != 0 {
		panic(fmt.Sprintf("spsc: capacity %d is not a power of two from 2 to %d", capacity, CapacityMax))
	}
	return &Queue[T]{
		slots:    make([]T, capacity),
		mask:     uint64(capacity - 1),
		scrub:    holdsPointers(reflect.TypeFor[T]()),
		pushSeat: park.NewWaiter(),
		popSeat:  park.NewWaiter(),
	}
}

// Cap returns how many elements the queue can hold.
func (q *Queue[T]) Cap() int { return len(q.slots) }

// Len returns how many elements the queue holds. The producer sees at least, the consumer at most, what is really there; to
// anybody else it is a snapshot.
func (q *Queue[T]) Len() int {
	consumed := q.consumed.Load() // first: it cannot pass a produced that is read later
	return int(min(q.produced.Load()-consumed, uint64(len(q.slots))))
}

// Closed reports whether Close was called. A queue is finished when Closed was true before Len was read as 0.
func (q *Queue[T]) Closed() bool {
	return q.closed.Load() // edge(queue-close): acquire - after true, produced counts every element there will ever be.
}

// Close says that nothing follows. It is the producer's to call, once its last push returned; what is in the queue can still be
// taken. Closing twice is no error.
func (q *Queue[T]) Close() {
	q.closed.Store(true) // edge(queue-close): release - every element was pushed before this store is seen.
	q.wakeConsumer()
	q.popped.Wake()
}

// NotifyPush names an event that is woken on every push and on Close, for a consumer that serves many queues. It is woken at once,
// so that what was pushed before the call is not missed. Nil ends it.
func (q *Queue[T]) NotifyPush(ev *park.Event) {
	q.notify.Store(ev)
	if ev != nil {
		ev.Wake()
	}
}

// TryPush pushes as many of items as there is room for, in order and with one publishing store, and returns how many those were. A
// closed queue takes none.
func (q *Queue[T]) TryPush(items []T) int {
	if q.closed.Load() {
		return 0
	}
	at := q.produced.Load()
	room := uint64(len(q.slots)) - (at - q.consumedSeen)
	if room < uint64(len(items)) {
		q.consumedSeen = q.consumed.Load() // edge(queue-consume): acquire - slots below it are ours to overwrite.
		room = uint64(len(q.slots)) - (at - q.consumedSeen)
	}
	n := int(min(room, uint64(len(items))))
	if n == 0 {
		return 0
	}
	first := copy(q.slots[at&q.mask:], items[:n])
	copy(q.slots, items[first:n])
	q.produced.Store(at + uint64(n)) // edge(queue-produce): release - the elements are in their slots before this store is seen.
	q.wakeConsumer()
	return n
}

// Put pushes one element and reports whether there was room for it in an open queue. It does not wait.
func (q *Queue[T]) Put(v T) bool {
	if q.closed.Load() {
		return false
	}
	at := q.produced.Load()
	if at-q.consumedSeen >= uint64(len(q.slots)) {
		q.consumedSeen = q.consumed.Load() // edge(queue-consume): acquire - slots below it are ours to overwrite.
		if at-q.consumedSeen >= uint64(len(q.slots)) {
			return false
		}
	}
	q.slots[at&q.mask] = v
	q.produced.Store(at + 1) // edge(queue-produce): release - the element is in its slot before this store is seen.
	q.wakeConsumer()
	return true
}

// TryPop takes up to len(into) elements, oldest first, and returns how many there were.
func (q *Queue[T]) TryPop(into []T) int {
	at := q.consumed.Load()
	held := q.producedSeen - at
	if held < uint64(len(into)) {
		q.producedSeen = q.produced.Load() // edge(queue-produce): acquire - the elements below it are complete.
		held = q.producedSeen - at
	}
	n := int(min(held, uint64(len(into))))
	if n == 0 {
		return 0
	}
	i := int(at & q.mask)
	first := copy(into[:n], q.slots[i:])
	copy(into[first:n], q.slots)
	if q.scrub {
		clear(q.slots[i : i+first])
		clear(q.slots[:n-first])
	}
	q.consumed.Store(at + uint64(n)) // edge(queue-consume): release - the elements were copied out before this store is seen.
	q.popped.Wake()
	return n
}

// Take takes one element and reports whether there was one. It does not wait.
func (q *Queue[T]) Take() (T, bool) {
	at := q.consumed.Load()
	var zero T
	if at == q.producedSeen {
		q.producedSeen = q.produced.Load() // edge(queue-produce): acquire - the elements below it are complete.
		if at == q.producedSeen {
			return zero, false
		}
	}
	slot := &q.slots[at&q.mask]
	v := *slot
	if q.scrub {
		*slot = zero
	}
	q.consumed.Store(at + 1) // edge(queue-consume): release - the element was copied out before this store is seen.
	q.popped.Wake()
	return v, true
}

// wakeConsumer costs two loads when nobody sleeps.
func (q *Queue[T]) wakeConsumer() {
	q.pushed.Wake()
	if ev := q.notify.Load(); ev != nil {
		ev.Wake()
	}
}

func holdsPointers(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Bool, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Uint, reflect.Uint8,
		reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr, reflect.Float32, reflect.Float64, reflect.Complex64,
		reflect.Complex128:
		return false
	case reflect.Array:
		return t.Len() > 0 && holdsPointers(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if holdsPointers(t.Field(i).Type) {
				return true
			}
		}
		return false
	default:
		return true
	}
}
