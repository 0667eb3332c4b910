package ring

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/ingestd/ingestd/internal/failpoint"
)

// MismatchError says that a segment is whole, and not what was asked for.
type MismatchError struct {
	Have, Want Layout
	Differ     []string // "batch size 32 instead of 64"; the spec is told by "spec"
}

func (e *MismatchError) Error() string {
	return "segment: made for another table: " + strings.Join(e.Differ, ", ")
}

// UncleanError says that the machine went down while the segment was in use. Nothing says which of its pages reached the disk.
type UncleanError struct{}

func (e *UncleanError) Error() string {
	return "segment: the machine went down while it was in use, so parts of it may be older than others"
}

// DamagedError says that no daemon left a segment like this: its bytes were changed.
type DamagedError struct{ Problems []string }

func (e *DamagedError) Error() string { return "segment: damaged: " + strings.Join(e.Problems, "; ") }

// Recovered is a batch that was found in a segment. It is leased, and belongs to who called Recover.
type Recovered struct {
	Batch
	Pending uint64 // the groups that have not released it; AllGroups when it was published before there was one

	// Stream is not 0 when the place was lent to a session's stream that may come back for rows it had not handed over: it is to
	// be kept from reuse for a while, and Unpin says when that is over. Count may be 0 then.
	Stream uint64
}

// Recovery says what Recover found.
type Recovery struct {
	Batches   []Recovered // by number
	Samples   int         // in them
	Closed    int         // batches that were being filled, published short
	Discarded int         // slots that were given out and not written whole
	Clean     bool        // the daemon before stopped in order
}

// Recover takes up the segment in mem, which nobody else may have: what a daemon left behind, however it died. Every sample that was written whole is kept, the others
// are discarded. It returns the ring, in which all that was found is leased, and what that is. It can be begun again wherever it is interrupted.
//
// The error is a *FormatError when mem is no segment of this version, a *MismatchError when it is one of another layout, an *UncleanError when the machine went down
// over it, and a *DamagedError when no daemon can have left it so. In all of them mem is as it was.
func Recover(mem []byte, layout Layout) (*Ring, *Recovery, error) {
	if _, err := layout.geometry(); err != nil {
		return nil, nil, err
	}
	v, err := OpenView(mem)
	if err != nil {
		return nil, nil, err
	}
	if err := v.layout.same(&layout); err != nil {
		return nil, nil, err
	}
	clean := word(mem, offClean).Load() == 1
	if boot := [16]byte(mem[offBoot:]); !clean && boot != layout.Boot && boot != ([16]byte{}) && layout.Boot != ([16]byte{}) {
		return nil, nil, &UncleanError{}
	}
	s := v.Survey()
	if len(s.Problems) > 0 {
		return nil, nil, &DamagedError{s.Problems}
	}
	word(mem, offClean).Store(0)
	copy(mem[offBoot:], layout.Boot[:])
	word(mem, offClosed).Store(0)
	rec := &recovery{Ring: over(v), survey: s, found: &Recovery{Clean: clean}}
	rec.groups.Store(rec.usedGroups())
	rec.leased.Store(rec.published.Load()) // what is missing of those before was never more than counted
	places := rec.unread()
	failpoint.Hit("ring/recover/begun")
	rec.countSessions(places)
	failpoint.Hit("ring/recover/counted")
	rec.dropSettled(places)
	failpoint.Hit("ring/recover/dropped")
	rec.closePlaces(places)
	failpoint.Hit("ring/recover/closed")
	rec.leased.Store(rec.published.Load())
	rec.collect()
	failpoint.Hit("ring/recover/collected")
	rec.reserved.Store((rec.reserved.Load() + uint64(layout.BatchSize) - 1) / uint64(layout.BatchSize) * uint64(layout.BatchSize))
	rec.sealed.Store(rec.reserved.Load() / uint64(layout.BatchSize))
	return rec.Ring, rec.found, nil
}

// same compares all but what belongs to one making of a segment: its time, its boot.
func (l *Layout) same(want *Layout) error {
	var differ []string
	number := func(name string, have, want int) {
		if have != want {
			differ = append(differ, fmt.Sprintf("%s %d instead of %d", name, have, want))
		}
	}
	number("batch size", l.BatchSize, want.BatchSize)
	number("batches", l.Batches, want.Batches)
	number("sessions", l.Sessions, cmp.Or(want.Sessions, SessionsDefault))
	if l.Fingerprint != want.Fingerprint || !slices.Equal(l.Columns, want.Columns) {
		differ = append(differ, "another spec")
	}
	if have, want := l.Table, trimZero([]byte(want.Table)[:min(len(want.Table), tableBytes)]); have != want {
		differ = append(differ, fmt.Sprintf("table %q instead of %q", have, want))
	}
	if differ == nil {
		return nil
	}
	return &MismatchError{Have: *l, Want: *want, Differ: differ}
}

// recovery is a Recover under way.
type recovery struct {
	*Ring
	survey *Survey
	found  *Recovery
}

func (r *recovery) usedGroups() (mask uint64) {
	for _, g := range r.Groups() {
		mask |= 1 << g.Index
	}
	return mask
}

// unread returns the places of batches that were not published, in the order in which their samples go on: the shared ones by opening, then the lent ones, whose
// samples are newer than what their streams have in shared batches, by the number of their first sample.
func (r *recovery) unread() []uint32 {
	var all []uint32
	for i, p := range r.survey.Places {
		if p.State == Open || p.State == Sealing || p.State == Lent {
			all = append(all, uint32(i))
		}
	}
	rank := func(i uint32) (lent bool, order uint64) {
		if p := r.survey.Places[i]; p.State != Lent {
			return false, p.Number
		}
		return true, r.slotWords(i, r.geo.numbers)[0]
	}
	slices.SortFunc(all, func(a, b uint32) int {
		lentA, orderA := rank(a)
		lentB, orderB := rank(b)
		if lentA != lentB {
			if lentB {
				return -1
			}
			return 1
		}
		return cmp.Compare(orderA, orderB)
	})
	return all
}

// countSessions raises each session's count to what stands in slots that were marked and whose mark of the session was not stored. Those are in
// places that were not published. It comes before anything is changed.
func (r *recovery) countSessions(places []uint32) {
	held := map[uint64]uint64{} // by stream
	for _, i := range places {
		streams, numbers, arrivals := r.slotWords(i, r.geo.streams), r.slotWords(i, r.geo.numbers), r.slotWords(i, r.geo.arrivals)
		for row, a := range arrivals {
			if a != 0 {
				held[streams[row]] = max(held[streams[row]], numbers[row]+1)
			}
		}
	}
	for i := range r.layout.Sessions {
		e := r.session(i)
		if !e.used() {
			continue
		}
		if n := held[e.word(entryStream).Load()]; n > e.word(entryHeld).Load() {
			e.word(entryHeld).Store(n)
		}
	}
}

// dropSettled takes out the rows of lent places that stand elsewhere: those that were noted as settled, and those whose copy was marked when the daemon died
// before it could note that. It comes before the batches with the copies are published, since they are told by not being so.
func (r *recovery) dropSettled(places []uint32) {
	shared := map[uint64]uint64{} // by stream: one more than the number of its last sample in a batch that many fill
	for _, i := range places {
		if r.survey.Places[i].State == Lent {
			continue
		}
		streams, numbers, arrivals := r.slotWords(i, r.geo.streams), r.slotWords(i, r.geo.numbers), r.slotWords(i, r.geo.arrivals)
		for row, a := range arrivals {
			if a != 0 {
				shared[streams[row]] = max(shared[streams[row]], numbers[row]+1)
			}
		}
	}
	for _, i := range places {
		p := r.survey.Places[i]
		if p.State != Lent {
			continue
		}
		numbers, arrivals := r.slotWords(i, r.geo.numbers), r.slotWords(i, r.geo.arrivals)
		for row := range arrivals {
			if row < p.Settled || numbers[row] < shared[p.Stream] {
				arrivals[row] = 0
				failpoint.Hit("ring/recover/settled")
			}
		}
		r.settled(i).Store(0)
	}
}

// closePlaces publishes, short, what was being filled.
func (r *recovery) closePlaces(places []uint32) {
	size := uint64(r.layout.BatchSize)
	counted := ^uint64(0)
	for _, i := range places {
		p := r.survey.Places[i]
		rows := r.closeUp(i)
		if p.State != Lent && p.Number != counted {
			counted = p.Number
			given := min(size, r.reserved.Load()-min(r.reserved.Load(), p.Number*size))
			r.found.Discarded += max(0, int(given)-p.Void-int(rows))
		}
		if rows == 0 && !r.isSession(p.Stream) {
			r.state(i).Store(uint64(Free))
			continue
		}
		r.found.Closed++
		r.announce(i, rows)
		failpoint.Hit("ring/recover/announced")
	}
}

func (r *recovery) isSession(stream uint64) bool {
	for i := range r.layout.Sessions {
		if e := r.session(i); e.used() && e.word(entryStream).Load() == stream {
			return true
		}
	}
	return false
}

// collect leases every batch there is to the caller, and frees the places of those that nobody waits for.
func (r *recovery) collect() {
	used := r.usedGroups()
	for i := range uint32(r.layout.Batches) {
		w := r.state(i).Load()
		number, state := w>>stateBits, State(w&stateMask)
		pending := r.pending(i).Load()
		if pending != AllGroups {
			pending &= used
		}
		stream := r.stream(i).Load()
		if !r.isSession(stream) {
			stream = 0
		}
		wanted := pending != 0 && r.count(i).Load() > 0 || stream != 0
		if state != Published && state != Leased || !wanted {
			r.state(i).Store(number<<stateBits | uint64(Free))
			r.free.push(i)
			continue
		}
		r.state(i).Store(number<<stateBits | uint64(Leased))
		failpoint.Hit("ring/recover/leased")
		b := Batch{Number: number, Index: i, Count: int(r.count(i).Load()), view: &r.View}
		r.found.Batches = append(r.found.Batches, Recovered{Batch: b, Pending: pending, Stream: stream})
		r.found.Samples += b.Count
	}
	slices.SortFunc(r.found.Batches, func(a, b Recovered) int { return cmp.Compare(a.Number, b.Number) })
}

// Unpin says that the stream which filled a recovered place needs nothing of it any more.
func (r *Ring) Unpin(b Batch) { r.stream(b.Index).Store(0) }

// SetClean says, in the segment, that it was left in order: nobody uses it any more, and all of it was written back to its file.
func (r *Ring) SetClean() { word(r.mem, offClean).Store(1) }
