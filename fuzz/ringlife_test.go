package fuzz

import (
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
)

// life is a ring, its model, and what is out of both.
type life struct {
	t     *testing.T
	ring  *ring.Ring
	peer  *ring.View // of the same memory
	model *model
	runs  []pending
	held  []heldBatch
	next  [3]uint64 // number of the next sample of each stream
	seen  [3]uint64 // 1 + the number of the last sample of each stream that was leased
	due   int       // samples committed and not leased
}

// pending is a run that is reserved for samples of a stream. A stream reserves in the order of its samples; it may commit them in another, or give some up.
type pending struct {
	ring.Run
	stream, first uint64
}

type heldBatch struct {
	batch ring.Batch
	rows  []modelSlot
}

// lifeShapes are the rings that an input chooses from by its first byte: every wrap happens soon.
var lifeShapes = []struct {
	batchSize, batches int
	columns            []int64
}{
	{1, 2, []int64{8}},
	{2, 2, []int64{8, 3}},
	{3, 2, []int64{1, 16, 5}},
	{4, 3, []int64{24}},
	{7, 4, []int64{9, 64}},
	{64, 2, []int64{1}},
}

func newLife(t *testing.T, shape byte) *life {
	s := lifeShapes[int(shape)%len(lifeShapes)]
	l := ring.Layout{BatchSize: s.batchSize, Batches: s.batches, Columns: s.columns, Spec: []byte("{}"), Table: "fuzz", Created: time.Unix(1, 0)}
	size, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	mem := ring.AlignedBytes(size)
	r, err := ring.Format(mem, l)
	if err != nil {
		t.Fatal(err)
	}
	r.Poison = true
	peer, err := ring.OpenView(mem)
	if err != nil {
		t.Fatal(err)
	}
	return &life{t: t, ring: r, peer: peer, model: newModel(s.batchSize, s.batches)}
}

// FuzzRingLife reads its input as a shape and a list of operations of two bytes each: what, and with what. After each, the ring and its model agree on the
// cursors and on every state line; what is leased is what was committed, byte for byte, in the order of each stream, and stays so until it is released;
// at the end every committed sample was leased, and every place is free.
func FuzzRingLife(f *testing.F) {
	f.Add([]byte{1, 0, 1, 1, 0, 0, 1, 1, 0, 4, 0, 5, 0})             // two runs, committed, leased, released
	f.Add([]byte{3, 0, 2, 0, 3, 2, 0, 1, 0, 4, 0, 5, 0})             // the first of two runs is abandoned: its rows are taken out
	f.Add([]byte{3, 0, 2, 0, 3, 2, 1, 1, 0, 3, 0, 4, 0})             // the last one is: its slots go to the next
	f.Add([]byte{2, 0, 1, 3, 0, 2, 0, 0, 2, 1, 0, 4, 0, 5, 0})       // flushed, then abandoned: an empty batch
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 4, 0, 4, 0, 5, 1}) // full; committed and released out of order
	f.Add([]byte{4, 0, 6, 6, 3, 2, 0, 1, 0, 4, 0, 5, 0})             // a run is split, and only its second part committed
	f.Add([]byte{5, 0, 63, 1, 0, 0, 40, 1, 0, 3, 0, 4, 0, 4, 0, 0, 1, 5, 0, 0, 1, 2, 0})
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 || len(input) > 4096 {
			return
		}
		l := newLife(t, input[0])
		for ops := input[1:]; len(ops) >= 2; ops = ops[2:] {
			l.step(ops[0], int(ops[1]))
			l.compare()
		}
		l.finish()
	})
}

func (l *life) step(op byte, arg int) {
	switch op % 7 {
	case 0:
		l.reserve(arg%l.model.size+1+arg/200, arg) // now and then more than a batch
	case 1:
		l.commit(arg)
	case 2:
		if run, ok := take(&l.runs, arg); ok {
			l.ring.Abandon(run.Run)
			l.model.abandon(run.Run)
		}
	case 6:
		l.split(arg)
	case 3:
		if got, want := l.ring.Flush(), l.model.flush(); got != want {
			l.t.Fatalf("Flush() = %v, want %v", got, want)
		}
	case 4:
		l.lease()
	case 5:
		if h, ok := take(&l.held, arg); ok {
			l.verify(h)
			l.ring.Release(h.batch)
			l.model.release(int(h.batch.Number))
		}
	}
}

// take removes one of the things that are out.
func take[T any](from *[]T, arg int) (T, bool) {
	var zero T
	if len(*from) == 0 {
		return zero, false
	}
	i := arg % len(*from)
	v := (*from)[i]
	*from = append((*from)[:i:i], (*from)[i+1:]...)
	return v, true
}

func (l *life) reserve(n, arg int) {
	at, want, wantOK := l.model.reserve(n)
	run, ok := l.ring.TryReserve(n)
	if ok != wantOK {
		l.t.Fatalf("TryReserve(%d) = %v, want %v", n, ok, wantOK)
	}
	if !ok {
		return
	}
	place := l.model.batches[at/l.model.size].place
	if int(run.Position) != at || int(run.N) != want || int(run.Row) != at%l.model.size || int(run.Index) != place {
		l.t.Fatalf("TryReserve(%d) = %+v, want %d slots at %d in place %d", n, run, want, at, place)
	}
	for c, size := range l.ring.Layout().Columns {
		if got := len(l.ring.RunColumn(run, c)); int64(got) != size*int64(run.N) {
			l.t.Fatalf("column %d of a run of %d has %d bytes", c, run.N, got)
		}
	}
	stream := arg % len(l.next)
	l.runs = append(l.runs, pending{run, uint64(stream), l.next[stream]})
	l.next[stream] += uint64(run.N)
}

// split makes two runs of one. Either may be empty, and then is nothing.
func (l *life) split(arg int) {
	whole, ok := take(&l.runs, arg)
	if !ok {
		return
	}
	first, second := whole.Split(arg % (int(whole.N) + 1))
	for _, part := range []pending{{first, whole.stream, whole.first}, {second, whole.stream, whole.first + uint64(first.N)}} {
		if part.N > 0 {
			l.runs = append(l.runs, part)
		}
	}
}

func (l *life) commit(arg int) {
	p, ok := take(&l.runs, arg)
	if !ok {
		return
	}
	run, stream, first := p.Run, p.stream, p.first
	l.due += int(run.N)
	for c, size := range l.ring.Layout().Columns {
		column := l.ring.RunColumn(run, c)
		for i := range int64(run.N) {
			proof.Leaf(column[i*size:(i+1)*size], spec.U8, stream, first+uint64(i), c)
		}
	}
	l.ring.Commit(run, stream, first, 1+first, ring.Mark{})
	l.model.commit(run, stream, first, 1+first)
}

func (l *life) lease() {
	number, rows, wantOK := l.model.lease()
	b, ok := l.ring.TryLease()
	if ok != wantOK {
		l.t.Fatalf("TryLease() = %v, want %v", ok, wantOK)
	}
	if !ok {
		return
	}
	if int(b.Number) != number || b.Count != len(rows) {
		l.t.Fatalf("leased batch %d of %d rows, want %d of %d", b.Number, b.Count, number, len(rows))
	}
	for _, h := range l.held {
		if h.batch.Index == b.Index {
			l.t.Fatalf("batches %d and %d are both held in place %d", h.batch.Number, b.Number, b.Index)
		}
	}
	h := heldBatch{b, rows}
	l.verify(h)
	for _, row := range rows {
		if row.number < l.seen[row.stream] {
			l.t.Fatalf("sample %d of stream %d came after sample %d", row.number, row.stream, l.seen[row.stream]-1)
		}
		l.seen[row.stream] = row.number + 1
	}
	l.due -= len(rows)
	l.held = append(l.held, h)
}

// verify checks every word and byte of a held batch.
func (l *life) verify(h heldBatch) {
	streams, numbers, arrivals := h.batch.Streams(), h.batch.Numbers(), h.batch.Arrivals()
	for i, want := range h.rows {
		if streams[i] != want.stream || numbers[i] != want.number || arrivals[i] != want.arrival {
			l.t.Fatalf("batch %d row %d is sample %d of stream %d, arrived %d; want %+v", h.batch.Number, i, numbers[i], streams[i], arrivals[i], want)
		}
		for c, size := range l.ring.Layout().Columns {
			at := int64(i) * size
			if bad := proof.CheckLeaf(h.batch.Column(c)[at:at+size], spec.U8, want.stream, want.number, c); bad >= 0 {
				l.t.Fatalf("batch %d row %d column %d: byte %d is wrong", h.batch.Number, i, c, bad)
			}
		}
	}
	told, err := l.peer.Batch(h.batch.Number, h.batch.Index, h.batch.Count)
	if err != nil || told.Count != h.batch.Count || string(told.Column(0)) != string(h.batch.Column(0)) {
		l.t.Fatalf("a peer that is told of batch %d gets %v", h.batch.Number, err)
	}
}

// compare checks the cursors and the state lines.
func (l *life) compare() {
	if got := int(l.ring.Reserved()); got != l.model.reserved {
		l.t.Fatalf("reserved is %d, want %d", got, l.model.reserved)
	}
	if got, want := int(l.ring.Published()), l.model.published(); got != want {
		l.t.Fatalf("published is %d, want %d", got, want)
	}
	if got := int(l.ring.Leased()); got != l.model.leased {
		l.t.Fatalf("leased is %d, want %d", got, l.model.leased)
	}
	for place := range l.model.places {
		if got, want := l.peer.BatchState(place), l.model.line(place); got != want {
			l.t.Fatalf("the line of place %d says %+v, want %+v", place, got, want)
		}
	}
}

// finish commits what is out, and sees that the ring comes back to empty with every place free.
func (l *life) finish() {
	for len(l.runs) > 0 {
		l.step(1, 0)
	}
	l.step(3, 0)
	for len(l.held) > 0 {
		l.step(5, 0)
	}
	for l.model.leased < l.model.published() {
		l.step(4, 0)
		if len(l.held) > 0 {
			l.step(5, 0)
		}
		l.compare()
	}
	if l.due != 0 {
		l.t.Fatalf("%d samples were committed and never leased", l.due)
	}
	for range l.model.places * l.model.size {
		l.step(0, 0)
	}
	if n := len(l.runs); n != l.model.places*l.model.size {
		l.t.Fatalf("an empty ring of %d slots has room for %d", l.model.places*l.model.size, n)
	}
	l.compare()
}
