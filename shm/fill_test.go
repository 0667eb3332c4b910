//go:build linux && !race

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/wire"
)

func TestFillInPlace(t *testing.T) {
	watchLeaks(t)
	h := startHost(t, hostConfig{batchSize: 8, batches: 6})
	a := h.attach(wire.Hello{Client: "test"})
	if c := a.Accepted(); c.Table != testTable || c.BatchSize != 8 || c.Prefetch != 2 || c.Held != 0 || c.Stream != 1 || !c.Spec.Equal(h.spec) {
		t.Errorf("accepted: %+v", c)
	}
	p, r := newAuthor(a), newReader(h)
	check(t, p.need(t.Context()))
	first := p.place
	check(t, p.writeAll(t.Context(), 8))
	b, err := h.ring.Lease(t.Context(), r.seat)
	check(t, err)
	if b.Index != first.Index || b.Count != 8 {
		t.Errorf("the place was %d, the batch is in %d with %d rows", first.Index, b.Index, b.Count)
	}
	check(t, verify(h.spec, b))
	h.ring.Release(b)
	r.next[1] = 8
	done := make(chan error)
	go func() { done <- r.all() }()
	for n := 1; p.next < 2000; n = n%11 + 1 {
		_, err := p.write(t.Context(), n)
		check(t, err)
	}
	check(t, p.flush(t.Context()))
	if rows, all, err := p.Taken(); rows != p.next || !all || err != nil || p.Handed() != p.next {
		t.Errorf("taken %d, %v, %v, of %d", rows, all, err, p.next)
	}
	h.eventually("all of it is committed", func(s FillStats) bool { return s.Committed == p.next && len(s.Fillers) == 1 })
	check(t, a.Close())
	check(t, <-h.served)
	h.ring.Flush()
	h.ring.Close()
	check(t, <-done)
	if r.next[1] != p.next {
		t.Errorf("%d of %d samples came", r.next[1], p.next)
	}
	if s := h.server.Stats().Fill; s.Attached != 1 || s.Detached != 1 || s.Committed != p.next || s.Published < 100 {
		t.Errorf("stats: %+v", s)
	}
	h.free()
}

// Rows of a producer that is slow, or has stopped, do not wait for it; nor do other writers' batches.
func TestSlowProducerIsSettled(t *testing.T) {
	for name, cfg := range map[string]hostConfig{
		"after a while":       {server: ServerConfig{Fill: FillConfig{SettleAfter: 5 * time.Millisecond}}},
		"the table's linger":  {server: ServerConfig{Fill: FillConfig{SettleAfter: time.Hour}}, linger: 5 * time.Millisecond},
		"when it asks for it": {server: ServerConfig{Fill: FillConfig{SettleAfter: time.Hour}}},
	} {
		t.Run(name, func(t *testing.T) {
			watchLeaks(t)
			cfg.batchSize, cfg.batches = 8, 6
			h := startHost(t, cfg)
			p, r := newAuthor(h.attach(wire.Hello{})), newReader(h)
			for range 3 { // each time less than a place
				check(t, p.writeAll(t.Context(), 3))
				before := p.next
				if name == "when it asks for it" {
					check(t, p.flush(t.Context()))
				}
				h.eventually("they are copied", func(s FillStats) bool { return s.Settled == before })
			}
			n, err := r.batch(t.Context()) // the shared batch is full by now
			check(t, err)
			if n != 8 {
				t.Errorf("a batch of %d", n)
			}
			check(t, p.Close())
			check(t, <-h.served)
			check(t, r.finish())
			if r.next[1] != 9 {
				t.Errorf("%d of 9 samples came", r.next[1])
			}
			h.free()
		})
	}
}

// What was called complete before the socket ended is in; rows of a place that was left half-way are copied.
func TestFillerLeaves(t *testing.T) {
	for rows := range 20 {
		h := startHost(t, hostConfig{batchSize: 8, batches: 6, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Hour}}})
		p, r := newAuthor(h.attach(wire.Hello{})), newReader(h)
		check(t, p.writeAll(t.Context(), rows))
		check(t, p.Close())
		check(t, <-h.served)
		check(t, r.finish())
		if r.next[1] != uint64(rows) {
			t.Errorf("%d of %d samples came", r.next[1], rows)
		}
		h.free()
	}
}

// A producer that ends while the ring is full, and nobody reads, does not wait: its last rows become a short batch.
func TestFillerLeavesFullRing(t *testing.T) {
	h := startHost(t, hostConfig{batchSize: 8, batches: 4, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Hour}}})
	p, r := newAuthor(h.attach(wire.Hello{})), newReader(h)
	check(t, p.writeAll(t.Context(), 3*8+5)) // all places there are
	check(t, p.Close())
	check(t, <-h.served)
	check(t, r.finish())
	if r.next[1] != 3*8+5 {
		t.Errorf("%d samples came", r.next[1])
	}
	h.free()
}

func TestFillGrants(t *testing.T) {
	watchLeaks(t)
	h := startHost(t, hostConfig{batchSize: 8, batches: 8, server: ServerConfig{PrefetchMax: 3, Fill: FillConfig{FillersMax: 4}}})
	granted := func(want, grant int64) *FillAttachment {
		t.Helper()
		a := h.attach(wire.Hello{Prefetch: want})
		if got := a.Accepted().Prefetch; got != grant {
			t.Errorf("asked for %d, was granted %d, want %d", want, got, grant)
		}
		return a
	}
	refused := func(code wire.Code, words string) {
		t.Helper()
		_, err := AttachFill(t.Context(), h.path, wire.Hello{Table: testTable}, nil)
		var refusal *wire.Refusal
		if !errors.As(err, &refusal) || refusal.Code != code || !strings.Contains(refusal.Reason, words) {
			t.Errorf("got %v, want %s, %q", err, code, words)
		}
		<-h.served
	}
	one := granted(100, 3) // of 6: two must stay free for shared filling and for a trainer
	granted(0, 2)          // of 3
	granted(5, 1)          // of 1
	refused(wire.CodeTooManyConnections, "may already hold all")
	for _, a := range []*FillAttachment{one} { // who has its places has them
		p := newAuthor(a)
		check(t, p.writeAll(t.Context(), 16))
		h.eventually("three places are lent again", func(s FillStats) bool { return s.Fillers[0].Lent == 3 && s.Committed == 16 })
	}
	check(t, one.Close())
	check(t, <-h.served)
	granted(1, 1)
	granted(1, 1)
	refused(wire.CodeTooManyConnections, "4 producers fill in place, which is this daemon's limit")
	lent := 0
	for i := range h.ring.Batches() {
		if h.ring.BatchState(i).State == ring.Lent {
			lent++
		}
	}
	if lent > 6 {
		t.Errorf("%d places are lent", lent)
	}

	small := startHost(t, hostConfig{batchSize: 8, batches: 2})
	h = small
	refused(wire.CodeTooManyConnections, "give the table more batches")
	least := startHost(t, hostConfig{batchSize: 8, batches: 3})
	h = least
	granted(2, 1)
	refused(wire.CodeTooManyConnections, "give the table more batches")
}

func TestFillRefusals(t *testing.T) {
	watchLeaks(t)
	for name, test := range map[string]struct {
		cfg    hostConfig
		hello  wire.Hello
		open   error
		code   wire.Code
		reason string
	}{
		"a table without":    {hello: wire.Hello{Table: "pushed"}, code: wire.CodeWrongRole, reason: `table "pushed" does not offer to be filled in place`},
		"memory for readers": {cfg: hostConfig{sealed: true}, code: wire.CodeWrongRole, reason: "does not offer"},
		"no table":           {hello: wire.Hello{Table: "none"}, code: wire.CodeUnknownTable, reason: testTable},
		"sessions are full":  {open: &ring.SessionsFullError{Sessions: 4}, code: wire.CodeTooManySessions, reason: "4 sessions"},
		"it stops":           {open: fmt.Errorf("table: %w", os.ErrClosed), code: wire.CodeShuttingDown, reason: "stopping"},
		"it fails":           {open: errors.New("out of luck"), code: wire.CodeInternal, reason: "out of luck"},
		"its own words":      {open: wire.Refuse(wire.CodeBadOption, "not like this"), code: wire.CodeBadOption, reason: "not like this"},
	} {
		t.Run(name, func(t *testing.T) {
			test.cfg.batchSize, test.cfg.batches = 8, 6
			h := startHost(t, test.cfg)
			h.refuse = test.open
			if test.hello.Table == "" {
				test.hello.Table = testTable
			}
			_, err := AttachFill(t.Context(), h.path, test.hello, nil)
			var refusal *wire.Refusal
			if !errors.As(err, &refusal) || refusal.Code != test.code || !strings.Contains(refusal.Reason, test.reason) {
				t.Errorf("got %v", err)
			}
			if err := <-h.served; !errors.As(err, &refusal) || refusal.Code != test.code {
				t.Errorf("Serve: %v", err)
			}
			if s := h.server.Stats(); s.Fill.Attached != 0 || s.Refused[test.code] != 1 {
				t.Errorf("stats: %+v", s)
			}
			if len(h.server.granted) != 0 || len(h.server.filling.granted) != 0 {
				t.Errorf("granted: %v, %v", h.server.granted, h.server.filling.granted)
			}
		})
	}
}

// Who may fill is a matter of users and groups; the daemon's own user always may, root is like any other.
func TestFillPermissions(t *testing.T) {
	own := uint32(os.Geteuid())
	memfd := newMemory(t, MemoryConfig{Size: 1, Fillable: true})
	named := newMemory(t, MemoryConfig{Size: 1, Fillable: true, Path: filepath.Join(t.TempDir(), "ring")})
	for name, test := range map[string]struct {
		cfg    FillConfig
		peer   credentials
		memory *Memory
		want   string // "" for may
	}{
		"own user":             {FillConfig{}, credentials{known: true, uid: own}, memfd, ""},
		"own user, others too": {FillConfig{Users: []uint32{4242}}, credentials{known: true, uid: own}, memfd, ""},
		"another":              {FillConfig{}, credentials{known: true, uid: own + 1, gid: 7}, memfd, fmt.Sprintf("user %d (group 7) may not fill table \"t\"", own+1)},
		"another says whom":    {FillConfig{Users: []uint32{4242}, Groups: []uint32{5}}, credentials{known: true, uid: 4243}, memfd, "trusts users [4242] and groups [5]"},
		"another of own group": {FillConfig{}, credentials{known: true, uid: 4242, gid: uint32(os.Getegid())}, memfd, "trusts nobody else"},
		"listed":               {FillConfig{Users: []uint32{1, 4242}}, credentials{known: true, uid: 4242}, memfd, ""},
		"its group":            {FillConfig{Groups: []uint32{9}}, credentials{known: true, uid: 4242, gid: 9}, memfd, ""},
		"another group of it":  {FillConfig{Groups: []uint32{9}}, credentials{known: true, uid: 4242, gid: 8, groups: []uint32{7, 9}}, memfd, ""},
		"other groups":         {FillConfig{Groups: []uint32{9}}, credentials{known: true, uid: 4242, gid: 8, groups: []uint32{7}}, memfd, "list the user or one of its groups"},
		"nobody knows":         {FillConfig{Users: []uint32{0}}, credentials{}, memfd, "does not say who"},
		"own user, named":      {FillConfig{}, credentials{known: true, uid: own}, named, ""},
		"listed, named":        {FillConfig{Users: []uint32{4242}}, credentials{known: true, uid: 4242}, named, "cannot be sealed"},
		"not listed, named":    {FillConfig{}, credentials{known: true, uid: 4242}, named, "trusts nobody else"},
	} {
		refusal := test.cfg.permit(test.peer, Table{Name: "t", Memory: test.memory})
		switch {
		case (refusal == nil) != (test.want == ""):
			t.Errorf("%s: %v", name, refusal)
		case refusal != nil && (refusal.Code != wire.CodeNotPermitted || !strings.Contains(refusal.Reason, test.want)):
			t.Errorf("%s: %v, want %q", name, refusal, test.want)
		}
	}
}

func TestFillConfig(t *testing.T) {
	h := &fillHost{}
	for want, cfg := range map[string]ServerConfig{
		"Fill.Prefetch is 65":      {Fill: FillConfig{Prefetch: 65}},
		"Fill.Prefetch is -1":      {Fill: FillConfig{Prefetch: -1}},
		"Fill.FillersMax is -1":    {Fill: FillConfig{FillersMax: -1}},
		"Fill.SettleAfter is -1ns": {Fill: FillConfig{SettleAfter: -1}},
		"Fill.Poll -1ns":           {Fill: FillConfig{Poll: -1}},
	} {
		cfg.Tables = h
		if _, err := NewServer(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	_, err := NewServer(ServerConfig{Tables: h, Fill: FillConfig{Prefetch: 64, FillersMax: 1, SettleAfter: 1, Poll: 1}})
	check(t, err)
}

// A full ring: the producer is told whom it waits for, and goes on when there is room.
func TestFillNotes(t *testing.T) {
	watchLeaks(t)
	holder := func() (wire.Note, bool) {
		return wire.Note{Trainer: 7, Group: "g", Client: "slow", PID: 99, Batch: 3, Since: 12345, Reason: "trainer 7 has held batch 3 for long"}, true
	}
	h := startHost(t, hostConfig{batchSize: 8, batches: 4, holder: holder})
	p, r := newAuthor(h.attach(wire.Hello{Notes: true})), newReader(h)
	quiet := newAuthor(h.attach(wire.Hello{}))
	ctx, cancel := context.WithCancel(t.Context())
	for _, a := range []*author{p, quiet} {
		var err error
		for err == nil && a.next < 64 { // until no place comes any more
			short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
			_, err = a.write(short, 8)
			stop()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a full ring: %v after %d samples", err, a.next)
		}
	}
	waited := make(chan error)
	go func() { waited <- p.need(ctx) }()
	h.eventually("a note was sent", func(s FillStats) bool {
		return s.Notes > 0 && s.Fillers[0].State == FillWaiting && s.Fillers[1].State == FillWaiting
	})
	until := time.NewTicker(time.Millisecond)
	defer until.Stop()
	for p.Note() == nil {
		<-until.C
	}
	if n := p.Note(); n.Code != wire.NoteRingFull || n.Trainer != 7 || n.Group != "g" || n.Client != "slow" || n.PID != 99 || n.Batch != 3 || n.Since != 12345 {
		t.Errorf("note: %+v", n)
	}
	if quiet.Note() != nil {
		t.Error("a note to a producer that reads none")
	}
	for range 2 {
		_, err := r.batch(ctx)
		check(t, err)
	}
	check(t, <-waited)
	if p.Note() != nil {
		t.Error("the note still holds after a place came")
	}
	cancel()
}

// Another connection of the session ends the first one, and goes on where that one stood.
func TestFillSessionIsTaken(t *testing.T) {
	watchLeaks(t)
	h := startHost(t, hostConfig{batchSize: 8, batches: 8, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Hour}}})
	old, r := newAuthor(h.attach(wire.Hello{Session: "s"})), newReader(h)
	check(t, old.writeAll(t.Context(), 11))
	check(t, old.need(t.Context()))
	held := old.place
	next := newAuthor(h.attach(wire.Hello{Session: "s"}))
	if c := next.Accepted(); c.Held != 11 || c.Stream != old.Accepted().Stream {
		t.Fatalf("accepted: %+v", c)
	}
	check(t, old.Wait(t.Context(), func() bool { return false }))
	var notice *wire.Notice
	if err := old.Err(); !errors.As(err, &notice) || notice.Code != wire.CodeSessionTaken {
		t.Errorf("the old one was told %v", err)
	}
	if st := h.ring.BatchState(int(held.Index)); st.State != ring.Lent { // it may be writing there
		t.Errorf("the place it was filling is %v", st.State)
	}
	check(t, next.Resumed())
	check(t, next.writeAll(t.Context(), 20))
	if stream := <-h.resumed; stream != old.Accepted().Stream {
		t.Errorf("stream %d resumed", stream)
	}
	check(t, old.Close())
	if err := <-h.served; !errors.As(err, &notice) || notice.Code != wire.CodeSessionTaken {
		t.Errorf("Serve of the old one: %v", err)
	}
	check(t, next.Close())
	check(t, <-h.served)
	check(t, r.finish())
	if r.next[old.Accepted().Stream] != 31 {
		t.Errorf("%v", r.next)
	}
	if s := h.server.Stats().Fill; s.Taken != 1 || s.Detached != 1 {
		t.Errorf("stats: %+v", s)
	}
	h.free()
}

// A daemon that stops takes what is complete, tells the producers, and takes no new ones.
func TestStopFilling(t *testing.T) {
	watchLeaks(t)
	h := startHost(t, hostConfig{batchSize: 8, batches: 8})
	p, r := newAuthor(h.attach(wire.Hello{})), newReader(h)
	check(t, p.writeAll(t.Context(), 13))
	h.server.StopFilling(t.Context())
	var notice *wire.Notice
	if err := <-h.served; !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
		t.Errorf("Serve: %v", err)
	}
	check(t, p.Wait(t.Context(), func() bool { return false }))
	if err := p.Err(); !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
		t.Errorf("it was told %v", err)
	}
	if rows, all, err := p.Taken(); rows != 13 || !all || err != nil {
		t.Errorf("taken %d, %v, %v", rows, all, err)
	}
	var refusal *wire.Refusal
	if _, err := AttachFill(t.Context(), h.path, wire.Hello{Table: testTable}, nil); !errors.As(err, &refusal) || refusal.Code != wire.CodeShuttingDown {
		t.Errorf("a new one: %v", err)
	}
	check(t, r.finish())
	if r.next[1] != 13 {
		t.Errorf("%v", r.next)
	}
	if s := h.server.Stats().Fill; s.CutOff != 1 || s.Stranded != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// The end of the table, and of the daemon.
func TestFillerIsToldOfTheEnd(t *testing.T) {
	watchLeaks(t)
	h := startHost(t, hostConfig{batchSize: 8, batches: 4})
	p := newAuthor(h.attach(wire.Hello{}))
	check(t, p.writeAll(t.Context(), 8))
	h.ring.Close()
	for {
		if err := p.need(t.Context()); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		check(t, p.writeAll(t.Context(), 8)) // what it had was its own
	}
	h.eventually("it is known to be told", func(s FillStats) bool { return s.Fillers[0].State == FillEnded })
	h.stop()
	var notice *wire.Notice
	if err := <-h.served; !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
		t.Errorf("Serve: %v", err)
	}
	if err := p.Wait(t.Context(), func() bool { return false }); err != nil {
		t.Error(err)
	}
	if err := p.Err(); !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
		t.Errorf("it was told %v", err)
	}
}

// A daemon that looks without sleeping does the same.
func TestFillPolling(t *testing.T) {
	h := startHost(t, hostConfig{batchSize: 4, batches: 6, server: ServerConfig{Fill: FillConfig{Poll: 200 * time.Microsecond}}})
	p, r := newAuthor(h.attach(wire.Hello{})), newReader(h)
	done := make(chan error)
	go func() { done <- r.all() }()
	for n := range 500 {
		_, err := p.write(t.Context(), 1+n%4)
		check(t, err)
	}
	check(t, p.Close())
	check(t, <-h.served)
	h.ring.Flush()
	h.ring.Close()
	check(t, <-done)
	if r.next[1] != p.next {
		t.Errorf("%d of %d samples came", r.next[1], p.next)
	}
}

// Rows that are called complete one by one, as fast as can be: the daemon is rung only when it must be, and never too seldom, or this would stop for ever.
func TestFillWakesAreNotLost(t *testing.T) {
	h := startHost(t, hostConfig{batchSize: 8, batches: 16})
	p, r := newAuthor(h.attach(wire.Hello{Prefetch: 4})), newReader(h)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			b, err := h.ring.Lease(context.Background(), r.seat)
			if err != nil {
				return
			}
			h.ring.Release(b)
		}
	}()
	rows := 100000
	if testing.Short() {
		rows = 10000
	}
	for range rows {
		check(t, p.need(t.Context()))
		check(t, p.Complete(p.place, 1))
		if p.row++; p.row == 8 {
			p.place = LentPlace{}
		}
	}
	check(t, p.Close())
	check(t, <-h.served)
	h.ring.Close()
	<-done
	if s := h.server.Stats().Fill; s.Committed != uint64(rows) {
		t.Errorf("%d of %d committed", s.Committed, rows)
	}
}
