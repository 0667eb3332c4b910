package spsc

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/internal/park"
)

func TestNewRefusesBadCapacities(t *testing.T) {
	for _, c := range []int{-2, 0, 1, 3, 6, 1023, CapacityMax + 1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("New(%d) did not panic", c)
				}
			}()
			New[byte](c)
		}()
	}
	for _, c := range []int{2, 4, 1024} {
		if got := New[byte](c).Cap(); got != c {
			t.Errorf("New(%d).Cap() = %d", c, got)
		}
	}
}

func TestFullAndEmpty(t *testing.T) {
	q := New[int](4)
	if _, ok := q.Take(); ok {
		t.Fatal("took from an empty queue")
	}
	for round := range 10 { // every position of the wrap
		if n := q.TryPush([]int{1, 2, 3, 4, 5}); n != 4 {
			t.Fatalf("round %d: pushed %d into a queue of 4, want 4", round, n)
		}
		if q.Put(6) || q.TryPush([]int{6}) != 0 || q.Len() != 4 {
			t.Fatalf("round %d: a full queue took one more, or Len is %d", round, q.Len())
		}
		if v, ok := q.Take(); !ok || v != 1 {
			t.Fatalf("round %d: Take = %d, %v, want 1", round, v, ok)
		}
		if !q.Put(7) {
			t.Fatalf("round %d: no room after a Take", round)
		}
		got := make([]int, 9)
		if n := q.TryPop(got); n != 4 || !slices.Equal(got[:n], []int{2, 3, 4, 7}) {
			t.Fatalf("round %d: popped %v", round, got[:n])
		}
		if n := q.TryPop(got); n != 0 || q.Len() != 0 {
			t.Fatalf("round %d: an empty queue gave %d", round, n)
		}
		if !q.Put(9) {
			t.Fatal("no room in an empty queue")
		}
		if v, _ := q.Take(); v != 9 {
			t.Fatalf("round %d: Take = %d, want 9", round, v)
		}
	}
	if q.TryPush(nil) != 0 || q.TryPop(nil) != 0 {
		t.Fatal("empty slices moved something")
	}
	if n, err := q.Pop(t.Context(), nil); n != 0 || err != nil {
		t.Fatalf("Pop into nothing = %d, %v, want 0 and no wait", n, err)
	}
	if n, err := q.PushSome(t.Context(), nil); n != 0 || err != nil {
		t.Fatalf("PushSome of nothing = %d, %v, want 0 and no wait", n, err)
	}
}

func TestClose(t *testing.T) {
	q := New[int](4)
	q.TryPush([]int{1, 2})
	q.Close()
	q.Close()
	if q.Put(3) || q.TryPush([]int{3}) != 0 {
		t.Fatal("a closed queue took an element")
	}
	if err := q.Push(t.Context(), []int{3}); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("Push after Close: %v, want os.ErrClosed", err)
	}
	into := make([]int, 1)
	for want := 1; want <= 2; want++ {
		if n, err := q.Pop(t.Context(), into); n != 1 || err != nil || into[0] != want {
			t.Fatalf("Pop after Close = %d %v %v, want what was pushed before", into[0], n, err)
		}
	}
	if _, err := q.Pop(t.Context(), into); err != io.EOF {
		t.Fatalf("Pop of a closed and empty queue: %v, want io.EOF", err)
	}
}

// The three ends of a wait: its deadline, Close, and the element itself.
func TestBlockedCallsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := New[int](2)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := q.Pop(ctx, make([]int, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Pop past its deadline: %v", err)
		}
		q.TryPush([]int{1, 2})
		ctx, cancel = context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := q.Push(ctx, []int{3}); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Push past its deadline: %v", err)
		}
		pushed := make(chan error)
		go func() { pushed <- q.Push(t.Context(), []int{3, 4, 5}) }()
		synctest.Wait() // the producer is parked
		got := make([]int, 0, 5)
		for len(got) < 5 {
			into := make([]int, 2)
			n, err := q.Pop(t.Context(), into)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, into[:n]...)
		}
		if err := <-pushed; err != nil || !slices.Equal(got, []int{1, 2, 3, 4, 5}) {
			t.Fatalf("got %v, %v", got, err)
		}
		popped := make(chan error)
		go func() { _, err := q.Pop(t.Context(), make([]int, 1)); popped <- err }()
		synctest.Wait() // the consumer is parked
		q.Close()
		if err := <-popped; err != io.EOF {
			t.Fatalf("parked Pop at Close: %v, want io.EOF", err)
		}

		full := New[int](2)
		full.TryPush([]int{1, 2})
		go func() { pushed <- full.Push(t.Context(), []int{3}) }()
		synctest.Wait()
		full.Close()
		if err := <-pushed; !errors.Is(err, os.ErrClosed) {
			t.Fatalf("parked Push at Close: %v, want os.ErrClosed", err)
		}
		cancelled, stop := context.WithCancelCause(t.Context())
		why := errors.New("the reason")
		stop(why)
		if _, err := New[int](2).Pop(cancelled, make([]int, 1)); !errors.Is(err, why) {
			t.Fatalf("Pop with an ended context: %v, want its cause", err)
		}
	})
}

func TestNotifyPush(t *testing.T) {
	q := New[int](4)
	var ev park.Event
	w := park.NewWaiter()
	for name, act := range map[string]func(){
		"NotifyPush": func() { q.NotifyPush(&ev) },
		"Put":        func() { q.NotifyPush(&ev); ev.Add(w); q.Put(1) },
		"TryPush":    func() { ev.Add(w); q.TryPush([]int{1}) },
		"Close":      func() { ev.Add(w); q.Close() },
	} {
		q = New[int](4)
		if name == "NotifyPush" {
			ev.Add(w)
		} else {
			q.NotifyPush(&ev)
		}
		act()
		if ev.Waiting() != 0 {
			t.Errorf("%s did not wake the event", name)
			ev.Remove(w)
		}
	}
	q = New[int](4)
	q.NotifyPush(&ev)
	q.NotifyPush(nil)
	ev.Add(w)
	q.Put(1)
	if ev.Waiting() != 1 {
		t.Error("a push woke an event that was taken off")
	}
	ev.Remove(w)
}

func TestElementsAreForgotten(t *testing.T) {
	q := New[*[1 << 16]byte](4)
	freed := make(chan struct{}, 2)
	for range 2 {
		p := new([1 << 16]byte)
		runtime.AddCleanup(p, func(c chan struct{}) { c <- struct{}{} }, freed)
		q.Put(p)
	}
	q.Take()
	q.TryPop(make([]*[1 << 16]byte, 1))
	for n := 0; n < 2; {
		runtime.GC()
		select {
		case <-freed:
			n++
		default:
		}
	}
	runtime.KeepAlive(q)
}

func TestHoldsPointers(t *testing.T) {
	type plain struct {
		_ [3]uint32
		_ struct{ _ float64 }
	}
	if New[plain](2).scrub || New[Desc](2).scrub || New[[0]*int](2).scrub {
		t.Error("a plain type is said to hold pointers")
	}
	if !New[string](2).scrub || !New[struct{ _ [2][]byte }](2).scrub || !New[any](2).scrub || !New[func()](2).scrub {
		t.Error("a type with pointers is said to hold none")
	}
}

func TestSharedLimits(t *testing.T) {
	mem := make([]byte, SharedBytes(8))
	for _, c := range []int{-1, 0, 1, 3, 7, SharedCapacityMax + 1, SharedCapacityMax * 2} {
		if err := FormatShared(mem, c); err == nil || !strings.Contains(err.Error(), "power of two") {
			t.Errorf("FormatShared with capacity %d: %v", c, err)
		}
	}
	if err := FormatShared(mem, 16); err == nil || !strings.Contains(err.Error(), "needs 512 bytes, got 384") {
		t.Errorf("FormatShared in too little memory: %v", err)
	}
	if _, err := NewProducer(mem[:len(mem)-1], 8); err == nil {
		t.Error("NewProducer took memory that is one byte short")
	}
	if _, err := NewConsumer(mem[1:], 4); err == nil || !strings.Contains(err.Error(), "multiple of 8") {
		t.Errorf("NewConsumer on unaligned memory: %v", err)
	}
	if err := FormatShared(make([]byte, SharedBytes(SharedCapacityMax)), SharedCapacityMax); err != nil {
		t.Error(err)
	}
}

func sharedPair(t testing.TB, capacity int) ([]byte, *Producer, *Consumer) {
	t.Helper()
	mem := make([]byte, SharedBytes(capacity))
	for i := range mem {
		mem[i] = 0xAA
	}
	if err := FormatShared(mem, capacity); err != nil {
		t.Fatal(err)
	}
	p, err := NewProducer(mem, capacity)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewConsumer(mem, capacity)
	if err != nil {
		t.Fatal(err)
	}
	return mem, p, c
}

func TestSharedHostileCursors(t *testing.T) {
	full := []Desc{{1, 1}, {2, 2}, {3, 3}, {4, 4}}
	for _, test := range []struct {
		name    string
		word    string
		value   uint64
		corrupt bool
	}{
		{"one more than fits", "produced", 7, true},
		{"what just fits", "produced", 6, false},
		{"went back", "produced", 1, true},
		{"far off", "produced", 1 << 63, true},
		{"the largest", "produced", ^uint64(0), true},
		{"more taken than pushed", "consumed", 6, true},
		{"all taken", "consumed", 5, false},
		{"one taken", "consumed", 2, false},
		{"went back", "consumed", 0, true},
		{"the largest", "consumed", ^uint64(0), true},
	} {
		_, p, c := sharedPair(t, 4)
		into := make([]Desc, 4)
		// For "produced" two were pushed and taken; for "consumed" five were pushed and the producer has seen one of them taken.
		p.TryPush(full[:2])
		var err error
		if test.word == "produced" {
			c.TryPop(into[:2])
			c.produced.Store(test.value)
			_, err = c.TryPop(into)
		} else {
			p.consumed.Store(1)
			p.TryPush(full[:4]) // looks at the cursor and fills the queue
			if p.Pushed() != 5 {
				t.Fatalf("pushed %d, want 5", p.Pushed())
			}
			p.consumed.Store(test.value)
			_, err = p.TryPush(full[:1])
		}
		var corrupt *CorruptError
		if errors.As(err, &corrupt) != test.corrupt {
			t.Errorf("%s %s: %v", test.word, test.name, err)
		} else if test.corrupt && (corrupt.Word != test.word || !strings.Contains(err.Error(), "end this peer")) {
			t.Errorf("%s %s: %v", test.word, test.name, err)
		}
	}
}

func TestSharedWaitingAndClose(t *testing.T) {
	_, p, c := sharedPair(t, 2)
	if p.ConsumerWaiting() || c.Closed() {
		t.Fatal("a new queue has a waiting consumer or is closed")
	}
	c.SetWaiting(true)
	if !p.ConsumerWaiting() {
		t.Fatal("the consumer's waiting is not seen")
	}
	c.SetWaiting(false)
	if p.ConsumerWaiting() {
		t.Fatal("the end of the consumer's waiting is not seen")
	}
	p.Close()
	if !c.Closed() {
		t.Fatal("Close is not seen")
	}
}

// What was looked at and not done still takes its slot: the producer gets no room for it, and its word says so.
func TestLookedAtIsNotTaken(t *testing.T) {
	_, p, c := sharedPair(t, 4)
	push := func(want int) {
		t.Helper()
		n, err := p.TryPush(make([]Desc, 5))
		if err != nil || n != want {
			t.Fatalf("pushed %d, %v, want %d", n, err, want)
		}
	}
	taken := func(want uint64) {
		t.Helper()
		n, err := p.Taken()
		if err != nil || n != want {
			t.Fatalf("taken: %d, %v, want %d", n, err, want)
		}
	}
	push(4)
	into := make([]Desc, 3)
	for _, want := range []int{3, 1, 0} {
		if n, err := c.Peek(into); n != want || err != nil {
			t.Fatalf("looked at %d, %v, want %d", n, err, want)
		}
	}
	taken(0)
	push(0)
	c.Done(3)
	taken(3)
	push(3)
	c.Done(1)
	push(1)
	if n, err := c.Peek(into); n != 3 || err != nil {
		t.Fatalf("looked at %d, %v, want 3", n, err)
	}
	for _, n := range []int{-1, 4} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Done(%d) of 3 looked at did not panic", n)
				}
			}()
			c.Done(n)
		}()
	}
	p.produced.Store(p.at + 1) // one more than there is room for
	if _, err := c.Peek(make([]Desc, 9)); err == nil {
		t.Fatal("a producer that went over the queue's end was believed")
	}
	for _, at := range []uint64{p.at + 1, 0} { // ahead of what was pushed, and back
		p.consumed.Store(at)
		var corrupt *CorruptError
		if _, err := p.Taken(); !errors.As(err, &corrupt) || corrupt.Word != "consumed" || corrupt.Got != at {
			t.Fatalf("consumed reads %d: %v", at, err)
		}
	}
}
