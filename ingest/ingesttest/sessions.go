package ingesttest

import (
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/wire"
)

// inSession makes a hello for a session.
func inSession(name string) func(*wire.Hello) {
	return func(h *wire.Hello) { h.Session = name }
}

// patient are limits so long that only what ends a wait by itself ends it within a test.
var patient = Limits{HandshakeTimeout: time.Hour, IdleTimeout: time.Hour, StallTimeout: time.Hour, AckTimeout: time.Hour}

// sessionsGoOn: a session's connections have one stream, whose numbers go on; held is what is in the ring.
func sessionsGoOn(t *testing.T, start Start) {
	r := newRig(t, start, "a:U8[100],b:U8[50]", 4, 4, Limits{})
	r.train()
	var stream uint64
	for round := range uint64(4) {
		c := r.join(1, inSession("s"))
		if round == 0 {
			stream = c.accepted.Stream
		}
		if c.accepted.Held != 5*round || c.accepted.Stream != stream {
			t.Fatalf("connection %d: stream %d holds %d, want stream %d and %d", round, c.accepted.Stream, c.accepted.Held, stream, 5*round)
		}
		if err := c.send(5, 0); err != nil {
			t.Fatal(err)
		}
		c.wantAcks(5)
		_ = c.CloseWrite()
		if _, notice, err := c.ending(); err != nil || notice != nil {
			t.Fatal(notice, err)
		}
		_ = c.Close()
	}
	for id, name := range map[uint64]string{2: "other", 3: ""} {
		c := r.join(id, inSession(name))
		if c.accepted.Held != 0 || c.accepted.Stream == stream {
			t.Errorf("session %q: stream %d holds %d", name, c.accepted.Stream, c.accepted.Held)
		}
		_ = c.Close()
	}
	r.finish()
	if r.taken[1] != 20 {
		t.Errorf("%d of 20 samples delivered", r.taken[1])
	}
}

// brokenConnections: a producer whose connections break at any byte gets each sample in once, if it begins each time with what is held.
func brokenConnections(t *testing.T, start Start) {
	for _, text := range []string{"a:U8[64]", "a:U8[100],b:U8[2000]", "a:U8[70000]"} {
		t.Run(text, func(t *testing.T) {
			seed := rand.Uint64()
			rng := rand.New(rand.NewPCG(seed, 0))
			r := newRig(t, start, text, 4, 4, Limits{})
			r.train()
			acked := uint64(0)
			for round := range 60 {
				c := r.join(1, func(h *wire.Hello) {
					h.Session, h.Ack = "s", []wire.AckMode{wire.AckQueued, wire.AckCommitted}[round%2]
				})
				if c.accepted.Held < acked {
					t.Fatalf("seed %#x, connection %d: %d held, %d were acked", seed, round, c.accepted.Held, acked)
				}
				n := rng.IntN(20)
				if err := c.send(n, 0); err != nil {
					t.Fatal(err)
				}
				seen := rng.IntN(n + 1)
				c.wantAcks(seen)
				acked = c.accepted.Held + uint64(seen)
				if _, err := c.Write(make([]byte, rng.IntN(int(r.table.Spec().SampleBytes())))); err != nil {
					t.Fatal(err)
				}
				_ = c.Close() // with or without acks unread: an end or a reset
			}
			c := r.join(1, inSession("s"))
			if c.accepted.Held < acked {
				t.Fatalf("seed %#x: %d held at last, %d were acked", seed, c.accepted.Held, acked)
			}
			_ = c.Close()
			r.finish()
			if r.taken[1] != c.accepted.Held {
				t.Errorf("seed %#x: %d held, %d delivered", seed, c.accepted.Held, r.taken[1])
			}
		})
	}
}

// takeover: the second connection of a session ends the first, whatever that is doing, and goes on after what is in the ring.
func takeover(t *testing.T, start Start) {
	const slots = 2 * 4
	for _, tc := range []struct {
		name, spec string
		samples    int // whole ones that the first sends
		rest       int // bytes of a further one
		acks       int // that it reads before
		full       bool
	}{
		{"idle", "a:U8[1000]", 3, 0, 3, false},
		{"inside a sample", "a:U8[1000]", 3, 500, 3, false},
		{"inside a large sample", "a:U8[200000]", 3, 100000, 3, false},
		{"waiting for a slot", "a:U8[1000]", 50, 0, slots, true},
		{"waiting for a slot for a large sample", "a:U8[66000]", slots + 1, 0, slots, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, start, tc.spec, 4, 2, patient)
			first := r.join(1, inSession("s"))
			if err := first.send(tc.samples, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := first.Write(make([]byte, tc.rest)); err != nil {
				t.Fatal(err)
			}
			first.wantAcks(tc.acks)
			for tc.full && r.waitingForSlot() == 0 {
				pause(t)
			}
			second := r.join(1, inSession("s"))
			if second.accepted.Stream != first.accepted.Stream || second.accepted.Held != uint64(tc.acks) {
				t.Fatalf("stream %d holds %d, want %d and %d", second.accepted.Stream, second.accepted.Held, first.accepted.Stream, tc.acks)
			}
			acks, notice, err := first.ending()
			if err != nil || acks != 0 || notice == nil || notice.Code != wire.CodeSessionTaken {
				t.Fatalf("the first got %d acks more, notice %v, error %v; want %s", acks, notice, err, wire.CodeSessionTaken)
			}
			_ = first.Close()
			r.train()
			if err := second.send(3, 0); err != nil {
				t.Fatal(err)
			}
			second.wantAcks(3)
			_ = second.Close()
			r.finish()
			if want := uint64(tc.acks + 3); r.taken[1] != want {
				t.Errorf("%d samples delivered, want %d", r.taken[1], want)
			}
			if st := r.transport.Stats(); st.Ended[string(wire.CodeSessionTaken)] != 1 {
				t.Errorf("counted %+v", st.Ended)
			}
		})
	}
	t.Run("acks not read", func(t *testing.T) {
		r := newRig(t, start, "a:U64", 1024, 4, patient)
		r.train()
		first := r.join(1, inSession("s"))
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			for first.send(1<<15, 0) == nil { // until the daemon closes
			}
		}()
		for before, same := uint64(0), 0; same < 3; { // until the socket takes no more acks, and the daemon no more samples
			pause(t)
			now := r.transport.Stats().Samples
			if same++; now == 0 || now != before {
				before, same = now, 0
			}
		}
		second := r.join(1, inSession("s"))
		if err := second.send(3, 0); err != nil {
			t.Fatal(err)
		}
		second.wantAcks(3)
		_ = first.Close()
		<-sent
		_ = second.Close()
		r.finish()
		if r.taken[1] != second.accepted.Held+3 {
			t.Errorf("%d delivered, want %d", r.taken[1], second.accepted.Held+3)
		}
	})
}

// pause lets others work for a moment.
func pause(t *testing.T) {
	select {
	case <-time.After(20 * time.Millisecond):
	case <-t.Context().Done():
	}
}

// tooManySessions: a table that knows as many sessions as it can refuses another, and goes on serving those it knows.
func tooManySessions(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 4, 4, Limits{}, func(c *engine.Config) { c.Sessions = 1 })
	r.train()
	known := r.join(1, inSession("known"))
	_, err := r.ask(2, inSession("new"))
	var refusal *wire.Refusal
	if !errors.As(err, &refusal) || refusal.Code != wire.CodeTooManySessions || refusal.Reason == "" {
		t.Fatalf("got %v, want %s", err, wire.CodeTooManySessions)
	}
	none := r.join(3, nil)
	again := r.join(1, inSession("known"))
	if _, notice, err := known.ending(); err != nil || notice == nil || notice.Code != wire.CodeSessionTaken {
		t.Fatalf("notice %v, error %v", notice, err)
	}
	for _, c := range []*client{known, none, again} {
		_ = c.Close()
	}
	r.finish()
}

// committedTable: where the table says so, every connection gets committed acks.
func committedTable(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 4, 16, Limits{}, func(c *engine.Config) { c.CommittedAcks = true })
	c := r.join(1, func(h *wire.Hello) { h.Ack = wire.AckQueued })
	if c.accepted.Ack != wire.AckCommitted {
		t.Fatalf("the daemon agreed to %q acks", c.accepted.Ack)
	}
	for n := range uint64(8) {
		if err := c.send(1, 0); err != nil {
			t.Fatal(err)
		}
		c.wantAcks(1)
		if got := r.table.Stats().Committed; got != n+1 {
			t.Fatalf("%d acked, %d committed", n+1, got)
		}
	}
	_ = c.Close()
	r.train()
	r.finish()
}

// notes: a producer that asked for it is told that its stream waits for a slot, between acks; others see nothing but acks.
func notes(t *testing.T, start Start) {
	const slots, samples = 2 * 4, 50
	r := newRig(t, start, "a:U8[1000]", 4, 2, Limits{})
	plain := r.join(1, nil)
	if err := plain.send(samples, 0); err != nil {
		t.Fatal(err)
	}
	plain.wantAcks(slots)
	for r.waitingForSlot() == 0 {
		pause(t)
	}
	noted := r.join(2, func(h *wire.Hello) { h.Notes = true })
	if err := noted.send(samples, 0); err != nil {
		t.Fatal(err)
	}
	var last time.Time
	for range 2 {
		one := make([]byte, 1)
		if _, err := io.ReadFull(noted, one); err != nil || one[0] != wire.NoteMark {
			t.Fatalf("got %#x, %v, want a note", one, err)
		}
		n, err := wire.ReadNote(noted)
		if err != nil || n.Code != wire.NoteRingFull || n.Reason == "" {
			t.Fatalf("got %+v, %v, want a note that the ring is full", n, err)
		}
		now := time.Now()
		if !last.IsZero() && now.Sub(last) < time.Second/2 {
			t.Errorf("two notes within %v", now.Sub(last))
		}
		last = now
	}
	for r.transport.Stats().Notes < 2 { // counted after they were sent
		pause(t)
	}
	r.train()
	plain.wantAcks(samples - slots)
	_ = noted.CloseWrite()
	if acks, notice, err := noted.ending(); acks != samples || notice != nil || err != nil {
		t.Errorf("%d acks, notice %v, error %v", acks, notice, err)
	}
	_, _ = noted.Close(), plain.Close()
	r.finish()
}

// goneWhileWaiting: a producer that dies while its connection waits for a slot is noticed, though no slot comes free.
func goneWhileWaiting(t *testing.T, start Start) {
	r := newRig(t, start, "a:U8[1000]", 4, 2, patient)
	c := r.join(1, nil)
	if err := c.send(50, 0); err != nil {
		t.Fatal(err)
	}
	for r.waitingForSlot() == 0 {
		pause(t)
	}
	_ = c.Close() // its acks are unread, as when its process is killed: over TCP a reset
	for r.transport.Stats().Open > 0 {
		pause(t)
	}
	if st := r.transport.Stats(); st.Ended["reset"] != 1 {
		t.Errorf("counted %+v", st.Ended)
	}
	r.train()
	r.finish()
}
