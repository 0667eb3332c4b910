//go:build linux && !race

package killtest

import (
	"testing"
	"time"
)

// TestHostilePeers: scribblers beside honest peers; nobody else notices.
func TestHostilePeers(t *testing.T) {
	t.Parallel()
	const spoiled = 150
	hostilePeers(t, newSeed(t), func(n uint64) bool { return n >= spoiled })
}

// hostilePeers goes on until enough says so of the number of channels that were spoiled.
func hostilePeers(t *testing.T, seed uint64, enough func(spoiled uint64) bool) {
	w := newWorld(t, seed, tables("a", "b"), nil)
	w.populate(true)
	// Not from the start: a queue of zeros would give back batch 0, and a scribbler who has it may do so.
	within(patience, func() bool { return w.delivered() > 2000 || w.running.Err() != nil })
	var roles []string
	for _, tb := range w.tables {
		for _, role := range hostileRoles {
			group := ""
			if role == "train" {
				group = tb.groups[0] // one that others read, too: an own group, that holds everybody back, is its right
			}
			w.add(&peer{kind: scribbler, table: tb, role: role, group: group, addr: "unix://" + w.unix})
			roles = append(roles, role)
		}
	}
	spoiled := func() (n uint64) {
		for _, p := range w.of(scribbler) {
			n += p.current().lines.Load()
		}
		return n
	}
	limit := time.Now().Add(patience)
	for last := uint64(0); !enough(spoiled()) && w.running.Err() == nil; {
		within(100*time.Millisecond, func() bool { return w.running.Err() != nil })
		if now := w.delivered(); now > last && spoiled() > 0 {
			last, limit = now, time.Now().Add(patience)
		} else if time.Now().After(limit) {
			w.fail("nothing is delivered any more beside peers that scribble")
		}
	}
	n := spoiled()
	w.finish()
	t.Logf("%d channels spoiled, as %v", n, roles)
	w.report()
}
