package spsc

import (
	"testing"

	"github.com/ingestd/ingestd/internal/park"
)

// noAllocations fails the test if f allocates once it has been warmed up.
func noAllocations(t *testing.T, what string, f func()) {
	t.Helper()
	if n := testing.AllocsPerRun(1000, f); n != 0 {
		t.Errorf("%s: %v allocations, want 0", what, n)
	}
}

func TestNoAllocations(t *testing.T) {
	q := New[*int](8)
	var ev park.Event
	q.NotifyPush(&ev)
	items, into := make([]*int, 5), make([]*int, 5)
	noAllocations(t, "Put and Take", func() { q.Put(items[0]); q.Take() })
	noAllocations(t, "TryPush and TryPop", func() { q.TryPush(items); q.TryPop(into) })
	ctx := t.Context()
	noAllocations(t, "Push and Pop", func() {
		if q.Push(ctx, items) != nil {
			t.Error("Push failed")
		}
		if _, err := q.Pop(ctx, into); err != nil {
			t.Error(err)
		}
	})
	_, p, c := sharedPair(t, 8)
	descs := make([]Desc, 5)
	noAllocations(t, "shared", func() {
		p.TryPush(descs)
		p.ConsumerWaiting()
		c.SetWaiting(true)
		c.TryPop(descs)
		c.SetWaiting(false)
	})

	// Both sides park again and again: the answer comes only after the question was taken.
	ask, answer := New[int](2), New[int](2)
	go func() {
		one := make([]int, 1)
		for {
			if _, err := ask.Pop(ctx, one); err != nil {
				return
			}
			if answer.Push(ctx, one) != nil {
				return
			}
		}
	}()
	one := make([]int, 1)
	noAllocations(t, "parking", func() {
		if ask.Push(ctx, one) != nil {
			t.Error("Push failed")
		}
		if _, err := answer.Pop(ctx, one); err != nil {
			t.Error(err)
		}
	})
	ask.Close()
}
