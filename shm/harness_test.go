//go:build linux && !race

// The race detector does not see mapped memory (it misses races there and flags correct code), so what attaches runs without it.

package shm

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

const (
	testTable     = "numbers"
	testSpec      = "x:F32[8,8],y:I32"
	testBatchSize = 16
)

// daemon is what a daemon has between its drainers and its trainers.
type daemon struct {
	t      testing.TB
	spec   *spec.Spec
	ring   *ring.Ring
	memory *Memory
	fifo   *sampler.FIFO
	server *Server
	path   string
	stop   context.CancelFunc // cuts every trainer off
	served chan error         // what each Serve returned
	next   uint64             // number of the next sample
	seat   *park.Waiter
}

func (d *daemon) Table(name string) (Table, bool) {
	if name == "private" {
		return Table{Name: name, Spec: d.spec, View: &d.ring.View, Source: d.fifo}, true
	}
	return Table{Name: testTable, Spec: d.spec, View: &d.ring.View, Memory: d.memory, Source: d.fifo}, name == testTable
}

func (d *daemon) Names() []string { return []string{testTable, "private"} }

func startDaemon(t testing.TB, batches int, cfg ServerConfig) *daemon {
	t.Helper()
	return startGroups(t, batches, cfg, sampler.Config{})
}

// startGroups is startDaemon with policies.
func startGroups(t testing.TB, batches int, cfg ServerConfig, policies sampler.Config) *daemon {
	t.Helper()
	s, err := spec.ParseText(testSpec)
	check(t, err)
	d := &daemon{t: t, spec: s, path: filepath.Join(t.TempDir(), "socket"), served: make(chan error, 1000), seat: park.NewWaiter()}
	layout := ring.Layout{
		BatchSize: testBatchSize, Batches: batches, Columns: s.LeafBytes(), Spec: s.JSON(), Fingerprint: s.Fingerprint(), Table: testTable,
		Created: time.Now(),
	}
	size, err := layout.Bytes()
	check(t, err)
	d.memory, err = NewMemory(MemoryConfig{Name: "ingestd " + testTable, Size: size})
	check(t, err)
	d.ring, err = ring.Format(d.memory.Bytes(), layout)
	check(t, err)
	d.ring.Poison = true
	d.fifo, err = sampler.New(d.ring, policies, nil)
	check(t, err)
	cfg.Tables = d
	d.server, err = NewServer(cfg)
	check(t, err)
	d.listen()
	return d
}

func (d *daemon) listen() {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.path})
	check(d.t, err)
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			all.Go(func() {
				hello, err := wire.ReadHello(conn)
				if err != nil {
					conn.Close()
					d.served <- err
					return
				}
				d.served <- d.server.Serve(ctx, conn, hello)
			})
		}
	})
	d.t.Cleanup(func() {
		stop()
		l.Close()
		all.Wait()
		if n := len(d.server.Stats().Trainers); n != 0 {
			d.t.Errorf("%d trainers are left in the server", n)
		}
		check(d.t, d.memory.Close())
	})
}

func check(t testing.TB, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

// publish fills n batches of stream 1 with samples that prove themselves. It waits for room in the ring.
func (d *daemon) publish(ctx context.Context, n int) error {
	for left := n * testBatchSize; left > 0; {
		run, err := d.ring.Reserve(ctx, d.seat, left)
		if err != nil {
			return err
		}
		for leaf := range d.spec.NumLeaves() {
			l, col := d.spec.Leaf(leaf), d.ring.RunColumn(run, leaf)
			for row := range int64(run.N) {
				proof.Leaf(col[row*l.Bytes():(row+1)*l.Bytes()], l.DType, 1, d.next+uint64(row), leaf)
			}
		}
		d.ring.Commit(run, 1, d.next, 1, ring.Mark{})
		d.next += uint64(run.N)
		left -= int(run.N)
	}
	return nil
}

// verify checks every byte of a batch.
func verify(s *spec.Spec, b ring.Batch) error {
	for leaf := range s.NumLeaves() {
		if row, at := proof.CheckColumn(b.Column(leaf), s.Leaf(leaf), leaf, b.Streams(), b.Numbers()); row >= 0 {
			return fmt.Errorf("batch %d, leaf %d, row %d: byte %d is wrong", b.Number, leaf, row, at)
		}
	}
	return nil
}

func (d *daemon) attach(prefetch int64) *Attachment {
	d.t.Helper()
	return d.attachIn("", prefetch)
}

func (d *daemon) attachIn(group string, prefetch int64) *Attachment {
	d.t.Helper()
	a, err := Attach(d.t.Context(), d.path, wire.Hello{Table: testTable, Group: group, Prefetch: prefetch, Client: "test"})
	check(d.t, err)
	d.t.Cleanup(func() { check(d.t, a.Close()) })
	return a
}

func take(t testing.TB, a *Attachment, want uint64) ring.Batch {
	t.Helper()
	b, err := a.Next(t.Context())
	check(t, err)
	if b.Number != want {
		t.Fatalf("got batch %d, want %d", b.Number, want)
	}
	s := a.Accepted().Spec
	check(t, verify(s, b))
	return b
}

// eventually waits until the server's state is as wanted, by looking again; go test's own deadline ends a wait for ever.
func (d *daemon) eventually(what string, ok func(Stats) bool) {
	d.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok(d.server.Stats()) {
		select {
		case <-tick.C:
		case <-d.t.Context().Done():
			d.t.Fatalf("never: %s: %+v", what, d.server.Stats())
		}
	}
}

// watchLeaks fails the test if it leaves goroutines or descriptors behind. Called first: cleanups run last to first.
func watchLeaks(t testing.TB) {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	warmUp(t)
	before := descriptors(t)
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore)
		if after := descriptors(t); len(after) > len(before) {
			t.Errorf("%d descriptors before, %d after: %v", len(before), len(after), after)
		}
	})
}

// warmUp makes the runtime open what it keeps open (its poller).
func warmUp(t testing.TB) {
	b, err := newBell()
	check(t, err)
	check(t, b.close())
}

func descriptors(t testing.TB) []string {
	entries, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	var open []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open = append(open, e.Name()+" "+to)
		}
	}
	return open
}

// raw attaches without the client's care and returns the channel, to be misused.
func (d *daemon) raw(prefetch int64) *Attachment {
	d.t.Helper()
	a := &Attachment{path: d.path}
	hello := wire.Hello{Role: wire.RoleTrain, VersionMin: wire.Version, VersionMax: wire.Version, Table: testTable, Prefetch: prefetch}
	conn, r, err := say(d.t.Context(), d.path, &hello, &a.accepted)
	check(d.t, err)
	a.conn = conn
	check(d.t, a.open(r))
	check(d.t, r.close())
	d.t.Cleanup(func() { _ = a.free() })
	return a
}
