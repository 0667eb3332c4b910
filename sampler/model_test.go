package sampler

import (
	"errors"
	"flag"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

var modelSeed = flag.Uint64("seed", 0, "seed of TestModel; 0: a new one")

// model is the rules of the package written down plainly: which group has which batch unread, and who holds which.
type model struct {
	t       *testing.T
	rnd     *rand.Rand
	ring    *ring.Ring
	fifo    *FIFO
	cfg     Config
	next    uint64 // number of the next batch
	before  []uint64
	groups  []*modelGroup
	members []*modelMember
	live    map[uint64]bool // batches that keep a place
}

type modelGroup struct {
	GroupConfig
	listed                 bool
	unread                 []uint64 // ascending
	members, dropped, lost int
	untold                 LostError
}

type modelMember struct {
	*Member
	group *modelGroup
	held  map[uint64]ring.Batch
	lost  LostError
}

func (m *model) group(name string) *modelGroup {
	for _, g := range m.groups {
		if g.Name == name {
			return g
		}
	}
	g := &modelGroup{GroupConfig: m.cfg.Default}
	for _, c := range m.cfg.Groups {
		if c.Name == name {
			g.GroupConfig, g.listed = c, true
		}
	}
	g.Name = name
	if len(m.groups) == 0 {
		g.unread, m.before = m.before, nil
	}
	m.groups = append(m.groups, g)
	return g
}

// settle frees the places of batches that nobody needs.
func (m *model) settle() {
	needed := map[uint64]bool{}
	for _, n := range m.before {
		needed[n] = true
	}
	for _, g := range m.groups {
		for _, n := range g.unread {
			needed[n] = true
		}
	}
	for _, mm := range m.members {
		for n := range mm.held {
			needed[n] = true
		}
	}
	m.live = needed
}

// victim is the oldest batch that only losing groups need, all of them unread.
func (m *model) victim() (uint64, bool) {
	for _, n := range slices.Sorted(maps.Keys(m.live)) {
		ok := len(m.groups) > 0
		for _, g := range m.groups {
			ok = ok && (g.OnLag == Lose || !slices.Contains(g.unread, n))
		}
		for _, mm := range m.members {
			_, holds := mm.held[n]
			ok = ok && !holds
		}
		if ok {
			return n, true
		}
	}
	return 0, false
}

func (m *model) push() {
	room := len(m.live) < m.ring.Batches()
	if n, ok := m.victim(); !room && ok {
		room = true
		for _, g := range m.groups {
			at := slices.Index(g.unread, n)
			if at < 0 {
				continue
			}
			g.unread = slices.Delete(g.unread, at, at+1)
			g.lost++
			if g.members == 0 {
				g.untold.add(n, 1)
			}
			for _, mm := range m.members {
				if mm.group == g {
					mm.lost.add(n, 1)
				}
			}
		}
		m.settle()
	}
	if got := push(m.t, m.ring, m.next); got != room {
		m.t.Fatalf("batch %d got a place: %v, want %v; live %v", m.next, got, room, m.live)
	}
	if !room {
		return
	}
	for _, g := range m.groups {
		g.unread = append(g.unread, m.next)
	}
	if len(m.groups) == 0 {
		m.before = append(m.before, m.next)
	}
	m.next++
	m.settle()
}

func (m *model) join() {
	g := m.group([]string{"a", "b", "c", "d"}[m.rnd.IntN(4)])
	mm := &modelMember{Member: join(m.t, m.fifo, g.Name), group: g, held: map[uint64]ring.Batch{}, lost: g.untold}
	g.untold = LostError{}
	g.members++
	m.members = append(m.members, mm)
}

func (m *model) giveUp(g *modelGroup, n uint64, then OnDeath) {
	if then == Drop {
		g.dropped++
		return
	}
	g.unread = append(g.unread, n)
	slices.Sort(g.unread)
}

func (m *model) leave(at int) {
	mm := m.members[at]
	mm.Leave()
	m.members = slices.Delete(m.members, at, at+1)
	for n := range mm.held {
		m.giveUp(mm.group, n, mm.group.OnDeath)
	}
	if mm.group.members--; mm.group.members == 0 {
		mm.group.untold = mm.lost
	}
	m.settle()
}

func (m *model) take(mm *modelMember) {
	b, ok, err := mm.TryNext()
	g := mm.group
	var lost *LostError
	switch {
	case mm.lost.N > 0:
		if !errors.As(err, &lost) || *lost != (LostError{g.Name, mm.lost.First, mm.lost.N}) {
			m.t.Fatalf("group %s: %v, want the loss of %+v", g.Name, err, mm.lost)
		}
		mm.lost = LostError{}
	case err != nil || ok != (len(g.unread) > 0) || ok && b.Number != g.unread[0]:
		m.t.Fatalf("group %s: batch %d, %v, %v, want one of %v", g.Name, b.Number, ok, err, g.unread)
	case ok:
		if b.Numbers()[0] != b.Number*batchSize {
			m.t.Fatalf("batch %d holds sample %d", b.Number, b.Numbers()[0])
		}
		mm.held[b.Number] = b
		g.unread = g.unread[1:]
	}
}

func (m *model) giveBack(mm *modelMember) {
	if len(mm.held) == 0 {
		return
	}
	all := slices.Sorted(maps.Keys(mm.held))
	n := all[m.rnd.IntN(len(all))]
	b := mm.held[n]
	delete(mm.held, n)
	switch m.rnd.IntN(4) {
	case 0:
		mm.Return(b)
		m.giveUp(mm.group, n, mm.group.OnDeath)
	case 1:
		mm.Offer(b)
		m.giveUp(mm.group, n, Offer)
	default:
		mm.Release(b)
	}
	m.settle()
}

// expire lets the time of every group without members pass.
func (m *model) expire() {
	m.fifo.expire(time.Now().Add(2 * m.fifo.cfg.Keep))
	for _, g := range slices.Clone(m.groups) {
		if !g.listed && g.members == 0 && len(m.groups) > 1 {
			m.groups = slices.DeleteFunc(m.groups, func(have *modelGroup) bool { return have == g })
		}
	}
	m.settle()
}

func (m *model) check() {
	st := m.fifo.Stats()
	if len(st.Groups) != len(m.groups) {
		m.t.Fatalf("groups %+v, want %d", st.Groups, len(m.groups))
	}
	for i, g := range m.groups {
		leased := 0
		for _, mm := range m.members {
			if mm.group == g {
				leased += len(mm.held)
			}
		}
		got := st.Groups[i]
		if got.GroupConfig != g.GroupConfig || got.Members != g.members || got.Unread != len(g.unread) || got.Leased != leased || got.Dropped != uint64(g.dropped) ||
			got.Lost != uint64(g.lost) {
			m.t.Fatalf("group %+v, want %+v with %d leased", got, *g, leased)
		}
	}
	free := 0
	for i := range m.ring.Batches() {
		if m.ring.BatchState(i).State == ring.Free {
			free++
		}
	}
	if free != m.ring.Batches()-len(m.live) {
		m.t.Fatalf("%d places are free, live are %v of %d", free, m.live, m.ring.Batches())
	}
}

// Random joining, leaving, taking, giving back, dying, losing and ending, against the plain rules.
func TestModel(t *testing.T) {
	seed := *modelSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	defer func() {
		if t.Failed() {
			t.Logf("replay with -run TestModel -seed %d", seed)
		}
	}()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for round := range 200 {
		m := &model{t: t, rnd: rnd, ring: newRing(t, []int{2, 4}[round%2]), live: map[uint64]bool{}}
		m.ring.Poison = false // released batches are not looked at here, and the places are many
		policy := func(name string) GroupConfig { return GroupConfig{name, OnDeath(rnd.IntN(2)), OnLag(rnd.IntN(2))} }
		m.cfg.Default = policy("")
		for _, name := range []string{"a", "b", "c"}[:rnd.IntN(4)] {
			m.cfg.Groups = append(m.cfg.Groups, policy(name))
		}
		m.fifo = newGroups(t, m.ring, m.cfg)
		for _, g := range m.cfg.Groups {
			m.group(g.Name)
		}
		for range 300 {
			m.step()
			m.check()
		}
		m.drain()
	}
}

func (m *model) step() {
	what := m.rnd.IntN(20)
	if what == 0 {
		m.expire()
	} else if what <= 5 {
		m.push()
	} else if len(m.members) == 0 || what == 6 && len(m.members) < 8 {
		m.join()
	} else if at := m.rnd.IntN(len(m.members)); what == 7 {
		m.leave(at)
	} else if what < 14 {
		m.take(m.members[at])
	} else {
		m.giveBack(m.members[at])
	}
}

// drain reads everything to the end: nothing is left anywhere.
func (m *model) drain() {
	for len(m.groups) == 0 {
		m.join()
	}
	m.ring.Close()
	w := park.NewWaiter()
	for len(m.members) > 0 {
		m.leave(0)
	}
	for _, g := range m.groups {
		mm := join(m.t, m.fifo, g.Name)
		for {
			b, err := mm.Next(m.t.Context(), w)
			if err == io.EOF {
				break
			} else if errors.As(err, new(*LostError)) {
				continue
			} else if err != nil || b.Number != g.unread[0] {
				m.t.Fatalf("draining group %s: batch %d, %v, want %v", g.Name, b.Number, err, g.unread)
			}
			g.unread = g.unread[1:]
			mm.Release(b)
		}
		if len(g.unread) > 0 {
			m.t.Fatalf("group %s: io.EOF with %v unread", g.Name, g.unread)
		}
	}
	m.settle()
	m.allFree()
}

func (m *model) allFree() {
	for i := range m.ring.Batches() {
		if st := m.ring.BatchState(i); st.State != ring.Free {
			m.t.Fatalf("place %d is %v at the end", i, st)
		}
	}
}

// Members of several groups that come, go and die at once, on the smallest rings: a group that was there all the time reads every sample
// exactly once, one that may lose batches reads each once or was told, and no place is left behind.
func TestGroupsAtOnce(t *testing.T) {
	const samples = 2000 * batchSize
	for _, batches := range []int{2, 4} {
		r := newRing(t, batches)
		s := newGroups(t, r, Config{Groups: []GroupConfig{{Name: "one"}, {Name: "two"}, {Name: "loses", OnLag: Lose}}})
		reads := map[string][]atomic.Int32{"one": make([]atomic.Int32, samples), "two": make([]atomic.Int32, samples), "loses": make([]atomic.Int32, samples)}
		var all sync.WaitGroup
		for id := range 6 {
			group := []string{"one", "two", "loses"}[id%3]
			all.Go(func() { trainAtOnce(t, s, group, id, reads[group]) })
		}
		var guests sync.WaitGroup
		over := make(chan struct{})
		guests.Go(func() { // a group that comes and goes
			for n := uint64(0); ; n++ {
				select {
				case <-over:
					return
				default:
				}
				m := join(t, s, "guest")
				if b, ok, _ := m.TryNext(); ok && n%2 == 0 {
					m.Release(b)
				}
				m.Leave()
				s.expire(time.Now().Add(time.Hour))
			}
		})
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
		close(over)
		guests.Wait()
		all.Wait()
		s.expire(time.Now().Add(time.Hour))
		for group, read := range reads {
			trainAtOnce(t, s, group, 100, read) // what came back after the others had seen the end
			lost := 0
			for n := range read {
				if times := read[n].Load(); times > 1 || times == 0 && group != "loses" {
					t.Fatalf("%d batches, group %s: sample %d was read %d times", batches, group, n, times)
				} else if times == 0 {
					lost++
				}
			}
			if got := int(s.Stats().Groups[slices.Index([]string{"one", "two", "loses"}, group)].Lost) * batchSize; got != lost {
				t.Errorf("%d batches, group %s: %d samples were not read, %d are counted as lost", batches, group, lost, got)
			}
		}
		for i := range r.Batches() {
			if st := r.BatchState(i); st.State != ring.Free {
				t.Errorf("place %d is %v at the end", i, st)
			}
		}
	}
}

// trainAtOnce reads to the end, and dies now and then and comes back.
func trainAtOnce(t *testing.T, s *FIFO, group string, id int, read []atomic.Int32) {
	w := park.NewWaiter()
	m := join(t, s, group)
	defer func() { m.Leave() }()
	for turn := 0; ; turn++ {
		b, err := m.Next(t.Context(), w)
		switch {
		case err == io.EOF:
			return
		case errors.As(err, new(*LostError)):
			continue
		case err != nil:
			t.Error(err)
			return
		}
		if turn%7 == id {
			m.Leave()
			m = join(t, s, group)
			continue
		}
		for _, n := range b.Numbers() {
			read[n].Add(1)
		}
		m.Release(b)
	}
}
