package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// dialog is what a publisher and the daemon say after the handshake. After an error that is not one of its answers the connection is of no use any more. One
// goroutine at a time uses it.
type dialog struct {
	conn    net.Conn
	timeout time.Duration // for an answer that is not waited for
	places  int           // of the table, for errors; 0: not known
	broken  error         // why it is of no use

	writing sync.Mutex // begin may be aborted from another goroutine
}

// beginMax is the longest a daemon is asked to wait for a place; a longer wait is asked for again.
const beginMax = time.Hour

// answerLead is how long before the end of a context the daemon gives up, so that it is its answer that ends the wait: it says who pins.
const answerLead = 50 * time.Millisecond

// begin takes a place. ctx bounds the wait for one.
func (d *dialog) begin(ctx context.Context, want uint64) (generation uint64, place int, err error) {
	for {
		if ctx.Err() != nil {
			return 0, 0, &waitError{ctx, "begin a generation"}
		}
		a, err := d.tryBegin(ctx, want)
		switch {
		case err != nil:
			return 0, 0, err
		case a.Op == weights.OpPlace:
			return a.Generation, a.Place, nil
		case a.Op != weights.OpFailed:
			return 0, 0, d.unexpected(a)
		case a.Code != weights.FailedPinned:
			return 0, 0, d.failed(a, want, nil)
		}
		if left, limited := remaining(ctx); limited && left <= answerLead {
			return 0, 0, d.failed(a, want, os.ErrDeadlineExceeded)
		}
	}
}

// remaining returns how long ctx has, if it has a deadline.
func remaining(ctx context.Context) (time.Duration, bool) {
	until, limited := ctx.Deadline()
	return time.Until(until), limited
}

// tryBegin asks for a place and waits for the answer, or for the end of ctx.
func (d *dialog) tryBegin(ctx context.Context, want uint64) (*weights.Answer, error) {
	wait := beginMax
	if left, limited := remaining(ctx); limited {
		wait = min(wait, max(left-min(left/4, answerLead), 0))
	}
	if err := d.ask(&weights.Ask{Op: weights.OpBegin, DeadlineMS: wait.Milliseconds(), Generation: want}); err != nil {
		return nil, err
	}
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(aborted)
		_ = d.say(&weights.Ask{Op: weights.OpAbort})
		_ = d.conn.SetReadDeadline(time.Now().Add(d.timeout))
	})
	var pins []weights.PinText
	for {
		a, err := d.hear(wait + d.timeout)
		if err == nil && a.Op == weights.OpWaiting {
			pins = a.Pins
			continue
		}
		if stop() {
			return a, err
		}
		<-aborted
		if err == nil && a.Op != weights.OpAborted { // the answer to the begin came first
			if len(a.Pins) > 0 {
				pins = a.Pins
			}
			a, err = d.hear(d.timeout)
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded): // it says nothing: the connection is of no more use, and why this ended is known all the same
		case err != nil:
			return nil, err
		case a.Op != weights.OpAborted:
			return nil, d.unexpected(a)
		}
		if len(pins) > 0 {
			return nil, d.failed(&weights.Answer{Code: weights.FailedPinned, Pins: pins}, want, &waitError{ctx, "no place came free"})
		}
		return nil, &waitError{ctx, "begin a generation"}
	}
}

// commit publishes what was begun. An end of ctx leaves unknown whether it was published, and the dialog of no use.
func (d *dialog) commit(ctx context.Context, generation uint64) (spec.Fingerprint, error) {
	if err := d.ask(&weights.Ask{Op: weights.OpCommit, Generation: generation}); err != nil {
		return spec.Fingerprint{}, err
	}
	failpoint.Hit("client/publisher/committed")
	stop := context.AfterFunc(ctx, func() { _ = d.conn.SetReadDeadline(past) })
	a, err := d.hear(d.timeout)
	if !stop() && err != nil {
		err = &waitError{ctx, fmt.Sprintf("generation %d may have been published or not", generation)}
		d.broken = err
	}
	switch {
	case err != nil:
		return spec.Fingerprint{}, err
	case a.Op == weights.OpPublished && a.Generation == generation:
		return a.Digest, nil
	case a.Op == weights.OpFailed:
		return spec.Fingerprint{}, d.failed(a, generation, nil)
	}
	return spec.Fingerprint{}, d.unexpected(a)
}

// abort gives back what was begun.
func (d *dialog) abort() error {
	if err := d.ask(&weights.Ask{Op: weights.OpAbort}); err != nil {
		return err
	}
	a, err := d.hear(d.timeout)
	if err == nil && a.Op != weights.OpAborted {
		err = d.unexpected(a)
	}
	return err
}

// say sends a message.
func (d *dialog) say(a *weights.Ask) error {
	d.writing.Lock()
	defer d.writing.Unlock()
	b, err := wire.AppendMessage(nil, a, wire.MessageBytesMax)
	if err != nil {
		return err
	}
	_ = d.conn.SetWriteDeadline(time.Now().Add(d.timeout))
	if _, err := d.conn.Write(b); err != nil {
		return fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	return nil
}

// ask is say for who then hears: if nothing can be written, it says why the daemon ended the connection, if that left its reason.
func (d *dialog) ask(a *weights.Ask) error {
	err := d.say(a)
	if err == nil || d.broken != nil {
		return err
	}
	if answer := d.lastWords(); answer != nil {
		err = answer
	}
	d.broken = err
	return err
}

// lastWords returns the notice that the daemon left, if it did.
func (d *dialog) lastWords() error {
	_, err := d.hear(d.timeout)
	var notice *wire.Notice
	if errors.As(err, &notice) {
		return err
	}
	return nil
}

// hear reads an answer, which may take so long.
func (d *dialog) hear(within time.Duration) (*weights.Answer, error) {
	if d.broken != nil {
		return nil, d.broken
	}
	_ = d.conn.SetReadDeadline(time.Now().Add(within))
	a, err := d.read()
	if err != nil {
		d.broken = err
		return nil, err
	}
	return a, nil
}

func (d *dialog) read() (*weights.Answer, error) {
	length, chunk, err := wire.ReadMessageLength(d.conn)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("the daemon did not answer in time: %w", err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrDaemonGone, unended(err))
	case chunk:
		return nil, fmt.Errorf("%w: the daemon sent a chunk to a publisher", wire.ErrProtocol)
	case length == 0:
		return nil, d.notice()
	}
	a := new(weights.Answer)
	if err := wire.ReadMessageBody(d.conn, length, wire.MessageBytesMax, a); err != nil {
		if errors.Is(err, wire.ErrProtocol) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	return a, nil
}

// notice reads the closing notice, which follows a length of 0.
func (d *dialog) notice() error {
	var mark [1]byte
	if _, err := io.ReadFull(d.conn, mark[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrDaemonGone, unended(err))
	}
	if mark[0] != wire.NoticeMark {
		return fmt.Errorf("%w: byte %#02x where a closing notice was due", wire.ErrProtocol, mark[0])
	}
	notice, err := wire.ReadNotice(d.conn)
	if err != nil {
		return fmt.Errorf("%w: its notice: %w", ErrDaemonGone, err)
	}
	return named(notice)
}

// unended makes of an end of the connection one that is no end of a stream.
func unended(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// unexpected is for an answer that does not answer what was asked.
func (d *dialog) unexpected(a *weights.Answer) error {
	d.broken = fmt.Errorf("%w: the daemon answered %q out of turn", wire.ErrProtocol, a.Op)
	return d.broken
}

// failed makes a typed error of the answer "failed".
func (d *dialog) failed(a *weights.Answer, generation uint64, cause error) error {
	switch a.Code {
	case weights.FailedPinned:
		e := &PinnedError{Places: d.places, Cause: cause}
		for _, p := range a.Pins {
			who := weights.Who{Client: p.Client, PID: p.PID, Addr: p.Addr, Remote: p.Addr != ""}
			e.Pins = append(e.Pins, weights.Pin{Reader: p.Reader, Who: who, Generation: p.Generation, Since: time.Unix(0, p.Since)})
		}
		return e
	case weights.FailedOldGeneration:
		return &said{&OldGenerationError{Wanted: generation, Newest: a.Generation}, errors.New(a.Reason)}
	case weights.FailedIncomplete:
		return &said{&IncompleteError{Generation: generation}, errors.New(a.Reason)}
	}
	return fmt.Errorf("the daemon did not publish generation %d (%s): %s", generation, a.Code, a.Reason)
}
