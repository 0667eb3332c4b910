//go:build linux && !race

package killtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
)

// ownPoints are the failpoints that an owner of a ring passes.
func ownPoints() (list []string) {
	for _, name := range failpoint.Names {
		if strings.HasPrefix(name, "ring/") || strings.HasPrefix(name, "drainer/settle/") {
			list = append(list, name)
		}
	}
	return list
}

// TestRingOwnerKilled: a process that owns a ring is killed at each point of package ring, and at random moments; its successor takes the segment up.
func TestRingOwnerKilled(t *testing.T) {
	t.Parallel()
	ownerKilled(t, newSeed(t), func(kills, missing int) bool { return kills >= 2*killsMin && missing == 0 || kills >= 20*killsMin })
}

// ownerKilled goes on until enough says so of the number of kills and of the points that nobody was killed at.
func ownerKilled(t *testing.T, seed uint64, enough func(kills, missing int) bool) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	dir := memoryDir(t)
	segment, ledger, layout := filepath.Join(dir, "segment"), filepath.Join(dir, "ledger"), ownSpec
	history := NewHistory("own")
	history.KeepsStreams = true
	deliver := func(line string) {
		d, err := ParseDelivery(line)
		if err != nil {
			t.Errorf("an owner wrote: %v", err)
			return
		}
		history.Deliver("own", d)
	}
	run := func(point string) *process {
		p, err := spawn(peerPath, point, deliver, "own", "--addr", segment, "--ledger", ledger, "--table", "own", "--spec", layout, "--seed", strconv.FormatUint(rnd.Uint64(), 10))
		check(t, err)
		return p
	}
	points, struck := ownPoints(), map[string]int{}
	kills, restless := 0, 0
	for !enough(kills, len(points)-len(struck)) {
		name := points[rnd.IntN(len(points))]
		if len(struck) < len(points) {
			for struck[name] > 0 {
				name = points[rnd.IntN(len(points))]
			}
		}
		point := ""
		if rnd.IntN(5) > 0 {
			point = name + ":" + strconv.Itoa(1+rnd.IntN([]int{3, 30, 300}[rnd.IntN(3)]))
		}
		if kills == 0 {
			name = "ring/entry/written" // passed only where a session is new
			point = name + ":2"
		}
		p := run(point)
		pause := time.Duration(rnd.Int64N(int64(30 * time.Millisecond)))
		if kills == 0 {
			pause = patience
		}
		timer := time.NewTimer(pause)
		select {
		case <-p.done:
		case <-timer.C:
			p.kill()
		}
		timer.Stop()
		if !p.struck() {
			t.Fatalf("after %d kills, the last owner with %q: %s", kills, point, p.ending())
		}
		if !p.killed.Load() {
			struck[name]++
		} else {
			restless++
		}
		kills++
	}
	last := run("")
	within(patience, func() bool { return last.lines.Load() > 20 || !last.running() })
	last.signal(termination)
	check(t, last.ends(0))
	for id := uint64(1); id <= 3; id++ {
		l, err := OpenLedger(fmt.Sprintf("%s-%d", ledger, id))
		check(t, err)
		sent, acked, err := l.Read()
		check(t, err)
		check(t, l.Close())
		history.Sent(id, sent, acked)
	}
	for _, fault := range history.Finish() {
		t.Error(fault)
	}
	for _, name := range points {
		if struck[name] == 0 {
			t.Errorf("nobody was killed at %s", name)
		}
	}
	t.Logf("seed %d; %d owners killed, %d of them at random moments, the others at %d points; %+v", seed, kills, restless, len(struck), history.Totals())
	if t.Failed() {
		kept := filepath.Join(os.TempDir(), "ingestd-kill-segment")
		if text, err := os.ReadFile(segment); err == nil && os.WriteFile(kept, text, 0o600) == nil {
			t.Logf("the segment is kept as %s", kept)
		}
	}
}
