package ring

import (
	"fmt"
	"sync/atomic"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/internal/park"
)

// Ring is the writing side of a segment, and the side that hands batches out. One process owns it.
type Ring struct {
	View

	// At Space wait writers that found the ring full, at Room those that found no place to be lent; one of each is woken for each place that comes
	// free. At Ready wait trainers that found nothing.
	Space, Room, Ready park.Event

	// Full, if set, is called when a writer is about to wait for a place, from its goroutine and with no lock held. Set before use.
	Full func()

	// Cursors in the segment. Several goroutines move each of them, atomically; a position is moved by exactly one.
	reserved, published, leased *atomic.Uint64
	sealed                      atomic.Uint64 // openings whose batches were published
	groups                      atomic.Uint64 // one bit for each entry of the group table that is in use

	// opened[opening%Batches] is (opening+1)<<16 | place, for the newest batch that was opened for shared filling with that remainder, and
	// numbered[number%Batches] is the same for published batches. At most Batches batches are live, and a batch is sealed, or leased, before its word
	// can be taken over, so until then the word is its own.
	opened, numbered []atomic.Uint64
	free             places
	tables           tables

	// Poison makes Release overwrite the batch with 0xCC, so that a slice kept too long shows as junk at once. For tests; set before use.
	Poison bool
}

const placeBits = 16

// Run is a row of slots inside one batch that its holder may fill. It is a small value; copies mean the same slots.
type Run struct {
	Position uint64 // of the first slot
	Index    uint32 // place of the batch
	Row      uint32 // of the first slot in the batch
	N        uint32 // slots
}

// Split cuts the run after n slots, 0 <= n <= N. Either part may be empty; an empty run is neither committed nor abandoned.
func (run Run) Split(n int) (front, rest Run) {
	k := uint32(n)
	front, rest = run, run
	front.N = k
	rest.Position += uint64(k)
	rest.Row += k
	rest.N -= k
	return front, rest
}

// Format writes the header and empty states into mem, whose length must be at least layout.Bytes and whose start a multiple of 64, and returns its Ring.
func Format(mem []byte, layout Layout) (*Ring, error) {
	g, err := layout.geometry()
	if err != nil {
		return nil, err
	}
	if err := checkMemory(mem); err != nil {
		return nil, err
	}
	if int64(len(mem)) < g.segment {
		return nil, formatError("%d bytes of memory for a segment of %d", len(mem), g.segment)
	}
	layout.writeHeader(mem, g)
	v, err := OpenView(mem)
	if err != nil {
		return nil, fmt.Errorf("reading back the header just written: %w", err)
	}
	r := over(v)
	for i := range v.layout.Batches {
		r.free.push(uint32(v.layout.Batches - 1 - i))
	}
	return r, nil
}

// over makes a Ring with nothing in it and no free place.
func over(v *View) *Ring {
	r := &Ring{
		View:      *v,
		reserved:  word(v.mem, offReserved),
		published: word(v.mem, offPublished),
		leased:    word(v.mem, offLeased),
		opened:    make([]atomic.Uint64, v.layout.Batches),
		numbered:  make([]atomic.Uint64, v.layout.Batches),
	}
	r.free.next = make([]atomic.Uint32, v.layout.Batches)
	r.tables.open = make([]bool, v.layout.Sessions)
	return r
}

func (r *Ring) state(index uint32) *atomic.Uint64    { return word(r.mem, r.line(index)) }
func (r *Ring) progress(index uint32) *atomic.Uint64 { return word(r.mem, r.line(index)+lineProgress) }
func (r *Ring) count(index uint32) *atomic.Uint64    { return word(r.mem, r.line(index)+lineCount) }
func (r *Ring) move(index uint32) *atomic.Uint64     { return word(r.mem, r.line(index)+lineMove) }
func (r *Ring) pending(index uint32) *atomic.Uint64  { return word(r.mem, r.line(index)+linePending) }
func (r *Ring) stream(index uint32) *atomic.Uint64   { return word(r.mem, r.line(index)+lineStream) }
func (r *Ring) settled(index uint32) *atomic.Uint64  { return word(r.mem, r.line(index)+lineSettled) }

func (r *Ring) openedOf(opening uint64) *atomic.Uint64 {
	return &r.opened[opening%uint64(len(r.opened))]
}

func (r *Ring) numberedOf(number uint64) *atomic.Uint64 {
	return &r.numbered[number%uint64(len(r.numbered))]
}

// TryReserve takes up to n slots, all in one batch: as many as are left in the batch being filled. It returns false when the ring is full.
func (r *Ring) TryReserve(n int) (Run, bool) {
	size := uint64(r.layout.BatchSize)
	for {
		p := r.reserved.Load()
		opening := p / size
		row := p - opening*size
		opened := r.openedOf(opening)
		// edge(open): acquire - after this load names our batch, its place is clean.
		w := opened.Load()
		if w>>placeBits != opening+1 {
			if r.reserved.Load() == p && !r.open(opening, opened, w) {
				return Run{}, false
			}
			continue
		}
		m := min(uint64(n), size-row)
		if r.reserved.CompareAndSwap(p, p+m) {
			failpoint.Hit("ring/reserve/taken")
			return Run{Position: p, Index: uint32(w & (1<<placeBits - 1)), Row: uint32(row), N: uint32(m)}, true
		}
	}
}

// open binds an opening to a free place. It returns false when there is none; true says to try again, whoever bound it.
func (r *Ring) open(opening uint64, opened *atomic.Uint64, was uint64) bool {
	index, ok := r.free.pop()
	if !ok {
		return opened.Load() != was // somebody else may have bound it with the last place
	}
	r.clean(index)
	r.state(index).Store(opening<<stateBits | uint64(Open))
	failpoint.Hit("ring/open/stated")
	// edge(open): release - the place is clean before this word says whose it is.
	if !opened.CompareAndSwap(was, (opening+1)<<placeBits|uint64(index)) {
		r.state(index).Store(uint64(Free))
		r.free.push(index)
	}
	// A writer that came while we held the last place found none.
	r.freed()
	return true
}

// clean makes a place that was popped ready to be filled. Until its state says otherwise it counts as free, so a daemon that dies here loses nothing.
func (r *Ring) clean(index uint32) {
	// edge(release): acquire - the pop came after the push of whoever read the place last.
	r.progress(index).Store(0)
	r.count(index).Store(0)
	r.move(index).Store(0)
	r.pending(index).Store(0)
	r.stream(index).Store(0)
	r.settled(index).Store(0)
	clear(r.slotWords(index, r.geo.arrivals))
}

// freed wakes one of those for whom a place that came free is enough.
func (r *Ring) freed() {
	r.Space.WakeOne()
	r.Room.WakeOne()
}

// RunColumn returns the bytes of one leaf for the slots of a run, to be filled before Commit.
func (r *Ring) RunColumn(run Run, leaf int) []byte {
	n := r.layout.Columns[leaf]
	at := r.base(run.Index) + r.geo.columns[leaf] + int64(run.Row)*n
	end := at + int64(run.N)*n
	return r.mem[at:end:end]
}

// Mark is a word of the segment that must follow a commit: it is stored when the slots are marked as written, and before they can be published. So whoever
// finds the segment of a dead daemon sees at least one of both. The zero Mark is none.
type Mark struct {
	word  *atomic.Uint64
	value uint64
}

func (m Mark) store() {
	if m.word != nil {
		m.word.Store(m.value)
	}
}

// Commit says that the run's slots are filled with samples first, first+1, ... of stream, whose last bytes came at arrival (Unix nanoseconds, not 0). Their
// batch is published if these were its last.
func (r *Ring) Commit(run Run, stream, first, arrival uint64, mark Mark) {
	failpoint.Hit("ring/commit/begun")
	r.mark(run.Index, run.Row, run.N, stream, first, arrival)
	failpoint.Hit("ring/commit/marked")
	mark.store()
	failpoint.Hit("ring/commit/held")
	r.advance(run.Index, uint64(run.N))
}

// mark writes the slots' own words. A slot's arrival is the last that is written of it: in the segment of a dead daemon, one that is not 0 says that the slot is whole.
func (r *Ring) mark(index, row, n uint32, stream, first, arrival uint64) {
	streams := r.slotWords(index, r.geo.streams)[row : row+n]
	numbers := r.slotWords(index, r.geo.numbers)[row : row+n]
	arrivals := r.slotWords(index, r.geo.arrivals)[row : row+n]
	for i := range streams {
		streams[i] = stream
		numbers[i] = first + uint64(i)
		arrivals[i] = max(arrival, 1)
		failpoint.Hit("ring/mark/row")
	}
}

// Abandon gives a run back unfilled. If no slot after it was reserved it goes to the next sample; otherwise its slots become void, and the rows after them move up
// when the batch is sealed: the batch is short by them, and no stream's order is broken.
func (r *Ring) Abandon(run Run) {
	if r.reserved.CompareAndSwap(run.Position+uint64(run.N), run.Position) {
		r.Space.WakeOne()
		return
	}
	r.void(run)
}

func (r *Ring) void(run Run) {
	r.advance(run.Index, uint64(run.N)<<progressBits|uint64(run.N))
}

// Flush closes the batch being filled, so that it is published short once the slots reserved in it are committed. It returns false if no slot is reserved in it.
func (r *Ring) Flush() bool {
	size := uint64(r.layout.BatchSize)
	for {
		p := r.reserved.Load()
		row := p % size
		if row == 0 {
			return false
		}
		w := r.openedOf(p / size).Load()
		if r.reserved.CompareAndSwap(p, p-row+size) {
			r.void(Run{Position: p, Index: uint32(w & (1<<placeBits - 1)), Row: uint32(row), N: uint32(size - row)})
			return true
		}
	}
}

// advance counts slots as done and publishes what became complete.
func (r *Ring) advance(index uint32, by uint64) {
	// edge(commit): release - slot bytes and slot words are complete before this count is seen.
	done := r.progress(index).Add(by) & progressMask
	failpoint.Hit("ring/advance/counted")
	switch size := uint64(r.layout.BatchSize); {
	case done == size:
		r.publish()
	case done > size:
		panic(fmt.Sprintf("ring: %d of %d slots of place %d are committed: a run was committed twice", done, size, index))
	}
}

// publish publishes every batch that is complete, in the order of their openings. Whoever completes a batch calls it: either it gets the batch that is next, or
// another caller has it and looks at the one after when done.
func (r *Ring) publish() {
	size := uint64(r.layout.BatchSize)
	for {
		opening := r.sealed.Load()
		w := r.openedOf(opening).Load()
		if w>>placeBits != opening+1 {
			return
		}
		index := uint32(w & (1<<placeBits - 1))
		// edge(commit): acquire - after this load shows all slots done, their bytes are ours to move and to publish.
		progress := r.progress(index).Load()
		if progress&progressMask != size {
			return
		}
		if !r.state(index).CompareAndSwap(opening<<stateBits|uint64(Open), opening<<stateBits|uint64(Sealing)) {
			return
		}
		failpoint.Hit("ring/publish/sealing")
		rows := size - progress>>progressBits
		if rows < size {
			r.closeUp(index)
			failpoint.Hit("ring/publish/closed")
		}
		r.announce(index, rows)
		r.sealed.Store(opening + 1)
	}
}

// announce makes a place, which nobody writes to any more, the next batch.
func (r *Ring) announce(index uint32, rows uint64) {
	groups := r.groups.Load()
	if groups == 0 {
		groups = AllGroups
	}
	r.pending(index).Store(groups)
	r.count(index).Store(rows)
	number := r.published.Add(1) - 1
	failpoint.Hit("ring/announce/numbered")
	// edge(publish): release - rows and count are complete before this state is seen.
	r.state(index).Store(number<<stateBits | uint64(Published))
	failpoint.Hit("ring/announce/published")
	// edge(number): release - the batch is published before this word says where it is.
	r.numberedOf(number).Store((number+1)<<placeBits | uint64(index))
	r.Ready.Wake()
}

// TryLease returns the oldest published batch that nobody has had, or false.
func (r *Ring) TryLease() (Batch, bool) {
	for {
		number := r.leased.Load()
		// edge(number): acquire - after this load names the batch, it is published.
		w := r.numberedOf(number).Load()
		if w>>placeBits != number+1 {
			if r.leased.Load() == number {
				return Batch{}, false
			}
			continue
		}
		if !r.leased.CompareAndSwap(number, number+1) {
			continue
		}
		failpoint.Hit("ring/lease/taken")
		b := Batch{Number: number, Index: uint32(w & (1<<placeBits - 1)), view: &r.View}
		b.Count = int(r.count(b.Index).Load())
		r.state(b.Index).Store(number<<stateBits | uint64(Leased))
		if b.Count > 0 {
			return b, true
		}
		r.Release(b) // every slot of it was given up
	}
}

// Release gives a leased batch back; its memory may be overwritten at once.
func (r *Ring) Release(b Batch) {
	if r.Poison {
		r.poison(b.Index)
	}
	// edge(release): release - the holder's reads are done before the place can be taken.
	if !r.state(b.Index).CompareAndSwap(b.Number<<stateBits|uint64(Leased), b.Number<<stateBits|uint64(Free)) {
		panic(fmt.Sprintf("ring: batch %d in place %d is not leased: released twice, or never leased", b.Number, b.Index))
	}
	failpoint.Hit("ring/release/freed")
	r.free.push(b.Index)
	r.freed()
}

func (r *Ring) poison(index uint32) {
	at := r.base(index)
	b := r.mem[at : at+r.geo.stride]
	for i := range b {
		b[i] = 0xCC
	}
}

// Close says that nothing will be reserved or published any more: waiting writers get os.ErrClosed, trainers io.EOF once they have had everything.
func (r *Ring) Close() {
	word(r.mem, offClosed).Store(1)
	r.Space.Wake()
	r.Room.Wake()
	r.Ready.Wake()
}
