//go:build linux

package remote

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

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
	spans  []ring.Span
	lost   sampler.LostError // not told yet

	mu     sync.Mutex
	held   []lent // oldest first
	ending bool   // both goroutines are done with the connection: deadlines are those of its last words
}

// lent is a batch that the trainer was sent.
type lent struct {
	batch    ring.Batch
	whole    bool // all of it was handed to the kernel
	answered bool // before that: then it is given back once it is whole
}

// nextError is why there is no next batch: nothing that the trainer did.
type nextError struct{ err error }

func (e *nextError) Error() string { return fmt.Sprintf("the next batch: %v", e.err) }

// errLeft is the cause when the trainer's side of the connection ended.
var errLeft = errors.New("the trainer's connection ended")

func newSession(s *Server, conn net.Conn, seat *shm.Seat, log *slog.Logger) *session {
	x := &session{
		server: s, conn: conn, seat: seat, log: log, room: make(chan struct{}, 1), fd: -1,
		out: sendfile.Sender{Conn: conn, Stall: s.cfg.StallTimeout}, held: make([]lent, 0, seat.Prefetch),
	}
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
		abort(x.conn)
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
	x.interrupt()
	listening.Wait()
	x.mu.Lock()
	x.ending = true
	x.mu.Unlock()
	how, err = x.end(ctx, context.Cause(running))
	return err
}

// interrupt makes both goroutines return from the connection, unless they have.
func (x *session) interrupt() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.ending {
		_ = x.conn.SetDeadline(past)
	}
}

// past is a deadline that makes a blocked read or write return.
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
			return &nextError{err}
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
	x.held = append(x.held, lent{batch: b})
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
			x.seat.Sent(s.Bytes)
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
	b := x.buf
	x.buf = b[:0]
	if more {
		return x.out.WriteMore(ctx, b)
	}
	return x.out.Write(ctx, b)
}

// sendSpan sends a run of columns from where it lies.
func (x *session) sendSpan(ctx context.Context, b ring.Batch, s ring.Span) error {
	x.seat.Sent(s.Bytes)
	if x.fd < 0 {
		return x.out.Write(ctx, b.Bytes(s))
	}
	return x.out.File(ctx, x.fd, s.Offset, s.Bytes, nil)
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
			if number := binary.LittleEndian.Uint64(buf[at:]); !x.answer(number) {
				gone(notice(wire.CodeBadPeer, "the answer is for batch %d, which this trainer was not sent, or has answered before", number))
				return
			}
		}
		have = copy(buf[:], buf[at:have])
		if err != nil {
			gone(errLeft)
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

// end tells the trainer why it is ended if there is somebody to tell, gives back what it still holds, and says what Serve returns. Both goroutines are done with the
// connection but for this one.
func (x *session) end(ctx context.Context, cause error) (shm.Outcome, error) {
	how, say := x.judge(ctx, cause)
	if say != nil && !x.inside && !x.over && !errors.Is(cause, os.ErrDeadlineExceeded) {
		x.server.dismiss(ctx, x.conn, wire.AppendNotice(nil, say))
	}
	abort(x.conn) // first: the memory of what was not answered goes to others now
	x.mu.Lock()
	held := x.held
	x.held = nil
	x.mu.Unlock()
	x.seat.Returned(len(held))
	for _, h := range held {
		if !h.whole || how == shm.OutcomeCutOff {
			x.seat.Member.Offer(h.batch) // it cannot have begun to read it, or it was us who ended it
		} else {
			x.seat.Member.Return(h.batch)
		}
	}
	log := x.log.With("returned", len(held))
	if say == nil {
		log.Info("trainer ended", "died", how == shm.OutcomeDied)
		return how, nil
	}
	log.Warn("trainer cut off", "code", say.Code, "reason", say.Reason, "err", cause)
	if say.Code == wire.CodeInternal {
		return how, fmt.Errorf("table %q: trainer %d: %w", x.seat.Table.Name, x.seat.ID, cause)
	}
	return how, say
}

// judge says how a trainer ended, and in what words it is told; nil: it is gone.
func (x *session) judge(ctx context.Context, cause error) (shm.Outcome, *wire.Notice) {
	x.mu.Lock()
	holds := len(x.held) > 0
	x.mu.Unlock()
	var said *wire.Notice
	var failed *nextError
	switch {
	case errors.As(cause, &said):
		return shm.OutcomeBadPeer, said
	case errors.Is(cause, errLeft) && !holds:
		return shm.OutcomeDetached, nil
	case errors.Is(cause, errLeft):
		return shm.OutcomeDied, nil
	case ctx.Err() != nil:
		return shm.OutcomeCutOff, notice(wire.CodeShuttingDown, "the daemon is stopping")
	case errors.Is(cause, os.ErrDeadlineExceeded):
		return shm.OutcomeCutOff, notice(wire.CodeStalled, "the trainer took nothing of a batch for %v", x.server.cfg.StallTimeout)
	case errors.As(cause, &failed):
		return shm.OutcomeCutOff, notice(wire.CodeInternal, "the daemon failed; its log says why")
	}
	return shm.OutcomeDied, nil // a write failed
}
