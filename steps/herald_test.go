package steps

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/tensor"
)

func newSeat() *park.Waiter { return park.NewWaiter() }

var testTime = time.Unix(1, 0)

// push commits one chunk of a producer.
func push(t testing.TB, r *ring.Ring, p *Producer, h tensor.Header) {
	t.Helper()
	p.takes(t, h)
	slot, ok := r.TryReserve(1)
	if !ok {
		t.Fatal("the ring is full")
	}
	h.Put(r.RunColumn(slot, headerColumn))
	r.Commit(slot, p.stream, 0, 1, ring.Mark{})
}

// read releases all that is in the ring and tells what the herald said there.
func read(r *ring.Ring) string {
	var said []string
	for {
		b, ok := r.TryLease()
		if !ok {
			return strings.Join(said, " ")
		}
		if h, err := tensor.ParseHeader(b.Column(headerColumn)); err == nil {
			said = append(said, fmt.Sprintf("%s%d", map[uint16]string{tensor.FlagOpened: "+", tensor.FlagClosed: "-"}[h.Flags], h.Stream))
		}
		r.Release(b)
	}
}

// fill takes all that is free of a ring.
func fill(r *ring.Ring) (all []ring.Run) {
	for {
		run, ok := r.TryReserve(1)
		if !ok {
			return all
		}
		all = append(all, run)
	}
}

func TestHeraldSaysAtOnce(t *testing.T) {
	r := newRing(t, 8)
	k := New(r, Config{ChunkBytes: chunkBytes}, nil)
	m := manifest(t)
	a, b := open(t, k, "a", 1, m), open(t, k, "b", 2, m)
	a.Close()
	b.Close()
	if got := read(r); got != "+1 +2 -1 -2" {
		t.Errorf("said %q", got)
	}
	if st := k.Stats(); st.Announced != 4 || st.Unsaid != 0 {
		t.Errorf("%+v", st)
	}
}

// TestHeraldDoesNotWaitForItsBatch: where a batch has several chunks, what is said is published short.
func TestHeraldDoesNotWaitForItsBatch(t *testing.T) {
	r, _ := newRingIn(t, 4, 3)
	k := New(r, Config{ChunkBytes: chunkBytes}, nil)
	p := open(t, k, "a", 1, manifest(t))
	if got := read(r); got != "+1" {
		t.Errorf("said %q", got)
	}
	p.Close()
	if got := read(r); got != "-1" {
		t.Errorf("said %q", got)
	}
}

// TestHeraldInAFullRing: nobody waits for it, what it has to say of a stream is kept once, and is said as it is when there is room.
func TestHeraldInAFullRing(t *testing.T) {
	r := newRing(t, 2)
	k := New(r, Config{ChunkBytes: chunkBytes}, nil)
	m := manifest(t)
	slots := fill(r)
	stays, goes, returns := open(t, k, "stays", 1, m), open(t, k, "goes", 2, m), open(t, k, "returns", 3, m)
	goes.Close()
	returns.Close()
	_, _ = stays, open(t, k, "returns", 3, m)
	if st := k.Stats(); st.Unsaid != 3 || st.Announced != 0 {
		t.Errorf("%+v", st)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = k.Run(ctx) })
	for _, s := range slots {
		r.Abandon(s)
	}
	var said []string
	for len(said) < 3 {
		b, err := r.Lease(t.Context(), newSeat())
		if err != nil {
			t.Fatal(err)
		}
		if h, err := tensor.ParseHeader(b.Column(headerColumn)); err == nil {
			said = append(said, fmt.Sprintf("%d:%d", h.Stream, h.Flags))
		}
		r.Release(b)
	}
	if want := fmt.Sprintf("[1:%d 2:%d 3:%d]", tensor.FlagOpened, tensor.FlagClosed, tensor.FlagOpened); fmt.Sprint(said) != want {
		t.Errorf("said %v, want %s", said, want)
	}
	cancel()
	running.Wait()
}

// TestHeraldEnds: Flush waits as long as its context, and no longer than the ring lives; so does Run.
func TestHeraldEnds(t *testing.T) {
	r := newRing(t, 2)
	k := New(r, Config{ChunkBytes: chunkBytes}, nil)
	fill(r)
	open(t, k, "w0", 1, manifest(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Flush returned %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- k.Run(t.Context()) }()
	r.Close()
	if err := <-done; err != nil {
		t.Errorf("Run returned %v", err)
	}
	if err := k.Flush(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Flush returned %v", err)
	}
}

// TestHeraldManyAtOnce: however many come and go at once, the last word on each is right.
func TestHeraldManyAtOnce(t *testing.T) {
	r := newRing(t, 64)
	k := New(r, Config{ChunkBytes: chunkBytes}, nil)
	m := manifest(t)
	ctx, cancel := context.WithCancel(t.Context())
	var running, all sync.WaitGroup
	running.Go(func() { _ = k.Run(ctx) })
	last := map[uint64]uint16{}
	reading := make(chan struct{})
	running.Go(func() {
		defer close(reading)
		for {
			b, err := r.Lease(context.Background(), newSeat())
			if err != nil {
				return
			}
			if h, err := tensor.ParseHeader(b.Column(headerColumn)); err == nil {
				last[h.Stream] = h.Flags
			}
			r.Release(b)
		}
	})
	for i := range uint64(8) {
		all.Go(func() {
			for range 50 {
				p := open(t, k, fmt.Sprint("w", i), i+1, m)
				p.Close()
			}
			if i%2 == 0 {
				open(t, k, fmt.Sprint("w", i), i+1, m)
			}
		})
	}
	all.Wait()
	if err := k.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Close()
	<-reading
	cancel()
	running.Wait()
	for i := range uint64(8) {
		want := uint16(tensor.FlagClosed)
		if i%2 == 0 {
			want = tensor.FlagOpened
		}
		if last[i+1] != want {
			t.Errorf("the last word on stream %d has the flags %#x, want %#x", i+1, last[i+1], want)
		}
	}
}
