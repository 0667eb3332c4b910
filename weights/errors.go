package weights

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// Who is a publisher or reader, for messages and the status page.
type Who struct {
	Client string // what it calls itself
	PID    int    // 0 where it is not known
	Remote bool   // over the network, or streamed; else it maps the memory
	Addr   string // of a remote one
}

// String names it for a person.
func (w Who) String() string {
	text := w.Client
	if text == "" {
		text = "unnamed"
	}
	if w.PID != 0 {
		text += fmt.Sprintf(" (process %d)", w.PID)
	} else if w.Addr != "" {
		text += " at " + w.Addr
	}
	return text
}

// Pin says that a reader holds a generation.
type Pin struct {
	Reader     uint64
	Who        Who
	Generation uint64
	Place      int
	Since      time.Time // when the daemon first saw it: the reader writes no time
}

func (p Pin) String() string {
	return fmt.Sprintf("generation %d by reader %d, %s, since %s", p.Generation, p.Reader, p.Who, p.Since.Format(time.RFC3339))
}

// ActiveError says that the table has a publisher already.
type ActiveError struct {
	Publisher uint64
	Who       Who
	Since     time.Time
}

func (e *ActiveError) Error() string {
	return fmt.Sprintf("publisher %d, %s, has the table since %s: one publishes at a time; end it, or try again when it has ended",
		e.Publisher, e.Who, e.Since.Format(time.RFC3339))
}

// PinnedError says that every place but the newest generation's is pinned by readers.
type PinnedError struct {
	Places int
	Pins   []Pin // all of those places, oldest generation first; empty: not known
	Cause  error // why the wait ended; nil: nobody waited
}

func (e *PinnedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "readers pin all that the %d places hold beside the newest generation:", e.Places)
	const named = 8
	for i, p := range e.Pins[:min(len(e.Pins), named)] {
		if i > 0 {
			b.WriteString(";")
		}
		fmt.Fprintf(&b, " %s", p)
	}
	if more := len(e.Pins) - named; more > 0 {
		fmt.Fprintf(&b, "; and %d more", more)
	}
	b.WriteString("; let them release it, or give the table more generations")
	return b.String()
}

func (e *PinnedError) Unwrap() error { return e.Cause }

// OldGenerationError says that a publisher asked for a number that is not above the newest.
type OldGenerationError struct {
	Wanted, Newest uint64
}

func (e *OldGenerationError) Error() string {
	if e.Wanted > GenerationMax || e.Newest >= GenerationMax {
		return fmt.Sprintf("generation %d cannot follow generation %d: the last number is %d", e.Wanted, e.Newest, uint64(GenerationMax))
	}
	return fmt.Sprintf("generation %d is not above the newest, which is %d: generations only grow", e.Wanted, e.Newest)
}

// CapacityError says that a manifest needs more memory than the table may have.
type CapacityError struct {
	Bytes, Capacity int64 // of the whole segment
	DataBytes       int64 // of one generation
	Places          int
}

func (e *CapacityError) Error() string {
	return fmt.Sprintf("%d generations of %d bytes need a segment of %d bytes, and the table's capacity is %d: raise it, or keep fewer generations",
		e.Places, e.DataBytes, e.Bytes, e.Capacity)
}

// IncompleteError says that a commit came before all of a generation had come.
type IncompleteError struct {
	Generation uint64
	Tensor     string // the first that is not whole
	Missing    int    // how many tensors are not
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("generation %d is not whole: %d tensors are missing or incomplete, the first is %q", e.Generation, e.Missing, e.Tensor)
}

// NoGenerationError says that nothing was published yet.
type NoGenerationError struct{ Table string }

func (e *NoGenerationError) Error() string {
	return fmt.Sprintf("nothing was published to table %q yet: publish to it, or ask to wait", e.Table)
}

// ReplacedError says that a publisher with another manifest has begun another segment: what a reader holds stays as it is, newer generations are
// found by a reader that is opened anew.
type ReplacedError struct{ Table string }

func (e *ReplacedError) Error() string {
	return fmt.Sprintf("table %q has generations of another manifest now: attach again", e.Table)
}

// TooManyReadersError says that no more readers are taken.
type TooManyReadersError struct{ Readers int }

func (e *TooManyReadersError) Error() string {
	return fmt.Sprintf("%d readers are attached, which is this table's limit: end one or raise the limit", e.Readers)
}

// ErrNotBegun is returned for what needs a place that Begin gave.
var ErrNotBegun = errors.New("weights: no generation was begun")

// ErrBegun is returned by Begin when there is one under way.
var ErrBegun = errors.New("weights: a generation is under way: commit or abort it first")

var errClosed = fmt.Errorf("weights: %w", os.ErrClosed)
