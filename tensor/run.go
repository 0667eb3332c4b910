package tensor

import "slices"

// piece is a part of a tensor that was put, and where it lies.
type piece struct {
	flat int64
	data []byte
}

func (p piece) end() int64 { return p.flat + int64(len(p.data)) }

// run is what was put and not cut yet: pieces that follow each other without anything but gaps between tensors, in ascending or descending order.
type run struct {
	list       []piece // in the order in which they were put
	first      int     // what is before it was cut
	lo, hi     int64   // flat range that is left
	descending bool
}

func (r *run) reset() {
	clear(r.list) // the producer's memory is not held longer than it must be
	*r = run{list: r.list[:0]}
}

// end is where the last byte ends; false if nothing is left.
func (r *run) end() (int64, bool) { return r.hi, r.hi > r.lo }

// turns says whether the run's order is still open.
func (r *run) turns() bool { return len(r.list)-r.first == 1 }

// goesOn says whether a piece goes on where the run ends, or, if that is the end of a tensor, after the gap that follows.
func (r *run) goesOn(p piece, whole func(end int64) bool) bool {
	return r.hi > r.lo && (!r.descending || r.turns()) && (p.flat == r.hi || p.flat == roundUp(r.hi) && whole(r.hi))
}

// precedes says whether the run goes on after a piece.
func (r *run) precedes(p piece, whole func(end int64) bool) bool {
	return r.hi > r.lo && (r.descending || r.turns()) && p.flat%Align == 0 && roundUp(p.end()) == r.lo && whole(p.end()) && whole(r.hi)
}

// overlaps says whether a piece has bytes that the run has.
func (r *run) overlaps(p piece) bool { return r.hi > r.lo && p.flat < r.hi && p.end() > r.lo }

// within is how many bytes of a flat range the run has.
func (r *run) within(from, end int64) int64 { return max(min(end, r.hi)-max(from, r.lo), 0) }

// bytes is how long the run is. In a descending one all pieces end as chunks may, so what follows the last one is part of it: chunks are then whole blocks.
func (r *run) bytes() int64 {
	if r.descending {
		return roundUp(r.hi) - r.lo
	}
	return r.hi - r.lo
}

// add adds a piece that goes on, or precedes, or is the first, of a run that is thought to descend or not.
func (r *run) add(p piece, descending bool) {
	switch {
	case r.hi == r.lo:
		*r = run{list: r.list[:0], lo: p.flat, hi: p.end(), descending: descending}
	case p.flat < r.lo:
		r.lo, r.descending = p.flat, true
	default:
		r.hi, r.descending = p.end(), false
	}
	r.list = append(r.list, p)
}

var zeros [Align]byte

// take cuts so many bytes off the side that was put first, at a multiple of Align or all there is, and returns where they lie. The parts, and what lies between, go into the arena's list.
func (r *run) take(bytes int64, into *arena) (flat int64) {
	if r.descending {
		return r.takeLast(bytes, into)
	}
	flat = r.lo
	for stop := flat + bytes; r.lo < stop; {
		p := &r.list[r.first]
		n := min(int64(len(p.data)), stop-p.flat)
		part := p.data[:n]
		p.flat, p.data = p.flat+n, p.data[n:]
		r.lo = p.flat
		gap := int64(0)
		if len(p.data) == 0 {
			next := stop
			if r.first++; r.first < len(r.list) {
				next = min(stop, r.list[r.first].flat)
			}
			gap = next - r.lo
			r.lo = next
		}
		into.join(part)
		into.join(zeros[:gap])
	}
	r.compact()
	return flat
}

func (r *run) takeLast(bytes int64, into *arena) (flat int64) {
	flat = roundUp(r.hi) - bytes
	k := r.first
	for k < len(r.list) && r.list[k].flat > flat {
		k++
	}
	// Piece k holds the byte at flat, since it starts a block of some tensor. What is before it is taken whole.
	stop := roundUp(r.hi)
	for j := k; j >= r.first; j-- {
		p := &r.list[j]
		part, next := p.data, stop
		if j > r.first {
			next = r.list[j-1].flat
		}
		if p.flat < flat {
			part = p.data[flat-p.flat:]
			p.data = p.data[:flat-p.flat]
			into.join(part)
			into.join(zeros[:next-flat-int64(len(part))])
			continue
		}
		into.join(part)
		into.join(zeros[:next-p.end()])
	}
	if r.list[k].flat == flat {
		k++
	}
	r.first, r.hi = k, flat
	r.compact()
	return flat
}

// compact forgets what was cut, so that the list does not grow with the transaction.
func (r *run) compact() {
	if r.first == len(r.list) || r.first >= 64 && 2*r.first >= len(r.list) {
		r.list = slices.Delete(r.list, 0, r.first)
		r.first = 0
	}
}
