//go:build linux && !race

package killtest

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
)

// stopped tells whether the kernel has stopped the process.
func (p *process) stopped() bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid()))
	_, after, _ := bytes.Cut(text, []byte(") "))
	return err == nil && bytes.HasPrefix(after, []byte("T"))
}

// TestStoppedPeerStopsNobody: each peer in turn is stopped for as long as the ring takes to go round twice: the others go on. Then it goes on, too.
func TestStoppedPeerStopsNobody(t *testing.T) {
	t.Parallel()
	w := newWorld(t, newSeed(t), tables("default"), func(cfg *daemon.Config) {
		cfg.Limits.StallTimeout = daemon.Duration(200 * time.Millisecond) // then a large sample that is half there loses its slot
	})
	w.populate(true)
	for _, p := range w.peers {
		q := p.current()
		from := p.progress(q)
		if !within(patience, func() bool { return p.progress(q) > from }) {
			t.Fatalf("the %s does nothing", p.kind)
		}
		q.signal(syscall.SIGSTOP)
		if !within(patience, q.stopped) {
			t.Fatal("the process does not stop")
		}
		for _, tb := range w.tables {
			goal := tb.history.Totals().InRing + uint64(2*tb.Batches*tb.BatchSize)
			if !within(patience, func() bool { return tb.history.Totals().InRing >= goal }) {
				t.Errorf("table %q stands still while a %s of table %q is stopped", tb.Name, p.kind, p.table.Name)
			}
		}
		q.signal(syscall.SIGCONT)
		from = p.progress(q)
		if !within(patience, func() bool { return p.progress(q) > from || q != p.current() }) {
			t.Errorf("the %s does not go on", p.kind)
		}
	}
	w.finish()
	w.report()
}
