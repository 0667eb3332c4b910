package ring

import (
	"fmt"
	"slices"
)

// countMax bounds the cursors: far beyond what a ring counts in its life, and low enough for every product and shift.
const countMax = 1 << 44

// Survey is what a segment that nobody writes to holds, and what is wrong with it. Recover and `ingestd check` go by the same one.
type Survey struct {
	Places   []BatchState // by index
	Rows     []int        // by index: rows that hold samples and that nobody has had
	Problems []string     // none in what any daemon leaves behind, however it died
}

// problemsMax bounds the list: after so many, the rest adds nothing.
const problemsMax = 100

func (s *Survey) found(format string, args ...any) {
	if len(s.Problems) < problemsMax {
		s.Problems = append(s.Problems, fmt.Sprintf(format, args...))
	}
}

// Survey looks at everything in the segment but the samples' bytes. Nobody may write to it meanwhile.
func (v *View) Survey() *Survey {
	s := &Survey{Places: make([]BatchState, v.layout.Batches), Rows: make([]int, v.layout.Batches)}
	for i := range s.Places {
		s.Places[i] = v.BatchState(i)
	}
	v.surveyCursors(s)
	v.surveyTables(s)
	if len(s.Problems) > 0 {
		return s // what follows compares with them
	}
	numbers := map[uint64]int{}
	openings := map[uint64]int{}
	for i, p := range s.Places {
		v.surveyPlace(s, i, p, numbers, openings)
	}
	if len(s.Problems) == 0 {
		v.surveyMissing(s, numbers)
	}
	return s
}

// surveyMissing looks for the places of batches that were published and not leased. A daemon can have died between counting a batch and saying so in its place,
// which then shows what it was before.
func (v *View) surveyMissing(s *Survey, numbers map[uint64]int) {
	filling := uint64(0)
	for _, p := range s.Places {
		if p.State == Open || p.State == Sealing || p.State == Lent {
			filling++
		}
	}
	waiting := uint64(0)
	for number := range numbers {
		if number >= v.Leased() {
			waiting++
		}
	}
	if missing := v.Published() - v.Leased() - waiting; missing > filling {
		s.found("%d batches are published and not leased, and %d of them are in no place: their samples are lost", v.Published()-v.Leased(), missing)
	}
}

func (v *View) surveyCursors(s *Survey) {
	size := uint64(v.layout.BatchSize)
	reserved, published, leased := v.Reserved(), v.Published(), v.Leased()
	for _, c := range []struct {
		name  string
		value uint64
		max   uint64
	}{
		{"reserved / batch_size", reserved / size, countMax},
		{"published", published, countMax},
		{"leased", leased, published},
		{"closed", word(v.mem, offClosed).Load(), 1},
		{"clean", word(v.mem, offClean).Load(), 1},
		{"streams", word(v.mem, offStreams).Load(), countMax},
	} {
		if c.value > c.max {
			s.found("the cursor %s is %d, at most %d is possible", c.name, c.value, c.max)
		}
	}
}

func (v *View) surveyTables(s *Survey) {
	streams := word(v.mem, offStreams).Load()
	names := map[string]bool{}
	seen := map[uint64]string{}
	for i := range v.layout.Sessions {
		e := v.session(i)
		if state := e.word(entryState).Load(); state > 1 {
			s.found("session entry %d: state %d does not exist", i, state)
		}
		if !e.used() {
			continue
		}
		name, stream, held := e.name(), e.word(entryStream).Load(), e.word(entryHeld).Load()
		v.surveyEntry(s, "session", i, e)
		if names[name] {
			s.found("session %q stands in two entries", name)
		}
		if other, twice := seen[stream]; twice {
			s.found("sessions %q and %q have the same stream %d", other, name, stream)
		}
		if stream < 1 || stream > streams {
			s.found("session %q has stream %d of %d", name, stream, streams)
		}
		if held > countMax {
			s.found("session %q holds %d samples, at most %d are possible", name, held, uint64(countMax))
		}
		names[name], seen[stream] = true, name
	}
	clear(names)
	for i := range GroupsMax {
		e := v.group(i)
		if state := e.word(entryState).Load(); state > 1 {
			s.found("group entry %d: state %d does not exist", i, state)
		}
		if !e.used() {
			continue
		}
		v.surveyEntry(s, "group", i, e)
		if names[e.name()] {
			s.found("group %q stands in two entries", e.name())
		}
		names[e.name()] = true
	}
}

func (v *View) surveyEntry(s *Survey, what string, i int, e entry) {
	n := e.word(entryLength).Load()
	if n < 1 || n > NameBytesMax {
		s.found("%s entry %d: a name of %d bytes", what, i, n)
		return
	}
	for _, c := range e.mem[entryName+n:] {
		if c != 0 {
			s.found("%s entry %d: its name of %d bytes goes on after its end", what, i, n)
			return
		}
	}
}

func (v *View) surveyPlace(s *Survey, i int, p BatchState, numbers, openings map[uint64]int) {
	size := v.layout.BatchSize
	arrivals := v.slotWords(uint32(i), v.geo.arrivals)
	if p.State > Lent {
		s.found("place %d: state %d does not exist", i, p.State)
		return
	}
	written, streams := 0, v.slotWords(uint32(i), v.geo.streams)
	for row, a := range arrivals {
		if a == 0 || p.State == Free {
			continue
		}
		written++
		if last := word(v.mem, offStreams).Load(); streams[row] > last {
			s.found("place %d (%v) row %d: stream %d, and only %d were given a number", i, p.State, row, streams[row], last)
			return
		}
	}
	if p.State != Free && (p.Committed > size || p.Void > p.Committed || uint(p.Settled) > uint(size) || uint(p.Count) > uint(size)) {
		s.found("place %d (%v): %d slots committed, %d of them given up, %d settled, %d rows, in a batch of %d", i, p.State, p.Committed, p.Void, p.Settled, p.Count, size)
		return
	}
	if m := word(v.mem, v.line(uint32(i))+lineMove).Load(); p.State != Free && m != 0 {
		to, from := m&^moving>>moveBits, m&(1<<moveBits-1)
		if m&moving == 0 || to >= from || from >= uint64(size) || (p.State != Sealing && p.State != Lent && p.State != Open) || !v.movable(uint32(i), to, from) {
			s.found("place %d (%v): the move word is %#x", i, p.State, m)
			return
		}
	}
	switch p.State {
	case Open, Sealing:
		if p.Number > v.Reserved()/uint64(size)+uint64(v.layout.Batches) { // ahead by those whose slots were all given back
			s.found("place %d: opening %d is %v, with %d slots reserved", i, p.Number, p.State, v.Reserved())
			return
		}
		if other, twice := openings[p.Number]; twice && written > 0 && s.Rows[other] > 0 {
			s.found("places %d and %d are both opening %d", other, i, p.Number)
			return
		}
		if _, twice := openings[p.Number]; !twice || written > 0 {
			openings[p.Number] = i
		}
		s.Rows[i] = written
	case Lent:
		if p.Number != 0 || p.Stream > word(v.mem, offStreams).Load() {
			s.found("place %d: lent to stream %d, with state word %#x", i, p.Stream, p.Number<<stateBits|uint64(p.State))
			return
		}
		s.Rows[i] = max(0, written-p.Settled)
	case Published, Leased:
		if p.Number >= v.Published() {
			s.found("place %d: batch %d is %v, with %d published", i, p.Number, p.State, v.Published())
			return
		}
		if other, twice := numbers[p.Number]; twice {
			s.found("places %d and %d both hold batch %d", other, i, p.Number)
			return
		}
		numbers[p.Number] = i
		if p.State == Leased && p.Number >= v.Leased() {
			s.found("place %d: batch %d is leased, and the cursor says that %d are", i, p.Number, v.Leased())
		}
		if written < p.Count || slices.Contains(arrivals[:p.Count], 0) {
			s.found("place %d: batch %d has %d rows, and not all of them were written", i, p.Number, p.Count)
			return
		}
		v.surveyRows(s, i, p)
		s.Rows[i] = p.Count
	}
}

// movable tells whether closeUp can have noted this move: it has filled all rows before the one it moves to and emptied all between both, and where both
// are written they are the same sample.
func (v *View) movable(i uint32, to, from uint64) bool {
	streams, numbers, arrivals := v.slotWords(i, v.geo.streams), v.slotWords(i, v.geo.numbers), v.slotWords(i, v.geo.arrivals)
	if slices.Contains(arrivals[:to], 0) || slices.ContainsFunc(arrivals[to+1:from], func(a uint64) bool { return a != 0 }) {
		return false
	}
	return arrivals[to] == 0 || arrivals[from] == 0 || streams[to] == streams[from] && numbers[to] == numbers[from]
}

// surveyRows checks that the samples of each stream are in order.
func (v *View) surveyRows(s *Survey, i int, p BatchState) {
	streams, numbers := v.slotWords(uint32(i), v.geo.streams), v.slotWords(uint32(i), v.geo.numbers)
	last := map[uint64]uint64{}
	for row := range p.Count {
		if before, ok := last[streams[row]]; ok && numbers[row] <= before {
			s.found("batch %d row %d: sample %d of stream %d comes after sample %d", p.Number, row, numbers[row], streams[row], before)
		}
		last[streams[row]] = numbers[row]
	}
}
