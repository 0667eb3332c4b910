package sampler

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

func TestEveryGroupGetsEveryBatch(t *testing.T) {
	r := newRing(t, 4)
	s := newFIFO(t, r, 0)
	fill(t, r, 0, 2*batchSize)
	a := join(t, s, "a") // the first group: everything that is unread
	b := join(t, s, "b") // a later one: what comes now
	if err := r.Pending(0); err != 1 {
		t.Errorf("batch 0 is pending for %b, want the first group alone", err)
	}
	fill(t, r, 2*batchSize, batchSize)
	a2 := join(t, s, "a")
	zero, one, two := take(t, a, 0), take(t, a2, 1), take(t, a, 2)
	other := take(t, b, 2)
	takeNone(t, a2)
	takeNone(t, b)
	if other.Index != two.Index {
		t.Error("two groups read one batch in two places")
	}
	a.Release(two)
	if got := r.Pending(two.Index); got != 2 || r.BatchState(int(two.Index)).State != ring.Leased {
		t.Errorf("released by one group of two: pending %b, %v", got, r.BatchState(int(two.Index)))
	}
	b.Release(other)
	if st := r.BatchState(int(two.Index)); st.State != ring.Free {
		t.Errorf("released by all: %v", st)
	}
	a.Release(zero)
	a2.Release(one)
	if got, want := sumOf(s), (sum{Delivered: 4, Released: 4}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	for i, g := range s.Stats().Groups {
		if want := []string{"a", "b"}[i]; g.Name != want || g.Members != 2-i || g.Unread != 0 || g.Listed {
			t.Errorf("group %d: %+v", i, g)
		}
	}
	r.Close()
	for _, m := range []*Member{a, a2, b} {
		if _, err := m.Next(t.Context(), park.NewWaiter()); err != io.EOF {
			t.Errorf("group %s at the end: %v", m.Group(), err)
		}
	}
}

// The end comes to each group after its own last batch.
func TestEndOfEachGroup(t *testing.T) {
	r := newRing(t, 4)
	s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "fast"}, {Name: "slow"}}})
	fast, slow := join(t, s, "fast"), join(t, s, "slow")
	fill(t, r, 0, 2*batchSize)
	r.Close()
	w := park.NewWaiter()
	for n := range uint64(2) {
		fast.Release(take(t, fast, n))
	}
	if _, err := fast.Next(t.Context(), w); err != io.EOF {
		t.Fatalf("the fast group: %v, want io.EOF", err)
	}
	held := take(t, slow, 0)
	slow.Release(take(t, slow, 1))
	if _, err := slow.Next(t.Context(), w); err != io.EOF {
		t.Fatalf("the slow group, whose last batch is out: %v, want io.EOF", err)
	}
	slow.Return(held)
	b, err := slow.Next(t.Context(), w)
	if err != nil || b.Number != 0 {
		t.Fatalf("what came back after the end: %d, %v", b.Number, err)
	}
	slow.Release(b)
	if _, err := fast.Next(t.Context(), w); err != io.EOF {
		t.Errorf("another group's return: %v, want io.EOF still", err)
	}
}

// A publication that one group takes from the ring wakes the others, whose queue it goes to.
func TestGroupsWakeEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 4)
		s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "a"}, {Name: "b"}, {Name: "c"}}})
		got := make(chan string)
		for _, group := range []string{"a", "b", "c"} {
			m := join(t, s, group)
			go func() {
				b, err := m.Next(t.Context(), park.NewWaiter())
				got <- fmt.Sprintf("%s%d%v", group, b.Number, err)
				m.Release(b)
			}()
		}
		synctest.Wait()
		fill(t, r, 0, batchSize)
		all := []string{<-got, <-got, <-got}
		slices.Sort(all)
		if want := []string{"a0<nil>", "b0<nil>", "c0<nil>"}; !slices.Equal(all, want) {
			t.Errorf("%q, want %q", all, want)
		}
	})
}

func TestLeaveReturns(t *testing.T) {
	r := newRing(t, 4)
	s := newFIFO(t, r, 0)
	m, other := join(t, s, "g"), join(t, s, "g")
	fill(t, r, 0, 4*batchSize)
	for n := range uint64(3) {
		take(t, m, n)
	}
	m.Release(ring.Batch{Number: 1, Index: index(t, r, 1)})
	if got := m.Leases(); len(got) != 2 || got[0].Number != 0 || got[1].Number != 2 || got[0].Since.After(got[1].Since) {
		t.Errorf("leases: %+v", got)
	}
	m.Leave()
	m.Leave()
	if _, _, err := m.TryNext(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Leave: %v", err)
	}
	for _, n := range []uint64{0, 2, 3} {
		other.Release(take(t, other, n))
	}
	if got, want := sumOf(s), (sum{Delivered: 6, Released: 4, Returned: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// index finds a batch's place.
func index(t testing.TB, r *ring.Ring, number uint64) uint32 {
	t.Helper()
	for i := range r.Batches() {
		if st := r.BatchState(i); st.State == ring.Leased && st.Number == number {
			return uint32(i)
		}
	}
	t.Fatalf("batch %d is leased nowhere", number)
	return 0
}

func TestLeaveEndsNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := join(t, newFIFO(t, newRing(t, 2), 0), "g")
		got := make(chan error)
		go func() { _, err := m.Next(t.Context(), park.NewWaiter()); got <- err }()
		synctest.Wait()
		m.Leave()
		if err := <-got; !errors.Is(err, os.ErrClosed) {
			t.Errorf("a Next under way: %v, want os.ErrClosed", err)
		}
	})
}

func TestGivingBackWhatIsNotHeldPanics(t *testing.T) {
	r := newRing(t, 4)
	s := newFIFO(t, r, 0)
	m, other := join(t, s, "g"), join(t, s, "h")
	fill(t, r, 0, 2*batchSize)
	b := take(t, m, 0)
	for what, f := range map[string]func(){
		"another group's":  func() { other.Release(b) },
		"another's return": func() { join(t, s, "g").Return(b) },
		"another number":   func() { m.Release(ring.Batch{Number: 1, Index: b.Index}) },
		"no such place":    func() { m.Offer(ring.Batch{Number: 0, Index: 99}) },
		"never given out":  func() { m.Release(ring.Batch{Number: 1, Index: 1 - b.Index}) },
	} {
		func() {
			defer func() {
				if got := recover(); got == nil || !strings.Contains(got.(string), "that does not hold it") {
					t.Errorf("%s: %v", what, got)
				}
			}()
			f()
		}()
	}
	m.Release(b) // and nothing was harmed
}

func TestDropOnDeath(t *testing.T) {
	r := newRing(t, 4)
	s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "drops", OnDeath: Drop}, {Name: "offers"}}})
	drops, offers := join(t, s, "drops"), join(t, s, "offers")
	fill(t, r, 0, 3*batchSize)
	drops.Return(take(t, drops, 0))
	drops.Offer(take(t, drops, 1)) // not begun: whatever the policy
	drops.Release(take(t, drops, 1))
	offers.Return(take(t, offers, 0))
	offers.Release(take(t, offers, 0))
	if got := r.BatchState(int(index(t, r, 1))); got.State != ring.Leased {
		t.Errorf("%v", got)
	}
	take(t, drops, 2)
	drops.Leave() // holding a batch
	again := join(t, s, "drops")
	takeNone(t, again)
	if got, want := sumOf(s), (sum{Delivered: 6, Released: 2, Returned: 4, Dropped: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	offers.Release(take(t, offers, 1))
	offers.Release(take(t, offers, 2))
	for i := range r.Batches() {
		if st := r.BatchState(i); st.State != ring.Free {
			t.Errorf("place %d is %v", i, st)
		}
	}
}

// lose fills a batch more than there is room for without waiting, as the writer that is about to wait would.
func push(t testing.TB, r *ring.Ring, number uint64) bool {
	t.Helper()
	run, ok := r.TryReserve(batchSize)
	if !ok {
		r.Full()
		if run, ok = r.TryReserve(batchSize); !ok {
			return false
		}
	}
	clear(r.RunColumn(run, 0))
	r.Commit(run, 0, number*batchSize, 1, ring.Mark{})
	return true
}

func wantLost(t testing.TB, m *Member, first uint64, n int) {
	t.Helper()
	_, ok, err := m.TryNext()
	var lost *LostError
	if ok || !errors.As(err, &lost) || *lost != (LostError{m.Group(), first, n}) {
		t.Fatalf("%v, %v, want the loss of %d from %d on", ok, err, n, first)
	}
}

func TestLosingGroup(t *testing.T) {
	r := newRing(t, 4)
	s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "keeps"}, {Name: "loses", OnLag: Lose}}})
	keeps, loses, loses2 := join(t, s, "keeps"), join(t, s, "loses"), join(t, s, "loses")
	if keeps.Policies().OnLag != Hold || loses.Policies() != (GroupConfig{Name: "loses", OnLag: Lose}) {
		t.Errorf("policies: %+v and %+v", keeps.Policies(), loses.Policies())
	}
	for n := range uint64(4) {
		if !push(t, r, n) {
			t.Fatalf("no room for batch %d", n)
		}
		keeps.Release(take(t, keeps, n))
	}
	held := take(t, loses, 0)
	for n := uint64(4); n < 6; n++ { // 1 and 2 are lost, not 0, which is being read
		if !push(t, r, n) {
			t.Fatalf("no room for batch %d", n)
		}
	}
	wantLost(t, loses, 1, 2)
	loses.Release(take(t, loses, 3))
	loses.Release(held)
	if !push(t, r, 6) || !push(t, r, 7) {
		t.Fatal("no room where two were released")
	}
	if push(t, r, 8) {
		t.Fatal("batches that another group keeps were overwritten")
	}
	wantLost(t, loses2, 1, 2) // the other member is told too, once
	for n := uint64(4); n < 8; n++ {
		keeps.Release(take(t, keeps, n))
		loses2.Release(take(t, loses2, n))
	}
	if got := s.Stats(); got.Lost != 2 || got.Groups[0].Lost != 0 || got.Groups[1].Lost != 2 || got.Groups[1].Delivered != 6 {
		t.Errorf("stats: %+v", got)
	}
}

// A group that loses batches while nobody trains in it tells the next who comes.
func TestLossWithoutMembers(t *testing.T) {
	r := newRing(t, 2)
	s := newGroups(t, r, Config{Default: GroupConfig{OnLag: Lose}})
	join(t, s, "g").Leave()
	for n := range uint64(10) {
		if !push(t, r, n) {
			t.Fatalf("no room for batch %d", n)
		}
	}
	m := join(t, s, "g")
	wantLost(t, m, 0, 8)
	if !push(t, r, 10) {
		t.Fatal("no room")
	}
	m.Leave() // without having been told of batch 8
	m = join(t, s, "g")
	wantLost(t, m, 8, 1)
	b := take(t, m, 9)
	m.Return(b)
	if !push(t, r, 11) { // what came back can be lost as well
		t.Fatal("no room")
	}
	wantLost(t, m, 9, 1)
	if st := s.Stats(); st.Waiting != 0 || st.Groups[0].Oldest != 10 || st.Groups[0].Unread != 2 {
		t.Errorf("stats: %+v", st)
	}
}

// A writer that waits is let go when the last group that holds a batch releases it, and a losing group is all that is left.
func TestLossAtRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 2)
		s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "keeps"}, {Name: "loses", OnLag: Lose}}})
		keeps, loses := join(t, s, "keeps"), join(t, s, "loses")
		fill(t, r, 0, 2*batchSize)
		zero, one := take(t, keeps, 0), take(t, keeps, 1)
		wrote := make(chan error)
		writer := func() {
			_, err := r.Reserve(t.Context(), park.NewWaiter(), batchSize)
			wrote <- err
		}
		go writer()
		synctest.Wait()
		keeps.Release(one) // not the oldest, and room all the same
		if err := <-wrote; err != nil {
			t.Fatal(err)
		}
		wantLost(t, loses, 1, 1)
		go writer()
		synctest.Wait()
		keeps.Return(zero) // nobody else keeps it from being overwritten but this very group
		synctest.Wait()
		keeps.Release(take(t, keeps, 0))
		if err := <-wrote; err != nil {
			t.Fatal(err)
		}
		wantLost(t, loses, 0, 1)
	})
}

// Two writers in line for a ring that a losing group has filled: each gets its place.
func TestLossForEachWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 4)
		s := newGroups(t, r, Config{Default: GroupConfig{OnLag: Lose}})
		join(t, s, "g")
		fill(t, r, 0, 4*batchSize)
		wrote := make(chan ring.Run)
		for range 4 {
			go func() {
				run, err := r.Reserve(t.Context(), park.NewWaiter(), batchSize)
				if err != nil {
					t.Error(err)
				}
				wrote <- run
			}()
		}
		for range 4 {
			<-wrote
		}
		if st := s.Stats(); st.Lost != 4 {
			t.Errorf("%d batches were lost for 4 writers", st.Lost)
		}
	})
}

func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keep = time.Minute
		r := newRing(t, 4)
		s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "listed"}}})
		done := make(chan error)
		go func() { done <- s.Run(t.Context()) }()
		names := func() (all []string) {
			for _, g := range r.Groups() {
				all = append(all, g.Name)
			}
			return all
		}
		m := join(t, s, "guest")
		fill(t, r, 0, 2*batchSize)
		m.Release(take(t, m, 0))
		<-time.After(10 * keep)
		if got := names(); !slices.Equal(got, []string{"listed", "guest"}) {
			t.Fatalf("with a trainer: %q", got)
		}
		m.Leave()
		<-time.After(keep / 2)
		join(t, s, "guest").Leave() // it was away for a moment
		<-time.After(keep - time.Second)
		if got := names(); !slices.Equal(got, []string{"listed", "guest"}) {
			t.Fatalf("before its time: %q", got)
		}
		<-time.After(keep/4 + 2*time.Second)
		if got := names(); !slices.Equal(got, []string{"listed"}) {
			t.Fatalf("after its time: %q", got)
		}
		if st := s.Stats(); st.Ended != 1 || st.Dropped != 1 || st.Delivered != 1 || len(st.Groups) != 1 || st.Groups[0].Unread != 2 {
			t.Errorf("stats: %+v", st)
		}
		// Its entry is another's now, who does not get what was pending for it.
		other := join(t, s, "other")
		takeNone(t, other)
		listed := join(t, s, "listed")
		listed.Release(take(t, listed, 0))
		listed.Release(take(t, listed, 1))
		listed.Leave()
		other.Leave()
		<-time.After(2 * keep)
		if got := names(); !slices.Equal(got, []string{"listed"}) {
			t.Fatalf("a listed group ends never, another does: %q", got)
		}
		r.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// The last group of a table keeps what comes, however long nobody trains.
func TestLastGroupStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 4)
		s := newGroups(t, r, Config{Keep: time.Second})
		go func() { _ = s.Run(t.Context()) }()
		for _, name := range []string{"a", "b"} {
			join(t, s, name).Leave()
			<-time.After(100 * time.Millisecond)
		}
		<-time.After(time.Hour)
		if got := r.Groups(); len(got) != 1 || got[0].Name != "b" {
			t.Fatalf("groups: %+v, want the one that was used last", got)
		}
		fill(t, r, 0, batchSize)
		take(t, join(t, s, "b"), 0)
		r.Close()
		synctest.Wait()
	})
}

func TestGroupsMax(t *testing.T) {
	r := newRing(t, 2)
	s := newFIFO(t, r, 0)
	for i := range ring.GroupsMax {
		join(t, s, fmt.Sprint(i))
	}
	_, err := s.Join("one more", Who{})
	var full *ring.GroupsFullError
	if !errors.As(err, &full) || !strings.Contains(err.Error(), `"one more"`) {
		t.Errorf("group 65: %v", err)
	}
	if _, err := s.Join("", Who{}); err == nil || errors.As(err, &full) {
		t.Errorf("a group without a name: %v", err)
	}
	m := join(t, s, "63")
	fill(t, r, 0, batchSize)
	m.Release(take(t, m, 0))
}

// A process that takes the segment up knows who has not read what.
func TestRecovered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		layout := ring.Layout{BatchSize: batchSize, Batches: 8, Columns: []int64{8}, Table: "t", Created: time.Now()}
		size, err := layout.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		mem := ring.AlignedBytes(size)
		r, err := ring.Format(mem, layout)
		if err != nil {
			t.Fatal(err)
		}
		s := newFIFO(t, r, 0)
		fill(t, r, 0, batchSize)
		a := join(t, s, "a")
		b := join(t, s, "b")
		fill(t, r, batchSize, 3*batchSize)
		a.Release(take(t, a, 0))
		a.Release(take(t, a, 1))
		take(t, a, 2)
		b.Release(take(t, b, 1))
		b.Release(take(t, b, 2))
		take(t, b, 3)
		fill(t, r, 4*batchSize, batchSize) // published, not taken from the ring
		session, err := r.OpenSession("producer", time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		place, ok := r.TryLend(session.Stream())
		if !ok {
			t.Fatal("no place to lend")
		}
		clear(r.PlaceColumn(place, 0))
		r.CommitPlace(place, 0, 2, session.Stream(), 0, 1, session.Mark(2))

		r, found, err := ring.Recover(mem, layout)
		if err != nil {
			t.Fatal(err)
		}
		s = newGroups(t, r, Config{Groups: []GroupConfig{{Name: "new"}}}, found.Batches...)
		if got := s.Stats(); len(got.Groups) != 3 || got.Groups[2].Name != "new" || !got.Groups[2].Listed {
			t.Fatalf("stats: %+v", got)
		}
		fill(t, r, 0, batchSize)
		a, b = join(t, s, "a"), join(t, s, "b")
		want := map[*Member][]uint64{a: {2, 3, 4, 5, 6}, b: {3, 4, 5, 6}, join(t, s, "new"): {6}}
		for m, numbers := range want {
			for _, n := range numbers {
				m.Release(take(t, m, n))
			}
			takeNone(t, m)
		}
		leased := func() (n int) {
			for i := range r.Batches() {
				if r.BatchState(i).State == ring.Leased {
					n++
				}
			}
			return n
		}
		if got := s.Stats().Pinned; got != 1 || leased() != 1 {
			t.Errorf("%d places are kept, %d are leased", got, leased())
		}
		ctx := t.Context()
		go func() { _ = s.Run(ctx) }()
		<-time.After(29 * time.Second)
		before := s.Stats().Pinned
		s.Unpin(session.Stream() + 1)
		if got := s.Stats().Pinned; got != before {
			t.Errorf("another stream's Unpin: %d kept, before %d", got, before)
		}
		<-time.After(10 * time.Second)
		if got := s.Stats().Pinned; got != 0 || leased() != 0 {
			t.Errorf("after the grace: %d kept, %d leased", got, leased())
		}
		r.Close()
	})
}

// Places that a stream may come back for: the batch is given out, the place is not filled again.
func TestPinned(t *testing.T) {
	r := newRing(t, 2)
	fill(t, r, 0, 2*batchSize)
	zero, _ := r.TryLease()
	one, _ := r.TryLease()
	empty := one
	empty.Count = 0
	s := newGroups(t, r, Config{}, ring.Recovered{Batch: zero, Pending: ring.AllGroups, Stream: 7}, ring.Recovered{Batch: empty, Pending: ring.AllGroups, Stream: 8})
	m := join(t, s, "g")
	m.Release(take(t, m, 0))
	takeNone(t, m)
	if _, ok := r.TryReserve(1); ok || s.Stats().Pinned != 2 {
		t.Fatal("a pinned place was filled again")
	}
	s.Unpin(7)
	if _, ok := r.TryReserve(batchSize); !ok || s.Stats().Pinned != 1 {
		t.Fatal("no place after Unpin")
	}
	s.Unpin(7)
	s.Unpin(8)
	if _, ok := r.TryReserve(batchSize); !ok || s.Stats().Pinned != 0 {
		t.Fatal("no place after the second Unpin")
	}
}

// With no group yet, recovered batches wait for the first one; what nobody needs any more is free at once.
func TestRecoveredWithoutGroup(t *testing.T) {
	r := newRing(t, 4)
	fill(t, r, 0, 3*batchSize)
	var found []ring.Recovered
	for range 3 {
		b, _ := r.TryLease()
		found = append(found, ring.Recovered{Batch: b, Pending: ring.AllGroups})
	}
	found[1].Pending = 1 << 9 // of a group that is gone
	s := newGroups(t, r, Config{}, found...)
	if h, ok := s.Holder(); !ok || h.Batch != 0 || !h.Idle {
		t.Errorf("holder: %+v, %v", h, ok)
	}
	fill(t, r, 3*batchSize, batchSize)
	m := join(t, s, "g")
	for _, n := range []uint64{0, 2, 3} {
		m.Release(take(t, m, n))
	}
	takeNone(t, m)
	takeNone(t, join(t, s, "h"))
}

func TestHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 8)
		s := newFIFO(t, r, 0)
		if h, ok := s.Holder(); ok {
			t.Errorf("of an empty ring: %+v", h)
		}
		fill(t, r, 0, 2*batchSize)
		<-time.After(time.Second)
		if h, ok := s.Holder(); !ok || !h.Idle || h.Group != "" || h.Batch != 0 {
			t.Errorf("nobody has ever trained: %+v, %v", h, ok)
		}
		a, err := s.Join("a", Who{Trainer: 5, Client: "me", PID: 77})
		if err != nil {
			t.Fatal(err)
		}
		joined := time.Now()
		if h, ok := s.Holder(); !ok || h != (Holder{Group: "a", Batch: 0, Since: joined, Idle: true}) {
			t.Errorf("nobody takes: %+v, %v", h, ok)
		}
		zero := take(t, a, 0)
		took := time.Now()
		<-time.After(time.Second)
		one := take(t, a, 1)
		b := join(t, s, "b")
		fill(t, r, 2*batchSize, batchSize)
		two := take(t, b, 2)
		if h, ok := s.Holder(); !ok || !h.Since.Equal(took) || h != (Holder{Group: "a", Who: Who{5, "me", 77}, Batch: 0, Since: h.Since}) {
			t.Errorf("the oldest lease: %+v, %v", h, ok)
		}
		a.Release(zero)
		a.Release(one)
		left := time.Now()
		b.Release(two)
		b.Leave()
		<-time.After(time.Second)
		fill(t, r, 3*batchSize, 2*batchSize)
		a.Release(take(t, a, 2))
		a.Release(take(t, a, 3))
		take(t, a, 4)
		// b holds two places without anybody, a one with somebody.
		if h, ok := s.Holder(); !ok || h != (Holder{Group: "b", Batch: 3, Since: left, Idle: true}) {
			t.Errorf("the group that lags: %+v, %v", h, ok)
		}
	})
}
