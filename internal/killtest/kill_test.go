//go:build linux && !race

package killtest

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
)

const termination = syscall.SIGTERM

// sessionsLast says that sessions survive their producers and the daemon.
const sessionsLast = false

// tables are three shapes, so that each way of receiving is taken: scattered from a staging buffer, read in place over several leaves, and one large sample that is held while it
// arrives.
func tables(groups ...string) []*table {
	return []*table{
		{Table: daemon.Table{Name: "small", Spec: SpecText("a:U8[40],b:F32[6],c:U8[3]"), BatchSize: 32, Batches: 12, Linger: daemon.Duration(10 * time.Millisecond)}, groups: groups},
		{Table: daemon.Table{Name: "large", Spec: SpecText("a:U8[60000],b:F32[5000]"), BatchSize: 4, Batches: 10, Linger: daemon.Duration(10 * time.Millisecond)}, groups: groups},
	}
}

// killer kills peers of a kind, at random moments after they have done something, until there were so many.
func (w *world) killer(k kind, most int) {
	rnd := w.rand("killer of " + string(k))
	var victims []*peer
	for _, p := range w.peers {
		if p.kind == k {
			victims = append(victims, p)
		}
	}
	for w.running.Err() == nil && w.killed(k) < most {
		p := victims[rnd.IntN(len(victims))]
		q := p.current()
		from := p.progress(q)
		if !q.running() || !within(time.Second, func() bool { return p.progress(q) > from || !q.running() }) {
			continue
		}
		pause := time.NewTimer(time.Duration(rnd.Int64N(int64(8 * time.Millisecond))))
		select {
		case <-pause.C:
		case <-q.done:
		}
		q.kill()
	}
}

// TestPeersKilled: producers and trainers are killed beside each other, the daemon never.
func TestPeersKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, newSeed(t), tables("default"), nil)
	for i, tb := range w.tables {
		for k := range 3 {
			addr := "tcp://" + w.tcp
			if k == 1 {
				addr = "unix://" + w.unix
			}
			w.add(&peer{kind: tcpProducer, table: tb, addr: addr, most: []int{24, 3}[i], pause: 300 * time.Microsecond})
			w.add(&peer{kind: trainer, table: tb, group: "default", addr: "unix://" + w.unix, most: 3})
		}
	}
	for _, k := range []kind{tcpProducer, trainer} {
		w.all.Go(func() { w.killer(k, 110) })
	}
	if !within(2*time.Minute, func() bool { return w.running.Err() != nil || w.killed(tcpProducer) >= 110 && w.killed(trainer) >= 110 }) {
		t.Error(fmt.Errorf("not enough was killed in time"))
	}
	w.finish()
	w.report()
}
