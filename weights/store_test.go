package weights

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

func TestPublishAndRead(t *testing.T) {
	s := heapStore(t, 3)
	m := manifestOf(t, 1000, 0, 7)
	if _, err := s.OpenReader(Who{}); err == nil || !strings.Contains(err.Error(), "nothing was published") {
		t.Fatalf("a reader before the first generation: %v", err)
	}
	p := must(s.OpenPublisher(m, Who{Client: "trainer", PID: 7}))(t)
	select {
	case <-s.First():
		t.Fatal("First before anything was published")
	default:
	}
	pl := must(p.TryBegin(0))(t)
	if _, err := p.TryBegin(0); err != ErrBegun {
		t.Errorf("a second Begin: %v", err)
	}
	incomplete := as[*IncompleteError](t, must1(pl.Commit()))
	if incomplete.Missing != 2 || incomplete.Tensor != "layers.0.w" {
		t.Errorf("an empty place: %v; the empty tensor needs no sum, the other two do", incomplete)
	}
	write(pl)
	digest := must(pl.Commit())(t)
	if want := Digest(m, pl.Sums()); digest != want {
		t.Errorf("digest %v, want %v", digest, want)
	}
	if _, err := pl.Commit(); err != ErrNotBegun {
		t.Errorf("a second Commit: %v", err)
	}
	pl.Abort() // nothing
	<-s.First()

	r := must(s.OpenReader(Who{Client: "worker"}))(t)
	held, ok := r.Latest(0)
	if !ok || held.Generation() != 1 || held.Digest() != digest || wrongContent(held.Manifest(), held.Data(), 1) >= 0 {
		t.Fatalf("%v, %v", held, ok)
	}
	if _, ok := r.Latest(1); ok {
		t.Error("a generation newer than the newest")
	}
	if _, _, ok := held.Descriptor(); ok {
		t.Error("heap memory has a descriptor")
	}
	stats := s.Stats()
	if len(stats.Generations) != 1 || len(stats.Generations[0].Pins) != 1 || stats.Generations[0].Pins[0].Who.Client != "worker" ||
		stats.Publisher == nil || stats.Published != 1 || stats.Failed[FailedIncomplete] != 1 || stats.Bytes != uint64(m.DataBytes()) {
		t.Errorf("%+v", stats)
	}
	held.Release()
	held.Release()
	if n := len(s.Stats().Generations[0].Pins); n != 0 {
		t.Errorf("%d pins after the release", n)
	}
}

// must1 returns only the error.
func must1[T any](_ T, err error) error { return err }

// TestAllPinned: a reader that holds every generation but the newest makes the publisher wait, which is told who it is; its release ends the wait.
func TestAllPinned(t *testing.T) {
	s := heapStore(t, 3)
	p := must(s.OpenPublisher(manifestOf(t, 10), Who{}))(t)
	publish(t, p)
	r := must(s.OpenReader(Who{Client: "slow", PID: 42}))(t)
	var all []*Held
	for g := uint64(1); g <= 3; g++ {
		held, ok := r.Latest(g - 1)
		if !ok || held.Generation() != g {
			t.Fatalf("generation %d: %v", g, ok)
		}
		if all = append(all, held); g < 3 {
			publish(t, p)
		}
	}
	pins := as[*PinnedError](t, must1(p.TryBegin(0))).Pins
	if len(pins) != 2 || pins[0].Generation != 1 || pins[1].Generation != 2 || pins[0].Who.PID != 42 || pins[0].Since.IsZero() {
		t.Fatalf("%+v", pins)
	}
	for g, held := range all {
		if at := wrongContent(held.Manifest(), held.Data(), uint64(g+1)); at >= 0 || s.current.view.Generation(held.Place()) != uint64(g+1) {
			t.Errorf("generation %d after the attempt: tensor %d differs, or its word is not back", g+1, at)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := p.Begin(ctx, 0)
	as[*PinnedError](t, err)
	if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "generation 1 by reader 1, slow (process 42)") {
		t.Errorf("%v", err)
	}
	began := make(chan *Place)
	go func() {
		pl, _ := p.Begin(t.Context(), 0)
		began <- pl
	}()
	all[1].Release()
	if pl := <-began; pl == nil || pl.Index() != all[1].Place() {
		t.Errorf("%+v, want the place that was released, %d", pl, all[1].Place())
	}
	if got := s.Stats().Failed[FailedPinned]; got != 1 {
		t.Errorf("counted %d generations as pinned, want the one that ended", got)
	}
}

// TestEndsLeaveNothing: an aborted place, and one whose publisher closed, hold nothing, and the newest stays.
func TestEndsLeaveNothing(t *testing.T) {
	s := heapStore(t, 2)
	m := manifestOf(t, 100)
	p := must(s.OpenPublisher(m, Who{}))(t)
	publish(t, p)
	for range 3 {
		pl := must(p.TryBegin(0))(t)
		write(pl)
		pl.Abort()
		if _, err := pl.Commit(); err != ErrNotBegun {
			t.Errorf("commit after abort: %v", err)
		}
	}
	pl := must(p.TryBegin(5))(t)
	write(pl)
	p.Close()
	p.Close()
	if _, err := pl.Commit(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
	if _, err := p.TryBegin(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("begin after close: %v", err)
	}
	if g := s.current.view.Generation(pl.Index()); g != 0 {
		t.Errorf("the place says generation %d", g)
	}
	stats := s.Stats()
	if stats.Newest != 1 || len(stats.Generations) != 1 || stats.Failed[FailedAborted] != 3 || stats.Failed[FailedEnded] != 1 || stats.Publisher != nil {
		t.Errorf("%+v", stats)
	}
	p = must(s.OpenPublisher(m, Who{}))(t)
	if g := publish(t, p); g != 2 || p.Number() != 2 {
		t.Errorf("generation %d by publisher %d, want 2 by 2", g, p.Number())
	}
}

func TestGenerationNumbers(t *testing.T) {
	s := heapStore(t, 2)
	p := must(s.OpenPublisher(manifestOf(t, 1), Who{}))(t)
	begin := func(want uint64) error {
		pl, err := p.TryBegin(want)
		if err == nil {
			write(pl)
			must(pl.Commit())(t)
		}
		return err
	}
	check(t, begin(10))
	for _, want := range []uint64{1, 9, 10, GenerationMax + 1, 1<<64 - 1} {
		old := as[*OldGenerationError](t, begin(want))
		if old.Newest != 10 || old.Wanted != want {
			t.Errorf("%+v", old)
		}
	}
	check(t, begin(11))
	check(t, begin(GenerationMax))
	for _, want := range []uint64{0, GenerationMax} {
		as[*OldGenerationError](t, begin(want))
	}
	if got := s.Newest(); got != GenerationMax {
		t.Errorf("newest %d", got)
	}
}

// TestReplaced: another manifest takes over at its first commit, not before; generation numbers go on, and what readers hold stays.
func TestReplaced(t *testing.T) {
	s := heapStore(t, 2)
	first, second := manifestOf(t, 100), manifestOf(t, 100, 200)
	p := must(s.OpenPublisher(first, Who{}))(t)
	publish(t, p)
	if active := as[*ActiveError](t, must1(s.OpenPublisher(second, Who{}))); active.Publisher != 1 {
		t.Errorf("%+v", active)
	}
	p.Close()
	r := must(s.OpenReader(Who{}))(t)
	held, _ := r.Latest(0)
	before := s.current

	p = must(s.OpenPublisher(second, Who{}))(t) // gives up before its first commit
	pl := must(p.TryBegin(0))(t)
	write(pl)
	p.Close()
	if r.Err() != nil || s.current != before || s.Newest() != 1 {
		t.Fatal("a publisher that published nothing replaced the segment")
	}

	p = must(s.OpenPublisher(second, Who{}))(t)
	if g := publish(t, p); g != 2 {
		t.Errorf("generation %d, want 2", g)
	}
	as[*ReplacedError](t, r.Err())
	_, err := r.Wait(t.Context(), 1)
	as[*ReplacedError](t, err)
	if again, err := r.Wait(t.Context(), 0); err != nil || again.Generation() != 1 {
		t.Errorf("what was there before it was replaced: %v", err)
	}
	if wrongContent(first, held.Data(), 1) >= 0 {
		t.Error("what was held changed")
	}
	r2 := must(s.OpenReader(Who{}))(t)
	if now, ok := r2.Latest(0); !ok || now.Generation() != 2 || wrongContent(second, now.Data(), 2) >= 0 {
		t.Error("the new segment does not show generation 2")
	}

	p.Close() // other metadata is another manifest text, so another segment
	tagged := must(tensor.NewManifest([]tensor.Tensor{second.Tensor(0), second.Tensor(1)}, map[string]string{"step": "7"}))(t)
	p = must(s.OpenPublisher(tagged, Who{}))(t)
	publish(t, p)
	as[*ReplacedError](t, r2.Err())
}

func TestCapacity(t *testing.T) {
	m := manifestOf(t, 1<<20)
	need := LayoutOf(m, 2).SegmentBytes
	for capacity, fits := range map[int64]bool{need: true, need - 1: false} {
		s := must(NewStore(StoreConfig{Generations: 2, Capacity: capacity, Heap: true}))(t)
		p, err := s.OpenPublisher(m, Who{})
		if fits {
			check(t, err)
			publish(t, p)
			continue
		}
		if e := as[*CapacityError](t, err); e.Bytes != need || e.Capacity != capacity {
			t.Errorf("%+v", e)
		}
		if _, err := s.OpenPublisher(manifestOf(t, 1), Who{}); err != nil {
			t.Errorf("the refused one keeps the table: %v", err)
		}
	}
}

func TestReaderAt(t *testing.T) {
	s := heapStore(t, 3)
	p := must(s.OpenPublisher(manifestOf(t, 5), Who{}))(t)
	publish(t, p)
	publish(t, p)
	r := must(s.OpenReader(Who{}))(t)
	digests := map[uint64]spec.Fingerprint{}
	for _, g := range s.Stats().Generations {
		digests[g.Generation] = g.Digest
	}
	held, ok := r.At(1, digests[1])
	if !ok || held.Generation() != 1 || wrongContent(held.Manifest(), held.Data(), 1) >= 0 {
		t.Fatal("generation 1 is there and was not found")
	}
	for g, d := range map[uint64]spec.Fingerprint{1: digests[2], 3: {}, 0: {}} {
		if _, ok := r.At(g, d); ok {
			t.Errorf("generation %d with digest %v was found", g, d)
		}
	}
	publish(t, p) // 3, in the free place
	if g := publish(t, p); g != 4 || s.current.view.Generation(held.Place()) != 1 {
		t.Error("a generation pinned by At was overwritten")
	}
}

func TestReaderLimitAndClose(t *testing.T) {
	s := must(NewStore(StoreConfig{ReadersMax: 2, Heap: true}))(t)
	p := must(s.OpenPublisher(manifestOf(t, 5), Who{}))(t)
	publish(t, p)
	a, b := must(s.OpenReader(Who{}))(t), must(s.OpenReader(Who{}))(t)
	as[*TooManyReadersError](t, must1(s.OpenReader(Who{})))
	held, _ := a.Latest(0)
	check(t, a.Close())
	check(t, a.Close())
	if _, ok := a.Latest(0); ok {
		t.Error("a closed reader pins")
	}
	if n := len(s.Stats().Readers); n != 2 {
		t.Errorf("%d readers, want 2: the closed one still holds a generation", n)
	}
	held.Release()
	if n := len(s.Stats().Readers); n != 1 {
		t.Errorf("%d readers, want 1", n)
	}
	check(t, s.Close())
	check(t, s.Close())
	if _, err := b.Wait(t.Context(), 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("wait after close: %v", err)
	}
	if _, err := p.TryBegin(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("begin after close: %v", err)
	}
	if _, err := s.OpenReader(Who{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("open after close: %v", err)
	}
}

// TestNews: a wait sees each publication, and a deadline ends it.
func TestNews(t *testing.T) {
	s := heapStore(t, 3)
	p := must(s.OpenPublisher(manifestOf(t, 5), Who{}))(t)
	publish(t, p)
	r := must(s.OpenReader(Who{}))(t)
	got := make(chan uint64)
	go func() {
		for g := uint64(1); g < 4; {
			held, err := r.Wait(t.Context(), g)
			if err != nil {
				close(got)
				return
			}
			g = held.Generation()
			held.Release()
			got <- g
		}
	}()
	for g := uint64(2); g <= 4; g++ {
		publish(t, p)
		if saw := <-got; saw != g {
			t.Fatalf("saw generation %d, want %d", saw, g)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := r.Wait(ctx, 4); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestStoreConfig(t *testing.T) {
	for _, bad := range []StoreConfig{{Generations: 1}, {Generations: 65}, {Generations: -1}, {Capacity: -1}, {ReadersMax: -1}} {
		if _, err := NewStore(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	for _, n := range []int{PlacesMin, PlacesMax} {
		s := heapStore(t, n)
		p := must(s.OpenPublisher(manifestOf(t, 3), Who{}))(t)
		for range n + 2 {
			publish(t, p)
		}
		if got := len(s.Stats().Generations); got != n {
			t.Errorf("%d generations are there, want %d", got, n)
		}
	}
}

// TestPending: the segment of a manifest that nothing was published of is freed with its publisher.
func TestPendingIsFreed(t *testing.T) {
	s := heapStore(t, 2)
	p := must(s.OpenPublisher(manifestOf(t, 3), Who{}))(t)
	m := p.memory
	must(p.TryBegin(0))(t)
	p.Close()
	if m.uses != 0 || s.current != nil {
		t.Errorf("%d uses of the memory", m.uses)
	}
}
