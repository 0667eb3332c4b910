package fuzz

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
)

// Offsets of a shared queue's words, from docs/segment-format.md ("Channel").
const (
	queueProduced = 0
	queueConsumed = 64
	queueWaiting  = 128
	queueClosed   = 192
	queueSlots    = 256
)

// sharedQueue is both ends of one queue, and what each of them may know.
type sharedQueue struct {
	t        *testing.T
	mem      []byte
	guard    []byte // around the queue: nobody's
	capacity uint64
	producer *spsc.Producer
	consumer *spsc.Consumer

	// The model: each side's own count, and the other's as that side saw it last.
	pushed, consumedSeen uint64
	popped, producedSeen uint64
}

// FuzzSharedQueue reads its input as operations of ten bytes: what, with how many, and a word. Operation 2 is the hostile one: it overwrites a word of the
// shared memory. Whatever it does, each side believes of the other's count only what can be, says which value cannot, and loses or repeats nothing of its own.
func FuzzSharedQueue(f *testing.F) {
	op := func(what, n byte, word uint64) []byte { return binary.LittleEndian.AppendUint64([]byte{what, n}, word) }
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	f.Add(byte(1), join(op(0, 3, 0), op(1, 2, 0), op(0, 9, 0), op(1, 9, 0)))
	for _, word := range []uint64{1, 3, 4, 5, 6, 9, 1 << 63} { // counts on both sides of what can be
		f.Add(byte(1), join(op(0, 3, 0), op(1, 0, 0), op(2, queueConsumed/8, word), op(0, 7, 0), op(2, queueConsumed/8, 1), op(0, 7, 0)))
		f.Add(byte(1), join(op(0, 3, 0), op(1, 0, 0), op(2, queueProduced/8, word), op(1, 7, 0), op(2, queueProduced/8, 4), op(1, 7, 0)))
	}
	f.Add(byte(0), join(op(0, 1, 0), op(1, 0, 0), op(0, 0, 0), op(2, queueConsumed/8, 0), op(0, 3, 0)))
	for _, at := range []byte{queueProduced / 8, queueConsumed / 8, queueWaiting / 8, queueClosed / 8, queueSlots / 8} {
		for _, word := range []uint64{0, 1, 2, 5, 1 << 32, ^uint64(0)} {
			f.Add(byte(1), join(op(0, 3, 0), op(1, 1, 0), op(2, at, word), op(1, 9, 0), op(0, 9, 0), op(1, 9, 0)))
		}
	}
	f.Fuzz(func(t *testing.T, size byte, ops []byte) {
		q := newSharedQueue(t, 2<<(size%4))
		for ; len(ops) >= 10; ops = ops[10:] {
			word := binary.LittleEndian.Uint64(ops[2:])
			switch n := int(ops[1]); ops[0] % 3 {
			case 0:
				q.push(uint64(n)%(2*q.capacity)+1, word)
			case 1:
				q.pop(uint64(n)%(2*q.capacity) + 1)
			case 2:
				binary.LittleEndian.PutUint64(q.mem[uint64(n)*8%uint64(len(q.mem))/8*8:], word)
			}
		}
		for _, b := range append(q.guard[:64:64], q.guard[64+len(q.mem):]...) {
			if b != 0 {
				t.Fatal("somebody wrote beside the queue")
			}
		}
	})
}

func newSharedQueue(t *testing.T, capacity int) *sharedQueue {
	size := spsc.SharedBytes(capacity)
	guard := ring.AlignedBytes(int64(size + 128))
	mem := guard[64 : 64+size]
	if err := spsc.FormatShared(mem, capacity); err != nil {
		t.Fatal(err)
	}
	producer, err := spsc.NewProducer(mem, capacity)
	if err != nil {
		t.Fatal(err)
	}
	consumer, err := spsc.NewConsumer(mem, capacity)
	if err != nil {
		t.Fatal(err)
	}
	return &sharedQueue{t: t, mem: mem, guard: guard, capacity: uint64(capacity), producer: producer, consumer: consumer}
}

func (q *sharedQueue) word(at int) uint64 { return binary.LittleEndian.Uint64(q.mem[at:]) }

func (q *sharedQueue) slot(number uint64) spsc.Desc {
	at := queueSlots + int(number%q.capacity)*spsc.DescBytes
	return spsc.Desc{A: q.word(at), B: q.word(at + 8)}
}

// believe is how a side reads the other's count when it runs out: from least to most can be, anything else is an error and changes nothing.
func (q *sharedQueue) believe(seen *uint64, word string, at int, least, most uint64) (want error) {
	got := q.word(at)
	if got < least || got > most {
		return &spsc.CorruptError{Word: word, Got: got, Min: least, Max: most}
	}
	*seen = got
	return nil
}

func (q *sharedQueue) compare(what string, n int, err error, wantN uint64, want error) {
	var got *spsc.CorruptError
	if want == nil && err != nil || want != nil && (!errors.As(err, &got) || *got != *want.(*spsc.CorruptError)) || uint64(n) != wantN {
		q.t.Fatalf("%s = %d, %v; want %d, %v", what, n, err, wantN, want)
	}
}

func (q *sharedQueue) push(n, word uint64) {
	items := make([]spsc.Desc, n)
	for i := range items {
		items[i] = spsc.Desc{A: q.pushed + uint64(i), B: word}
	}
	var want error
	if q.capacity-(q.pushed-q.consumedSeen) < n {
		want = q.believe(&q.consumedSeen, "consumed", queueConsumed, q.consumedSeen, q.pushed)
	}
	room := uint64(0)
	if want == nil {
		room = min(n, q.capacity-(q.pushed-q.consumedSeen))
	}
	got, err := q.producer.TryPush(items)
	q.compare("TryPush", got, err, room, want)
	for i, d := range items[:got] {
		if have := q.slot(q.pushed + uint64(i)); have != d {
			q.t.Fatalf("descriptor %d was pushed as %+v and lies there as %+v", q.pushed+uint64(i), d, have)
		}
	}
	if q.pushed += uint64(got); q.producer.Pushed() != q.pushed || got > 0 && q.word(queueProduced) != q.pushed {
		q.t.Fatalf("%d were pushed; the producer says %d, the word %d", q.pushed, q.producer.Pushed(), q.word(queueProduced))
	}
	if q.producer.ConsumerWaiting() != (uint32(q.word(queueWaiting)) != 0) {
		q.t.Fatalf("waiting is %v, the word %#x", q.producer.ConsumerWaiting(), q.word(queueWaiting))
	}
}

func (q *sharedQueue) pop(n uint64) {
	var want error
	if q.producedSeen-q.popped < n {
		want = q.believe(&q.producedSeen, "produced", queueProduced, q.producedSeen, q.popped+q.capacity)
	}
	there := uint64(0)
	if want == nil {
		there = min(n, q.producedSeen-q.popped)
	}
	into := make([]spsc.Desc, n)
	got, err := q.consumer.TryPop(into)
	q.compare("TryPop", got, err, there, want)
	for i, d := range into[:got] {
		if have := q.slot(q.popped + uint64(i)); d != have {
			q.t.Fatalf("descriptor %d is %+v, its place holds %+v", q.popped+uint64(i), d, have)
		}
	}
	if q.popped += uint64(got); got > 0 && q.word(queueConsumed) != q.popped {
		q.t.Fatalf("%d were taken, the word says %d", q.popped, q.word(queueConsumed))
	}
	if q.consumer.Closed() != (uint32(q.word(queueClosed)) != 0) {
		q.t.Fatalf("closed is %v, the word %#x", q.consumer.Closed(), q.word(queueClosed))
	}
}
