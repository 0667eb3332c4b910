package ring

import "github.com/ingestd/ingestd/internal/failpoint"

// moving marks the move word of a state line as in use; below it stand the row moved to and the row moved from.
const (
	moving   = 1 << 63
	moveBits = 32
)

// closeUp moves the rows that hold samples to the front, in order, and returns how many there are. Rows that do not have arrival 0.
//
// It can be begun again wherever a dead daemon left it: one row moves at a time, the move is noted before it begins, and its source is whole until its arrival is cleared.
func (r *Ring) closeUp(index uint32) uint64 {
	r.moveAgain(index)
	arrivals := r.slotWords(index, r.geo.arrivals)
	to := 0
	for from := range arrivals {
		if arrivals[from] == 0 {
			continue
		}
		if to != from {
			r.moveRow(index, to, from)
		}
		to++
	}
	return uint64(to)
}

// moveAgain finishes the move that a dead daemon had begun.
func (r *Ring) moveAgain(index uint32) {
	w := r.move(index).Load()
	if w&moving == 0 {
		return
	}
	to, from := int(w&^moving>>moveBits), int(w&(1<<moveBits-1))
	if r.slotWords(index, r.geo.arrivals)[from] != 0 {
		r.moveRow(index, to, from)
	}
	r.move(index).Store(0)
}

func (r *Ring) moveRow(index uint32, to, from int) {
	r.move(index).Store(moving | uint64(to)<<moveBits | uint64(from))
	failpoint.Hit("ring/closeup/noted")
	base := r.base(index)
	for leaf, size := range r.layout.Columns {
		at := base + r.geo.columns[leaf]
		copy(r.mem[at+size*int64(to):at+size*int64(to+1)], r.mem[at+size*int64(from):at+size*int64(from+1)])
		failpoint.Hit("ring/closeup/copied")
	}
	for _, column := range [...]int64{r.geo.streams, r.geo.numbers, r.geo.arrivals} { // the arrival last: it says that the row is whole
		w := r.slotWords(index, column)
		w[to] = w[from]
	}
	failpoint.Hit("ring/closeup/arrived")
	r.slotWords(index, r.geo.arrivals)[from] = 0
	failpoint.Hit("ring/closeup/moved")
	r.move(index).Store(0)
}
