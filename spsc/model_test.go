package spsc

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

var seed = flag.Uint64("seed", 0, "seed of the model tests; 0 draws one")

func modelSeed(t *testing.T) *rand.Rand {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay: go test -run '^%s$' ./spsc -seed %d", t.Name(), s)
		}
	})
	return rand.New(rand.NewPCG(s, 0))
}

// queueOps is what both forms of the queue can do, as the model test sees them.
type queueOps struct {
	push func([]Desc) int
	pop  func([]Desc) int
	len  func() int
}

// TestModel plays random operations on a queue and on a plain slice, which must agree after each.
func TestModel(t *testing.T) {
	rnd := modelSeed(t)
	for _, capacity := range []int{2, 4, 8, 64} {
		q := New[Desc](capacity)
		_, p, c := sharedPair(t, capacity)
		for name, ops := range map[string]queueOps{
			"queue": {q.TryPush, q.TryPop, q.Len},
			"single": {func(d []Desc) int {
				if len(d) == 0 || !q.Put(d[0]) {
					return 0
				}
				return 1 + q.TryPush(d[1:])
			}, func(d []Desc) int {
				if len(d) == 0 {
					return 0
				}
				v, ok := q.Take()
				if !ok {
					return 0
				}
				d[0] = v
				return 1 + q.TryPop(d[1:])
			}, q.Len},
			"shared": {
				func(d []Desc) int { n, err := p.TryPush(d); check(t, err); return n },
				func(d []Desc) int { n, err := c.TryPop(d); check(t, err); return n },
				func() int { return int(p.at - c.at) },
			},
			"two-step": {
				func(d []Desc) int { n, err := p.TryPush(d); check(t, err); return n },
				func(d []Desc) int { return twoSteps(t, c, d, rnd.IntN(len(d)+1)) },
				func() int { taken, err := p.Taken(); check(t, err); return int(p.Pushed() - taken) },
			},
		} {
			t.Run(fmt.Sprintf("%s/%d", name, capacity), func(t *testing.T) { playModel(t, rnd, ops, capacity) })
		}
	}
}

// twoSteps takes what there is with two looks, split after at most first, and tells the producer in two parts.
func twoSteps(t *testing.T, c *Consumer, into []Desc, first int) int {
	a, err := c.Peek(into[:first])
	check(t, err)
	b, err := c.Peek(into[a:])
	check(t, err)
	c.Done(a)
	c.Done(b)
	return a + b
}

func check(t *testing.T, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

func playModel(t *testing.T, rnd *rand.Rand, ops queueOps, capacity int) {
	var model []Desc
	next := uint64(0)
	for step := range 3000 {
		if rnd.IntN(2) == 0 {
			items := make([]Desc, rnd.IntN(capacity+3))
			for i := range items {
				items[i] = Desc{next + uint64(i), rnd.Uint64()}
			}
			want := min(len(items), capacity-len(model))
			if got := ops.push(items); got != want {
				t.Fatalf("step %d: pushed %d of %d with %d held, want %d", step, got, len(items), len(model), want)
			}
			model = append(model, items[:want]...)
			next += uint64(want)
		} else {
			into := make([]Desc, rnd.IntN(capacity+3))
			want := min(len(into), len(model))
			if got := ops.pop(into); got != want || !slices.Equal(into[:got], model[:want]) {
				t.Fatalf("step %d: popped %v, want %v", step, into[:got], model[:want])
			}
			model = model[want:]
		}
		if got := ops.len(); got != len(model) {
			t.Fatalf("step %d: Len is %d, want %d", step, got, len(model))
		}
	}
	ops.pop(make([]Desc, capacity)) // leaves the queue empty for the next user
}
