package spsc

import (
	"fmt"
	"io"
	"runtime"
	"testing"
)

// The smallest queues wrap at every other element. Elements carry more than one word, so that a torn one would show, and the race
// detector sees every slot and cursor, since all of it lies on the heap.
func TestTwoGoroutines(t *testing.T) {
	const elements = 20000
	for _, capacity := range []int{2, 4, 64} {
		for _, batch := range []int{1, 3, 32} {
			t.Run(fmt.Sprintf("queue/%d/%d", capacity, batch), func(t *testing.T) { runQueue(t, capacity, batch, elements) })
			t.Run(fmt.Sprintf("shared/%d/%d", capacity, batch), func(t *testing.T) { runShared(t, capacity, batch, elements) })
		}
	}
}

func element(i uint64) Desc { return Desc{A: i, B: ^i * 0x9E3779B97F4A7C15} }

// expect checks that got continues the sequence at next and returns where it ends.
func expect(got []Desc, next uint64) (uint64, error) {
	for _, d := range got {
		if d != element(next) {
			return next, fmt.Errorf("element %d is %x, want %x", next, d, element(next))
		}
		next++
	}
	return next, nil
}

func runQueue(t *testing.T, capacity, batch int, elements uint64) {
	q := New[Desc](capacity)
	go func() {
		defer q.Close()
		items := make([]Desc, 0, batch)
		for i := uint64(0); i < elements; {
			items = items[:0]
			for len(items) < batch && i < elements {
				items = append(items, element(i))
				i++
			}
			if batch == 1 && q.Put(items[0]) {
				continue
			}
			if err := q.Push(t.Context(), items); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	into := make([]Desc, batch)
	next := uint64(0)
	for {
		n, err := q.Pop(t.Context(), into)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if next, err = expect(into[:n], next); err != nil {
			t.Fatal(err)
		}
		if q.Len() > capacity {
			t.Fatalf("Len is %d of %d", q.Len(), capacity)
		}
	}
	if next != elements {
		t.Fatalf("got %d elements, want %d", next, elements)
	}
}

func runShared(t *testing.T, capacity, batch int, elements uint64) {
	_, p, c := sharedPair(t, capacity)
	failed := make(chan error, 1)
	go func() {
		failed <- func() error {
			items := make([]Desc, 0, batch)
			for i := uint64(0); i < elements; {
				for at := i + uint64(len(items)); len(items) < batch && at < elements; at++ {
					items = append(items, element(at))
				}
				n, err := p.TryPush(items)
				if err != nil {
					return err
				}
				if n == 0 {
					runtime.Gosched()
				}
				i += uint64(n)
				items = append(items[:0], items[n:]...)
			}
			p.Close()
			return nil
		}()
	}()
	into := make([]Desc, batch)
	next := uint64(0)
	for {
		closed := c.Closed()
		n, err := c.TryPop(into)
		if err != nil {
			t.Fatal(err)
		}
		if next, err = expect(into[:n], next); err != nil {
			t.Fatal(err)
		}
		if n == 0 && closed {
			break
		}
		if n == 0 {
			runtime.Gosched()
		}
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	if next != elements {
		t.Fatalf("got %d elements, want %d", next, elements)
	}
}
