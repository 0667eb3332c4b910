//go:build linux

package shm

import (
	"testing"
	"time"
)

// TestRowAgeIgnoresTheWallClock: a clock that was set back an hour would keep rows from being settled for an hour, one that was set forward would have each
// copied at once.
func TestRowAgeIgnoresTheWallClock(t *testing.T) {
	start := time.Now()
	for _, jump := range []time.Duration{0, -time.Hour, time.Hour} {
		var r rowAge
		arrival := start.Add(-jump).Round(0) // the clock was set by jump after the row had come
		for _, passed := range []time.Duration{0, 30 * time.Millisecond, 100 * time.Millisecond} {
			if age := r.age(arrival, start.Add(passed)); age != passed {
				t.Errorf("after a jump by %v: a row that has waited %v is said to have waited %v", jump, passed, age)
			}
		}
		if age := r.age(arrival.Add(1), start.Add(time.Second)); age != 0 {
			t.Errorf("after a jump by %v: the next row is said to have waited %v", jump, age)
		}
	}
}
