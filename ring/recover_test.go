package ring

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// life drives a ring by random operations, one after the other, and keeps what every sample's fate must be.
type life struct {
	t     *testing.T
	rng   *rand.Rand
	r     *Ring
	now   time.Time
	names []string

	sessions []*Session
	next     []uint64          // per session: number of its next sample
	kept     []map[uint64]bool // per session: committed and not released
	runs     []pendingRun      // reserved, not committed
	lent     []lentPlace       // by session, at most one
	leased   []Batch
}

type pendingRun struct {
	run     Run
	session int
	first   uint64
}

type lentPlace struct {
	place         Place
	session       int
	rows, settled int
	first         uint64 // number of row 0
}

func newLife(t *testing.T, rng *rand.Rand, shape [2]int) *life {
	r := newRing(t, shape[0], shape[1], 8, 3)
	l := &life{t: t, rng: rng, r: r, now: time.Unix(100, 0)}
	for i := range 3 {
		l.open(fmt.Sprintf("session %d", i))
	}
	return l
}

func (l *life) open(name string) {
	s, err := l.r.OpenSession(name, l.now, time.Hour)
	if err != nil {
		l.t.Fatal(err)
	}
	l.names = append(l.names, name)
	l.sessions = append(l.sessions, s)
	l.next = append(l.next, s.Held())
	l.kept = append(l.kept, map[uint64]bool{})
}

func (l *life) busy(session int) bool {
	return slices.ContainsFunc(l.runs, func(p pendingRun) bool { return p.session == session })
}

func (l *life) lender(session int) int {
	return slices.IndexFunc(l.lent, func(p lentPlace) bool { return p.session == session })
}

// step does one operation.
func (l *life) step() {
	session := l.rng.IntN(len(l.sessions))
	switch op := l.rng.IntN(12); op {
	case 0, 1, 2:
		if l.lender(session) >= 0 || l.busy(session) {
			return
		}
		if run, ok := l.r.TryReserve(1 + l.rng.IntN(4)); ok {
			first := l.next[session]
			fill(l.r, run, l.sessions[session].Stream(), first)
			l.runs = append(l.runs, pendingRun{run, session, first})
		}
	case 3, 4, 5:
		if len(l.runs) == 0 {
			return
		}
		i := l.rng.IntN(len(l.runs))
		p := l.runs[i]
		l.runs = slices.Delete(l.runs, i, i+1)
		if op == 5 && l.rng.IntN(3) == 0 {
			l.r.Abandon(p.run)
			return
		}
		l.commit(p.run, p.session, Mark{})
	case 6:
		l.lend(session)
	case 7, 8:
		l.fillRows(session)
	case 9:
		l.settle(session)
	case 10:
		if b, ok := l.r.TryLease(); ok {
			l.leased = append(l.leased, b)
		}
		if l.rng.IntN(8) == 0 {
			l.r.Flush()
		}
	case 11:
		if len(l.leased) > 0 {
			i := l.rng.IntN(len(l.leased))
			b := l.leased[i]
			for row := range b.Count {
				for s := range l.sessions {
					if l.sessions[s].Stream() == b.Streams()[row] {
						delete(l.kept[s], b.Numbers()[row])
					}
				}
			}
			l.leased = slices.Delete(l.leased, i, i+1)
			l.r.Release(b)
		}
	}
}

func (l *life) commit(run Run, session int, mark Mark) {
	s, first := l.sessions[session], l.next[session]
	if mark == (Mark{}) {
		mark = s.Mark(first + uint64(run.N))
	}
	l.next[session] += uint64(run.N)
	for i := range uint64(run.N) {
		l.kept[session][first+i] = true
	}
	l.r.Commit(run, s.Stream(), first, 1, mark)
}

func (l *life) lend(session int) {
	if l.lender(session) >= 0 || l.busy(session) || l.unpublished(session) {
		return
	}
	if p, ok := l.r.TryLend(l.sessions[session].Stream()); ok {
		l.lent = append(l.lent, lentPlace{place: p, session: session, first: l.next[session]})
	}
}

// unpublished tells whether samples of the session lie in a shared batch that is still open: those in a place of its own would overtake them.
func (l *life) unpublished(session int) bool {
	for i := range uint32(l.r.Batches()) {
		if s := l.r.BatchState(int(i)); s.State != Open && s.State != Sealing {
			continue
		}
		for row, a := range l.r.slotWords(i, l.r.geo.arrivals) {
			if a != 0 && l.r.slotWords(i, l.r.geo.streams)[row] == l.sessions[session].Stream() {
				return true
			}
		}
	}
	return false
}

func (l *life) fillRows(session int) {
	i := l.lender(session)
	if i < 0 {
		return
	}
	p, s := &l.lent[i], l.sessions[session]
	if p.rows == l.r.BatchSize() {
		return
	}
	n := 1 + l.rng.IntN(l.r.BatchSize()-p.rows)
	for leaf, size := range l.r.layout.Columns {
		col := l.r.PlaceColumn(p.place, leaf)
		for k := range n {
			prove(col[int64(p.rows+k)*size:int64(p.rows+k+1)*size], s.Stream(), l.next[session]+uint64(k), leaf)
		}
	}
	l.r.CommitPlace(p.place, p.rows, n, s.Stream(), l.next[session], 1, s.Mark(l.next[session]+uint64(n)))
	for k := range uint64(n) {
		l.kept[session][l.next[session]+k] = true
	}
	l.next[session] += uint64(n)
	p.rows += n
	if p.rows == l.r.BatchSize() && p.settled == 0 {
		l.r.PublishPlace(p.place, p.rows)
		l.lent = slices.Delete(l.lent, i, i+1)
	}
}

func (l *life) settle(session int) {
	i := l.lender(session)
	if i < 0 {
		return
	}
	p, s := &l.lent[i], l.sessions[session]
	for p.settled < p.rows {
		run, ok := l.r.TryReserve(p.rows - p.settled)
		if !ok {
			return
		}
		for leaf, size := range l.r.layout.Columns {
			copy(l.r.RunColumn(run, leaf), l.r.PlaceColumn(p.place, leaf)[int64(p.settled)*size:])
		}
		p.settled += int(run.N)
		l.r.Commit(run, s.Stream(), p.first+uint64(p.settled)-uint64(run.N), 1, l.r.SettledMark(p.place, p.settled))
	}
	if p.settled == l.r.BatchSize() || l.rng.IntN(2) == 0 {
		l.r.ReturnPlace(p.place)
		l.lent = slices.Delete(l.lent, i, i+1)
	}
}

// crash recovers a copy of the segment as it is, and checks that it holds just what it must.
func (l *life) crash() (*Ring, *Recovery) {
	l.t.Helper()
	mem := AlignedBytes(int64(len(l.r.mem)))
	copy(mem, l.r.mem)
	r, found, err := Recover(mem, l.r.layout)
	if err != nil {
		l.t.Fatal(err)
	}
	l.check(r, found)
	return r, found
}

func (l *life) check(r *Ring, found *Recovery) {
	l.t.Helper()
	got := make([]map[uint64]bool, len(l.sessions))
	last := make([]int64, len(l.sessions))
	for i := range got {
		got[i], last[i] = map[uint64]bool{}, -1
	}
	for i, b := range found.Batches {
		if i > 0 && b.Number <= found.Batches[i-1].Number {
			l.t.Fatalf("batch %d after batch %d", b.Number, found.Batches[i-1].Number)
		}
		if err := verify(b.Batch, r.layout.Columns); err != nil {
			l.t.Fatal(err)
		}
		for row := range b.Count {
			s := slices.IndexFunc(l.sessions, func(s *Session) bool { return s.Stream() == b.Streams()[row] })
			n := b.Numbers()[row]
			if got[s][n] {
				l.t.Fatalf("sample %d of session %d is there twice", n, s)
			}
			if int64(n) < last[s] {
				l.t.Fatalf("sample %d of session %d comes after sample %d", n, s, last[s])
			}
			got[s][n], last[s] = true, int64(n)
		}
	}
	infos := r.Sessions()
	for s := range l.sessions {
		for n := range l.kept[s] {
			if !got[s][n] {
				l.t.Fatalf("sample %d of session %d was committed and is lost", n, s)
			}
		}
		if len(got[s]) != len(l.kept[s]) {
			l.t.Fatalf("session %d: %d samples recovered, %d were kept", s, len(got[s]), len(l.kept[s]))
		}
		if info := infos[s]; info.Name != l.names[s] || info.Held != l.next[s] || info.Stream != l.sessions[s].Stream() {
			l.t.Fatalf("session %d: %+v, want %q with %d held", s, info, l.names[s], l.next[s])
		}
	}
}

// TestRecoverAnyMoment recovers a copy of the segment after every operation of random lives, and again what that left; then the next life goes on in a recovered segment.
func TestRecoverAnyMoment(t *testing.T) {
	rng := seeded(t)
	steps := 400
	if testing.Short() {
		steps = 300
	}
	for _, shape := range [][2]int{{1, 2}, {2, 3}, {4, 4}, {5, 8}} {
		l := newLife(t, rng, shape)
		for i := range steps {
			l.step()
			r, found := l.crash()
			if i%8 != 0 {
				continue
			}
			// Recovered again before anything happened: the same is found.
			again := AlignedBytes(int64(len(r.mem)))
			copy(again, r.mem)
			r2, found2, err := Recover(again, r.layout)
			if err != nil {
				t.Fatal(err)
			}
			l.check(r2, found2)
			if len(found2.Batches) != len(found.Batches) {
				t.Fatalf("%d batches, then %d", len(found.Batches), len(found2.Batches))
			}
			if i%64 == 0 { // go on from here
				l.goOn(r, found)
			}
		}
	}
}

// goOn continues a life in a segment that was recovered from it.
func (l *life) goOn(r *Ring, found *Recovery) {
	r.Poison = true
	l.r, l.runs, l.lent, l.leased = r, nil, nil, nil
	for _, b := range found.Batches {
		r.Unpin(b.Batch)
		l.leased = append(l.leased, b.Batch)
	}
	for i, name := range l.names {
		s, err := r.OpenSession(name, l.now, time.Hour)
		if err != nil {
			l.t.Fatal(err)
		}
		l.sessions[i] = s
		if s.Held() != l.next[i] {
			l.t.Fatalf("%s holds %d, want %d", name, s.Held(), l.next[i])
		}
	}
}

// Every store of a close-up can be the last one of a daemon.
func TestCloseUpFromAnyRow(t *testing.T) {
	r := newRing(t, 6, 2, 8, 3)
	r.NextStream()
	r.NextStream()
	a, _ := r.TryReserve(2)
	b, _ := r.TryReserve(2)
	c, _ := r.TryReserve(2)
	fill(r, b, 2, 0)
	fill(r, c, 2, 2)
	r.mark(b.Index, b.Row, b.N, 2, 0, 1)
	r.mark(c.Index, c.Row, c.N, 2, 2, 1)
	_ = a
	whole := bytes.Clone(r.mem)
	arrivals := r.slotWords(a.Index, r.geo.arrivals)
	for stop := range 5 { // rows moved before the end
		for _, half := range []string{"before", "copied", "arrived", "cleared"} {
			copy(r.mem, whole)
			for row := range stop {
				if row < 4 {
					r.moveRow(a.Index, row, row+2)
				}
			}
			if stop < 4 {
				to, from := stop, stop+2
				r.move(a.Index).Store(moving | uint64(to)<<moveBits | uint64(from))
				if half != "before" {
					junk := r.mem[r.base(a.Index)+r.geo.columns[0]+8*int64(to):]
					binary.LittleEndian.PutUint32(junk, 0xDEADBEEF) // half-way through the copy
				}
				if half == "arrived" || half == "cleared" {
					r.move(a.Index).Store(0)
					r.moveRow(a.Index, to, from)
					r.move(a.Index).Store(moving | uint64(to)<<moveBits | uint64(from))
					if half == "arrived" {
						arrivals[from] = 1
					}
				}
			}
			mem := AlignedBytes(int64(len(r.mem)))
			copy(mem, r.mem)
			r2, found, err := Recover(mem, r.layout)
			if err != nil {
				t.Fatalf("after %d rows, %s: %v", stop, half, err)
			}
			if len(found.Batches) != 1 || found.Batches[0].Count != 4 {
				t.Fatalf("after %d rows, %s: %+v", stop, half, found)
			}
			got := found.Batches[0]
			if err := verify(got.Batch, r2.layout.Columns); err != nil {
				t.Fatalf("after %d rows, %s: %v", stop, half, err)
			}
			if fmt.Sprint(got.Numbers()) != "[0 1 2 3]" {
				t.Fatalf("after %d rows, %s: samples %v", stop, half, got.Numbers())
			}
		}
	}
}

// A settled row whose copy was marked when the daemon died, and whose place does not say so yet, comes once.
func TestRecoverBetweenCopyAndSettledMark(t *testing.T) {
	r := newRing(t, 4, 3, 8, 3)
	s, err := r.OpenSession("s", time.Unix(1, 0), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	l := &life{t: t, r: r, rng: rand.New(rand.NewPCG(1, 1)), names: []string{"s"}, sessions: []*Session{s}, next: []uint64{0}, kept: []map[uint64]bool{{}}}
	l.lend(0)
	for l.lent[0].rows < 2 {
		l.fillRows(0)
	}
	p := l.lent[0]
	run, _ := r.TryReserve(p.rows)
	for leaf, size := range r.layout.Columns {
		copy(r.RunColumn(run, leaf), r.PlaceColumn(p.place, leaf)[:size*int64(run.N)])
	}
	r.mark(run.Index, run.Row, run.N, s.Stream(), 0, 1) // and no further
	_, found := l.crash()
	if len(found.Batches) == 0 {
		t.Fatal("nothing was found")
	}
}

func TestRecoverRefuses(t *testing.T) {
	r := newRing(t, 4, 3, 8, 3)
	for i := range 6 {
		put(r, r.NextStream(), uint64(i))
	}
	whole := bytes.Clone(r.mem)
	try := func(change func(mem []byte, want *Layout)) ([]byte, error) {
		mem, want := AlignedBytes(int64(len(whole))), r.layout
		copy(mem, whole)
		change(mem, &want)
		before := bytes.Clone(mem)
		_, _, err := Recover(mem, want)
		if err != nil && !bytes.Equal(before, mem) {
			t.Errorf("%v: the segment was changed", err)
		}
		return mem, err
	}
	if _, err := try(func([]byte, *Layout) {}); err != nil {
		t.Fatal(err)
	}
	var mismatch *MismatchError
	for name, change := range map[string]func(mem []byte, want *Layout){
		"batch size": func(_ []byte, want *Layout) { want.BatchSize = 8 },
		"batches":    func(_ []byte, want *Layout) { want.Batches = 4 },
		"spec":       func(_ []byte, want *Layout) { want.Fingerprint[3]++ },
		"sessions":   func(_ []byte, want *Layout) { want.Sessions = 7 },
		"table":      func(_ []byte, want *Layout) { want.Table = "u" },
	} {
		if _, err := try(change); !errors.As(err, &mismatch) || len(mismatch.Differ) != 1 {
			t.Errorf("another %s: %v", name, err)
		}
	}
	if _, err := try(func(mem []byte, want *Layout) { mem[8] = 1 }); err == nil {
		t.Error("version 1 was taken")
	}
	boots := func(clean byte) error {
		_, err := try(func(mem []byte, want *Layout) {
			mem[offBoot], want.Boot[0], mem[offClean] = 1, 2, clean
		})
		return err
	}
	var unclean *UncleanError
	if err := boots(0); !errors.As(err, &unclean) {
		t.Errorf("after the machine went down: %v", err)
	}
	if err := boots(1); err != nil {
		t.Errorf("after an orderly stop and a restart of the machine: %v", err)
	}
}

func put(r *Ring, stream, number uint64) {
	run, ok := r.TryReserve(1)
	if !ok {
		panic("full")
	}
	fill(r, run, stream, number)
	r.Commit(run, stream, number, 1, Mark{})
}

// TestRecoverSurvivesAnything changes each byte of the cursors, state lines and tables in turn: recovery refuses, or gives a ring in which nothing is torn and every place is accounted for.
func TestRecoverSurvivesAnything(t *testing.T) {
	rng := seeded(t)
	l := newLife(t, rng, [2]int{3, 5})
	for range 200 {
		l.step()
	}
	refused := 0
	if _, err := l.r.AddGroup("g", l.now); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(l.r.mem)
	areas := [][2]int64{{offReserved, headerBytes}, {l.r.geo.statesOffset, l.r.geo.sessionTable + 4*entryBytes}, {l.r.geo.groupTable, l.r.geo.groupTable + 2*entryBytes}}
	for _, area := range areas {
		for off := area[0]; off < area[1]; off++ {
			for _, flip := range []byte{1, 4, 0xFF} {
				mem := AlignedBytes(int64(len(whole)))
				copy(mem, whole)
				mem[off] ^= flip
				r, found, err := Recover(mem, l.r.layout)
				if err != nil {
					refused++
					continue
				}
				seen := map[uint32]bool{}
				for _, b := range found.Batches {
					if seen[b.Index] || b.Count > 3 {
						t.Fatalf("byte %d ^ %#x: %+v", off, flip, b)
					}
					seen[b.Index] = true
					if err := verify(b.Batch, r.layout.Columns); err != nil {
						t.Fatalf("byte %d ^ %#x: %v", off, flip, err)
					}
					r.Release(b.Batch)
				}
				for i := range 5 * 3 { // every place can be filled
					if _, ok := r.TryReserve(1); !ok {
						t.Fatalf("byte %d ^ %#x: %d of 15 slots came back", off, flip, i)
					}
				}
			}
		}
	}
	if refused == 0 {
		t.Fatal("no change was refused: the survey looks at nothing")
	}
}

// TestRecoverRefusesAnotherMove: a move word that names other rows than those that closeUp was about to move would overwrite a sample, or put a stream out of order.
func TestRecoverRefusesAnotherMove(t *testing.T) {
	r := newRing(t, 6, 2, 8, 3)
	stream := r.NextStream()
	void, _ := r.TryReserve(2)
	run, _ := r.TryReserve(4)
	fill(r, run, stream, 0)
	r.mark(run.Index, run.Row, run.N, stream, 0, 1)
	r.moveRow(void.Index, 0, 2) // and now row 3 to row 1
	refused := 0
	for to := range uint64(8) {
		for from := range uint64(8) {
			r.move(void.Index).Store(moving | to<<moveBits | from)
			mem := AlignedBytes(int64(len(r.mem)))
			copy(mem, r.mem)
			r2, found, err := Recover(mem, r.layout)
			if damaged := (*DamagedError)(nil); errors.As(err, &damaged) {
				refused++
				continue
			}
			if err != nil || len(found.Batches) != 1 || fmt.Sprint(found.Batches[0].Numbers()) != "[0 1 2 3]" {
				t.Fatalf("row %d to row %d: %+v, %v", from, to, found, err)
			}
			if err := verify(found.Batches[0].Batch, r2.layout.Columns); err != nil {
				t.Errorf("row %d to row %d: %v", from, to, err)
			}
			if to == 0 && from > 2 || to == 1 && from > 3 || to > 1 {
				t.Errorf("row %d to row %d was taken", from, to)
			}
		}
	}
	if refused == 0 || refused == 64 {
		t.Errorf("%d of 64 moves refused", refused)
	}
}

// TestIntact: a lease is intact until its release, whoever owns the ring by then, and not when the place is used again.
func TestIntact(t *testing.T) {
	r := newRing(t, 1, 2, 8, 3)
	put(r, r.NextStream(), 0)
	put(r, r.NextStream(), 0)
	first, ok := r.TryLease()
	second, _ := r.TryLease()
	if !ok || !first.Intact() || !second.Intact() {
		t.Fatalf("leased: %v %v", first, second)
	}
	next, found, err := Recover(r.mem, r.layout)
	if err != nil || len(found.Batches) != 2 || !first.Intact() || !second.Intact() {
		t.Fatalf("recovered: %+v, %v", found, err)
	}
	next.Release(found.Batches[0].Batch)
	if first.Intact() || !second.Intact() {
		t.Error("after a release by the next owner")
	}
	put(next, next.NextStream(), 0)
	if again, ok := next.TryLease(); !ok || again.Index != first.Index || first.Intact() || !again.Intact() {
		t.Errorf("leased anew: %v", again)
	}
}
