package engine

import (
	"fmt"
	"time"

	"github.com/ingestd/ingestd/sampler"
)

// Holder returns whom the table's writers wait for, or would if the ring were full: the trainer that has held a batch for longest, else the group that nobody
// reads for; false where nothing is unread.
func (t *Table) Holder() (sampler.Holder, bool) { return t.sampler.Holder() }

// FullError says that the ring stayed full until the deadline, and why. It matches os.ErrDeadlineExceeded.
type FullError struct {
	Table  string
	Holder sampler.Holder // who is waited for; the zero value where nobody is to blame
	Err    error          // the deadline's
}

func (e *FullError) Error() string {
	return fmt.Sprintf("table %q: %s: %v", e.Table, RingFull(e.Holder, time.Now()), e.Err)
}

func (e *FullError) Unwrap() error { return e.Err }

// full makes a *FullError of a Reserve's end by its deadline.
func (t *Table) full(err error) error {
	h, _ := t.Holder()
	return &FullError{t.cfg.Name, h, err}
}

// RingFull says for a person why a ring is full, with what Holder returned.
func RingFull(h sampler.Holder, now time.Time) string {
	return "the ring is full, waiting for " + Blame(h, now)
}

// Blame names for a person whom a full ring waits for, with what Holder returned; the zero value is nobody.
func Blame(h sampler.Holder, now time.Time) string {
	held := now.Sub(h.Since).Round(time.Millisecond)
	switch {
	case h.Idle && h.Group == "":
		return "a trainer: none has come yet"
	case h.Idle:
		return fmt.Sprintf("a trainer of group %q: none has taken what is unread for %v", h.Group, held)
	case h == sampler.Holder{}:
		return "its trainers, of which none holds a batch just now"
	}
	if h.Trainer == 0 {
		return fmt.Sprintf("a trainer of this process, of group %q, which has held batch %d for %v", h.Group, h.Batch, held)
	}
	return fmt.Sprintf("trainer %d%s of group %q, which has held batch %d for %v", h.Trainer, whoIs(h), h.Group, h.Batch, held)
}

func whoIs(h sampler.Holder) string {
	switch {
	case h.Client != "" && h.PID != 0:
		return fmt.Sprintf(" (%s, pid %d)", h.Client, h.PID)
	case h.PID != 0:
		return fmt.Sprintf(" (pid %d)", h.PID)
	case h.Client != "":
		return fmt.Sprintf(" (%s)", h.Client)
	}
	return ""
}
