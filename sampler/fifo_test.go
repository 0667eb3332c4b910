package sampler

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

const batchSize = 4

func newRing(t testing.TB, batches int) *ring.Ring {
	t.Helper()
	layout := ring.Layout{BatchSize: batchSize, Batches: batches, Columns: []int64{8}, Table: "t", Created: time.Now()}
	size, err := layout.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	r, err := ring.Format(ring.AlignedBytes(size), layout)
	if err != nil {
		t.Fatal(err)
	}
	r.Poison = true
	return r
}

func newFIFO(t testing.TB, r *ring.Ring, linger time.Duration) *FIFO {
	t.Helper()
	return newGroups(t, r, Config{Linger: linger})
}

func newGroups(t testing.TB, r *ring.Ring, cfg Config, recovered ...ring.Recovered) *FIFO {
	t.Helper()
	s, err := New(r, cfg, recovered)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func join(t testing.TB, s *FIFO, group string) *Member {
	t.Helper()
	m, err := s.Join(group, Who{Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// sum is Stats without its groups, so that it can be compared.
type sum struct {
	Delivered, Released, Returned, Dropped, Lost uint64
	Leased, Waiting                              int
}

func sumOf(s *FIFO) sum {
	st := s.Stats()
	return sum{st.Delivered, st.Released, st.Returned, st.Dropped, st.Lost, st.Leased, st.Waiting}
}

// fill commits samples numbered from first on, as stream 0.
func fill(t testing.TB, r *ring.Ring, first, n int) {
	t.Helper()
	for n > 0 {
		run, ok := r.TryReserve(n)
		if !ok {
			t.Fatalf("the ring is full at sample %d", first)
		}
		clear(r.RunColumn(run, 0))
		r.Commit(run, 0, uint64(first), 1, ring.Mark{})
		first += int(run.N)
		n -= int(run.N)
	}
}

func take(t testing.TB, m *Member, want uint64) ring.Batch {
	t.Helper()
	b, ok, err := m.TryNext()
	if !ok || err != nil || b.Number != want {
		t.Fatalf("group %s got batch %d (%v, %v), want %d", m.Group(), b.Number, ok, err, want)
	}
	return b
}

func takeNone(t testing.TB, m *Member) {
	t.Helper()
	if b, ok, err := m.TryNext(); ok || err != nil {
		t.Fatalf("group %s got batch %d (%v, %v), want none", m.Group(), b.Number, ok, err)
	}
}

func TestConfig(t *testing.T) {
	named := func(names ...string) (cfg Config) {
		for _, n := range names {
			cfg.Groups = append(cfg.Groups, GroupConfig{Name: n})
		}
		return cfg
	}
	for _, test := range []struct {
		cfg  Config
		says string // "": it is taken
	}{
		{Config{}, ""},
		{Config{Linger: LingerMin, Keep: LingerMin, Grace: LingerMin}, ""},
		{Config{Linger: time.Hour, Keep: time.Hour, Grace: time.Hour}, ""},
		{Config{Linger: LingerMin - 1}, "must be 0 (off) or at least 1ms"},
		{Config{Linger: -1}, "must be 0 (off) or at least 1ms"},
		{Config{Keep: LingerMin - 1}, "must be 0 (the default) or at least 1ms"},
		{Config{Grace: -1}, "must be 0 (the default) or at least 1ms"},
		{Config{Default: GroupConfig{OnDeath: Drop, OnLag: Lose}}, ""},
		{Config{Default: GroupConfig{OnDeath: Drop + 1}}, "policy 2 and hold are no policies"},
		{Config{Default: GroupConfig{OnLag: Lose + 1}}, "offer and policy 2 are no policies"},
		{Config{Default: GroupConfig{Name: "a"}}, "list a group of that name"},
		{named("a", "b"), ""},
		{named("a", "b", "a"), `"a" is listed twice`},
		{named(""), "without a name"},
		{named(strings.Repeat("n", ring.NameBytesMax)), ""},
		{named(strings.Repeat("n", ring.NameBytesMax+1)), "must have 1 to 128"},
	} {
		_, err := New(newRing(t, 2), test.cfg, nil)
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%+v: %v, want %q", test.cfg, err, test.says)
		}
	}
	if got := (Config{}).withDefaults(); got.Keep != time.Minute || got.Grace != 30*time.Second {
		t.Errorf("defaults: %+v", got)
	}
}

func TestPolicyText(t *testing.T) {
	for _, d := range []OnDeath{Offer, Drop} {
		got := OnDeath(9)
		if err := got.UnmarshalText([]byte(d.String())); err != nil || got != d {
			t.Errorf("%v became %v, %v", d, got, err)
		}
	}
	for _, l := range []OnLag{Hold, Lose} {
		got := OnLag(9)
		if err := got.UnmarshalText([]byte(l.String())); err != nil || got != l {
			t.Errorf("%v became %v, %v", l, got, err)
		}
	}
	if err := new(OnLag).UnmarshalText([]byte("offer")); err == nil || !strings.Contains(err.Error(), `must be one of ["hold" "lose"]`) {
		t.Errorf("an unknown policy: %v", err)
	}
}

func TestOrderAndReturn(t *testing.T) {
	r := newRing(t, 8)
	s := newFIFO(t, r, 0)
	m := join(t, s, "g")
	takeNone(t, m)
	fill(t, r, 0, 6*batchSize)
	var held []ring.Batch
	for i := range uint64(4) {
		held = append(held, take(t, m, i))
	}
	// Trainers die in any order: what they held comes again by number, and before anything newer.
	for _, i := range []int{2, 0, 3} {
		m.Return(held[i])
	}
	if st := sumOf(s); st != (sum{Delivered: 4, Returned: 3, Leased: 1, Waiting: 3}) {
		t.Errorf("stats: %+v", st)
	}
	again := []ring.Batch{take(t, m, 0), take(t, m, 2)}
	m.Return(again[0])
	m.Release(take(t, m, 0))
	m.Release(take(t, m, 3))
	m.Release(take(t, m, 4))
	b := again[1]
	if got := b.Numbers(); !slices.Equal(got, []uint64{8, 9, 10, 11}) {
		t.Errorf("batch 2 after its return holds samples %v", got)
	}
	m.Release(b)
	m.Release(held[1])
	r.Close()
	m.Release(take(t, m, 5))
	if _, err := m.Next(t.Context(), park.NewWaiter()); err != io.EOF {
		t.Fatalf("after the last batch: %v, want io.EOF", err)
	}
	if st := sumOf(s); st != (sum{Delivered: 10, Released: 6, Returned: 4}) {
		t.Errorf("stats: %+v", st)
	}
}

func TestReturnAfterTheEnd(t *testing.T) {
	r := newRing(t, 2)
	m := join(t, newFIFO(t, r, 0), "g")
	fill(t, r, 0, batchSize)
	b := take(t, m, 0)
	r.Close()
	w := park.NewWaiter()
	if _, err := m.Next(t.Context(), w); err != io.EOF {
		t.Fatalf("nothing is left to give out: %v, want io.EOF", err)
	}
	m.Return(b)
	b, err := m.Next(t.Context(), w)
	if err != nil || b.Number != 0 {
		t.Fatalf("the batch that came back after the end: %d, %v", b.Number, err)
	}
	m.Release(b)
}

func TestReturnTwicePanics(t *testing.T) {
	r := newRing(t, 2)
	m := join(t, newFIFO(t, r, 0), "g")
	fill(t, r, 0, batchSize)
	b := take(t, m, 0)
	m.Return(b)
	defer func() {
		if recover() == nil {
			t.Fatal("returning a batch twice did not panic")
		}
	}()
	m.Return(b)
}

// What ends a wait: a publication, a Return, the end, a deadline.
func TestNextWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(t, 4)
		s := newFIFO(t, r, 0)
		m := join(t, s, "g")
		got := make(chan uint64)
		next := func() {
			b, err := m.Next(t.Context(), park.NewWaiter())
			if err == io.EOF {
				got <- 1 << 40
				return
			}
			if err != nil {
				t.Error(err)
			}
			got <- b.Number
		}
		go next()
		synctest.Wait()
		if n := s.Stats().Sleeping; n != 1 {
			t.Errorf("%d trainers sleep, want 1", n)
		}
		fill(t, r, 0, batchSize-1)
		synctest.Wait()
		select {
		case n := <-got:
			t.Fatalf("batch %d came before its last sample", n)
		default:
		}
		fill(t, r, batchSize-1, 1)
		if n := <-got; n != 0 {
			t.Fatalf("got batch %d, want 0", n)
		}
		b, _ := r.View.Batch(0, 0, batchSize)
		go next()
		synctest.Wait()
		m.Return(b)
		if n := <-got; n != 0 {
			t.Fatalf("got batch %d, want the returned one", n)
		}
		go next()
		synctest.Wait()
		r.Close()
		if n := <-got; n != 1<<40 {
			t.Fatalf("got batch %d, want the end", n)
		}

		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := join(t, newFIFO(t, newRing(t, 2), 0), "g").Next(ctx, park.NewWaiter()); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("past the deadline: %v", err)
		}
	})
}

func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const linger = 20 * time.Second
		r := newRing(t, 4)
		s := newFIFO(t, r, linger)
		m := join(t, s, "g")
		done := make(chan error)
		go func() { done <- s.Run(t.Context()) }()
		<-time.After(10 * linger)
		if n := s.Stats().Lingered; n != 0 {
			t.Fatalf("%d empty batches were published", n)
		}
		start := time.Now()
		fill(t, r, 0, batchSize-1)
		b, err := m.Next(t.Context(), park.NewWaiter())
		if err != nil || b.Count != batchSize-1 {
			t.Fatalf("%d rows, %v, want %d", b.Count, err, batchSize-1)
		}
		if waited := time.Since(start); waited < linger || waited > 3*linger/2 {
			t.Errorf("published after %v of simulated time, want %v to %v", waited, linger, 3*linger/2)
		}
		m.Release(b)
		// A batch that fills in time is not cut; the one after it has its own time.
		fill(t, r, 0, batchSize-1)
		<-time.After(linger / 2)
		fill(t, r, 3, 2)
		start = time.Now()
		m.Release(take(t, m, 1))
		b, err = m.Next(t.Context(), park.NewWaiter())
		if err != nil || b.Count != 1 || time.Since(start) < linger {
			t.Fatalf("%d rows after %v, %v, want 1 after %v", b.Count, time.Since(start), err, linger)
		}
		if n := s.Stats().Lingered; n != 2 {
			t.Errorf("Lingered is %d, want 2", n)
		}
		r.Close()
		if err := <-done; err != nil {
			t.Errorf("Run at the end of the ring: %v", err)
		}
	})
}

func TestRunEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newFIFO(t, newRing(t, 2), time.Hour).Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Run with an ended context: %v", err)
	}
}

// Nothing is allocated per batch, however many groups there are.
func TestNoAllocations(t *testing.T) {
	for groups := 1; groups <= ring.GroupsMax; groups *= 4 {
		r := newRing(t, 4)
		s := newFIFO(t, r, 0)
		w := park.NewWaiter()
		ctx := t.Context()
		var all []*Member
		for i := range groups {
			all = append(all, join(t, s, strings.Repeat("g", i+1)))
		}
		if n := testing.AllocsPerRun(500, func() {
			run, _ := r.TryReserve(batchSize)
			r.Commit(run, 0, 0, 1, ring.Mark{})
			for _, m := range all {
				b, err := m.Next(ctx, w)
				if err != nil {
					t.Error(err)
				}
				m.Return(b)
				b, _, _ = m.TryNext()
				m.Release(b)
			}
		}); n != 0 {
			t.Errorf("%v allocations per batch with %d groups, want 0", n, groups)
		}
	}
}

// Several trainers, some of which die holding a batch, on the smallest rings: every sample is read exactly once.
func TestManyTrainers(t *testing.T) {
	const samples = 4000 * batchSize
	for _, batches := range []int{2, 4} {
		r := newRing(t, batches)
		s := newFIFO(t, r, 0)
		var mu sync.Mutex
		read := make([]int, samples)
		var trainers sync.WaitGroup
		m := join(t, s, "g")
		for id := range 3 {
			m := join(t, s, "g")
			trainers.Go(func() {
				w := park.NewWaiter()
				for turn := 0; ; turn++ {
					b, err := m.Next(t.Context(), w)
					if err == io.EOF {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					if turn%7 == id {
						m.Return(b)
						continue
					}
					mu.Lock()
					for _, n := range b.Numbers() {
						read[n]++
					}
					mu.Unlock()
					m.Release(b)
				}
			})
		}
		w := park.NewWaiter()
		for at := 0; at < samples; {
			run, err := r.Reserve(t.Context(), w, 3)
			if err != nil {
				t.Fatal(err)
			}
			r.Commit(run, 0, uint64(at), 1, ring.Mark{})
			at += int(run.N)
		}
		r.Close()
		trainers.Wait()
		for b, ok, _ := m.TryNext(); ok; b, ok, _ = m.TryNext() { // returned after the others had seen the end
			for _, n := range b.Numbers() {
				read[n]++
			}
			m.Release(b)
		}
		for n, times := range read {
			if times != 1 {
				t.Fatalf("%d batches: sample %d was read %d times", batches, n, times)
			}
		}
		if st := sumOf(s); st.Leased != 0 || st.Waiting != 0 || st.Delivered != st.Released+st.Returned {
			t.Errorf("stats at the end: %+v", st)
		}
	}
}
