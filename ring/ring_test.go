package ring

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the random tests; 0 picks one")

// seeded returns a random source and prints how to run the same again if the test fails.
func seeded(t *testing.T) *rand.Rand {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay: go test ./ring -run '^%s$' -args -seed=%d", t.Name(), seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 1))
}

func newRing(t testing.TB, batchSize, batches int, columns ...int64) *Ring {
	t.Helper()
	l := Layout{BatchSize: batchSize, Batches: batches, Columns: columns, Spec: []byte("{}"), Table: "t", Created: time.Unix(1, 0)}
	size, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Format(AlignedBytes(size), l)
	if err != nil {
		t.Fatal(err)
	}
	r.Poison = true
	return r
}

// fill writes into each slot of the run bytes that follow from stream and number.
func fill(r *Ring, run Run, stream, first uint64) {
	for leaf, size := range r.layout.Columns {
		col := r.RunColumn(run, leaf)
		for i := range uint64(run.N) {
			prove(col[int64(i)*size:int64(i+1)*size], stream, first+i, leaf)
		}
	}
}

func prove(b []byte, stream, number uint64, leaf int) {
	var w [8]byte
	binary.LittleEndian.PutUint64(w[:], stream*0x9E3779B97F4A7C15^number*0xC2B2AE3D27D4EB4F^uint64(leaf))
	for i := range b {
		b[i] = w[i%8] + byte(i/8)
	}
}

// verify checks every row of a batch against what fill wrote.
func verify(b Batch, columns []int64) error {
	streams, numbers, arrivals := b.Streams(), b.Numbers(), b.Arrivals()
	want := make([]byte, 0, 64)
	for row := range streams {
		if arrivals[row] == 0 {
			return fmt.Errorf("batch %d row %d has no arrival", b.Number, row)
		}
		for leaf, size := range columns {
			want = append(want[:0], make([]byte, size)...)
			prove(want, streams[row], numbers[row], leaf)
			if got := b.Column(leaf)[int64(row)*size : int64(row+1)*size]; string(got) != string(want) {
				return fmt.Errorf("batch %d row %d leaf %d (stream %d number %d): torn or wrong", b.Number, row, leaf, streams[row], numbers[row])
			}
		}
	}
	return nil
}

func TestLayoutLimits(t *testing.T) {
	good := Layout{BatchSize: 1, Batches: 2, Columns: []int64{1}}
	for name, tc := range map[string]struct {
		change func(*Layout)
		ok     bool
	}{
		"smallest":           {func(*Layout) {}, true},
		"no slots":           {func(l *Layout) { l.BatchSize = 0 }, false},
		"too many slots":     {func(l *Layout) { l.BatchSize = BatchSizeMax + 1 }, false},
		"one batch":          {func(l *Layout) { l.Batches = 1 }, false},
		"most batches":       {func(l *Layout) { l.Batches = BatchesMax }, true},
		"too many batches":   {func(l *Layout) { l.Batches = BatchesMax + 1 }, false},
		"no columns":         {func(l *Layout) { l.Columns = nil }, false},
		"most columns":       {func(l *Layout) { l.Columns = ones(ColumnsMax) }, true},
		"too many columns":   {func(l *Layout) { l.Columns = ones(ColumnsMax + 1) }, false},
		"empty column":       {func(l *Layout) { l.Columns = []int64{0} }, false},
		"negative column":    {func(l *Layout) { l.Columns = []int64{-1} }, false},
		"overflowing column": {func(l *Layout) { l.Columns = []int64{1 << 62}; l.BatchSize = 4 }, false},
		"overflowing ring":   {func(l *Layout) { l.Columns = []int64{SegmentMax / 4}; l.Batches = 8 }, false},
		"long spec":          {func(l *Layout) { l.Spec = make([]byte, SpecBytesMax+1) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			l := good
			tc.change(&l)
			n, err := l.Bytes()
			if (err == nil) != tc.ok {
				t.Fatalf("Bytes() = %d, %v", n, err)
			}
			var fe *FormatError
			if err != nil && !errors.As(err, &fe) {
				t.Fatalf("%T is not a *FormatError", err)
			}
		})
	}
}

func ones(n int) []int64 {
	s := make([]int64, n)
	for i := range s {
		s[i] = 1
	}
	return s
}

func TestFormatRefusesBadMemory(t *testing.T) {
	l := Layout{BatchSize: 1, Batches: 2, Columns: []int64{1}}
	n, _ := l.Bytes()
	if _, err := Format(AlignedBytes(n)[:n-1], l); err == nil {
		t.Error("one byte too few was accepted")
	}
	if _, err := Format(AlignedBytes(n + 64)[8:], l); err == nil {
		t.Error("memory that is not on a 64-byte boundary was accepted")
	}
}

func TestRunsStayInsideOneBatch(t *testing.T) {
	r := newRing(t, 4, 2, 8)
	var got []uint32
	for {
		run, ok := r.TryReserve(3)
		if !ok {
			break
		}
		got = append(got, run.N)
	}
	if fmt.Sprint(got) != "[3 1 3 1]" {
		t.Fatalf("runs of %v slots, want [3 1 3 1]", got)
	}
}

func TestPublishInOrderWhateverTheOrderOfCommits(t *testing.T) {
	r := newRing(t, 1, 4, 8)
	var runs []Run
	for range 4 {
		run, ok := r.TryReserve(1)
		if !ok {
			t.Fatal("full too early")
		}
		runs = append(runs, run)
	}
	for i, at := range []int{2, 1, 3, 0} {
		fill(r, runs[at], 1, uint64(at))
		r.Commit(runs[at], 1, uint64(at), 1, Mark{})
		if _, ok := r.TryLease(); ok && i < 3 {
			t.Fatal("a batch was leased before the one in front of it was published")
		}
		if i < 3 && r.Published() != 0 {
			t.Fatalf("%d published before the first was committed", r.Published())
		}
	}
	// One lease was taken by the loop above when everything was published.
	for want := uint64(1); want < 4; want++ {
		b, ok := r.TryLease()
		if !ok || b.Number != want || b.Numbers()[0] != want {
			t.Fatalf("got %+v, want batch %d", b, want)
		}
	}
}

func TestHeldBatchDoesNotStopTheRing(t *testing.T) {
	r := newRing(t, 1, 3, 8)
	next := uint64(0)
	put := func() {
		t.Helper()
		run, ok := r.TryReserve(1)
		if !ok {
			t.Fatalf("full at sample %d", next)
		}
		fill(r, run, 1, next)
		r.Commit(run, 1, next, 1, Mark{})
		next++
	}
	put()
	held, _ := r.TryLease()
	for range 20 {
		put()
		b, ok := r.TryLease()
		if !ok {
			t.Fatal("nothing to lease")
		}
		r.Release(b)
	}
	if err := verify(held, r.layout.Columns); err != nil {
		t.Fatal(err)
	}
}

func TestFlushPublishesShort(t *testing.T) {
	r := newRing(t, 8, 2, 8, 3)
	if r.Flush() {
		t.Fatal("flushed an empty ring")
	}
	run, _ := r.TryReserve(3)
	if !r.Flush() || r.Flush() {
		t.Fatal("flush did not close the batch exactly once")
	}
	if _, ok := r.TryLease(); ok {
		t.Fatal("published with uncommitted slots")
	}
	fill(r, run, 7, 0)
	r.Commit(run, 7, 0, 1, Mark{})
	b, ok := r.TryLease()
	if !ok || b.Count != 3 {
		t.Fatalf("got %+v, want 3 rows", b)
	}
	if err := verify(b, r.layout.Columns); err != nil {
		t.Fatal(err)
	}
}

func TestAbandon(t *testing.T) {
	r := newRing(t, 6, 2, 8, 3)
	a, _ := r.TryReserve(2)
	b, _ := r.TryReserve(2)
	c, _ := r.TryReserve(1)
	r.Abandon(c) // nothing after it: goes to the next
	if c2, _ := r.TryReserve(2); c2.Position != c.Position || c2.N != 2 {
		t.Fatalf("got %+v, want the slot that was given back", c2)
	} else {
		fill(r, c2, 3, 0)
		r.Commit(c2, 3, 0, 1, Mark{})
	}
	r.Abandon(a) // slots after it are taken: its rows go
	fill(r, b, 2, 0)
	r.Commit(b, 2, 0, 1, Mark{})
	got, ok := r.TryLease()
	if !ok || got.Count != 4 {
		t.Fatalf("got %+v, want 4 rows", got)
	}
	if s := fmt.Sprint(got.Streams(), got.Numbers()); s != "[2 2 3 3] [0 1 0 1]" {
		t.Fatalf("rows %s", s)
	}
	if err := verify(got, r.layout.Columns); err != nil {
		t.Fatal(err)
	}
}

func TestBatchOfNothingIsSkipped(t *testing.T) {
	r := newRing(t, 2, 2, 8)
	a, _ := r.TryReserve(2)
	b, _ := r.TryReserve(2)
	fill(r, b, 1, 0)
	r.Commit(b, 1, 0, 1, Mark{})
	r.Abandon(a)
	got, ok := r.TryLease()
	if !ok || got.Number != 1 {
		t.Fatalf("got %+v, want batch 1", got)
	}
	if _, ok := r.TryReserve(1); !ok {
		t.Fatal("the place of the empty batch did not come back")
	}
}

func TestOwnBugsPanic(t *testing.T) {
	mustPanic := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s did not panic", name)
			}
		}()
		f()
	}
	r := newRing(t, 2, 2, 8)
	run, _ := r.TryReserve(2)
	r.Commit(run, 1, 0, 1, Mark{})
	mustPanic("committing a run twice", func() { r.Commit(run, 1, 0, 1, Mark{}) })
	b, _ := r.TryLease()
	r.Release(b)
	mustPanic("releasing a batch twice", func() { r.Release(b) })
}

func TestViewChecksWhatItIsTold(t *testing.T) {
	r := newRing(t, 2, 2, 8)
	run, _ := r.TryReserve(2)
	fill(r, run, 1, 0)
	r.Commit(run, 1, 0, 1, Mark{})
	v, err := OpenView(r.mem)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Batch(0, run.Index, 2); err == nil {
		t.Error("a batch that is not leased was handed out")
	}
	b, _ := r.TryLease()
	if _, err := v.Batch(b.Number, b.Index, 2); err != nil {
		t.Error(err)
	}
	for _, bad := range []struct {
		number uint64
		index  uint32
		count  int
	}{{1, b.Index, 2}, {1 << 61, b.Index, 2}, {0, 2, 2}, {0, 1 << 31, 2}, {0, b.Index, 1}, {0, b.Index, 3}, {0, b.Index, -1}, {0, b.Index ^ 1, 2}} {
		if _, err := v.Batch(bad.number, bad.index, bad.count); err == nil {
			t.Errorf("%+v was handed out", bad)
		}
	}
}

func TestCloseWakesBothSides(t *testing.T) {
	r := newRing(t, 1, 2, 8)
	for range 2 {
		run, _ := r.TryReserve(1)
		r.Commit(run, 1, 0, 1, Mark{})
	}
	errs := make(chan error, 2)
	go func() {
		_, err := r.Reserve(t.Context(), park.NewWaiter(), 1)
		errs <- err
	}()
	empty := newRing(t, 1, 2, 8)
	go func() {
		_, err := empty.Lease(t.Context(), park.NewWaiter())
		errs <- err
	}()
	r.Close()
	empty.Close()
	got := []error{<-errs, <-errs}
	if !(errors.Is(got[0], os.ErrClosed) && got[1] == io.EOF) && !(errors.Is(got[1], os.ErrClosed) && got[0] == io.EOF) {
		t.Fatalf("got %v, want os.ErrClosed and io.EOF", got)
	}
	// A closed ring still gives out what was published.
	w := park.NewWaiter()
	for range 2 {
		if _, err := r.Lease(t.Context(), w); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Lease(t.Context(), w); err != io.EOF {
		t.Fatalf("got %v, want io.EOF", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newRing(t, 1, 2, 8).Lease(ctx, w); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want context.Canceled", err)
	}
}

func TestNoAllocations(t *testing.T) {
	r := newRing(t, 4, 2, 64, 8)
	r.Poison = false
	w := park.NewWaiter()
	n := uint64(0)
	if a := testing.AllocsPerRun(1000, func() {
		run, err := r.Reserve(t.Context(), w, 4)
		if err != nil {
			t.Fatal(err)
		}
		r.Commit(run, 1, n, 1, Mark{})
		n += 4
		b, err := r.Lease(t.Context(), w)
		if err != nil {
			t.Fatal(err)
		}
		_ = b.Column(0)
		r.Release(b)
	}); a != 0 {
		t.Fatalf("%v allocations per batch, want 0", a)
	}
}

// TestManyWritersAndTrainers runs the whole life of slots and batches from many goroutines on rings so small that every wrap, every
// fight for the last place and every abandoned row happens. Contents prove what they are; each stream's samples must come out once and, read in the
// order of batch numbers, in order.
func TestManyWritersAndTrainers(t *testing.T) {
	rng := seeded(t)
	const writers, trainers = 4, 3
	samples := uint64(20000)
	if testing.Short() {
		samples = 2000
	}
	for _, shape := range [][2]int{{1, 2}, {2, 2}, {3, 4}, {8, 2}, {5, 16}} {
		r := newRing(t, shape[0], shape[1], 8, 3)
		var rows sync.Map // batch number -> []row
		var writing, reading sync.WaitGroup
		var abandoned atomic.Int64
		for id := range uint64(writers) {
			seed := rng.Uint64()
			writing.Go(func() {
				rng, w := rand.New(rand.NewPCG(seed, id)), park.NewWaiter()
				for next := uint64(0); next < samples; {
					run, err := r.Reserve(t.Context(), w, int(min(samples-next, 1+rng.Uint64N(7))))
					if err != nil {
						t.Error(err)
						return
					}
					switch rng.IntN(16) {
					case 0:
						abandoned.Add(1)
						r.Abandon(run)
					case 1:
						r.Flush()
						fallthrough
					default:
						fill(r, run, id, next)
						r.Commit(run, id, next, 1, Mark{})
						next += uint64(run.N)
					}
				}
			})
		}
		for range trainers {
			reading.Go(func() {
				w := park.NewWaiter()
				for {
					b, err := r.Lease(t.Context(), w)
					if err == io.EOF {
						return
					}
					if err == nil {
						err = verify(b, r.layout.Columns)
					}
					if err != nil {
						t.Error(err)
						return
					}
					pairs := make([][2]uint64, b.Count)
					for i := range pairs {
						pairs[i] = [2]uint64{b.Streams()[i], b.Numbers()[i]}
					}
					if _, twice := rows.LoadOrStore(b.Number, pairs); twice {
						t.Errorf("batch %d was leased twice", b.Number)
					}
					r.Release(b)
				}
			})
		}
		writing.Wait()
		r.Flush()
		r.Close()
		reading.Wait()
		var next [writers]uint64
		for number := range r.Published() {
			v, ok := rows.Load(number)
			if !ok {
				continue // a batch of nothing
			}
			for _, p := range v.([][2]uint64) {
				if next[p[0]] != p[1] {
					t.Fatalf("%v: stream %d: sample %d came when %d was due", shape, p[0], p[1], next[p[0]])
				}
				next[p[0]]++
			}
		}
		for id, n := range next {
			if n != samples {
				t.Fatalf("%v: stream %d: %d of %d samples came out", shape, id, n, samples)
			}
		}
		if abandoned.Load() == 0 {
			t.Fatal("nothing was abandoned: the test does not test that")
		}
	}
}
