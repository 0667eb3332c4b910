package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// What the errors of this package are, with errors.Is. The package's doc tells them apart.
var (
	// ErrDaemonGone is wrapped when the connection ended and the daemon gave no reason.
	ErrDaemonGone = errors.New("the daemon went away without giving a reason")

	// ErrShuttingDown is wrapped when the daemon is stopping: it said so with a *wire.Notice or a *wire.Refusal.
	ErrShuttingDown = errors.New("the daemon is shutting down")

	// ErrSessionTaken is wrapped when another connection has the session now.
	ErrSessionTaken = errors.New("another connection has taken the session over")

	// ErrFull is wrapped when a deadline passed while the table's ring was full: see FullError.
	ErrFull = errors.New("the ring is full")
)

// FullError is a deadline that passed while the daemon waited for a free place in the ring, and who keeps it waiting. It is
// ErrFull, os.ErrDeadlineExceeded and the context's error.
type FullError struct {
	Trainer uint64    // number of the trainer that has held a batch for longest; 0 if none holds one
	Group   string    // its group, or the group that nobody reads for
	Client  string    // what that trainer calls itself
	PID     int       // its process; 0 where it is not known
	Batch   uint64    // number of the batch it holds
	Since   time.Time // since when it does; zero if none holds one
	Reason  string    // the daemon's words

	what string
	ctx  error
}

// newFullError is the end of a context while note was in force; what says what was being done.
func newFullError(ctx context.Context, note *wire.Note, what string) *FullError {
	e := &FullError{Trainer: note.Trainer, Group: note.Group, Client: note.Client, PID: note.PID, Batch: note.Batch, Reason: note.Reason,
		what: what, ctx: ctx.Err()}
	if note.Since != 0 {
		e.Since = time.Unix(0, note.Since)
	}
	return e
}

func (e *FullError) Error() string {
	who := ""
	if e.Trainer != 0 {
		who = fmt.Sprintf("trainer %d (%q, group %q, pid %d) has held batch %d since %s: ",
			e.Trainer, e.Client, e.Group, e.PID, e.Batch, e.Since.UTC().Format(time.RFC3339Nano))
	}
	return fmt.Sprintf("%s: %v: %s%s: %v", e.what, ErrFull, who, e.Reason, e.ctx)
}

// Timeout is true, as net.Error has it for deadlines.
func (e *FullError) Timeout() bool { return true }

func (e *FullError) Unwrap() []error { return []error{ErrFull, os.ErrDeadlineExceeded, e.ctx} }

// LostError says that the daemon does not hold samples it had acked: the acks were queued ones and the daemon died, or its
// segment was not kept. Those of them that no trainer has read are lost. Samples are numbered as this Producer numbers them: its
// first one is Held().
type LostError struct {
	From, To uint64 // samples From to To-1
}

func (e *LostError) Error() string {
	return fmt.Sprintf("the daemon acked samples %d to %d but does not hold them any more: with queued acks it may have died before they were in the ring, "+
		"or it does not keep its segment; committed acks and a segment directory prevent that, Config.ContinueAfterLoss goes on in spite of it", e.From, e.To-1)
}

// ReconnectingError is a context that ended while the Producer had no connection and tried to make one. The Producer goes on
// trying. It is the context's error, and os.ErrDeadlineExceeded where that was a deadline, but not what Last is.
type ReconnectingError struct {
	Since time.Time // since when there is no connection
	Tries int       // to make one since then
	Last  error     // why the last one failed, or before the first: why the connection ended

	what string
	ctx  context.Context
}

func (e *ReconnectingError) Error() string {
	return fmt.Sprintf("%s: no connection since %s, %d tries to make one; last: %v: %v", e.what, e.Since.UTC().Format(time.RFC3339Nano), e.Tries, e.Last, e.ctx.Err())
}

// Timeout says whether a deadline passed, as net.Error does.
func (e *ReconnectingError) Timeout() bool { return timeout(e.ctx) }

func (e *ReconnectingError) Unwrap() []error { return contextErrors(e.ctx) }

// waitError is the end of a call's context: its error, and os.ErrDeadlineExceeded too where that was a deadline.
type waitError struct {
	ctx  context.Context
	what string
}

func (e *waitError) Error() string { return fmt.Sprintf("%s: %v", e.what, e.ctx.Err()) }

// Timeout says whether a deadline passed, as net.Error does.
func (e *waitError) Timeout() bool { return timeout(e.ctx) }

func (e *waitError) Unwrap() []error { return contextErrors(e.ctx) }

func timeout(ctx context.Context) bool { return errors.Is(ctx.Err(), context.DeadlineExceeded) }

func contextErrors(ctx context.Context) []error {
	if timeout(ctx) {
		return []error{ctx.Err(), os.ErrDeadlineExceeded}
	}
	return []error{ctx.Err(), context.Cause(ctx)}
}

// said is what the daemon said, and the error of this package that it stands for.
type said struct{ is, words error }

func (e *said) Error() string { return e.words.Error() }

func (e *said) Unwrap() []error { return []error{e.is, e.words} }

// named gives the daemon's words the error they stand for, where there is one.
func named(err error) error {
	switch codeOf(err) {
	case wire.CodeShuttingDown:
		return &said{ErrShuttingDown, err}
	case wire.CodeSessionTaken:
		return &said{ErrSessionTaken, err}
	}
	return err
}

// codeOf is the code of the daemon's refusal or notice; empty if err is neither.
func codeOf(err error) wire.Code {
	var refusal *wire.Refusal
	var notice *wire.Notice
	switch {
	case errors.As(err, &refusal):
		return refusal.Code
	case errors.As(err, &notice):
		return notice.Code
	}
	return ""
}

// answered says whether the error is something that the daemon said.
func answered(err error) bool {
	return codeOf(err) != "" || errors.Is(err, wire.ErrProtocol) || errors.Is(err, ErrNotChallenged) || errors.Is(err, ErrDaemonUnproven)
}
