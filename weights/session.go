//go:build linux

package weights

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/pollfd"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// netConn is what connections of all transports offer.
type netConn interface {
	net.Conn
	CloseWrite() error
}

// limits is what a connection may take its time for.
type limits struct {
	chunkBytes int
	stall      time.Duration // without a byte inside a generation
	idle       time.Duration // of a publisher, without a byte between generations
	answer     time.Duration // for a remote reader to say whether what it got is whole
	write      time.Duration // for a peer to accept a message
	linger     time.Duration // for a peer to read why it was ended
}

// session is the connection of a publisher, after the reply: in place, or streamed. One goroutine uses it.
type session struct {
	conn       netConn
	limits     limits
	log        *slog.Logger
	publishing *Publishing
	place      *Place    // begun and not ended
	receiver   *receiver // of a streamed publisher; nil: it writes in place
	given      bool      // a begin was given up because the peer said something: that can only be abort
	overheard  []byte    // the first byte of that, where it had to be read
	ctx        context.Context
	until      time.Time // the read deadline in force
	patience   time.Duration
}

func newSession(conn netConn, p *Publishing, streamed bool, l limits, log *slog.Logger) *session {
	x := &session{conn: conn, limits: l, log: log, publishing: p}
	if streamed {
		x.receiver = newReceiver(p, l.chunkBytes)
	}
	return x
}

// run serves the publisher until its connection ends. It returns nil if the publisher ended it, the *wire.Notice that it was ended with, or what went wrong
// with the connection. The place that it had begun is the caller's to give back, with the publisher's Close.
func (x *session) run(ctx context.Context) error {
	x.ctx = ctx
	_ = x.conn.SetDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { _ = x.conn.SetReadDeadline(past) })()
	err := error(nil)
	for err == nil {
		err = x.next()
	}
	notice := x.notice(err)
	if notice == nil {
		return quiet(err)
	}
	if x.receiver != nil { // one in place may go on writing until its socket ends
		x.publishing.Close() // before the peer reads of it
	}
	dismiss(ctx, x.conn, notice, x.limits.linger)
	return notice
}

// past is a deadline that makes a blocked read or write return.
var past = time.Unix(1, 0)

// next serves one message or chunk.
func (x *session) next() error {
	x.patience = x.limits.idle
	if x.place != nil {
		x.patience = x.limits.stall
	}
	length, chunk, err := wire.ReadMessageLength(x)
	if err != nil {
		return err
	}
	x.patience = x.limits.stall
	if chunk {
		if x.receiver == nil {
			return &tensor.ChunkError{Reason: "a publisher in place sends none"}
		}
		return x.receiver.chunk(x, length)
	}
	var ask Ask
	if err := wire.ReadMessageBody(x, length, wire.MessageBytesMax, &ask); err != nil {
		return err
	}
	if x.given && ask.Op != OpAbort {
		return fmt.Errorf("%w: %q while a place is waited for; only abort can be said then", wire.ErrProtocol, cutText(ask.Op))
	}
	x.given = false
	switch ask.Op {
	case OpBegin:
		return x.begin(&ask)
	case OpCommit:
		return x.commit(&ask)
	case OpAbort:
		if x.place != nil {
			x.place.Abort()
			x.drop()
		}
		return x.say(&Answer{Op: OpAborted})
	}
	return fmt.Errorf("%w: %q is not something a publisher asks for", wire.ErrProtocol, cutText(ask.Op))
}

// Read reads from the connection; it fails when no byte came in time.
func (x *session) Read(b []byte) (int, error) {
	if len(x.overheard) > 0 {
		n := copy(b, x.overheard)
		x.overheard = x.overheard[n:]
		return n, nil
	}
	if x.patience == 0 { // no limit
		x.patience = foreverNearly
	}
	if now := time.Now(); x.until.Sub(now) < x.patience*7/8 || x.until.Sub(now) > x.patience { // a deadline costs a timer, so one that is near enough stays
		x.until = now.Add(x.patience)
		_ = x.conn.SetReadDeadline(x.until)
		if x.ctx.Err() != nil { // it may have come just before
			_ = x.conn.SetReadDeadline(past)
		}
	}
	return x.conn.Read(b)
}

// foreverNearly is a time that nobody waits for.
const foreverNearly = 365 * 24 * time.Hour

// say writes an answer.
func (x *session) say(a *Answer) error {
	b, err := wire.AppendMessage(nil, a, wire.MessageBytesMax)
	if err != nil {
		return err
	}
	_ = x.conn.SetWriteDeadline(time.Now().Add(x.limits.write))
	_, err = x.conn.Write(b)
	return err
}

// drop forgets the place, which has ended.
func (x *session) drop() {
	x.place = nil
	if x.receiver != nil {
		x.receiver.begin(nil)
	}
}

// waitingAfter is how long a publisher waits for a place before it is told for whom, beginMax how long at most.
const (
	waitingAfter = 50 * time.Millisecond
	beginMax     = 24 * time.Hour
)

// begin takes a place, for which it waits as long as it was asked to. A peer that says something meanwhile, or is gone, waits no longer.
func (x *session) begin(ask *Ask) error {
	switch {
	case x.place != nil:
		return fmt.Errorf("%w: a begin while generation %d is under way", wire.ErrProtocol, x.place.Generation())
	case ask.DeadlineMS < 0:
		return fmt.Errorf("%w: a deadline of %d ms", wire.ErrProtocol, ask.DeadlineMS)
	}
	wait := beginMax
	if ask.DeadlineMS < wait.Milliseconds() {
		wait = time.Duration(ask.DeadlineMS) * time.Millisecond
	}
	began, told := time.Now(), false
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for pause := lookFirst; ; pause = min(2*pause, lookLast) {
		place, err := x.publishing.TryBegin(ask.Generation)
		busy := (*PinnedError)(nil)
		if !errors.As(err, &busy) {
			return x.begun(place, err)
		}
		waited := time.Since(began)
		said, gone := x.heard()
		switch {
		case gone:
			return io.EOF
		case said:
			x.given = true
			x.publishing.store.fail(FailedAborted)
			return nil
		case waited >= wait:
			x.publishing.store.fail(FailedPinned)
			return x.begun(nil, busy)
		case waited >= waitingAfter && !told:
			told = true
			if err := x.say(&Answer{Op: OpWaiting, Pins: pinTexts(busy.Pins)}); err != nil {
				return err
			}
		}
		timer.Reset(min(pause, wait-waited))
		select {
		case <-timer.C:
		case <-x.ctx.Done():
			return os.ErrDeadlineExceeded
		}
	}
}

// heard tells whether a peer that is waited with has said something, and whether it is gone.
func (x *session) heard() (said, gone bool) {
	socket, ok := x.conn.(syscall.Conn)
	if !ok {
		return x.overhear()
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false, true
	}
	revents := pollfd.Conn(raw, unix.POLLIN|unix.POLLRDHUP)
	return revents&unix.POLLIN != 0, revents&(unix.POLLHUP|unix.POLLERR|unix.POLLRDHUP|unix.POLLNVAL) != 0
}

// overhearing is how long a read takes that is not meant to wait.
const overhearing = time.Millisecond

// overhear is heard for TLS and streams of QUIC, of which nobody says what waits in them: it reads a byte.
func (x *session) overhear() (said, gone bool) {
	x.until = time.Time{} // of the deadline
	_ = x.conn.SetReadDeadline(time.Now().Add(overhearing))
	var first [1]byte
	n, err := x.conn.Read(first[:])
	x.overheard = first[:n]
	return n > 0, n == 0 && err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// begun answers a begin.
func (x *session) begun(place *Place, err error) error {
	if err != nil {
		return x.failed(err)
	}
	x.place = place
	if x.receiver != nil {
		x.receiver.begin(place)
	}
	return x.say(&Answer{Op: OpPlace, Generation: place.Generation(), Place: place.Index()})
}

// failed answers with why there is no place, or why a generation was not published.
func (x *session) failed(err error) error {
	a := &Answer{Op: OpFailed, Reason: err.Error()}
	busy, old, part := (*PinnedError)(nil), (*OldGenerationError)(nil), (*IncompleteError)(nil)
	switch {
	case errors.As(err, &busy):
		a.Code, a.Pins = FailedPinned, pinTexts(busy.Pins)
	case errors.As(err, &old):
		a.Code, a.Generation = FailedOldGeneration, old.Newest
	case errors.As(err, &part):
		a.Code = FailedIncomplete
	default:
		return err
	}
	return x.say(a)
}

// commit publishes what was written, if it is whole.
func (x *session) commit(ask *Ask) error {
	if x.place == nil || ask.Generation != x.place.Generation() {
		return fmt.Errorf("%w: a commit of generation %d, which is not under way", wire.ErrProtocol, ask.Generation)
	}
	place, generation := x.place, x.place.Generation()
	if x.receiver != nil {
		if err := x.receiver.complete(); err != nil {
			place.Fail(FailedIncomplete)
			x.drop()
			return x.failed(err)
		}
	}
	digest, err := place.CommitWritten()
	x.drop()
	if err != nil {
		return err
	}
	x.log.Info("published", "generation", generation, "digest", digest.String())
	return x.say(&Answer{Op: OpPublished, Generation: generation, Digest: digest})
}

// notice says with which words a publisher is ended, nil if it is gone.
func (x *session) notice(err error) *wire.Notice {
	bad := (*tensor.ChunkError)(nil)
	switch {
	case x.ctx.Err() != nil, errors.Is(err, errClosed):
		return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"}
	case errors.As(err, &bad):
		return &wire.Notice{Code: wire.CodeBadChunk, Reason: bad.Error()}
	case errors.Is(err, wire.ErrProtocol):
		return &wire.Notice{Code: wire.CodeBadPeer, Reason: err.Error()}
	case errors.Is(err, os.ErrDeadlineExceeded) && x.place != nil:
		return &wire.Notice{Code: wire.CodeStalled, Reason: fmt.Sprintf("generation %d was under way, and no byte came for %v", x.place.Generation(), x.limits.stall)}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &wire.Notice{Code: wire.CodeIdleTimeout, Reason: fmt.Sprintf("no byte came for %v", x.limits.idle)}
	}
	return nil
}

// lingerBytes is the most that is read and dropped while a peer reads why it was ended.
const lingerBytes = 64 << 20

// dismiss tells a peer why it is ended, after a length of 0. What it still sends is read and dropped for a while: closing over unread bytes would reset the
// connection and take the reason along.
func dismiss(ctx context.Context, conn netConn, n *wire.Notice, linger time.Duration) {
	_ = conn.SetDeadline(time.Now().Add(linger))
	if _, err := conn.Write(wire.AppendNotice(binary.LittleEndian.AppendUint32(nil, 0), n)); err != nil || conn.CloseWrite() != nil {
		return
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(past) })()
	_, _ = io.CopyN(io.Discard, onlyReader{conn}, lingerBytes)
}

// onlyReader hides the connection's other methods, so that the copy goes through a small buffer and no splice.
type onlyReader struct{ io.Reader }
