package bench

import (
	"context"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// schedule is an open loop: sample i of a connection is due at start + i*interval, whatever happened to those before it.
type schedule struct {
	start    time.Time // CLOCK_REALTIME for the stamp, monotonic for the pace
	interval float64   // ns
}

// dueBy returns how many samples are due at now.
func (s *schedule) dueBy(now time.Time) uint64 {
	since := now.Sub(s.start)
	if since < 0 {
		return 0
	}
	return uint64(float64(since)/s.interval) + 1
}

// time of sample i, as nanoseconds after start.
func (s *schedule) offset(i uint64) int64 { return int64(float64(i) * s.interval) }

// startOpen makes every connection change to its share of the rate. The connections' samples are spread evenly over the interval.
func (s *sender) startOpen(rate float64) {
	interval := 1e9 * float64(len(s.conns)) / rate
	start := time.Now().Add(openLead)
	for i, c := range s.conns {
		c.open.Store(&schedule{start: start.Add(time.Duration(interval * float64(i) / float64(len(s.conns)))), interval: interval})
		c.ackEvent.Wake()
	}
}

// openLead lets what is still under way from the full-speed phase arrive first.
const openLead = 100 * time.Millisecond

// sendOpen follows the schedule from its start. All samples that are due go in one write, at most a buffer of them.
func (c *senderConn) sendOpen(ctx context.Context, plan *schedule) error {
	runtime.LockOSThread() // for the thread's timer slack
	defer runtime.UnlockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // else sleeps are 50 µs longer
	buf := append([]byte(nil), c.source...)
	epoch := plan.start.UnixNano()
	for done := uint64(0); ; {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		due := plan.dueBy(time.Now())
		if due <= done {
			sleepUntil(plan.start.Add(time.Duration(plan.offset(done))))
			continue
		}
		room, err := c.awaitRoom(ctx, 1)
		if err != nil {
			return err
		}
		n := min(due-done, room, c.perWrite)
		for i := range n {
			putStamp(buf[int(i)*c.sample:], uint64(epoch+plan.offset(done+i)))
		}
		if err := c.writeStamped(buf, n); err != nil {
			return err
		}
		done += n
	}
}

// writeStamped writes n samples whose stamps are in buf. A sample that is larger than buf goes on with unstamped bytes.
func (c *senderConn) writeStamped(buf []byte, n uint64) error {
	if c.sample <= len(buf) {
		return c.write(buf, n)
	}
	for range n {
		if _, err := c.conn.Write(buf); err != nil {
			return err
		}
		for left := c.sample - len(buf); left > 0; {
			k, err := c.conn.Write(c.source[:min(left, len(c.source))])
			if err != nil {
				return err
			}
			left -= k
		}
		c.sent++
	}
	return nil
}

// sleepUntil sleeps in the kernel: Go's own timers are only as fine as its poller, a millisecond when the process is idle.
func sleepUntil(t time.Time) {
	d := time.Until(t)
	if d <= 0 {
		return
	}
	ts := unix.NsecToTimespec(int64(min(d, 10*time.Millisecond))) // and look at the context now and then
	_ = unix.Nanosleep(&ts, nil)
}
