//go:build linux && !race

package shm

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/wire"
)

func listed(names ...string) (cfg sampler.Config) {
	for _, n := range names {
		cfg.Groups = append(cfg.Groups, sampler.GroupConfig{Name: n})
	}
	return cfg
}

// Two groups of trainer processes, in each of which one is killed every so often while another reads on: to each group every batch comes, twice only
// if a trainer was killed between giving it back and saying so; a death in one group is nothing to the other.
func TestKillsInGroups(t *testing.T) {
	const batches, kills = 1000, 3
	d := startGroups(t, 8, ServerConfig{}, listed("a", "b"))
	steady := map[string]*trainerProcess{"a": d.startIn(t, "a", "read"), "b": d.startIn(t, "b", "read")}
	times := map[string][]int{"a": make([]int, batches), "b": make([]int, batches)}
	published := make(chan error)
	go func() {
		err := d.publish(t.Context(), batches)
		d.ring.Close()
		published <- err
	}()
	for range kills {
		for _, group := range []string{"a", "b"} {
			victim := d.startIn(t, group, "read")
			first := victim.line()
			check(t, victim.cmd.Process.Kill())
			for line := first; line != "gone"; line = victim.line() {
				if n, err := strconv.Atoi(strings.TrimPrefix(line, "read ")); err == nil {
					times[group][n]++
				}
			}
			check(t, <-d.served)
		}
	}
	for _, group := range []string{"a", "b"} {
		steady[group].readAll(times[group])
		check(t, <-d.served)
	}
	check(t, <-published)
	for group, times := range times {
		d.startIn(t, group, "read").readAll(times) // what came back after the steady one was told of the end
		check(t, <-d.served)
		missing := 0
		for n, k := range times {
			if k == 0 {
				missing++
			} else if k > 1 {
				t.Errorf("group %s: batch %d was read %d times", group, n, k)
			}
		}
		if most := 2 * kills; missing > most { // given back without having said so, at most its prefetch each
			t.Errorf("group %s: %d batches were never read; %d kills explain at most %d", group, missing, kills, most)
		}
	}
	d.allFree()
}

func (d *daemon) allFree() {
	d.t.Helper()
	for i := range d.ring.Batches() {
		if st := d.ring.BatchState(i); st.State != ring.Free {
			d.t.Errorf("place %d is %v", i, st)
		}
	}
}

// A killed trainer's batches stay in its group, by its policy.
func TestKilledTrainerInGroups(t *testing.T) {
	cfg := listed("offers", "drops")
	cfg.Groups[1].OnDeath = sampler.Drop
	d := startGroups(t, 8, ServerConfig{}, cfg)
	for _, group := range []string{"offers", "drops"} {
		victim := d.startIn(t, group, "hold")
		if group == "offers" {
			check(t, d.publish(t.Context(), 4))
		}
		victim.expect("holding 0")
		d.eventually("it was given another", func(s Stats) bool { return len(s.Trainers) == 1 && len(s.Trainers[0].Held) == 2 })
		if st := d.server.Stats().Trainers[0]; st.Group != group {
			t.Errorf("a trainer of group %q: %+v", group, st)
		}
		check(t, victim.cmd.Process.Signal(unix.SIGKILL))
		check(t, <-d.served)
	}
	d.ring.Close()
	offers, drops := d.startIn(t, "offers", "read"), d.startIn(t, "drops", "read")
	for n := range 4 {
		offers.expect(fmt.Sprint("read ", n))
	}
	offers.expect("end")
	for n := 1; n < 4; n++ { // 0 is what it held when it died; 1 it had not looked at
		drops.expect(fmt.Sprint("read ", n))
	}
	drops.expect("end")
	check(t, <-d.served)
	check(t, <-d.served)
	for _, g := range d.fifo.Stats().Groups {
		if want := map[string]uint64{"drops": 1}[g.Name]; g.Dropped != want || g.Returned != 2 {
			t.Errorf("group %+v, want %d dropped", g, want)
		}
	}
	d.allFree()
}

// What the daemon takes away itself at its end is not dropped.
func TestShutdownDropsNothing(t *testing.T) {
	d := startGroups(t, 4, ServerConfig{}, sampler.Config{Default: sampler.GroupConfig{OnDeath: sampler.Drop}})
	a := d.attach(2)
	check(t, d.publish(t.Context(), 1))
	take(t, a, 0)
	d.stop()
	var notice *wire.Notice
	if err := <-d.served; !errors.As(err, &notice) {
		t.Fatal(err)
	}
	if st := d.fifo.Stats(); st.Dropped != 0 || st.Waiting != 1 {
		t.Errorf("stats: %+v", st)
	}
}

// A trainer that is far too slow, in a group that loses batches: it is told of each loss before the next batch, its queue always has room for that, and
// nothing is unaccounted for.
func TestSlowTrainerIsTold(t *testing.T) {
	watchLeaks(t)
	const batches = 400
	d := startGroups(t, 4, ServerConfig{}, sampler.Config{Default: sampler.GroupConfig{OnLag: sampler.Lose}})
	a := d.attachIn("slow", 2)
	if got := a.Accepted(); got.Group != "slow" || got.ChannelBytes != channelBytes(4) || got.Prefetch != 2 {
		t.Errorf("accepted: %+v", got)
	}
	published := make(chan error)
	go func() {
		err := d.publish(t.Context(), batches)
		d.ring.Close()
		published <- err
	}()
	check(t, <-published) // without one batch given back
	read, lost, last, note := 0, 0, -1, (*LostError)(nil)
	for {
		b, err := a.Next(t.Context())
		if err == io.EOF {
			break
		}
		if errors.As(err, &note) {
			if note.Group != "slow" || note.N < 1 || int(note.First) <= last {
				t.Errorf("%+v after batch %d", note, last)
			}
			lost += note.N
			continue
		}
		check(t, err)
		check(t, verify(d.spec, b))
		if int(b.Number) <= last {
			t.Errorf("batch %d came after %d", b.Number, last)
		}
		last = int(b.Number)
		read++
		a.Release(b)
	}
	if read+lost != batches || lost == 0 {
		t.Errorf("%d read and %d lost of %d", read, lost, batches)
	}
	if st := d.server.Stats(); st.Lost != uint64(lost) || st.Delivered != uint64(read) || d.fifo.Stats().Lost != uint64(lost) {
		t.Errorf("stats: %+v, sampler %+v", st, d.fifo.Stats())
	}
	check(t, a.Close())
	check(t, <-d.served)
}

// A trainer reads and gives back what it was given without looking at the notes between: the queue, of the smallest capacity, still is never too full.
func TestLossBeforeEveryBatch(t *testing.T) {
	d := startGroups(t, 2, ServerConfig{}, sampler.Config{Default: sampler.GroupConfig{OnLag: sampler.Lose}})
	a := d.attach(1)
	check(t, d.publish(t.Context(), 1))
	d.eventually("it holds all it may", func(s Stats) bool { return s.Trainers[0].State == StateAtLimit })
	next := uint64(0)
	for round := range 50 {
		check(t, d.publish(t.Context(), 2)) // the first of them is lost
		if round > 0 {
			var lost *LostError
			if _, err := a.Next(t.Context()); !errors.As(err, &lost) || *lost != (LostError{Group: wire.GroupDefault, First: next - 1, N: 1}) {
				t.Fatalf("round %d: %v, want the loss of batch %d", round, err, next-1)
			}
		}
		a.Release(take(t, a, next))
		next += 2
		d.eventually("it was given the next", func(s Stats) bool { return s.Delivered == uint64(round+2) && s.Trainers[0].State == StateAtLimit })
	}
}

func TestTooManyGroups(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 200, ServerConfig{})
	for n := range ring.GroupsMax {
		if _, err := d.fifo.Join(fmt.Sprint(n), sampler.Who{}); err != nil {
			t.Fatal(err)
		}
	}
	a := d.attachIn("63", 1)
	_, err := Attach(t.Context(), d.path, wire.Hello{Table: testTable, Group: "64"})
	var refusal *wire.Refusal
	if !errors.As(err, &refusal) || refusal.Code != wire.CodeTooManyGroups || !strings.Contains(refusal.Reason, `"64"`) {
		t.Errorf("group 65: %v", err)
	}
	<-d.served
	if st := d.server.Stats(); st.Attached != 1 || st.Refused[wire.CodeTooManyGroups] != 1 || len(st.Trainers) != 1 {
		t.Errorf("stats: %+v", st)
	}
	check(t, a.Close())
	check(t, <-d.served)
	d.server.mu.Lock()
	defer d.server.mu.Unlock()
	if len(d.server.granted) != 0 {
		t.Errorf("granted still: %v", d.server.granted)
	}
}
