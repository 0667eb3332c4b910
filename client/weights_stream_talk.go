package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// PinnedError is a publisher's deadline that passed while readers pinned all places of the table. Begin may be called again. It is os.ErrDeadlineExceeded.
type PinnedError struct {
	Pins   []weights.Pin // who pins, oldest generation first; at most 16
	Reason string        // the daemon's words
	ctx    error
}

func (e *PinnedError) Error() string {
	if e.Reason != "" {
		return "client: publish: " + e.Reason
	}
	var who []string
	for _, p := range e.Pins {
		who = append(who, p.String())
	}
	return fmt.Sprintf("client: publish: readers pin all places but the newest generation's: %s: let them release it, or give the table more generations", strings.Join(who, "; "))
}

// Timeout is true, as net.Error has it for deadlines.
func (e *PinnedError) Timeout() bool { return true }

func (e *PinnedError) Unwrap() []error {
	if e.ctx != nil {
		return []error{os.ErrDeadlineExceeded, e.ctx}
	}
	return []error{os.ErrDeadlineExceeded}
}

// FailedError is what else the daemon says no to: an old generation's number, a commit of what is not whole. Begin may be called again.
type FailedError struct {
	Code       weights.Failure
	Generation uint64 // that was to be begun or published; 0: any
	Reason     string // the daemon's words
}

func (e *FailedError) Error() string { return fmt.Sprintf("client: publish (%s): %s", e.Code, e.Reason) }

// talk is what a publisher says, in place or streamed, and hears. When a call returns an error that is neither a *PinnedError nor a *FailedError, the connection is of no
// more use: nobody knows what the daemon has understood.
type talk struct {
	conn  net.Conn
	table string
}

// answerGrace is how much later than a deadline the daemon's answer may be, which says who it waited for.
const answerGrace = time.Second

// beginAgain is how long one begin waits where the caller's context has no deadline.
const beginAgain = time.Hour

// begin takes a place for generation want, or for the next one if that is 0; until ctx ends it waits while readers pin all.
func (t *talk) begin(ctx context.Context, want uint64) (generation uint64, place int, err error) {
	for {
		wait := beginAgain
		deadline, limited := ctx.Deadline()
		if limited {
			wait = max(0, time.Until(deadline))
		}
		a, pins, err := t.ask(ctx, &weights.Ask{Op: weights.OpBegin, DeadlineMS: wait.Milliseconds(), Generation: want}, weights.OpPlace)
		switch {
		case err != nil && len(pins) > 0 && timeout(ctx):
			return 0, 0, &PinnedError{Pins: pins, ctx: ctx.Err()}
		case err != nil:
			return 0, 0, err
		case a.Op == weights.OpPlace && a.Generation > 0:
			return a.Generation, a.Place, nil
		case a.Op == weights.OpPlace:
			return 0, 0, fmt.Errorf("%w: generation 0 was begun", wire.ErrProtocol)
		case a.Code != string(weights.FailedPinned):
			return 0, 0, &FailedError{weights.Failure(a.Code), want, a.Reason}
		case limited:
			return 0, 0, &PinnedError{pinsOf(a.Pins), a.Reason, ctx.Err()}
		}
	}
}

// commit publishes the generation that was begun.
func (t *talk) commit(ctx context.Context, generation uint64) (spec.Fingerprint, error) {
	a, _, err := t.ask(ctx, &weights.Ask{Op: weights.OpCommit, Generation: generation}, weights.OpPublished)
	switch {
	case err != nil:
		return spec.Fingerprint{}, err
	case a.Op == weights.OpFailed:
		return spec.Fingerprint{}, &FailedError{weights.Failure(a.Code), generation, a.Reason}
	case a.Generation != generation:
		return spec.Fingerprint{}, fmt.Errorf("%w: generation %d was published, and %d was to be", wire.ErrProtocol, a.Generation, generation)
	}
	return a.Digest, nil
}

// abort gives the place back.
func (t *talk) abort(ctx context.Context) error {
	_, _, err := t.ask(ctx, &weights.Ask{Op: weights.OpAbort}, weights.OpAborted)
	return err
}

// ask says something and reads the answer, which is of the kind wanted or, unless that is OpAborted, OpFailed. pins are those that the daemon named while it waited.
func (t *talk) ask(ctx context.Context, ask *weights.Ask, want string) (a *weights.Answer, pins []weights.Pin, err error) {
	if ctx.Err() != nil {
		return nil, nil, &waitError{ctx, "client: publish: " + ask.Op}
	}
	text, err := wire.AppendMessage(nil, ask, wire.MessageBytesMax)
	if err != nil {
		return nil, nil, err
	}
	_ = t.conn.SetDeadline(time.Time{})
	var limited context.Context
	cancel := func() {}
	if deadline, ok := ctx.Deadline(); ok && want == weights.OpPlace { // the daemon keeps the deadline, and says who it waited for
		limited, cancel = context.WithDeadline(context.WithoutCancel(ctx), deadline.Add(answerGrace))
		defer context.AfterFunc(ctx, func() {
			if !timeout(ctx) {
				cancel()
			}
		})()
	} else {
		limited, cancel = context.WithCancel(ctx)
	}
	defer cancel()
	fired := make(chan struct{})
	stop := context.AfterFunc(limited, func() {
		_ = t.conn.SetDeadline(past)
		close(fired)
	})
	a, pins, err = t.exchange(text, want)
	if !stop() {
		<-fired
		if err != nil {
			return nil, pins, &waitError{ctx, "client: publish: " + ask.Op}
		}
		_ = t.conn.SetDeadline(time.Time{}) // the answer came together with the context's end
	}
	if err != nil {
		return nil, pins, fmt.Errorf("client: publish: %s: %w", ask.Op, named(err))
	}
	return a, pins, nil
}

// exchange is ask without an end.
func (t *talk) exchange(text []byte, want string) (a *weights.Answer, pins []weights.Pin, err error) {
	if _, err := t.conn.Write(text); err != nil {
		return nil, nil, t.ended(err)
	}
	for {
		a = &weights.Answer{}
		if err := t.hear(a); err != nil {
			return nil, pins, err
		}
		switch {
		case a.Op == weights.OpWaiting:
			pins = pinsOf(a.Pins)
		case a.Op == want || a.Op == weights.OpFailed && want != weights.OpAborted:
			return a, pins, nil
		default:
			return nil, pins, fmt.Errorf("%w: the daemon answered %q where %q was due", wire.ErrProtocol, a.Op, want)
		}
	}
}

// hear reads an answer, or why the daemon ends the connection.
func (t *talk) hear(a *weights.Answer) error {
	length, chunk, err := wire.ReadMessageLength(t.conn)
	switch {
	case err != nil:
		return gone(err)
	case chunk:
		return fmt.Errorf("%w: a chunk came where an answer was due", wire.ErrProtocol)
	case length == 0:
		return readClosing(t.conn)
	}
	return gone(wire.ReadMessageBody(t.conn, length, wire.MessageBytesMax, a))
}

// gone is the end of a connection of which the daemon said nothing.
func gone(err error) error {
	if err == nil || errors.Is(err, wire.ErrProtocol) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrDaemonGone, err)
}

// closingTimeout is how long the daemon may take to say why it has ended a connection to which nothing can be written.
const closingTimeout = 2 * time.Second

// ended says why the connection ended to which nothing could be written: the daemon's words, if it left any.
func (t *talk) ended(err error) error {
	if deadlineExceeded(err) {
		return err
	}
	_ = t.conn.SetReadDeadline(time.Now().Add(closingTimeout))
	var notice *wire.Notice
	for range 4 { // answers that were on their way
		var a weights.Answer
		if said := t.hear(&a); errors.As(said, &notice) {
			return notice
		} else if said != nil {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%w: %w", ErrDaemonGone, err)
}

func pinsOf(texts []weights.PinText) []weights.Pin {
	pins := make([]weights.Pin, 0, len(texts))
	for _, p := range texts {
		who := weights.Who{Client: p.Client, PID: p.PID, Addr: p.Addr, Remote: p.Addr != ""}
		pins = append(pins, weights.Pin{Reader: p.Reader, Who: who, Generation: p.Generation, Since: time.Unix(0, p.Since)})
	}
	return pins
}
