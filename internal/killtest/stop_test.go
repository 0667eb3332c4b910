//go:build linux && !race

package killtest

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	w := newWorld(t, newSeed(t), tables("a", "b"), func(cfg *daemon.Config) {
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

// TestOutOfDescriptors: the daemon may open no more files for a while, in which its peers are killed and want to come back. Those that it has go on; when it may again,
// all do.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	w := newWorld(t, newSeed(t), tables("a", "b"), nil)
	w.populate(true)
	var old unix.Rlimit
	check(t, unix.Prlimit(w.theDaemon().pid(), unix.RLIMIT_NOFILE, nil, &old))
	for _, k := range []kind{tcpProducer, trainer} {
		w.killers.Go(func() { w.killer(k, 1<<30) })
	}
	waits := w.rand("descriptors")
	for round := 0; round < 5 && w.running.Err() == nil; round++ {
		open, err := w.theDaemon().descriptors()
		check(t, err)
		few := uint64(open - 2 + round) // fewer than are open are enough for those that are
		check(t, unix.Prlimit(w.theDaemon().pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: few, Max: old.Max}, nil))
		w.moment(waits, 400*time.Millisecond, w.theDaemon())
		check(t, unix.Prlimit(w.theDaemon().pid(), unix.RLIMIT_NOFILE, &old, nil))
		from := w.delivered()
		if !within(patience, func() bool { return w.delivered() > from+2000 || w.running.Err() != nil }) {
			w.fail("nothing goes on with descriptors to spare")
		}
	}
	s, err := w.status()
	check(t, err)
	t.Logf("not accepted: %d; refused: %v", s.Producers.AcceptErrors, s.Producers.Refused)
	w.finish()
	w.report()
}
