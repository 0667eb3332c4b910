package engine_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
)

// TestRecover: a table that is made over the memory of one that never ended goes on where that was: with its samples, its sessions, its groups, and no number
// twice.
func TestRecover(t *testing.T) {
	given := &memory{}
	cfg := config(t, newPool(t))
	cfg.Memory = given.make(0, 0)
	first := newTable(t, cfg)
	if first.Found() != nil {
		t.Error("a new table says that it was found")
	}
	s, plain := openSession(t, first, "s", nil), open(t, first)
	mustPush(t, first, s, 0, 6)
	mustPush(t, first, plain, 0, 3)
	plain.Close()
	<-plain.Done()
	if err := s.WaitCommitted(t.Context()); err != nil { // its connection is still there when the process dies
		t.Fatal(err)
	}
	tr := first.NewTrainer()
	b, err := tr.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	held := b.Number // in the hands of a trainer when it ends
	left := slices.Clone(given.bytes)
	s.Close()

	again := &memory{}
	cfg.Recover = true
	cfg.Memory = func(size int64) (engine.Memory, error) {
		m, err := again.make(0, 0)(size)
		copy(again.bytes, left)
		return m, err
	}
	second := newTable(t, cfg)
	if found := second.Found(); found == nil || found.Samples != 9 || found.Clean {
		t.Fatalf("found %+v", found)
	}
	if st := second.Stats(); st.Sessions != 1 || len(st.Sampler.Groups) != 1 || st.Sampler.Groups[0].Name != engine.GroupDefault {
		t.Errorf("%+v", st)
	}
	resumed, fresh := openSession(t, second, "s", nil), open(t, second)
	if resumed.Held() != 6 || resumed.ID() != s.ID() || fresh.ID() == plain.ID() || fresh.ID() == s.ID() {
		t.Fatalf("stream %d holds %d, another is %d; before they were %d and %d", resumed.ID(), resumed.Held(), fresh.ID(), s.ID(), plain.ID())
	}
	mustPush(t, second, resumed, 6, 2)
	resumed.Close()
	fresh.Close()
	if err := second.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantReceived(t, second, map[uint64]uint64{s.ID(): 8, plain.ID(): 3})
	if held != 0 {
		t.Errorf("the first batch had number %d", held)
	}

	// What cannot be taken up is given back as it was.
	other := mustSpec(t, "other:U8")
	for name, tc := range map[string]struct {
		change func(*engine.Config)
		say    string
	}{
		"another spec":       {func(c *engine.Config) { c.Spec = other }, "another spec"},
		"another batch size": {func(c *engine.Config) { c.BatchSize = 2 }, "batch size 4 instead of 2"},
	} {
		bad := cfg
		tc.change(&bad)
		bad.Memory = func(int64) (engine.Memory, error) {
			m, err := again.make(0, 0)(int64(len(left)))
			copy(again.bytes, left)
			return m, err
		}
		again.closed = 0
		var mismatch *ring.MismatchError
		if _, err := engine.New(bad); !errors.As(err, &mismatch) || !strings.Contains(err.Error(), tc.say) || again.closed != 1 || !slices.Equal(again.bytes, left) {
			t.Errorf("%s: %v; closed %d times, changed %v", name, err, again.closed, !slices.Equal(again.bytes, left))
		}
	}
}

// TestConfiguredGroups: they are there from the start, with their policies; more than there is room for cannot be.
func TestConfiguredGroups(t *testing.T) {
	cfg := config(t, newPool(t))
	cfg.Groups = []sampler.GroupConfig{{Name: "eval", OnDeath: sampler.Drop, OnLag: sampler.Lose}}
	table := newTable(t, cfg)
	g := table.Stats().Sampler.Groups
	if len(g) != 1 || g[0].GroupConfig != cfg.Groups[0] || !g[0].Listed {
		t.Fatalf("%+v", g)
	}
	s := open(t, table)
	mustPush(t, table, s, 0, 4*20) // far more than 8 batches: the group loses what nobody reads
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := table.Stats().Sampler; st.Lost == 0 {
		t.Errorf("%+v", st)
	}
	cfg.Groups = append(cfg.Groups, cfg.Groups[0])
	if _, err := engine.New(cfg); err == nil {
		t.Error("a group that is listed twice was taken")
	}
}

// TestFullErrorNamesTheTrainer is TestFullErrorSaysWhy with somebody to blame.
func TestFullErrorNamesTheTrainer(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	tr, err := table.NewTrainerIn("g")
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, table)
	mustPush(t, table, s, 0, 4*8)
	if _, err := tr.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = s.Reserve(past(t), 1)
	var full *engine.FullError
	if !errors.As(err, &full) || full.Holder.Group != "g" || full.Holder.Batch != 0 || full.Holder.Idle || !strings.Contains(err.Error(), `of group "g"`) {
		t.Errorf("got %v", err)
	}
	tr.Close()
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestLenderInSession: a producer that writes in place and one that pushes have one session, one after the other.
func TestLenderInSession(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	taken := make(chan struct{})
	l, err := table.OpenLender(t.Context(), engine.StreamConfig{Session: "s", Taken: func() { close(taken) }})
	if err != nil {
		t.Fatal(err)
	}
	lease, place, ok := l.TryLend()
	if !ok {
		t.Fatal("no place")
	}
	fillPlace(table, place, l.ID(), 3)
	if _, err := l.Commit(lease, 3, 1); err != nil {
		t.Fatal(err)
	}
	if st := table.Stats(); len(st.Lenders) != 1 || st.Lenders[0].Session != "s" || st.Committed != 3 || st.Places["lent"] != 1 {
		t.Errorf("%+v", st)
	}
	go func() {
		<-taken
		_ = l.End(t.Context(), true)
		l.Free()
	}()
	s := openSession(t, table, "s", nil)
	if s.Held() != 3 || s.ID() != l.ID() {
		t.Fatalf("stream %d holds %d, want %d and 3", s.ID(), s.Held(), l.ID())
	}
	mustPush(t, table, s, 3, 2)
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := table.Stats(); st.Committed != 5 || st.Pushed != 5 || st.Opened != 2 || st.Taken != 1 {
		t.Errorf("%+v", st)
	}
	wantReceived(t, table, map[uint64]uint64{l.ID(): 5})
	if _, err := table.OpenLender(t.Context(), engine.StreamConfig{}); err == nil {
		t.Error("a closed table lends places")
	}
}
