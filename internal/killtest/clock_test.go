package killtest

import (
	"errors"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
)

// TestClockJumps: sessions are the one thing that outlives a daemon and is told by the wall clock. When it jumps, none that is open or was seen of late is forgotten for
// another, and no count changes.
func TestClockJumps(t *testing.T) {
	const ttl = time.Hour
	layout := ring.Layout{BatchSize: 2, Batches: 2, Columns: []int64{8}, Sessions: 2}
	size, err := layout.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for _, jump := range []time.Duration{-24 * time.Hour, -time.Minute, 0, time.Minute, ttl - 1, ttl, 24 * time.Hour} {
		r, err := ring.Format(ring.AlignedBytes(size), layout)
		if err != nil {
			t.Fatal(err)
		}
		open, err := r.OpenSession("open", now, ttl)
		if err != nil {
			t.Fatal(err)
		}
		closed, err := r.OpenSession("closed", now, ttl)
		if err != nil {
			t.Fatal(err)
		}
		run, _ := r.TryReserve(1)
		r.Commit(run, open.Stream(), 0, 1, open.Mark(1))
		closed.Close(now)
		_, err = r.OpenSession("new", now.Add(jump), ttl)
		var full *ring.SessionsFullError
		if old := jump >= ttl; old && err != nil || !old && !errors.As(err, &full) {
			t.Errorf("a new session, the clock set by %v: %v", jump, err)
		}
		if open.Name() != "open" || open.Held() != 1 {
			t.Errorf("the clock set by %v: session %q holds %d", jump, open.Name(), open.Held())
		}
	}
}
