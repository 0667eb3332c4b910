package spsc

import (
	"context"
	"io"
	"os"
	"runtime"
)

// How long a blocking call tries before it parks. Measured with BenchmarkTwins on a 2-core guest: 1,024 turns of pause take about
// 0.35 µs; with 512 or fewer a single element costs 14 to 38 ns instead of 11 when the consumer is the faster side, with 2,048 no
// less. A Gosched costs 0.11 µs, a park and its wake 0.2 µs when both goroutines share a thread and 27 to 41 µs when an idle core
// must be woken. So the spin bridges a partner that is between two elements, the yields one that waits for this very processor, and
// both together (under 5 µs) stay far below the dearer wake and cost little where the partner is slow.
const (
	spinTries  = 8
	yieldTries = 16
	pauseTurns = 1024
)

// Push pushes all of items, waiting for room. After an error some of them may be in the queue: use PushSome where that matters.
func (q *Queue[T]) Push(ctx context.Context, items []T) error {
	for len(items) > 0 {
		n, err := q.PushSome(ctx, items)
		if err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// PushSome waits until there is room for at least one of items and pushes as many as there is room for then. The error is
// os.ErrClosed after Close, or the context's; nothing was pushed when there is one.
func (q *Queue[T]) PushSome(ctx context.Context, items []T) (int, error) {
	if len(items) == 0 {
		return 0, nil
	}
	for try := 0; ; try++ {
		if n := q.TryPush(items); n > 0 {
			return n, nil
		}
		if q.closed.Load() {
			return 0, os.ErrClosed
		}
		if again(ctx, try) {
			continue
		}
		q.popped.Add(q.pushSeat)
		if n := q.TryPush(items); n > 0 || q.closed.Load() {
			q.popped.Remove(q.pushSeat)
			if n > 0 {
				return n, nil
			}
			return 0, os.ErrClosed
		}
		if err := q.pushSeat.Wait(ctx); err != nil {
			q.popped.Remove(q.pushSeat)
			return 0, err
		}
	}
}

// Pop waits until there is at least one element and takes up to len(into). The error is io.EOF when the queue is closed and empty,
// or the context's.
func (q *Queue[T]) Pop(ctx context.Context, into []T) (int, error) {
	if len(into) == 0 {
		return 0, nil
	}
	for try := 0; ; try++ {
		n, err := q.popOrEnd(into)
		if n > 0 || err != nil {
			return n, err
		}
		if again(ctx, try) {
			continue
		}
		q.pushed.Add(q.popSeat)
		if n, err := q.popOrEnd(into); n > 0 || err != nil {
			q.pushed.Remove(q.popSeat)
			return n, err
		}
		if err := q.popSeat.Wait(ctx); err != nil {
			q.pushed.Remove(q.popSeat)
			return 0, err
		}
	}
}

// popOrEnd reads closed before it looks for elements: the other way round it could miss the last ones.
func (q *Queue[T]) popOrEnd(into []T) (int, error) {
	closed := q.Closed()
	if n := q.TryPop(into); n > 0 {
		return n, nil
	}
	if closed {
		return 0, io.EOF
	}
	return 0, nil
}

// again reports whether the caller should try once more before it parks. A context that has ended goes straight to Wait, which says
// so; it is looked at only after the spin.
func again(ctx context.Context, try int) bool {
	if try < spins {
		pause()
		return true
	}
	if try >= spins+yieldTries || ctx.Err() != nil {
		return false
	}
	runtime.Gosched()
	return true
}

// spins is 0 where a spin could only keep the other side from running.
var spins = func() int {
	if runtime.GOMAXPROCS(0) == 1 {
		return 0
	}
	return spinTries
}()

// pause passes some time without touching a cache line that the other side writes. Without it a consumer that is faster than its
// producer takes the produced cursor's line away from it at every element, and both run at the speed of that line's travel.
func pause() {
	for range pauseTurns {
	}
}
