package tcpingest

import (
	"sync"
	"time"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/wire"
)

// When a stream that waits for a free slot is looked after.
const (
	watchAfter = 50 * time.Millisecond // the first time
	watchEvery = time.Second           // again; and a producer gets no two notes within it
)

// watch looks after a connection while its goroutine waits for a free slot and reads nothing: it writes notes to a peer that wants them, and ends the wait of
// one that is gone. It runs on a timer's goroutine.
type watch struct {
	table ingest.Table // nil: the peer wants no notes
	timer *time.Timer  // the session's own

	mu    sync.Mutex
	since time.Time // when the wait began; zero: it does not wait, and nothing below is the watch's
	noted time.Time // when the last note was written
	rest  []byte    // what the connection did not take of a note; nothing else may be written before
}

// startWatch is called by the connection's goroutine before it waits for a slot, stopWatch after it.
func (c *conn) startWatch() {
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = time.Now()
	if w.timer == nil {
		w.timer = time.AfterFunc(watchAfter, c.lookAfter)
	} else {
		w.timer.Reset(watchAfter)
	}
}

func (c *conn) stopWatch() {
	w := &c.watch
	w.timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = time.Time{}
}

func (c *conn) lookAfter() {
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.since.IsZero() {
		return
	}
	now := time.Now()
	if waited := now.Sub(w.since); waited < watchAfter { // fired for the wait before
		w.timer.Reset(watchAfter - waited)
		return
	}
	if c.from.hungUp() {
		c.gone.Store(true)
		c.endWait()
		return
	}
	next := watchEvery
	if w.table != nil {
		if age := now.Sub(w.noted); age < watchEvery {
			next = watchEvery - age
		} else {
			c.note(now)
		}
	}
	w.timer.Reset(next)
}

// note offers the peer a note, but does not wait for room: who does not read would not read it.
func (c *conn) note(now time.Time) {
	w := &c.watch
	whole := len(w.rest) == 0
	if whole {
		w.rest = wire.AppendNote(w.rest, ingest.RingFull(w.table, w.since, now))
	}
	sent := c.from.offer(w.rest)
	if whole && sent == 0 {
		w.rest = nil
		return
	}
	if whole {
		w.noted = now
		c.server.counters.Notes.Add(1)
	}
	w.rest = w.rest[sent:]
}

// finishNote writes what the connection did not take of the last note. The connection's goroutine calls it before it writes anything, while it does not wait for a
// slot.
func (c *conn) finishNote() error {
	for len(c.watch.rest) > 0 {
		n, err := c.Write(c.watch.rest)
		c.watch.rest = c.watch.rest[n:]
		if err != nil {
			return err
		}
	}
	return nil
}
