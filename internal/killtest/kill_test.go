//go:build linux && !race

package killtest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/failpoint"
)

const termination = syscall.SIGTERM

// killsMin is how many processes of each kind `make test` kills at least.
const killsMin = 100

// tables are two shapes, so that each way of receiving is taken: small samples that are scattered from a staging buffer, and large ones that are
// read in place over several leaves, their slot held while they arrive.
func tables(groups ...string) []*table {
	const linger = daemon.Duration(10 * time.Millisecond)
	return []*table{
		{Table: daemon.Table{Name: "small", Spec: SpecText("a:U8[40],b:F32[6],c:U8[3]"), BatchSize: 32, Batches: 16, Linger: linger}, groups: groups},
		{Table: daemon.Table{Name: "large", Spec: SpecText("a:U8[60000],b:F32[5000]"), BatchSize: 4, Batches: 16, Linger: linger}, groups: groups},
	}
}

// most is how many samples a producer of the table sends at once.
func (tb *table) most() int { return max(1, tb.BatchSize*3/4) }

// populate adds trainers of each group and producers of each transport to each table.
func (w *world) populate(sessionsGoOn bool) {
	trainers := 0
	for _, tb := range w.tables {
		for _, group := range tb.groups {
			for range 2 {
				w.add(&peer{kind: trainer, table: tb, group: group, addr: "unix://" + w.unix, most: 2, pause: 100 * time.Microsecond})
				trainers++
			}
		}
	}
	// A group gets what is published after it was made, and the history wants all.
	if !within(patience, func() bool { s, err := w.status(); return err == nil && len(s.Trainers) == trainers }) {
		w.fail("the trainers do not attach")
	}
	for _, tb := range w.tables {
		for k := range 2 {
			addr := "tcp://" + w.tcp
			if k == 1 {
				addr = "unix://" + w.unix
			}
			w.add(&peer{kind: tcpProducer, table: tb, addr: addr, most: tb.most(), pause: 400 * time.Microsecond, lasts: sessionsGoOn || k == 1})
			w.add(&peer{
				kind: shmProducer, table: tb, addr: "unix://" + w.unix, most: tb.most(), pause: 400 * time.Microsecond,
				lasts: sessionsGoOn || k == 1, either: k == 1, points: w.fillerPoint,
			})
		}
	}
}

// fillerPoint chooses the failpoint of a producer's process: one that nobody was killed at so far, soon, or any, or none.
func (w *world) fillerPoint(rnd *rand.Rand) string {
	points := slices.DeleteFunc(slices.Clone(failpoint.Names), func(name string) bool { return !strings.HasPrefix(name, "client/filler/") })
	missed := slices.DeleteFunc(slices.Clone(points), func(name string) bool { return w.struckAt(name) > 0 || !alwaysPassed(name) })
	if len(missed) > 0 && rnd.IntN(4) > 0 {
		return missed[rnd.IntN(len(missed))] + ":" + strconv.Itoa(1+rnd.IntN(4))
	}
	if rnd.IntN(2) == 0 {
		return ""
	}
	return points[rnd.IntN(len(points))] + ":" + strconv.Itoa(1+rnd.IntN(100))
}

// killer kills peers of a kind, at random moments after they have done something, until there were so many.
func (w *world) killer(k kind, most int) {
	rnd := w.rand("killer of " + string(k))
	victims := w.of(k)
	for w.killing.Err() == nil && w.killed(k) < most {
		p := victims[rnd.IntN(len(victims))]
		q := p.current()
		from := p.progress(q)
		if !q.running() || !within(200*time.Millisecond, func() bool { return p.progress(q) > from || !q.running() || w.killing.Err() != nil }) {
			continue
		}
		w.moment(rnd, 8*time.Millisecond, q)
		q.kill()
	}
}

// of returns the peers of a kind.
func (w *world) of(k kind) (list []*peer) {
	for _, p := range w.peers {
		if p.kind == k {
			list = append(list, p)
		}
	}
	return list
}

// moment waits for a random time, or until the process has ended.
func (w *world) moment(rnd *rand.Rand, most time.Duration, q *process) {
	pause := time.NewTimer(time.Duration(rnd.Int64N(int64(most))))
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-q.done:
	case <-w.killing.Done():
	}
}

// stopper stops processes of a kind for a moment, at random moments.
func (w *world) stopper(k kind) {
	rnd := w.rand("stopper of " + string(k))
	victims := w.of(k)
	for w.killing.Err() == nil {
		var q *process
		if k == theDaemon {
			q = w.theDaemon()
		} else {
			q = victims[rnd.IntN(len(victims))].current()
		}
		w.moment(rnd, 100*time.Millisecond, q)
		if !q.running() {
			within(time.Second, func() bool { return w.killing.Err() != nil || k != theDaemon || w.theDaemon().running() })
			continue
		}
		q.signal(syscall.SIGSTOP)
		w.moment(rnd, 30*time.Millisecond, q)
		q.signal(syscall.SIGCONT)
		w.mu.Lock()
		w.stops[k]++
		w.mu.Unlock()
	}
}

// daemonPoints are the failpoints of the daemon's process.
func daemonPoints() []string {
	return slices.DeleteFunc(slices.Clone(failpoint.Names), func(name string) bool { return strings.HasPrefix(name, "client/") || ofWeights(name) })
}

// daemonKiller ends the daemon over and over, and starts the next one, until that was enough and every point was struck or tried so often. The last daemon has no
// failpoint.
func (w *world) daemonKiller(enough func() bool, tries int) {
	k := &daemonEnds{world: w, rnd: w.rand("killer of the daemon"), points: daemonPoints(), tried: map[string]int{}, tries: tries}
	k.rnd.Shuffle(len(k.points), func(i, j int) { k.points[i], k.points[j] = k.points[j], k.points[i] })
	for w.killing.Err() == nil {
		if !k.end(w.theDaemon()) {
			return
		}
		done := enough() && w.visited(k.tried, tries)
		next := ""
		if !done {
			next = k.next()
		}
		w.mu.Lock()
		w.restarts++
		w.mu.Unlock()
		if !w.serve(next) || done {
			return
		}
	}
}

// daemonEnds is how daemons end.
type daemonEnds struct {
	*world
	rnd    *rand.Rand
	points []string
	tried  map[string]int
	tries  int
}

// end ends a daemon, when something was delivered: at its failpoint, at a random moment, or now and then in order, or while it does that. It returns false if it failed.
func (k *daemonEnds) end(d *process) bool {
	from := k.delivered()
	within(time.Second, func() bool { return k.delivered() > from || !d.running() || k.killing.Err() != nil })
	k.moment(k.rnd, 40*time.Millisecond, d)
	if d.point != "" {
		within(150*time.Millisecond, func() bool { return !d.running() })
	}
	if own, err := d.memory("RssAnon"); err == nil && own > ownMemoryMax {
		k.fail("the daemon holds %d bytes beside its segments", own)
	}
	if how := k.rnd.IntN(16); how < 2 && d.running() {
		d.signal(termination)
		if how == 0 {
			<-d.done
		} else {
			k.moment(k.rnd, 100*time.Millisecond, d)
		}
	}
	point := map[bool]string{true: d.point}[!d.running()]
	d.kill()
	switch code := d.cmd.ProcessState.ExitCode(); {
	case d.struck():
		k.count(theDaemon, point)
	case code != 0 && code != exitData: // those two are an end in order
		k.fail("the daemon ended by itself: %s", d.ending())
		return false
	}
	return true
}

// next chooses the failpoint of the next daemon: one that nobody was killed at so far, any, or none.
func (k *daemonEnds) next() string {
	i := slices.IndexFunc(k.points, func(name string) bool { return k.struckAt(name) == 0 && k.tried[name] < triesAt(name, k.tries) })
	if i >= 0 && k.rnd.IntN(4) > 0 {
		name := k.points[i]
		k.points = append(slices.Delete(k.points, i, i+1), name) // the others come before it is tried again
		k.tried[name]++
		count := 1 // some are passed only once in a daemon's life
		if k.tried[name]%2 == 0 {
			count += k.rnd.IntN(20)
		}
		return name + ":" + strconv.Itoa(count)
	}
	if k.rnd.IntN(2) == 0 {
		return k.points[k.rnd.IntN(len(k.points))] + ":" + strconv.Itoa(1+k.rnd.IntN(40))
	}
	return ""
}

func (w *world) struckAt(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.points[name]
}

// alwaysPassed tells whether a point is passed again and again wherever there are daemon, producers and trainers. The others are passed here only where peers happen to meet; all
// those of ring and drainer are struck in TestRingOwnerKilled.
func alwaysPassed(name string) bool {
	return !strings.HasPrefix(name, "ring/") && !strings.HasPrefix(name, "drainer/settle/") && name != "client/filler/copying" && !ofWeights(name)
}

// ofWeights tells whether a point is passed only where weights are published: they are struck in weights_test.go.
func ofWeights(name string) bool {
	return strings.HasPrefix(name, "weights/") || strings.HasPrefix(name, "client/publisher/")
}

// triesAt is how often it is tried to strike a point.
func triesAt(name string, tries int) int {
	if alwaysPassed(name) {
		return tries
	}
	return min(tries, 1)
}

// visited tells whether each point of the daemon was struck, or tried often enough to give up.
func (w *world) visited(tried map[string]int, tries int) bool {
	for _, name := range daemonPoints() {
		if w.struckAt(name) == 0 && tried[name] < triesAt(name, tries) {
			return false
		}
	}
	return true
}

// delivered counts the samples that came to trainers.
func (w *world) delivered() (n uint64) {
	for _, tb := range w.tables {
		n += tb.history.Totals().InRing
	}
	return n
}

// heap collects the daemon's garbage and returns what is left, in bytes: the least of several looks, since its peers are at work meanwhile.
func (w *world) heap() (least float64, err error) {
	for i := range 5 {
		w.mu.Lock()
		admin := w.admin
		w.mu.Unlock()
		if err := w.get(admin+"/debug/pprof/heap?gc=1", func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }); err != nil {
			return 0, err
		}
		var now float64
		if err := w.get(admin+"/metrics", func(r io.Reader) error {
			text, err := io.ReadAll(r)
			for line := range strings.Lines(string(text)) {
				if value, ok := strings.CutPrefix(line, "go_memstats_heap_alloc_bytes "); ok {
					now, err = strconv.ParseFloat(strings.TrimSpace(value), 64)
				}
			}
			return err
		}); err != nil {
			return 0, err
		}
		if i == 0 || now < least {
			least = now
		}
	}
	return least, nil
}

// heapGrowthMax is how much the daemon's heap may grow over any number of kills: what differs with what its peers do just now.
const heapGrowthMax = 1 << 20

// ownMemoryMax is how much the daemon may hold beside its segments.
const ownMemoryMax = 64 << 20

// peersKilled kills peers of these kinds while enough says so; the daemon never. Its memory must not grow meanwhile.
func peersKilled(t *testing.T, seed uint64, most int, enough func(*world) bool) {
	w := newWorld(t, seed, tables("a", "b"), nil)
	w.populate(false)
	kinds := []kind{tcpProducer, shmProducer, trainer}
	for _, k := range kinds {
		w.killers.Go(func() { w.killer(k, most) })
		w.killers.Go(func() { w.stopper(k) })
	}
	warm := func() bool {
		return w.running.Err() != nil || !slices.ContainsFunc(kinds, func(k kind) bool { return w.killed(k) < killsMin/4 })
	}
	if !within(patience, warm) {
		w.fail("not enough was killed in time: %v", w.kills)
	}
	before, err := w.heap()
	check(t, err)
	for !enough(w) && w.running.Err() == nil {
		within(100*time.Millisecond, func() bool { return w.running.Err() != nil })
	}
	after, err := w.heap()
	check(t, err)
	own, err := w.theDaemon().memory("RssAnon")
	check(t, err)
	if grown := after - before; grown > heapGrowthMax || own > ownMemoryMax {
		t.Errorf("the daemon's heap grew by %.0f bytes, to %.0f; beside its segments it holds %d", grown, after, own)
	}
	t.Logf("the daemon's heap: %.0f KiB, then %.0f KiB; beside its segments it holds %d KiB", before/1024, after/1024, own>>10)
	w.finish()
	w.report()
}

// everyoneKilled kills the daemon, which keeps its segments, and everybody else, while enough says so.
func everyoneKilled(t *testing.T, seed uint64, most, tries int, enough func(*world) bool) *world {
	w := newWorld(t, seed, tables("a", "b"), func(cfg *daemon.Config) { cfg.SegmentDir = "segments" })
	w.populate(true)
	for _, k := range []kind{tcpProducer, shmProducer, trainer} {
		w.killers.Go(func() { w.killer(k, most) })
	}
	for _, k := range []kind{tcpProducer, shmProducer, trainer, theDaemon} {
		w.killers.Go(func() { w.stopper(k) })
	}
	done := make(chan struct{})
	w.killers.Go(func() {
		defer close(done)
		w.daemonKiller(func() bool { return enough(w) }, tries)
	})
	select {
	case <-done: // every point was struck, and the daemon that runs now has none
	case <-w.running.Done():
	}
	w.finish()
	w.report()
	return w
}

// TestEveryoneKilled: the daemon is killed at each failpoint and at random moments, and its peers meanwhile; its successor takes the segments up.
func TestEveryoneKilled(t *testing.T) {
	t.Parallel()
	seed := newSeed(t)
	const tries = 12
	w := everyoneKilled(t, seed, killsMin, tries, enough(killsMin, tcpProducer, shmProducer, trainer, theDaemon))
	for _, name := range failpoint.Names {
		if w.struckAt(name) == 0 && alwaysPassed(name) {
			t.Errorf("nobody was killed at %s", name)
		}
	}
}

// enough tells whether so many of each kind were killed.
func enough(most int, kinds ...kind) func(*world) bool {
	limit := time.Now().Add(3 * time.Minute)
	return func(w *world) bool {
		if time.Now().After(limit) {
			w.fail("not enough was killed in time: %v of %d", w.kills, most)
		}
		return !slices.ContainsFunc(kinds, func(k kind) bool { return w.killed(k) < most })
	}
}

// TestPeersKilled: producers and trainers are killed and stopped beside each other, the daemon never.
func TestPeersKilled(t *testing.T) {
	t.Parallel()
	peersKilled(t, newSeed(t), killsMin, enough(killsMin, tcpProducer, shmProducer, trainer))
}

// TestSoak: everything at once, for as long as -soak says.
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("a long run: make soak")
	}
	seed := newSeed(t)
	fmt.Printf("seed %d, for %v\n", seed, *soakFor)
	over := time.Now().Add(*soakFor)
	t.Run("peers", func(t *testing.T) {
		t.Parallel()
		peersKilled(t, seed, 1<<30, func(*world) bool { return time.Now().After(over) })
	})
	t.Run("everyone", func(t *testing.T) {
		t.Parallel()
		everyoneKilled(t, seed, 1<<30, 0, func(*world) bool { return time.Now().After(over) })
	})
	t.Run("hostile", func(t *testing.T) {
		t.Parallel()
		until := time.Now().Add(min(*soakFor, time.Minute))
		hostilePeers(t, seed, func(uint64) bool { return time.Now().After(until) })
	})
	t.Run("owners", func(t *testing.T) {
		t.Parallel()
		ownerKilled(t, seed, func(_, missing int) bool { return missing == 0 && time.Now().After(over) })
	})
	t.Run("damage", func(t *testing.T) {
		t.Parallel()
		for round := uint64(0); time.Now().Before(over) && !t.Failed(); round++ {
			eachByteDamaged(t, seed+round)
		}
	})
}
