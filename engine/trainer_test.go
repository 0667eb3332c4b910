package engine_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ring"
)

// Every group gets every batch; what a trainer holds when it is closed goes to another of its group.
func TestTrainersInGroups(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	in := func(group string) *engine.Trainer {
		tr, err := table.NewTrainerIn(group)
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	next := func(tr *engine.Trainer, want uint64) ring.Batch {
		t.Helper()
		b, err := tr.Next(t.Context())
		if err == nil {
			err = check(table, b)
		}
		if err != nil || b.Number != want {
			t.Fatalf("batch %d, %v, want %d", b.Number, err, want)
		}
		return b
	}
	one, heir, other := table.NewTrainer(), in(engine.GroupDefault), in("other")
	s := open(t, table)
	mustPush(t, table, s, 0, 8) // two batches
	next(one, 0)
	next(one, 1) // several at once
	one.Close()
	one.Close()
	if _, err := one.Next(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v, want os.ErrClosed", err)
	}
	for n := range uint64(2) {
		heir.Release(next(heir, n))
		if st := table.Stats(); st.Places["leased"] != 2-int(n) {
			t.Errorf("places: %v", st.Places)
		}
		other.Release(next(other, n))
	}
	if st := table.Stats(); st.Places["leased"] != 0 {
		t.Errorf("places after both groups released: %v", st.Places)
	}
	s.Close()
	if err := table.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, tr := range []*engine.Trainer{heir, other} {
		if _, err := tr.Next(t.Context()); err != io.EOF {
			t.Errorf("at the end: %v, want io.EOF", err)
		}
		tr.Close()
	}
}

func TestTooManyGroups(t *testing.T) {
	table := newTable(t, config(t, newPool(t)))
	for n := range ring.GroupsMax {
		if _, err := table.NewTrainerIn(fmt.Sprint(n)); err != nil {
			t.Fatal(err)
		}
	}
	var full *ring.GroupsFullError
	if _, err := table.NewTrainerIn("one more"); !errors.As(err, &full) {
		t.Errorf("group 65: %v", err)
	}
	tr := table.NewTrainer() // whose group is one too many as well
	defer tr.Close()
	if _, err := tr.Next(t.Context()); !errors.As(err, &full) {
		t.Errorf("Next of a trainer without a group: %v", err)
	}
}
