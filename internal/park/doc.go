// Package park lets a goroutine sleep until another one says that something changed, without polling and without allocating.
//
// It is the slow path under the lock-free structures: spsc and ring move cursors with atomics alone and come here only when there is
// nothing to do. The condition itself stays with the caller, who must test it again between Add and Wait:
//
//	for {
//		if v, ok := try(); ok {
//			return v, nil
//		}
//		ev.Add(w)
//		if v, ok := try(); ok { // the state may have changed before Add was seen
//			ev.Remove(w)
//			return v, nil
//		}
//		if err := w.Wait(ctx); err != nil {
//			ev.Remove(w)
//			return zero, err
//		}
//	}
//
// A wake that finds nobody costs one atomic load. Any goroutine may call Wake; a Waiter belongs to one goroutine at a time. Wait
// returns the context's error, wrapped so that a deadline also matches os.ErrDeadlineExceeded. Nothing here panics but adding one Waiter twice.
package park
