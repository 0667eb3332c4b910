package engine_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testSpec = "image:F32[2,3],label:I16"

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newPool returns a pool that runs until the test ends.
func newPool(t testing.TB) *drainer.Pool {
	pool := drainer.NewPool(2)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	return pool
}

func config(t testing.TB, pool *drainer.Pool) engine.Config {
	return engine.Config{Name: "numbers", Spec: mustSpec(t, testSpec), BatchSize: 4, Batches: 8, Drainers: pool}
}

func newTable(t testing.TB, cfg engine.Config) *engine.Table {
	t.Helper()
	table, err := engine.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	table.Ring().Poison = true
	return table
}

func open(t testing.TB, table *engine.Table) *drainer.Stream {
	t.Helper()
	s, err := table.OpenStream(t.Context(), engine.StreamConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// push sends samples first..first+n-1 of the stream, which prove themselves.
func push(ctx context.Context, table *engine.Table, s *drainer.Stream, first, n uint64) error {
	for n > 0 {
		run, err := s.Reserve(ctx, int(n))
		if err != nil {
			return err
		}
		for i := range table.Spec().NumLeaves() {
			leaf, column := table.Spec().Leaf(i), s.Column(run, i)
			for row := range uint64(run.N) {
				proof.Leaf(column[row*uint64(leaf.Bytes()):(row+1)*uint64(leaf.Bytes())], leaf.DType, s.ID(), first+row, i)
			}
		}
		s.Push(run, time.Unix(1, 0))
		first += uint64(run.N)
		n -= uint64(run.N)
	}
	return nil
}

func mustPush(t testing.TB, table *engine.Table, s *drainer.Stream, first, n uint64) {
	t.Helper()
	if err := push(t.Context(), table, s, first, n); err != nil {
		t.Fatal(err)
	}
}

// receive takes every batch to the end of the table and returns how many samples of each stream came, in order and whole.
func receive(ctx context.Context, table *engine.Table) (next map[uint64]uint64, err error) {
	trainer := table.NewTrainer()
	next = map[uint64]uint64{}
	for {
		b, err := trainer.Next(ctx)
		if err == io.EOF {
			return next, nil
		}
		if err != nil {
			return nil, err
		}
		if err := check(table, b); err != nil {
			return nil, err
		}
		for row, stream := range b.Streams() {
			if b.Numbers()[row] != next[stream] {
				return nil, fmt.Errorf("stream %d: sample %d came when %d was due", stream, b.Numbers()[row], next[stream])
			}
			next[stream]++
		}
		trainer.Release(b)
	}
}

func check(table *engine.Table, b ring.Batch) error {
	for i := range table.Spec().NumLeaves() {
		if row, at := proof.CheckColumn(b.Column(i), table.Spec().Leaf(i), i, b.Streams(), b.Numbers()); row >= 0 {
			return fmt.Errorf("batch %d row %d leaf %d: byte %d is wrong", b.Number, row, i, at)
		}
	}
	return nil
}

func wantReceived(t *testing.T, table *engine.Table, want map[uint64]uint64) {
	t.Helper()
	got, err := receive(t.Context(), table)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("samples per stream: %v, want %v", got, want)
	}
}

// memory counts what becomes of it.
type memory struct {
	bytes  []byte
	closed int
}

func (m *memory) Bytes() []byte { return m.bytes }
func (m *memory) Close() error  { m.closed++; return nil }

func TestConfigurationsThatCannotBe(t *testing.T) {
	pool := newPool(t)
	given := &memory{}
	for name, tc := range map[string]struct {
		change func(*engine.Config)
		say    string
		closed int
	}{
		"no name":          {func(c *engine.Config) { c.Name = "" }, "name", 0},
		"long name":        {func(c *engine.Config) { c.Name = strings.Repeat("n", engine.NameBytesMax+1) }, "129 bytes", 0},
		"no spec":          {func(c *engine.Config) { c.Spec = nil }, "Config.Spec", 0},
		"no pool":          {func(c *engine.Config) { c.Drainers = nil }, "Config.Drainers", 0},
		"one batch":        {func(c *engine.Config) { c.Batches = 1 }, "1 batches", 0},
		"no slots":         {func(c *engine.Config) { c.BatchSize = 0 }, "batch size is 0", 0},
		"short linger":     {func(c *engine.Config) { c.Linger = 1 }, "linger is 1ns", 1},
		"negative linger":  {func(c *engine.Config) { c.Linger = -time.Second }, "linger is -1s", 1},
		"no memory":        {func(c *engine.Config) { c.Memory = func(int64) (engine.Memory, error) { return nil, io.ErrNoProgress } }, io.ErrNoProgress.Error(), 0},
		"too little":       {func(c *engine.Config) { c.Memory = given.make(-1, 0) }, "bytes of memory", 1},
		"not on a line":    {func(c *engine.Config) { c.Memory = given.make(64, 8) }, "multiple of 64", 1},
		"longest name":     {func(c *engine.Config) { c.Name = strings.Repeat("n", engine.NameBytesMax) }, "", 0},
		"more than enough": {func(c *engine.Config) { c.Memory = given.make(4096, 0) }, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			given.closed = 0
			cfg := config(t, pool)
			cfg.Memory = given.make(0, 0)
			tc.change(&cfg)
			_, err := engine.New(cfg)
			if (err == nil) != (tc.say == "") || err != nil && !strings.Contains(err.Error(), tc.say) {
				t.Fatalf("got %v, want it to say %q", err, tc.say)
			}
			if given.closed != tc.closed {
				t.Fatalf("the memory was closed %d times, want %d", given.closed, tc.closed)
			}
		})
	}
}

// make returns a Config.Memory that gives more than was asked for (less, if negative), starting at a distance from a line.
func (m *memory) make(more int64, off int) func(int64) (engine.Memory, error) {
	return func(size int64) (engine.Memory, error) {
		m.bytes = ring.AlignedBytes(size + more)[off:]
		return m, nil
	}
}

func TestMemoryIsTheCallersUntilFree(t *testing.T) {
	cfg := config(t, newPool(t))
	given, asked := &memory{}, int64(0)
	cfg.Memory = func(size int64) (engine.Memory, error) {
		asked = size
		return given.make(0, 0)(size)
	}
	table := newTable(t, cfg)
	if want, err := engine.SegmentBytes(cfg.Spec, cfg.BatchSize, cfg.Batches); err != nil || asked != want || table.Memory() != engine.Memory(given) {
		t.Fatalf("asked for %d bytes, want %d (%v)", asked, want, err)
	}
	view, err := ring.OpenView(given.bytes)
	if err != nil {
		t.Fatal(err)
	}
	if l := view.Layout(); l.Table != cfg.Name || l.Fingerprint != cfg.Spec.Fingerprint() || string(l.Spec) != string(cfg.Spec.JSON()) {
		t.Fatalf("the segment says %+v", l)
	}
	if err := table.Close(t.Context()); err != nil || given.closed != 0 {
		t.Fatalf("Close: %v; the memory was closed %d times", err, given.closed)
	}
	if err := table.Free(); err != nil || given.closed != 1 {
		t.Fatalf("Free: %v; the memory was closed %d times", err, given.closed)
	}
}

// TestCloseInOrder: while Close waits, no new stream opens and the open ones go on; when the last has ended the batch being filled is published short, and
// only then the trainers are told of the end.
func TestCloseInOrder(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	one, two := open(t, table), open(t, table)
	mustPush(t, table, one, 0, 3)
	closed := make(chan error, 1)
	go func() { closed <- table.Close(context.Background()) }()
	for { // until Close is seen to be under way
		s, err := table.OpenStream(t.Context(), engine.StreamConfig{})
		if errors.Is(err, os.ErrClosed) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		runtime.Gosched()
	}
	mustPush(t, table, two, 0, 6)
	one.Close()
	<-one.Done()
	mustPush(t, table, two, 6, 1)
	select {
	case err := <-closed:
		t.Fatalf("Close returned (%v) while a stream was open", err)
	default:
	}
	if table.Ring().Closed() {
		t.Fatal("the trainers were told of the end while a stream was open")
	}
	two.Close()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	wantReceived(t, table, map[uint64]uint64{one.ID(): 3, two.ID(): 7})
	if st := table.Stats(); st.Published != 3 || st.Leased != 3 || st.Places["free"] != st.Batches {
		t.Fatalf("10 samples in batches of 4 ended as %+v", st)
	}
}

// TestCloseWithDeadline: a stream that never ends does not keep the table from ending.
func TestCloseWithDeadline(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	s := open(t, table)
	mustPush(t, table, s, 0, 5)
	if err := s.WaitCommitted(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	err := table.Close(ctx)
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), table.Name()) {
		t.Fatalf("got %v, want a deadline error that names the table", err)
	}
	wantReceived(t, table, map[uint64]uint64{s.ID(): 5})
	if _, err := s.Reserve(t.Context(), 1); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("a slot of a closed table: %v, want os.ErrClosed", err)
	}
	if st := table.Stats(); len(st.Streams) != 1 || st.Streams[0].Stream != s.ID() {
		t.Fatalf("the stream that never ended is not shown: %+v", st)
	}
	s.Close()
	if err := table.Close(t.Context()); err != nil { // now it can end well
		t.Fatal(err)
	}
	stop, end := context.WithCancelCause(t.Context())
	defer end(nil)
	end(io.ErrClosedPipe)
	other := newTable(t, config(t, newPool(t)))
	s = open(t, other)
	if err := other.Close(stop); !errors.Is(err, io.ErrClosedPipe) {
		t.Fatalf("got %v, want the cause of the context's end", err)
	}
	s.Close()
	<-s.Done()
}

func TestClosedTableTakesNoStreams(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	for range 2 { // closing twice is no error
		if err := table.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s, err := table.OpenStream(t.Context(), engine.StreamConfig{}); s != nil || !errors.Is(err, os.ErrClosed) || !strings.Contains(err.Error(), table.Name()) {
			t.Fatalf("got %v, %v, want os.ErrClosed and the table's name", s, err)
		}
	}
	wantReceived(t, table, map[uint64]uint64{})
}

// TestStatsSurviveTheirStreams: the sums count every stream there ever was, and never go back while one ends.
func TestStatsSurviveTheirStreams(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	const streams, samples = 20, 50
	var working sync.WaitGroup
	for range streams {
		s := open(t, table)
		working.Go(func() {
			if err := push(t.Context(), table, s, 0, samples); err != nil {
				t.Error(err)
			}
			if run, err := s.Reserve(t.Context(), 1); err != nil {
				t.Error(err)
			} else {
				s.Abandon(run)
			}
			s.Close()
		})
	}
	received := make(chan error, 1)
	go func() {
		_, err := receive(context.Background(), table)
		received <- err
	}()
	var last engine.Stats
	for {
		st := table.Stats()
		if st.Pushed < last.Pushed || st.Committed < last.Committed || st.Abandoned < last.Abandoned || st.Opened != streams || st.Committed > st.Pushed {
			t.Fatalf("after %+v came %+v", last, st)
		}
		for i, s := range st.Streams {
			if i > 0 && s.Stream <= st.Streams[i-1].Stream {
				t.Fatalf("streams are not in order: %+v", st.Streams)
			}
		}
		if last = st; len(st.Streams) == 0 {
			break
		}
		runtime.Gosched()
	}
	working.Wait()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-received; err != nil {
		t.Fatal(err)
	}
	if st := table.Stats(); st.Pushed != streams*samples || st.Committed != streams*samples || st.Abandoned != streams || st.Opened != streams ||
		st.Table != "numbers" || st.Published != st.Leased || st.Sampler.Released != st.Sampler.Delivered {
		t.Fatalf("%d streams of %d samples ended as %+v", streams, samples, st)
	}
}

func TestTablesShareAPool(t *testing.T) {
	pool := newPool(t)
	var tables [3]*engine.Table
	for i := range tables {
		cfg := config(t, pool)
		cfg.Name = fmt.Sprintf("table %d", i)
		tables[i] = newTable(t, cfg)
	}
	for round := range uint64(3) {
		for i, table := range tables {
			s := open(t, table)
			if s.ID() != round+1 {
				t.Fatalf("stream %d of table %d has number %d", round, i, s.ID())
			}
			mustPush(t, table, s, 0, uint64(i)+round)
			s.Close()
		}
	}
	for i, table := range tables {
		if err := table.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := map[uint64]uint64{}
		for round := range uint64(3) {
			if n := uint64(i) + round; n > 0 {
				want[round+1] = n
			}
		}
		wantReceived(t, table, want)
	}
}

// TestLinger: with it, neither a slow stream nor an ended one leaves samples unread.
func TestLinger(t *testing.T) {
	cfg := config(t, newPool(t))
	cfg.Linger = time.Millisecond
	table := newTable(t, cfg)
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- table.Run(ctx) }()
	trainer := table.NewTrainer()
	s := open(t, table)
	for n := range uint64(2) {
		mustPush(t, table, s, n, 1)
		if n == 1 {
			s.Close()
		}
		b, err := trainer.Next(t.Context())
		if err != nil || b.Count != 1 {
			t.Fatalf("sample %d alone: %+v, %v", n, b, err)
		}
		trainer.Release(b)
	}
	stop()
	if err := <-ran; !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v", err)
	}
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestTrainersShareATable(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	one, two := table.NewTrainer(), table.NewTrainer()
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	if _, err := one.Next(ctx); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("nothing was pushed: %v, want a deadline error", err)
	}
	s := open(t, table)
	mustPush(t, table, s, 0, 8)
	a, err := one.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := two.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if a.Number != 0 || b.Number != 1 {
		t.Fatalf("two trainers got batches %d and %d", a.Number, b.Number)
	}
	two.Release(b)
	if err := check(table, a); err != nil { // released was the other one
		t.Fatal(err)
	}
	one.Release(a)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("a batch was released twice")
			}
		}()
		one.Release(a)
	}()
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, trainer := range []*engine.Trainer{one, two} {
		if _, err := trainer.Next(t.Context()); err != io.EOF {
			t.Fatalf("at the end: %v, want io.EOF", err)
		}
	}
}
