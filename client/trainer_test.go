//go:build linux && !race

// The race detector does not see mapped memory (it misses races there and flags correct code), so what attaches runs without it.

package client

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/remote"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

const trainerBatchSize = 4

// table serves one table to trainers over a unix socket.
type table struct {
	t      *testing.T
	spec   *spec.Spec
	ring   *ring.Ring
	memory *shm.Memory
	fifo   *sampler.FIFO
	server *shm.Server
	way    string
	path   string
	tcp    string
	stop   func()
	next   uint64
}

// everyWay runs a test with trainers that map the memory, and with such as have batches sent to them.
func everyWay(t *testing.T, test func(t *testing.T, way string)) {
	for _, way := range []string{"mapped", "tcp", "streamed over unix"} {
		t.Run(way, func(t *testing.T) { test(t, way) })
	}
}

func (d *table) Table(name string) (shm.Table, bool) {
	return shm.Table{Name: "t", Spec: d.spec, View: &d.ring.View, Memory: d.memory, Source: d.fifo}, name == "t"
}

func (d *table) Names() []string { return []string{"t"} }

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func serveTable(t *testing.T, text, way string) *table {
	t.Helper()
	d := &table{t: t, way: way, spec: must[*spec.Spec](t)(spec.ParseText(text)), path: filepath.Join(t.TempDir(), "socket")}
	layout := ring.Layout{
		BatchSize: trainerBatchSize, Batches: 8, Columns: d.spec.LeafBytes(), Spec: d.spec.JSON(), Fingerprint: d.spec.Fingerprint(), Table: "t",
		Created: time.Now(),
	}
	d.memory = must[*shm.Memory](t)(shm.NewMemory(shm.MemoryConfig{Size: must[int64](t)(layout.Bytes())}))
	d.ring = must[*ring.Ring](t)(ring.Format(d.memory.Bytes(), layout))
	d.ring.Poison = true
	d.fifo = must[*sampler.FIFO](t)(sampler.New(d.ring, sampler.Config{}, nil))
	d.server = must[*shm.Server](t)(shm.NewServer(shm.ServerConfig{Tables: d}))
	sender := must[*remote.Server](t)(remote.NewServer(remote.Config{Trainers: d.server}))
	local := must[net.Listener](t)(net.Listen("unix", d.path))
	tcp := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	d.tcp = tcp.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	var all sync.WaitGroup
	for _, l := range []net.Listener{local, tcp} {
		all.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				all.Go(func() {
					hello, err := wire.ReadHello(conn)
					if err != nil {
						conn.Close()
						return
					}
					if l == local && !hello.Stream {
						_ = d.server.Serve(ctx, conn.(*net.UnixConn), hello)
					} else {
						_ = sender.Serve(ctx, conn, hello)
					}
				})
			}
		})
	}
	t.Cleanup(func() {
		stop()
		local.Close()
		tcp.Close()
		all.Wait()
		if err := d.memory.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// push commits n samples of stream 7 whose leaf bytes are f(number).
func (d *table) push(n int, f func(number uint64, leaf int, to []byte)) {
	d.t.Helper()
	for ; n > 0; n-- {
		run, ok := d.ring.TryReserve(1)
		if !ok {
			d.t.Fatal("the ring is full")
		}
		for leaf := range d.spec.NumLeaves() {
			f(d.next, leaf, d.ring.RunColumn(run, leaf))
		}
		d.ring.Commit(run, 7, d.next, 1000+d.next, ring.Mark{})
		d.next++
	}
}

func (d *table) attach(cfg TrainerConfig) *Trainer {
	d.t.Helper()
	t := must[*Trainer](d.t)(d.tryAttach(cfg))
	d.t.Cleanup(func() {
		if err := t.Close(); err != nil {
			d.t.Error(err)
		}
	})
	return t
}

func (d *table) tryAttach(cfg TrainerConfig) (*Trainer, error) {
	if cfg.Table == "" {
		cfg.Table = "t"
	}
	cfg.Stream = d.way == "streamed over unix"
	if d.way != "mapped" && cfg.ReconnectFor == 0 {
		cfg.ReconnectFor = -1
	}
	if d.way == "tcp" {
		return Attach(d.t.Context(), "tcp://"+d.tcp, cfg)
	}
	return Attach(d.t.Context(), "unix://"+d.path, cfg)
}

func zero(uint64, int, []byte) {}

func TestTrainerReadsTypedColumns(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		d := serveTable(t, "x:F32[2],y:I64,flag:BOOL,half:BF16", way)
		tr := d.attach(TrainerConfig{Spec: d.spec, Prefetch: 3})
		if tr.Table() != "t" || tr.BatchSize() != trainerBatchSize || (tr.Batches() != 8) != (way != "mapped") || tr.Prefetch() != 3 || !tr.Spec().Equal(d.spec) {
			t.Errorf("attached to %q: %d of %d, prefetch %d, %v", tr.Table(), tr.Batches(), tr.BatchSize(), tr.Prefetch(), tr.Spec())
		}
		d.push(trainerBatchSize, func(n uint64, leaf int, to []byte) {
			switch leaf {
			case 0:
				binary.LittleEndian.PutUint32(to, math.Float32bits(float32(n)+0.5))
				binary.LittleEndian.PutUint32(to[4:], math.Float32bits(-float32(n)))
			case 1:
				binary.LittleEndian.PutUint64(to, -n)
			case 2:
				to[0] = byte(n & 1)
			case 3:
				binary.LittleEndian.PutUint16(to, uint16(n)<<8)
			}
		})
		b := must[*Batch](t)(tr.Next(t.Context()))
		if b.Number() != 0 || b.Count() != trainerBatchSize || !slices.Equal(b.Streams(), []uint64{7, 7, 7, 7}) ||
			!slices.Equal(b.Numbers(), []uint64{0, 1, 2, 3}) || !slices.Equal(b.Arrivals(), []uint64{1000, 1001, 1002, 1003}) {
			t.Errorf("batch %d of %d rows: %v %v %v", b.Number(), b.Count(), b.Streams(), b.Numbers(), b.Arrivals())
		}
		if x := must[[]float32](t)(View[float32](b, 0)); !slices.Equal(x, []float32{0.5, 0, 1.5, -1, 2.5, -2, 3.5, -3}) {
			t.Errorf("x is %v", x)
		}
		if y := must[[]int64](t)(ViewNamed[int64](b, "y")); !slices.Equal(y, []int64{0, -1, -2, -3}) {
			t.Errorf("y is %v", y)
		}
		if flag := must[[]uint8](t)(ViewNamed[uint8](b, "flag")); !slices.Equal(flag, []uint8{0, 1, 0, 1}) {
			t.Errorf("flag is %v", flag)
		}
		if half := must[[]uint16](t)(ViewNamed[uint16](b, "half")); !slices.Equal(half, []uint16{0, 256, 512, 768}) {
			t.Errorf("half is %v", half)
		}
		if raw := must[[]byte](t)(b.ColumnNamed("half")); len(raw) != 8 || raw[3] != 1 {
			t.Errorf("half's bytes are %v", raw)
		}
		for what, err := range map[string]error{
			`leaf "x" is F32 and cannot be viewed as int32`:   second(View[int32](b, 0)),
			`leaf "y" is I64 and cannot be viewed as float64`: second(View[float64](b, 1)),
			"there is no leaf 4":                              second(View[uint8](b, 4)),
			"there is no leaf -1":                             second(View[uint8](b, -1)),
			`no leaf "z"; its samples are x:F32[2]`:           second(ViewNamed[uint8](b, "z")),
			`has no leaf ""`:                                  second(b.ColumnNamed("")),
		} {
			if err == nil || !strings.Contains(err.Error(), what) {
				t.Errorf("%v, want %q", err, what)
			}
		}
		b.Release()
		b.Release()
		defer func() {
			if r := recover(); r == nil || !strings.Contains(r.(string), "batch 0 is used after its Release") {
				t.Errorf("using a released batch: %v", r)
			}
		}()
		b.Column(0)
	})
}

func second[T any](_ T, err error) error { return err }

func TestTrainerErrorsAreDifferent(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		d := serveTable(t, "x:U8", way)
		ctx := t.Context()
		if _, err := Attach(ctx, "nonsense", TrainerConfig{Table: "t"}); err == nil {
			t.Error("attached to nonsense")
		}
		if _, err := Attach(ctx, "unix://"+d.path+"-not", TrainerConfig{Table: "t"}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "is the daemon running") {
			t.Errorf("no daemon: %v", err)
		}
		var refusal *wire.Refusal
		if _, err := d.tryAttach(TrainerConfig{Table: "u"}); !errors.As(err, &refusal) || refusal.Code != wire.CodeUnknownTable {
			t.Errorf("no such table: %v", err)
		}
		other := must[*spec.Spec](t)(spec.ParseText("x:I8"))
		if _, err := d.tryAttach(TrainerConfig{Spec: other}); !errors.As(err, &refusal) || refusal.Code != wire.CodeSpecMismatch ||
			!strings.Contains(err.Error(), "I8") || !strings.Contains(err.Error(), "U8") {
			t.Errorf("another spec: %v", err)
		}

		tr := d.attach(TrainerConfig{})
		soon, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		if _, err := tr.Next(soon); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("past the deadline: %v", err)
		}
		d.push(trainerBatchSize, zero)
		must[*Batch](t)(tr.Next(ctx)).Release()
		d.ring.Close()
		if _, err := tr.Next(ctx); err != io.EOF {
			t.Errorf("the end of the stream: %v", err)
		}
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		if _, err := tr.Next(ctx); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		if err := tr.explain(&shm.PeerGoneError{Path: "p", Cause: io.ErrUnexpectedEOF}); !errors.Is(err, ErrDaemonGone) || errors.Is(err, io.EOF) {
			t.Errorf("a dead daemon: %v", err)
		}

		d = serveTable(t, "x:U8", way)
		tr = d.attach(TrainerConfig{})
		d.push(trainerBatchSize, zero)
		b := must[*Batch](t)(tr.Next(ctx))
		d.stop()
		var notice *wire.Notice
		if _, err := tr.Next(ctx); !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
			t.Errorf("cut off: %v", err)
		}
		b.Release() // nobody takes it, and nothing breaks
	})
}

func TestTrainerCopies(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		d := serveTable(t, "x:U8[3],y:U16", way)
		tr := d.attach(TrainerConfig{Prefetch: 1})
		d.push(2*trainerBatchSize, func(n uint64, leaf int, to []byte) {
			for i := range to {
				to[i] = byte(n)
			}
		})
		d.push(1, zero)
		d.ring.Flush()
		d.ring.Close()
		var c Copied
		for _, want := range []Copied{
			{0, 4, [][]byte{{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3}, {0, 0, 1, 1, 2, 2, 3, 3}}, []uint64{7, 7, 7, 7}, []uint64{0, 1, 2, 3}, []uint64{1000, 1001, 1002, 1003}},
			{1, 4, [][]byte{{4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7}, {4, 4, 5, 5, 6, 6, 7, 7}}, []uint64{7, 7, 7, 7}, []uint64{4, 5, 6, 7}, []uint64{1004, 1005, 1006, 1007}},
			{2, 1, [][]byte{{0, 0, 0}, {0, 0}}, []uint64{7}, []uint64{8}, []uint64{1008}},
		} {
			if err := tr.Copy(t.Context(), &c); err != nil {
				t.Fatal(err)
			}
			// The ring is poisoned on release: the copy must have been taken before.
			c.Columns[0] = slices.Replace(c.Columns[0], 0, 0)
			if c.Number == 2 { // the memory that push's zero left alone
				clear(c.Columns[0])
				clear(c.Columns[1])
			}
			if !reflect.DeepEqual(c, want) {
				t.Errorf("copied %+v, want %+v", c, want)
			}
		}
		if err := tr.Copy(t.Context(), &c); err != io.EOF {
			t.Errorf("at the end: %v", err)
		}
	})
}

// Every group gets every batch; a second delivery has the first one's number.
func TestTrainerGroups(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		d := serveTable(t, "x:U8", way)
		d.fifo = must[*sampler.FIFO](t)(sampler.New(d.ring, sampler.Config{Groups: []sampler.GroupConfig{{Name: "a"}, {Name: "default"}}}, nil))
		a, other := d.attach(TrainerConfig{Group: "a", Prefetch: 2}), d.attach(TrainerConfig{})
		if a.Group() != "a" || other.Group() != "default" {
			t.Errorf("groups %q and %q", a.Group(), other.Group())
		}
		d.push(2*trainerBatchSize, zero)
		one, two := must[*Batch](t)(a.Next(t.Context())), must[*Batch](t)(a.Next(t.Context())) // both held at once
		if one.Number() != 0 || two.Number() != 1 {
			t.Errorf("batches %d and %d", one.Number(), two.Number())
		}
		b := must[*Batch](t)(other.Next(t.Context()))
		if b.Number() != 0 {
			t.Errorf("the other group got batch %d first", b.Number())
		}
		b.Release()
		two.Release()
		if err := a.Close(); err != nil { // holding batch 0
			t.Error(err)
		}
		again := d.attach(TrainerConfig{Group: "a"})
		b = must[*Batch](t)(again.Next(t.Context()))
		if b.Number() != 0 {
			t.Errorf("the batch that was held comes again as %d", b.Number())
		}
		b.Release()
	})
}

func TestTrainerIsToldOfLoss(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		d := serveTable(t, "x:U8", way)
		d.fifo = must[*sampler.FIFO](t)(sampler.New(d.ring, sampler.Config{Default: sampler.GroupConfig{OnLag: sampler.Lose}}, nil))
		tr := d.attach(TrainerConfig{Group: "slow", Prefetch: 1})
		d.push(trainerBatchSize, zero)
		b := must[*Batch](t)(tr.Next(t.Context())) // held, so that nothing more is delivered
		w := park.NewWaiter()
		for n := range 10 * trainerBatchSize {
			run := must[ring.Run](t)(d.ring.Reserve(t.Context(), w, 1))
			d.ring.Commit(run, 7, uint64(n), 1, ring.Mark{})
		}
		b.Release()
		_, err := tr.Next(t.Context())
		var lost *LostBatchesError
		if !errors.As(err, &lost) || *lost != (LostBatchesError{Group: "slow", First: 1, N: 3}) ||
			!strings.Contains(err.Error(), `group "slow" lost 3 unread batches`) {
			t.Errorf("%v, want the loss of batches 1 to 3", err)
		}
		b = must[*Batch](t)(tr.Next(t.Context())) // and on it goes
		if b.Number() != 4 {
			t.Errorf("after the loss: batch %d", b.Number())
		}
		b.Release()
	})
}

func TestTrainerCopyDoesNotAllocate(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		d := serveTable(t, "x:U8[100]", way)
		tr := d.attach(TrainerConfig{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var c Copied
		if n := testing.AllocsPerRun(200, func() {
			run, _ := d.ring.TryReserve(trainerBatchSize)
			d.ring.Commit(run, 7, 0, 1, ring.Mark{})
			if err := tr.Copy(ctx, &c); err != nil {
				t.Error(err)
			}
		}); n != 0 {
			t.Errorf("%v allocations per batch copied, want 0", n)
		}
	})
}

// A batch is intact until it is given back, or the daemon has taken it back and another one has had it.
func TestIntact(t *testing.T) {
	d := serveTable(t, "x:U8", "mapped")
	tr := d.attach(TrainerConfig{Prefetch: 2})
	d.push(2*trainerBatchSize, zero)
	kept, released := must[*Batch](t)(tr.Next(t.Context())), must[*Batch](t)(tr.Next(t.Context()))
	released.Release()
	if !kept.Intact() || released.Intact() {
		t.Errorf("held: %v; given back: %v", kept.Intact(), released.Intact())
	}
	d.stop()
	if _, err := tr.Next(t.Context()); err == nil {
		t.Fatal("the daemon does not stop")
	}
	other := must[*sampler.Member](t)(d.fifo.Join("default", sampler.Who{}))
	b, err := other.Next(t.Context(), park.NewWaiter())
	if err != nil || b.Number != kept.Number() {
		t.Fatalf("batch %d, %v", b.Number, err)
	}
	other.Release(b)
	if kept.Intact() {
		t.Error("intact after another one has had it")
	}
}
