//go:build linux && !race

// The race detector does not see mapped memory (it misses races there and flags correct code), so what attaches runs without it.

package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

const (
	fillerSpec      = "x:F32[8,8],y:I32"
	fillerBatchSize = 8
)

// fillTable is a daemon with one table that is filled in place. It takes a kept segment up where there is one.
type fillTable struct {
	spec   *spec.Spec
	ring   *ring.Ring
	memory *shm.Memory
	server *shm.Server
	listen *net.UnixListener
	life   context.Context
	end    context.CancelFunc
	all    sync.WaitGroup
	pinned []ring.Recovered
	holder func() (wire.Note, bool)

	mu       sync.Mutex
	sessions map[string]*fillSession
	resumed  int
}

type fillSession struct {
	lender *drainer.Lender
	inRing *ring.Session
	taken  func()
}

func (d *fillTable) Names() []string { return []string{"t"} }

func (d *fillTable) Table(name string) (shm.Table, bool) {
	return shm.Table{Name: "t", Spec: d.spec, View: &d.ring.View, Memory: d.memory, Fill: d.open, Holder: d.holder}, name == "t"
}

func (d *fillTable) open(ctx context.Context, hello *wire.Hello, taken func()) (*drainer.Lender, error) {
	name := hello.Session
	d.mu.Lock()
	defer d.mu.Unlock()
	if name == "" {
		return drainer.NewLender(d.ring, drainer.LenderID{Stream: d.ring.NextStream()}), nil
	}
	if old := d.sessions[name]; old != nil {
		old.taken()
		select {
		case <-old.lender.Done():
			old.inRing.Close(time.Now())
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s, err := d.ring.OpenSession(name, time.Now(), time.Hour)
	if err != nil {
		return nil, err
	}
	l := drainer.NewLender(d.ring, drainer.LenderID{Stream: s.Stream(), Session: s, Resumed: func() { d.unpin(s.Stream()) }})
	d.sessions[name] = &fillSession{l, s, taken}
	return l, nil
}

// unpin is what a table does when a stream says that it has resumed.
func (d *fillTable) unpin(stream uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.resumed++
	for i, b := range d.pinned {
		if b.Stream == stream {
			d.ring.Unpin(b.Batch)
			d.pinned[i].Stream = 0
		}
	}
}

// newFillTable serves at a socket; the segment is kept in a file where one is named.
func newFillTable(socket, file string, batches int) (*fillTable, error) {
	d := &fillTable{sessions: map[string]*fillSession{}}
	var err error
	if d.spec, err = spec.ParseText(fillerSpec); err != nil {
		return nil, err
	}
	layout := ring.Layout{
		BatchSize: fillerBatchSize, Batches: batches, Columns: d.spec.LeafBytes(), Spec: d.spec.JSON(), Fingerprint: d.spec.Fingerprint(), Table: "t",
		Created: time.Now(), Sessions: 4,
	}
	size, err := layout.Bytes()
	if err != nil {
		return nil, err
	}
	cfg := shm.MemoryConfig{Name: "ingestd t", Size: size, Fillable: true, Path: file, Keep: file != ""}
	if file != "" {
		if d.memory, err = shm.OpenNamed(cfg); err == nil {
			var found *ring.Recovery
			if d.ring, found, err = ring.Recover(d.memory.Bytes(), layout); err != nil {
				return nil, err
			}
			d.pinned = found.Batches
		}
	}
	if d.memory == nil {
		if d.memory, err = shm.NewMemory(cfg); err != nil {
			return nil, err
		}
		if d.ring, err = ring.Format(d.memory.Bytes(), layout); err != nil {
			return nil, err
		}
	}
	if d.server, err = shm.NewServer(shm.ServerConfig{Tables: d, Fill: shm.FillConfig{SettleAfter: 2 * time.Millisecond}}); err != nil {
		return nil, err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if d.listen, err = net.ListenUnix("unix", &net.UnixAddr{Name: socket}); err != nil {
		return nil, err
	}
	d.listen.SetUnlinkOnClose(false)
	d.life, d.end = context.WithCancel(context.Background())
	d.all.Go(func() {
		for {
			conn, err := d.listen.AcceptUnix()
			if err != nil {
				return
			}
			d.all.Go(func() {
				hello, err := wire.ReadHello(conn)
				if err != nil {
					conn.Close()
					return
				}
				_ = d.server.Serve(d.life, conn, hello)
			})
		}
	})
	return d, nil
}

// stop ends the daemon in order.
func (d *fillTable) stop() error {
	d.server.StopFilling(context.Background())
	d.end()
	d.listen.Close()
	d.all.Wait()
	return d.memory.Close()
}

// serveFill starts a daemon that the test's end stops, and returns its address.
func serveFill(t testing.TB, batches int) (*fillTable, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	d, err := newFillTable(socket, "", batches)
	ok(t, err)
	t.Cleanup(func() { ok(t, d.stop()) })
	return d, "shm://" + socket
}

func ok(t testing.TB, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

func attachFiller(t testing.TB, addr string, cfg FillerConfig) *Filler {
	t.Helper()
	cfg.Table = "t"
	p, err := AttachFiller(t.Context(), addr, cfg)
	ok(t, err)
	t.Cleanup(p.Abort)
	return p
}

// fillSlots writes samples number, number+1, ... of a producer into slots.
func fillSlots(s *Slots, producer, number uint64) {
	spec := s.filler.spec
	for leaf := range spec.NumLeaves() {
		l, col := spec.Leaf(leaf), s.Column(leaf)
		for i := range int64(s.N()) {
			proof.Leaf(col[i*l.Bytes():(i+1)*l.Bytes()], l.DType, producer, number+uint64(i), leaf)
		}
	}
}

// fill fills n samples, the next of which is *number, in reservations of up to step slots.
func fill(ctx context.Context, p *Filler, producer uint64, number *uint64, n, step int) error {
	for n > 0 {
		s, err := p.Reserve(ctx, min(n, step))
		if err != nil {
			return err
		}
		fillSlots(s, producer, *number)
		if err := s.Commit(); err != nil {
			return err
		}
		*number += uint64(s.N())
		n -= s.N()
	}
	return nil
}

// ledger checks that each producer's samples come whole and in order.
type ledger struct {
	spec   *spec.Spec
	next   map[uint64]uint64 // by producer
	stream map[uint64]uint64 // number in the stream, by stream
}

func newLedger(s *spec.Spec) *ledger { return &ledger{s, map[uint64]uint64{}, map[uint64]uint64{}} }

// take checks a batch. producer says whose samples a stream has.
func (l *ledger) take(b ring.Batch, producer uint64) error {
	for i, stream := range b.Streams() {
		if n := b.Numbers()[i]; n != l.stream[stream] {
			return fmt.Errorf("batch %d row %d: sample %d of stream %d, due %d", b.Number, i, n, stream, l.stream[stream])
		}
		l.stream[stream]++
	}
	producers, numbers := make([]uint64, b.Count), make([]uint64, b.Count)
	for i := range producers {
		producers[i], numbers[i] = producer, l.next[producer]+uint64(i)
	}
	for leaf := range l.spec.NumLeaves() {
		if row, at := proof.CheckColumn(b.Column(leaf), l.spec.Leaf(leaf), leaf, producers, numbers); row >= 0 {
			return fmt.Errorf("batch %d, leaf %d, row %d: byte %d is not that of sample %d", b.Number, leaf, row, at, numbers[row])
		}
	}
	l.next[producer] += uint64(b.Count)
	return nil
}

// readAll reads what is published until the table ends.
func (d *fillTable) readAll(l *ledger, producer uint64) error {
	seat := park.NewWaiter()
	for {
		b, err := d.ring.Lease(context.Background(), seat)
		if err != nil {
			return nil
		}
		if err := l.take(b, producer); err != nil {
			return err
		}
		d.ring.Release(b)
	}
}

func TestFillerFills(t *testing.T) {
	d, addr := serveFill(t, 8)
	read := make(chan error)
	l := newLedger(d.spec)
	go func() { read <- d.readAll(l, 5) }()
	p := attachFiller(t, addr, FillerConfig{Spec: d.spec})
	number := uint64(0)
	for step := 1; step < 20; step++ {
		ok(t, fill(t.Context(), p, 5, &number, 100, step))
	}
	ok(t, p.Flush(t.Context()))
	if p.Committed() != number || p.Held() != 0 {
		t.Errorf("%d of %d committed, held %d", p.Committed(), number, p.Held())
	}
	ok(t, fill(t.Context(), p, 5, &number, 3, 3))
	ok(t, p.Close(t.Context()))
	ok(t, p.Close(t.Context()))
	if s := p.Stats(); s.Filled != number || s.Committed != number || s.Places < number/fillerBatchSize || s.Copied+s.Lost+s.Reconnects != 0 {
		t.Errorf("stats: %+v", s)
	}
	if _, err := p.Reserve(t.Context(), 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	waitEnd(d)
	ok(t, <-read)
	if l.next[5] != number {
		t.Errorf("%d of %d samples came", l.next[5], number)
	}
}

// waitEnd ends the table once no filler is left.
func waitEnd(d *fillTable) {
	d.server.StopFilling(context.Background())
	d.ring.Flush()
	d.ring.Close()
}

func TestSlots(t *testing.T) {
	d, addr := serveFill(t, 8)
	p := attachFiller(t, addr, FillerConfig{})
	if _, err := p.Reserve(t.Context(), 0); err == nil {
		t.Error("no slots were reserved")
	}
	s, err := p.Reserve(t.Context(), 100)
	ok(t, err)
	if s.N() != fillerBatchSize {
		t.Fatalf("%d slots, want the whole place", s.N())
	}
	if _, err := p.Reserve(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "still open; Commit or Abandon") {
		t.Errorf("a second reservation: %v", err)
	}
	if err := p.Push(t.Context(), make([]byte, 256), make([]byte, 4)); err == nil || !strings.Contains(err.Error(), "still open") {
		t.Errorf("a push beside it: %v", err)
	}
	x, err := SlotViewNamed[float32](s, "x")
	ok(t, err)
	y, err := SlotView[int32](s, 1)
	ok(t, err)
	raw, err := s.ColumnNamed("y")
	ok(t, err)
	if len(x) != 64*fillerBatchSize || len(y) != fillerBatchSize || len(raw) != 4*fillerBatchSize || cap(raw) != len(raw) {
		t.Errorf("views of %d, %d, %d", len(x), len(y), len(raw))
	}
	for what, err := range map[string]error{
		"another dtype": func() error { _, err := SlotView[int64](s, 0); return err }(),
		"no such leaf":  func() error { _, err := SlotView[int32](s, 2); return err }(),
		"no such name":  func() error { _, err := SlotViewNamed[int32](s, "z"); return err }(),
		"no column":     func() error { _, err := s.ColumnNamed("z"); return err }(),
	} {
		if err == nil {
			t.Errorf("%s: viewed", what)
		}
	}
	s.Abandon()
	s.Abandon()
	if err := s.Commit(); err == nil {
		t.Error("abandoned slots were committed")
	}
	if func() (paniced bool) {
		defer func() { paniced = recover() != nil }()
		s.Column(0)
		return false
	}() == false {
		t.Error("abandoned slots can be written")
	}
	s, err = p.Reserve(t.Context(), 3)
	ok(t, err)
	x, _ = SlotView[float32](s, 0)
	y, _ = SlotView[int32](s, 1)
	for i := range y {
		y[i] = int32(i) + 10
		x[64*i] = float32(i) / 2
	}
	ok(t, s.Commit())
	if err := s.Commit(); err == nil {
		t.Error("committed twice")
	}
	s.Abandon() // of what is not open: nothing
	sample := bytes.Repeat([]byte{7}, 256)
	ok(t, p.Push(t.Context(), sample, []byte{13, 0, 0, 0}))
	for _, leaves := range [][][]byte{{sample}, {sample, {1}}, {sample, {1, 2, 3, 4}, {}}} {
		if err := p.Push(t.Context(), leaves...); err == nil {
			t.Errorf("pushed %d leaves", len(leaves))
		}
	}
	ok(t, p.Close(t.Context()))
	waitEnd(d)
	b, found := d.ring.TryLease()
	if !found || b.Count != 4 || binary.LittleEndian.Uint32(b.Column(1)[8:]) != 12 || !bytes.Equal(b.Column(0)[3*256:], sample) || b.Column(1)[12] != 13 {
		t.Errorf("%+v", b)
	}
}

// A full ring, told apart from other waits, and ended by room.
func TestFillerFull(t *testing.T) {
	d, addr := serveFill(t, 4)
	d.holder = func() (wire.Note, bool) {
		return wire.Note{Trainer: 3, Group: "g", Client: "slow", PID: 77, Batch: 9, Since: 5, Reason: "trainer 3 is slow"}, true
	}
	p := attachFiller(t, addr, FillerConfig{})
	number := uint64(0)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		err := fill(ctx, p, 1, &number, 8, 8)
		cancel()
		if err == nil {
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		var full *FullError
		if !errors.As(err, &full) {
			continue // too early for a note
		}
		if !errors.Is(err, ErrFull) || full.Trainer != 3 || full.Client != "slow" || full.Batch != 9 || full.PID != 77 || full.Since.UnixNano() != 5 {
			t.Fatalf("%+v", full)
		}
		break
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Reserve(ctx, 1); !errors.Is(err, context.Canceled) || errors.Is(err, ErrFull) {
		t.Errorf("a cancelled call: %v", err)
	}
	aborted := make(chan error)
	go func() { _, err := p.Reserve(context.Background(), 1); aborted <- err }()
	b, _ := d.ring.TryLease()
	d.ring.Release(b)
	ok(t, <-aborted)
	p.slots.Abandon()
	ok(t, fill(t.Context(), p, 1, &number, 8, 8))
	go func() { _, err := p.Reserve(context.Background(), 1); aborted <- err }()
	p.Abort()
	if err := <-aborted; !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Abort: %v", err)
	}
}

// Each end has its own error, and no other.
func TestFillerEnds(t *testing.T) {
	all := []error{ErrFull, ErrShuttingDown, ErrSessionTaken, ErrDaemonGone, os.ErrClosed, context.DeadlineExceeded}
	for name, test := range map[string]struct {
		session string
		end     func(t *testing.T, d *fillTable, addr string, p *Filler)
		want    error
	}{
		"shutting down": {"", func(t *testing.T, d *fillTable, _ string, _ *Filler) { d.server.StopFilling(t.Context()) }, ErrShuttingDown},
		"table closed":  {"", func(_ *testing.T, d *fillTable, _ string, _ *Filler) { d.ring.Close() }, ErrShuttingDown},
		"session taken": {"s", func(t *testing.T, _ *fillTable, addr string, _ *Filler) {
			attachFiller(t, addr, FillerConfig{Session: "s"})
		}, ErrSessionTaken},
		"closed": {"", func(_ *testing.T, _ *fillTable, _ string, p *Filler) { p.Abort() }, os.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			d, addr := serveFill(t, 8)
			p := attachFiller(t, addr, FillerConfig{Session: test.session})
			number := uint64(0)
			ok(t, fill(t.Context(), p, 1, &number, 5, 5))
			ok(t, p.Flush(t.Context()))
			test.end(t, d, addr, p)
			var err error
			for err == nil { // places that were lent before
				err = fill(t.Context(), p, 1, &number, 8, 8)
			}
			for _, other := range all {
				if errors.Is(err, other) != (other == test.want) {
					t.Errorf("%v: is %v: %v", err, other, errors.Is(err, other))
				}
			}
			if p.Committed() < 5 {
				t.Errorf("%d committed", p.Committed())
			}
		})
	}
	_, addr := serveFill(t, 2)
	var refusal *wire.Refusal
	if _, err := AttachFiller(t.Context(), addr, FillerConfig{Table: "t"}); !errors.As(err, &refusal) || refusal.Code != wire.CodeTooManyConnections {
		t.Errorf("refused: %v", err)
	}
	for what, cfg := range map[string]FillerConfig{"no table": {}, "a negative prefetch": {Table: "t", Prefetch: -1}, "reconnects without a session": {Table: "t", ReconnectFor: 1}} {
		if _, err := AttachFiller(t.Context(), addr, cfg); err == nil {
			t.Errorf("%s: attached", what)
		}
	}
	if _, err := AttachFiller(t.Context(), "tcp://localhost:1", FillerConfig{Table: "t"}); err == nil || !strings.Contains(err.Error(), "same machine") {
		t.Errorf("over tcp: %v", err)
	}
}

// A daemon that stops and comes back without its segment has lost what it had; the slots that were open meanwhile are not.
func TestFillerAfterLoss(t *testing.T) {
	for _, goOn := range []bool{false, true} {
		t.Run(fmt.Sprint(goOn), func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "socket")
			d, err := newFillTable(socket, "", 8)
			ok(t, err)
			p := attachFiller(t, "unix://"+socket, FillerConfig{Session: "s", ContinueAfterLoss: goOn, ReconnectFrom: time.Millisecond})
			number := uint64(0)
			ok(t, fill(t.Context(), p, 1, &number, 11, 4))
			ok(t, p.Flush(t.Context()))
			s, err := p.Reserve(t.Context(), 3)
			ok(t, err)
			ok(t, d.stop())
			fillSlots(s, 1, 0) // still mapped
			d, err = newFillTable(socket, "", 8)
			ok(t, err)
			defer func() { ok(t, d.stop()) }()
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			if !goOn {
				for err = nil; err == nil; err = p.Flush(t.Context()) { // until it has noticed
					<-tick.C
				}
				var lost *LostError
				if !errors.As(err, &lost) || *lost != (LostError{From: 0, To: 11}) {
					t.Fatalf("after the loss: %v", err)
				}
				if err := s.Commit(); !errors.As(err, &lost) {
					t.Errorf("committed: %v", err)
				}
				return
			}
			for p.Stats().Reconnects == 0 {
				<-tick.C
			}
			ok(t, s.Commit())
			number = 3
			ok(t, fill(t.Context(), p, 1, &number, 20, 6))
			ok(t, p.Close(t.Context()))
			if st := p.Stats(); st.Lost != 11 || st.Copied != 3 || st.Reconnects != 1 || st.Filled != 34 || st.Committed != 34 {
				t.Errorf("stats: %+v", st)
			}
			l := newLedger(d.spec)
			waitEnd(d)
			ok(t, d.readAll(l, 1))
			if l.next[1] != 23 {
				t.Errorf("%d of 23 samples came", l.next[1])
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.resumed != 1 {
				t.Errorf("it said %d times that it had resumed", d.resumed)
			}
		})
	}
}

func TestFillerWithoutDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	d, err := newFillTable(socket, "", 8)
	ok(t, err)
	patient := attachFiller(t, "unix://"+socket, FillerConfig{Session: "a"})
	hasty := attachFiller(t, "unix://"+socket, FillerConfig{Session: "b", ReconnectFor: 30 * time.Millisecond, ReconnectTo: time.Millisecond, ReconnectFrom: time.Millisecond})
	never := attachFiller(t, "unix://"+socket, FillerConfig{Session: "c", ReconnectFor: -1})
	ok(t, d.stop())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	number := uint64(0)
	err = nil
	for err == nil {
		err = fill(ctx, patient, 1, &number, 8, 8)
	}
	var reconnecting *ReconnectingError
	if !errors.As(err, &reconnecting) || reconnecting.Tries == 0 || reconnecting.Last == nil || !errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ErrFull) {
		t.Errorf("while it has none: %v", err)
	}
	for err = nil; err == nil; {
		err = fill(t.Context(), hasty, 1, &number, 8, 8)
	}
	if !errors.Is(err, ErrDaemonGone) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("its patience is out: %v", err)
	}
	for err = nil; err == nil; {
		err = fill(t.Context(), never, 1, &number, 8, 8)
	}
	if !errors.Is(err, ErrShuttingDown) {
		t.Errorf("without reconnecting: %v", err)
	}
}

func TestFillerAllocatesNothing(t *testing.T) {
	d, addr := serveFill(t, 8)
	p := attachFiller(t, addr, FillerConfig{})
	read := make(chan error)
	go func() {
		seat := park.NewWaiter()
		for {
			b, err := d.ring.Lease(context.Background(), seat)
			if err != nil {
				read <- nil
				return
			}
			d.ring.Release(b)
		}
	}()
	leaves := [][]byte{make([]byte, 256), make([]byte, 4)}
	step := func() {
		for range 2 * fillerBatchSize {
			s, err := p.Reserve(t.Context(), 1)
			ok(t, err)
			ok(t, s.Commit())
			ok(t, p.Push(t.Context(), leaves...))
		}
	}
	step()
	if n := testing.AllocsPerRun(200, step); n != 0 {
		t.Errorf("%v allocations in %d samples, want 0", n, 4*fillerBatchSize)
	}
	p.Abort()
	waitEnd(d)
	ok(t, <-read)
}

// BenchmarkFill fills slots in place, beside what a plain copy of the same bytes costs.
func BenchmarkFill(b *testing.B) {
	for _, n := range []int{1, 8} {
		for _, write := range []bool{false, true} {
			b.Run(fmt.Sprintf("slots=%d/write=%v", n, write), func(b *testing.B) {
				d, addr := serveFill(b, 16)
				p := attachFiller(b, addr, FillerConfig{Prefetch: 4})
				read := make(chan error)
				go func() {
					seat := park.NewWaiter()
					for {
						batch, err := d.ring.Lease(context.Background(), seat)
						if err != nil {
							read <- nil
							return
						}
						d.ring.Release(batch)
					}
				}()
				from := make([]byte, 256*n)
				samples := 0
				for b.Loop() {
					s, err := p.Reserve(b.Context(), n)
					if err != nil {
						b.Fatal(err)
					}
					if write {
						copy(s.Column(0), from)
					}
					samples += s.N()
					if err := s.Commit(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(samples)/b.Elapsed().Seconds(), "samples/s")
				p.Abort()
				waitEnd(d)
				<-read
			})
		}
	}
	b.Run("copy", func(b *testing.B) {
		from, to := make([]byte, 256), make([]byte, 256<<10)
		at := 0
		for b.Loop() {
			copy(to[at:], from)
			at = (at + 256) % len(to)
		}
	})
}
