package ring

import (
	"fmt"

	"github.com/ingestd/ingestd/internal/failpoint"
)

// Place is a whole place of the segment that one producer fills in place, row by row from row 0 on. It becomes a batch of its own, so a producer that stops
// half-way holds up nobody else's batch. It is a small value; copies mean the same place. One goroutine at a time calls the methods for a place.
type Place struct{ Index uint32 }

// TryLend takes a free place for a stream. It returns false when there is none, when others wait for one, or after Close; Lend tells which.
func (r *Ring) TryLend(stream uint64) (Place, bool) {
	if r.Room.Waiting() > 0 || r.Closed() {
		return Place{}, false
	}
	return r.lend(stream)
}

func (r *Ring) lend(stream uint64) (Place, bool) {
	index, ok := r.free.pop()
	if !ok {
		return Place{}, false
	}
	r.clean(index)
	r.stream(index).Store(stream)
	r.state(index).Store(uint64(Lent))
	failpoint.Hit("ring/lend/lent")
	return Place{index}, true
}

// PlaceColumn returns the bytes of one leaf for all rows of a lent place.
func (v *View) PlaceColumn(p Place, leaf int) []byte {
	n := v.layout.Columns[leaf] * int64(v.layout.BatchSize)
	at := v.base(p.Index) + v.geo.columns[leaf]
	return v.mem[at : at+n : at+n]
}

// PlaceArrivals returns, for each row of a lent place, when it was complete, in Unix nanoseconds; only those of committed rows mean something.
func (v *View) PlaceArrivals(p Place) []uint64 { return v.slotWords(p.Index, v.geo.arrivals) }

// CommitPlace says that n more rows of a lent place, from row on, are filled: samples first, first+1, ... of stream, complete at arrival (Unix nanoseconds, not 0).
// Rows are committed in order; anything else panics.
func (r *Ring) CommitPlace(p Place, row, n int, stream, first, arrival uint64, mark Mark) {
	progress := r.progress(p.Index)
	if have := progress.Load(); State(r.state(p.Index).Load()&stateMask) != Lent || have != uint64(row) || n < 1 || row+n > r.layout.BatchSize {
		panic(fmt.Sprintf("ring: rows %d to %d of place %d are committed, where %d of %d are, in state %v", row, row+n, p.Index, have, r.layout.BatchSize,
			State(r.state(p.Index).Load()&stateMask)))
	}
	r.mark(p.Index, uint32(row), uint32(n), stream, first, arrival)
	failpoint.Hit("ring/place/marked")
	mark.store()
	failpoint.Hit("ring/place/held")
	progress.Store(uint64(row + n))
}

// SettledMark is the mark for the commit that copies rows of a lent place elsewhere: with it, its first rows count as copied.
func (r *Ring) SettledMark(p Place, rows int) Mark {
	return Mark{r.settled(p.Index), uint64(rows)}
}

// PublishPlace makes a lent place the next batch, with its first rows; the rest of them stay empty. Nobody writes to it any more. Nothing of it may have been settled.
func (r *Ring) PublishPlace(p Place, rows int) {
	have, settled := r.progress(p.Index).Load(), r.settled(p.Index).Load()
	if r.state(p.Index).Load() != uint64(Lent) || have != uint64(rows) || rows < 1 || settled != 0 {
		panic(fmt.Sprintf("ring: place %d is published with %d rows, where %d are committed and %d settled", p.Index, rows, have, settled))
	}
	r.stream(p.Index).Store(0)
	failpoint.Hit("ring/place/publish")
	// One store makes it published: until then the successor of a daemon that dies finds it lent, with its rows.
	r.announce(p.Index, uint64(rows))
}

// ReturnPlace frees a lent place. What it held is gone: it was settled, or never committed.
func (r *Ring) ReturnPlace(p Place) {
	if r.Poison {
		r.poison(p.Index)
	}
	// edge(release): release - the producer's writes are done before the place can be taken.
	if !r.state(p.Index).CompareAndSwap(uint64(Lent), uint64(Free)) {
		panic(fmt.Sprintf("ring: place %d is not lent: given back twice, or never lent", p.Index))
	}
	failpoint.Hit("ring/place/returned")
	r.free.push(p.Index)
	r.freed()
}
