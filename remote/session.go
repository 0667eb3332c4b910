//go:build linux

package remote

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/internal/sendfile"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// session is one trainer. The caller of Serve sends batches, and listen takes the answers. A batch is in held from before the trainer can learn of it until its
// lease has been passed on, so whatever happens it ends in its group exactly once.
type session struct {
	server *Server
	conn   net.Conn
	seat   *shm.Seat
	log    *slog.Logger
	room   chan struct{} // capacity 1: something was answered

	// Of the goroutine that sends.
	out    sendfile.Sender
	fd     int  // of the segment's memory, -1 where there is none
	inside bool // a batch was begun and not all of it was written
	over   bool // the end of the stream was told
	buf    []byte
	copied int64 // bytes of batches in buf
	spans  []ring.Span
	lost   sampler.LostError // not told yet

	mu     sync.Mutex
	held   []lent // oldest first
	count  uint64 // batches that were sent, or begun to be
	begun  uint64 // of those, how many the trainer may have begun to read: all, unless it says so as it leaves
	ending bool   // nothing more is written but last words: deadlines are theirs
}

// lent is a batch that the trainer was sent.
type lent struct {
	batch    ring.Batch
	at       uint64 // how many were sent before it
	whole    bool   // all of it was handed to the kernel
	answered bool   // before that: then it is given back once it is whole
}

// begunAll stands for all that a trainer was sent, as long as it does not say how many it has begun.
const begunAll = math.MaxUint64

// ownError is why there is no next batch, or why it cannot be read: nothing that the trainer did.
type ownError struct {
	what string
	err  error
}

func (e *ownError) Error() string { return fmt.Sprintf("%s: %v", e.what, e.err) }

func (e *ownError) Unwrap() error { return e.err }

// errLeft is the cause when the trainer's side of the connection ended.
var errLeft = errors.New("the trainer's connection ended")

func newSession(s *Server, conn net.Conn, seat *shm.Seat, log *slog.Logger) *session {
	x := &session{
		server: s, conn: conn, seat: seat, log: log, room: make(chan struct{}, 1), fd: -1,
		out: sendfile.Sender{Conn: conn, Stall: s.cfg.StallTimeout}, held: make([]lent, 0, seat.Prefetch), begun: begunAll,
	}
	sendfile.SetPatience(conn, s.cfg.StallTimeout)
	sendfile.ResetAtEnd(conn) // if this process dies, too: a successor may give the memory of a segment that is kept to others
	if m := seat.Table.Memory; m != nil && x.out.Socket() {
		x.fd = m.Descriptor()
	}
	return x
}

// serve sends batches until the trainer or ctx ends, and gives back all that it held.
func (x *session) serve(ctx context.Context) error {
	running, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	how := shm.OutcomeDied
	defer func() { x.seat.Leave(how) }()
	defer context.AfterFunc(running, x.interrupt)()
	if err := x.accept(running); err != nil {
		_ = sendfile.Abort(x.conn)
		x.log.Info("the trainer did not take the reply", "err", err)
		return nil
	}
	x.log.Info("trainer attached", "prefetch", x.seat.Prefetch)
	var listening sync.WaitGroup
	listening.Go(func() { x.listen(cancel) })
	err := x.send(running)
	if err == nil {
		<-running.Done()
	}
	cancel(err) // the first cause counts
	how, err = x.end(ctx, context.Cause(running), &listening)
	return err
}

// interrupt makes what is being written fail.
func (x *session) interrupt() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.ending {
		_ = x.conn.SetWriteDeadline(past)
	}
}

// past is a deadline that makes a blocked write return.
var past = time.Unix(1, 0)

func (x *session) accept(ctx context.Context) error {
	t := &x.seat.Table
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedRemoteTrain{
		Table: t.Name, Spec: t.Spec, Fingerprint: t.Spec.Fingerprint(), Trainer: x.seat.ID, Group: x.seat.Member.Group(),
		BatchSize: int64(t.View.BatchSize()), Prefetch: int64(x.seat.Prefetch),
		Created: t.View.Layout().Created.UnixNano(),
	})
	if err != nil {
		return err
	}
	return x.out.Write(ctx, reply)
}

// send sends batches as long as the trainer may hold one more. It returns nil after the last one.
func (x *session) send(ctx context.Context) error {
	seat := park.NewWaiter()
	for {
		if err := x.awaitRoom(ctx); err != nil {
			return err
		}
		b, err := x.seat.Member.Next(ctx, seat)
		switch {
		case err == nil:
			if err = x.sendBatch(ctx, b); err != nil {
				return err
			}
		case err == io.EOF:
			return x.sendEnd(ctx)
		case x.addLost(err):
		case ctx.Err() != nil:
			return ctx.Err()
		default:
			return &ownError{"the next batch", err}
		}
	}
}

// addLost adds what err says was lost, and tells whether it says that.
func (x *session) addLost(err error) bool {
	more := (*sampler.LostError)(nil)
	if !errors.As(err, &more) {
		return false
	}
	if x.lost.N == 0 || more.First < x.lost.First {
		x.lost.First = more.First
	}
	x.lost.N += more.N
	return true
}

// awaitRoom waits until the trainer may hold one more batch.
func (x *session) awaitRoom(ctx context.Context) error {
	for {
		x.mu.Lock()
		room := len(x.held) < x.seat.Prefetch
		x.mu.Unlock()
		if room {
			x.seat.SetState(shm.StateWaiting)
			return ctx.Err()
		}
		x.seat.SetState(shm.StateAtLimit)
		select {
		case <-x.room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

const (
	// smallBytes is up to what size a run of columns is copied behind what is written before it: two short system calls cost more than that copy.
	smallBytes = 16 << 10
	// bufferBytes is the most that is copied before it is written.
	bufferBytes = 64 << 10
)

// header appends the header of a batch, or of none, and what was lost.
func (x *session) header(b ring.Batch) {
	h := wire.BatchHeader{LostFirst: x.lost.First, LostCount: uint64(x.lost.N)}
	if x.lost.N > 0 {
		x.seat.Lost(x.lost.N)
		x.lost = sampler.LostError{}
	}
	if b.Count > 0 {
		v := x.seat.Table.View
		h.Count, h.Number, h.Columns = uint32(b.Count), b.Number, uint32(b.Columns()+wire.BatchOwnColumns)
		h.PayloadBytes = uint64(wire.BatchShape{SampleBytes: v.SampleBytes()}.PayloadBytes(int64(b.Count)))
	}
	x.buf = wire.AppendBatchHeader(x.buf[:0], &h)
}

func (x *session) sendBatch(ctx context.Context, b ring.Batch) error {
	x.mu.Lock()
	x.held = append(x.held, lent{batch: b, at: x.count})
	x.count++
	x.mu.Unlock()
	x.seat.Delivered()
	x.header(b)
	x.inside = true
	x.spans = b.Spans(x.spans[:0])
	for _, s := range x.spans {
		if s.Bytes <= smallBytes {
			if int64(len(x.buf))+s.Bytes > bufferBytes {
				if err := x.flush(ctx, true); err != nil {
					return err
				}
			}
			x.buf = append(x.buf, b.Bytes(s)...)
			x.copied += s.Bytes
			continue
		}
		if err := x.flush(ctx, true); err != nil {
			return err
		}
		if err := x.sendSpan(ctx, b, s); err != nil {
			return err
		}
	}
	if err := x.flush(ctx, false); err != nil {
		return err
	}
	x.inside = false
	x.sent()
	return nil
}

// flush writes what was put into the buffer.
func (x *session) flush(ctx context.Context, more bool) error {
	b, n := x.buf, x.copied
	x.buf, x.copied = b[:0], 0
	write := x.out.Write
	if more {
		write = x.out.WriteMore
	}
	if err := write(ctx, b); err != nil {
		return err
	}
	x.seat.Sent(n, false)
	return nil
}

// sendSpan sends a run of columns from where it lies.
func (x *session) sendSpan(ctx context.Context, b ring.Batch, s ring.Span) error {
	if x.fd < 0 {
		if err := x.out.Write(ctx, b.Bytes(s)); err != nil {
			return err
		}
		x.seat.Sent(s.Bytes, false)
		return nil
	}
	err := x.out.File(ctx, x.fd, s.Offset, s.Bytes, nil)
	switch {
	case errors.Is(err, unix.EIO): // of the file: sockets have none
		return &ownError{fmt.Sprintf("batch %d cannot be read", b.Number), err}
	case err == nil:
		x.seat.Sent(s.Bytes, true)
	}
	return err
}

// sent says that the newest batch is all with the kernel.
func (x *session) sent() {
	x.mu.Lock()
	newest := &x.held[len(x.held)-1]
	newest.whole = true
	b, answered := newest.batch, newest.answered
	if answered {
		x.held = x.held[:len(x.held)-1]
	}
	x.mu.Unlock()
	if answered {
		x.giveBack(b)
	}
}

// sendEnd tells the trainer that there will be no more batches.
func (x *session) sendEnd(ctx context.Context) error {
	x.buf = x.buf[:0]
	if x.lost.N > 0 {
		x.header(ring.Batch{})
	}
	x.buf = wire.AppendNotice(x.buf, &wire.Notice{Code: wire.CodeEndOfStream, Reason: "the table is closed, and every batch was delivered"})
	x.over = true
	if err := x.flush(ctx, false); err != nil {
		return err
	}
	x.seat.SetState(shm.StateEnded)
	return nil
}

// listen takes answers until the connection ends.
func (x *session) listen(gone context.CancelCauseFunc) {
	var buf [512]byte
	have := 0
	for {
		n, err := x.conn.Read(buf[have:])
		have += n
		at := 0
		for ; have-at >= wire.AnswerBytes; at += wire.AnswerBytes {
			number := binary.LittleEndian.Uint64(buf[at:])
			switch begun := number &^ wire.AnswerLeaves; {
			case begun == number && x.answer(number):
			case begun == number:
				gone(notice(wire.CodeBadPeer, "the answer is for batch %d, which this trainer was not sent, or has answered before", number))
				return
			case x.leaves(begun):
				gone(errLeft)
				return
			default:
				gone(notice(wire.CodeBadPeer, "the trainer leaves and says that it has begun %d batches, which is more than it was sent", begun))
				return
			}
		}
		have = copy(buf[:], buf[at:have])
		if err != nil {
			gone(fmt.Errorf("%w: %w", errLeft, err))
			return
		}
	}
}

func notice(code wire.Code, format string, args ...any) *wire.Notice {
	return &wire.Notice{Code: code, Reason: fmt.Sprintf(format, args...)}
}

// heldMany is from how many batches on the list of those held is not moved up for the oldest, which is answered first mostly.
const heldMany = 64

// answer takes a batch back, and reports false if it is none that the trainer holds.
func (x *session) answer(number uint64) bool {
	x.mu.Lock()
	for i := range x.held {
		h := &x.held[i]
		if h.batch.Number != number {
			continue
		}
		again, whole, b := h.answered, h.whole, h.batch
		h.answered = true
		switch {
		case whole && i == 0 && len(x.held) > heldMany:
			x.held = x.held[1:]
		case whole:
			x.held = append(x.held[:i], x.held[i+1:]...)
		}
		x.mu.Unlock()
		if whole {
			x.giveBack(b)
		}
		return !again
	}
	x.mu.Unlock()
	return false
}

func (x *session) giveBack(b ring.Batch) {
	x.seat.Member.Release(b)
	x.seat.GivenBack()
	select {
	case x.room <- struct{}{}:
	default:
	}
}

// leaves notes that the trainer has begun so many batches and will begin no other, and reports false if it was sent fewer.
func (x *session) leaves(begun uint64) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if begun > x.count {
		return false
	}
	x.begun = begun
	return true
}

// answersTimeout is how long answers of a trainer that cannot be told anything any more are waited for. They lie in the socket mostly: it ends at once.
const answersTimeout = 200 * time.Millisecond

// end tells the trainer why it is ended if there is somebody to tell, takes the answers that are still on their way, gives back what it holds, and says what Serve returns.
// Nothing is sent any more.
func (x *session) end(ctx context.Context, cause error, listening *sync.WaitGroup) (shm.Outcome, error) {
	x.mu.Lock()
	x.ending = true
	x.mu.Unlock()
	how, words := x.judge(ctx, cause)
	x.part(ctx, how, words, listening)
	_ = sendfile.Abort(x.conn) // first: the memory of what was not answered goes to others now
	listening.Wait()
	x.mu.Lock()
	held := x.held
	x.held = nil
	x.mu.Unlock()
	x.seat.Returned(len(held))
	begun := 0
	for _, h := range held {
		if h.whole && h.at < x.begun {
			begun++
		}
	}
	if left := x.begun != begunAll; how == shm.OutcomeDied && (len(held) == 0 || left && begun == 0) {
		how = shm.OutcomeDetached
	}
	for _, h := range held {
		if h.whole && h.at < x.begun && (how == shm.OutcomeDied || how == shm.OutcomeBadPeer) {
			x.seat.Member.Return(h.batch)
		} else {
			x.seat.Member.Offer(h.batch) // it cannot have begun to read it, or it was us who ended it
		}
	}
	return how, x.report(how, words, cause, len(held))
}

// part says the last words and takes the last answers.
func (x *session) part(ctx context.Context, how shm.Outcome, words *wire.Notice, listening *sync.WaitGroup) {
	switch {
	case how == shm.OutcomeStalled:
	case how == shm.OutcomeBadPeer && !x.inside && !x.over:
		x.server.dismiss(ctx, x.conn, wire.AppendNotice(nil, words))
	case how == shm.OutcomeBadPeer:
	case words != nil && !x.inside && !x.over:
		if stop, ok := x.server.say(ctx, x.conn, wire.AppendNotice(nil, words)); ok {
			listening.Wait()
			stop()
		}
	default:
		_ = x.conn.SetReadDeadline(time.Now().Add(answersTimeout))
		listening.Wait()
	}
}

// judge says how a trainer ended, and in what words it is told; nil: it is gone.
func (x *session) judge(ctx context.Context, cause error) (shm.Outcome, *wire.Notice) {
	var said *wire.Notice
	var failed *ownError
	switch {
	case errors.As(cause, &said):
		return shm.OutcomeBadPeer, said
	case errors.Is(cause, errLeft):
		return shm.OutcomeDied, nil
	case ctx.Err() != nil:
		return shm.OutcomeCutOff, notice(wire.CodeShuttingDown, "the daemon is stopping")
	case errors.Is(cause, os.ErrDeadlineExceeded):
		return shm.OutcomeStalled, notice(wire.CodeStalled, "the trainer took nothing of a batch for %v", x.server.cfg.StallTimeout)
	case errors.As(cause, &failed):
		return shm.OutcomeFailed, notice(wire.CodeInternal, "the daemon failed; its log says why")
	}
	return shm.OutcomeDied, nil // a write failed
}

// report logs how a trainer ended, and makes of it what Serve returns.
func (x *session) report(how shm.Outcome, words *wire.Notice, cause error, returned int) error {
	log := x.log.With("returned", returned)
	if words == nil {
		log.Info("trainer ended", "died", how == shm.OutcomeDied, "err", cause)
		return nil
	}
	log.Warn("trainer cut off", "code", words.Code, "reason", words.Reason, "err", cause)
	if how == shm.OutcomeFailed {
		return fmt.Errorf("table %q: trainer %d: %w", x.seat.Table.Name, x.seat.ID, cause)
	}
	return words
}
