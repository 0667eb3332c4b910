package engine_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
)

func openSession(t testing.TB, table *engine.Table, name string, taken func()) *drainer.Stream {
	t.Helper()
	s, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: name, Taken: taken})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSessionsGoOn: the streams of a session have one number and count on, those of others are other streams.
func TestSessionsGoOn(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	var id uint64
	for round := range uint64(3) {
		s := openSession(t, table, "a", nil)
		if round == 0 {
			id = s.ID()
		}
		if s.Held() != 5*round || s.ID() != id {
			t.Fatalf("round %d: stream %d holds %d, want %d and %d", round, s.ID(), s.Held(), id, 5*round)
		}
		other := open(t, table)
		if other.ID() == id || other.Held() != 0 {
			t.Fatalf("a stream without session is %d and holds %d", other.ID(), other.Held())
		}
		mustPush(t, table, s, s.Held(), 5)
		if st := s.Stats(); st.Pushed != 5 || st.Committed > 5 || st.Held != 5*round || st.Session != "a" {
			t.Fatalf("%+v", st)
		}
		s.Close()
		other.Close()
		<-other.Done()
	}
	named := openSession(t, table, "b", nil)
	if named.ID() == id || named.Held() != 0 {
		t.Fatalf("session b is stream %d and holds %d", named.ID(), named.Held())
	}
	named.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := table.Stats(); st.Sessions != 2 || st.Opened != 7 || st.Taken != 0 || st.Pushed != 15 || st.Committed != 15 {
		t.Fatalf("%+v", st)
	}
	wantReceived(t, table, map[uint64]uint64{id: 15})
}

// TestSessionIsTakenOver: the second waits until the first has closed and all it pushed is in the ring.
func TestSessionIsTakenOver(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	taken := make(chan struct{})
	first := openSession(t, table, "a", func() { close(taken) })
	mustPush(t, table, first, 0, 3)
	opened := make(chan *drainer.Stream, 1)
	go func() {
		s, err := table.OpenStream(context.Background(), engine.StreamConfig{Session: "a"})
		if err != nil {
			t.Error(err)
		}
		opened <- s
	}()
	<-taken
	mustPush(t, table, first, 3, 2) // what was under way still counts
	select {
	case <-opened:
		t.Fatal("two streams have the session")
	default:
	}
	first.Close()
	second := <-opened
	if second.Held() != 5 || second.ID() != first.ID() {
		t.Fatalf("stream %d holds %d, want %d and 5", second.ID(), second.Held(), first.ID())
	}
	mustPush(t, table, second, 5, 2)
	second.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := table.Stats(); st.Taken != 1 {
		t.Fatalf("%d taken over, want 1", st.Taken)
	}
	wantReceived(t, table, map[uint64]uint64{first.ID(): 7})
}

// TestWaitingForASession: of those that wait the last one gets it; a wait ends with its context and with the table.
func TestWaitingForASession(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	told := 0
	first := openSession(t, table, "a", func() { told++ })
	late, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	for range 2 {
		_, err := table.OpenStream(late, engine.StreamConfig{Session: "a"})
		if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), `"a"`) {
			t.Fatalf("got %v, want a deadline error that names the session", err)
		}
	}
	if told != 1 {
		t.Fatalf("Taken was called %d times", told)
	}
	const waiting = 3
	results := make(chan error, waiting)
	streams := make(chan *drainer.Stream, waiting)
	for range waiting {
		go func() {
			s, err := table.OpenStream(context.Background(), engine.StreamConfig{Session: "a"})
			if err == nil {
				streams <- s
			}
			results <- err
		}()
	}
	for range waiting - 1 {
		if err := <-results; !errors.Is(err, engine.ErrSessionTaken) {
			t.Fatalf("got %v, want ErrSessionTaken", err)
		}
	}
	first.Close()
	if err := <-results; err != nil {
		t.Fatal(err)
	}
	last := <-streams
	go func() {
		_, err := table.OpenStream(context.Background(), engine.StreamConfig{Session: "a"})
		results <- err
	}()
	ctx, stop := context.WithCancel(t.Context())
	stop()
	_ = table.Close(ctx)
	if err := <-results; !errors.Is(err, os.ErrClosed) {
		t.Fatalf("got %v, want os.ErrClosed", err)
	}
	last.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestSessionTable: it is full at its limit, and one that is old enough makes room, but never one in use.
func TestSessionTable(t *testing.T) {
	for _, ttl := range []time.Duration{time.Hour, 1} {
		cfg := config(t, newPool(t))
		cfg.Sessions, cfg.SessionTTL = 2, ttl
		table := newTable(t, cfg)
		inUse := openSession(t, table, "in use", nil)
		mustPush(t, table, inUse, 0, 1)
		gone := openSession(t, table, "gone", nil)
		gone.Close()
		for len(table.Stats().Streams) > 1 {
			runtime.Gosched()
		}
		var full *ring.SessionsFullError
		s, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: "new"})
		if ttl == time.Hour {
			if !errors.As(err, &full) || full.Sessions != 2 {
				t.Fatalf("a third session of 2: %v", err)
			}
			s = openSession(t, table, "gone", nil) // it is known
		} else if err != nil {
			t.Fatalf("one is old enough to be forgotten: %v", err)
		}
		s.Close()
		inUse.Close()
		if err := table.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := engine.New(engine.Config{Name: "t", Spec: mustSpec(t, testSpec), BatchSize: 1, Batches: 2, Drainers: newPool(t), SessionTTL: -1}); err == nil {
		t.Error("a negative SessionTTL was taken")
	}
	table := newTable(t, config(t, newPool(t)))
	if _, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: strings.Repeat("s", engine.NameBytesMax+1)}); err == nil {
		t.Error("a session's name above the limit was taken")
	}
	s := openSession(t, table, strings.Repeat("s", engine.NameBytesMax), nil)
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestSessionsUnderContention: many want few sessions, over and over. Every sample that was pushed is there once, whoever pushed it.
func TestSessionsUnderContention(t *testing.T) {
	cfg := config(t, newPool(t))
	cfg.Batches = 64
	table := newTable(t, cfg)
	var working sync.WaitGroup
	var mu sync.Mutex
	want := map[uint64]uint64{}
	for worker := range 8 {
		working.Go(func() {
			for range 50 {
				taken := make(chan struct{})
				s, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: fmt.Sprint(worker % 2), Taken: func() { close(taken) }})
				if errors.Is(err, engine.ErrSessionTaken) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				n := s.Held()
				for range 5 {
					if err := push(t.Context(), table, s, n, 1); err != nil {
						t.Error(err)
					}
					n++
				}
				mu.Lock()
				want[s.ID()] = max(want[s.ID()], n)
				mu.Unlock()
				s.Close()
			}
		})
	}
	received := make(chan error, 1)
	var got map[uint64]uint64
	go func() {
		var err error
		got, err = receive(context.Background(), table)
		received <- err
	}()
	working.Wait()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-received; err != nil {
		t.Fatal(err)
	}
	if len(want) != 2 || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("received %v, pushed %v", got, want)
	}
}

// TestFullErrorSaysWhy: a Reserve that runs out of time says so, and whom it waited for.
func TestFullErrorSaysWhy(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	s := open(t, table)
	mustPush(t, table, s, 0, 4*8)
	late, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	_, err := s.Reserve(late, 1)
	var full *engine.FullError
	if !errors.As(err, &full) || full.Table != table.Name() || !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "the ring is full") {
		t.Fatalf("got %v, want a *FullError", err)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if _, err := s.Reserve(stopped, 1); errors.As(err, &full) || !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want the context's error", err)
	}
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// past returns a context whose deadline is over.
func past(t testing.TB) context.Context {
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	t.Cleanup(cancel)
	return ctx
}

// fillPlace writes the first n samples of a stream in place.
func fillPlace(table *engine.Table, p ring.Place, stream uint64, n int) {
	for i := range table.Spec().NumLeaves() {
		leaf, column := table.Spec().Leaf(i), table.Ring().PlaceColumn(p, i)
		for row := range n {
			proof.Leaf(column[row*int(leaf.Bytes()):(row+1)*int(leaf.Bytes())], leaf.DType, stream, uint64(row), i)
		}
	}
}
