package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// How long the daemon's reason may take to arrive after a write has failed, or once it has begun.
const reasonTimeout = 5 * time.Second

// errInterrupted is a write that stopped because its context ended.
var errInterrupted = errors.New("interrupted")

// sendable says whether something lies in buf or kept that may be written now. It wants mu.
func (p *Producer) sendable() bool {
	if p.kept != nil {
		return !p.down && p.writeErr == nil && p.kept.pos < p.writeTo() && !p.kept.halted()
	}
	return len(p.buf) > 0
}

// writeBuffered writes what is sendable, or waits for the write that is going on. It wants mu and lets go of it meanwhile. If ctx
// ends first, the leftover writer goes on with the rest.
func (p *Producer) writeBuffered(ctx context.Context, op string) error {
	if err := p.usable(ctx, op); err != nil {
		return err
	}
	if p.writing {
		return p.sleep(ctx, op, never)
	}
	if !p.sendable() {
		return nil
	}
	p.watch(ctx)
	switch err := p.writeOut(ctx); {
	case err == errInterrupted:
		p.kickWriter()
		return p.waited(ctx, op)
	case err != nil:
		return p.usable(ctx, op)
	}
	return nil
}

// writeOut writes what is sendable, which nobody else may be doing. It wants mu and lets go of it meanwhile.
func (p *Producer) writeOut(ctx context.Context) error {
	switch {
	case p.kept != nil && p.kept.lent != nil:
		return p.writeLent(ctx)
	case p.kept != nil:
		return p.writeKept(ctx)
	}
	out := p.buf
	p.buf, p.spare = p.spare[:0], nil
	p.wired = p.sent
	p.beginWrite()
	n, err := p.write(ctx, out)
	p.mu.Lock()
	if err == errInterrupted {
		// Only the pushing goroutine is interrupted and only it fills buf, so nothing came after this.
		p.spare = p.buf
		p.buf = out[:copy(out, out[n:])]
	} else if p.spare = out[:0]; cap(out) > max(p.fillBytes, directBytes) {
		p.spare = nil // held the rest of a large sample
	}
	p.endWrite(err)
	return err
}

// beginWrite claims the connection and lets go of mu.
func (p *Producer) beginWrite() {
	p.writing = true
	p.stats.Writes++
	p.mu.Unlock()
}

// endWrite gives the connection back; it wants mu.
func (p *Producer) endWrite(err error) {
	p.writing = false
	if err != nil && err != errInterrupted && p.writeErr == nil {
		p.writeErr = err
		p.conn.SetReadDeadline(time.Now().Add(reasonTimeout))
	}
	p.quiet.Broadcast()
	p.rouse()
}

// writeDirect sends the n samples in vec from the caller's memory; nobody else writes and buf is empty. It returns how
// many were taken. It wants mu and lets go of it meanwhile.
func (p *Producer) writeDirect(ctx context.Context, op string, n int) (int, error) {
	p.sent += uint64(n)
	p.wired += uint64(n)
	p.watch(ctx)
	p.beginWrite()
	written, err := p.writeVec(ctx)
	p.mu.Lock()
	if err == nil {
		p.endWrite(nil)
		return n, nil
	}
	begun := int((written + p.sampleBytes - 1) / p.sampleBytes)
	if err != errInterrupted {
		begun = int(written / p.sampleBytes) // the one cut short is not taken: nobody will finish it
	} else if part := written % p.sampleBytes; part > 0 {
		p.keepRest(p.sampleBytes - part)
	}
	p.sent -= uint64(n - begun)
	p.wired -= uint64(n - begun)
	clear(p.vec)
	p.endWrite(err)
	switch {
	case err != errInterrupted:
		return begun, p.usable(ctx, op)
	case begun == n:
		return n, nil
	}
	return begun, p.waited(ctx, op)
}

// keepRest copies the first n bytes left in vec and has the leftover writer send them.
func (p *Producer) keepRest(n int64) {
	for _, b := range p.vec {
		b = b[:min(n, int64(len(b)))]
		p.buf = append(p.buf, b...)
		n -= int64(len(b))
	}
	p.kickWriter()
}

// write writes b until ctx ends. Any other interruption is one that was meant for an earlier write.
func (p *Producer) write(ctx context.Context, b []byte) (written int, err error) {
	for written < len(b) {
		if ctx.Err() != nil {
			return written, errInterrupted
		}
		n, err := p.conn.Write(b[written:])
		written += n
		if err = p.retry(err); err != nil {
			return written, err
		}
	}
	return written, nil
}

// writeVec is write for vec, from which it removes what it has written.
func (p *Producer) writeVec(ctx context.Context) (written int64, err error) {
	for len(p.vec) > 0 {
		if ctx.Err() != nil || p.kept.halted() {
			return written, errInterrupted
		}
		n, err := p.vec.WriteTo(p.conn)
		written += n
		if err = p.retry(err); err != nil {
			return written, err
		}
	}
	return written, nil
}

// retry clears the deadline that interrupted a write. The context is looked at after that, so no interruption is missed.
func (p *Producer) retry(err error) error {
	if err != nil && deadlineExceeded(err) {
		return p.conn.SetWriteDeadline(time.Time{})
	}
	return err
}

// watch lets the end of ctx interrupt a write. It costs nothing while the same context comes again. It wants mu.
func (p *Producer) watch(ctx context.Context) {
	done, conn := ctx.Done(), p.conn
	if done == p.watched && conn == p.watchedConn {
		return
	}
	if p.unwatch != nil {
		p.unwatch()
		p.unwatch = nil
	}
	if p.watched, p.watchedConn = done, conn; done != nil {
		p.unwatch = context.AfterFunc(ctx, func() { conn.SetWriteDeadline(past) })
	}
}

// kickWriter asks the leftover writer to write buf.
func (p *Producer) kickWriter() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// writeLeftovers writes what lies in buf or kept when the pushing goroutine has no reason to: when all that was written is
// acked, after an interruption, and after a reconnect. The attendant must not do it, for it would then not read.
func (p *Producer) writeLeftovers() {
	defer close(p.writerEnded)
	for {
		select {
		case <-p.ended:
			return
		case <-p.kick:
		}
		p.mu.Lock()
		for first := true; !p.writing && p.sendable() && p.writeErr == nil && p.err == nil; first = false {
			if !first && p.wired != p.acked && !(p.kept != nil && (p.kept.lent != nil || p.wired < p.begun || p.kept.inside())) {
				break // its acks will kick us
			}
			_ = p.writeOut(context.Background())
		}
		p.mu.Unlock()
	}
}

// readAcks counts acks until the connection ends, and returns why it did.
func (p *Producer) readAcks(conn net.Conn, buf []byte) error {
	for {
		n, err := conn.Read(buf)
		if wordErr := p.words(conn, buf[:n]); wordErr != nil {
			return wordErr
		}
		if err != nil {
			return err
		}
	}
}

// words takes what the daemon sent: acks, notes, and at the end a notice, which it returns.
func (p *Producer) words(conn net.Conn, b []byte) error {
	for len(b) > 0 {
		acks := 0
		for acks < len(b) && b[acks] == wire.Ack {
			acks++
		}
		if err := p.ack(uint64(acks)); err != nil || acks == len(b) {
			return err
		}
		mark := b[acks]
		if mark != wire.NoteMark && mark != wire.NoticeMark {
			return fmt.Errorf("%w: the daemon sent the byte %#02x where an ack, a note or a closing notice must be", wire.ErrProtocol, mark)
		}
		rest := bytes.NewReader(b[acks+1:])
		from := io.MultiReader(rest, conn)
		conn.SetReadDeadline(time.Now().Add(reasonTimeout))
		if mark == wire.NoticeMark {
			notice, err := wire.ReadNotice(from)
			if err != nil {
				return err
			}
			return notice
		}
		note, err := wire.ReadNote(from)
		if err != nil {
			return err
		}
		p.mu.Lock()
		if note.Code == wire.NoteStepRefused {
			p.refused = note
		} else {
			p.note = note
		}
		if p.writeErr == nil { // else its deadline holds
			conn.SetReadDeadline(time.Time{})
		}
		p.mu.Unlock()
		b = b[len(b)-rest.Len():]
	}
	return nil
}

func (p *Producer) ack(n uint64) error {
	if n == 0 {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if due := p.due(); n > due {
		return fmt.Errorf("%w: the daemon acked %d samples more than it was sent", wire.ErrProtocol, n-due)
	}
	p.acked += n
	p.note = nil
	p.outage.over = true
	if p.acked >= p.wakeAt {
		p.rouse()
	}
	if p.kept != nil && p.kept.lent != nil {
		p.kept.lent.forget(p.acked)
		if p.sendable() { // the window has moved, and nobody else writes
			p.kickWriter()
		}
	} else if p.acked == p.wired && p.sendable() {
		p.kickWriter()
	}
	return nil
}

// due is how many acks the daemon may send. It wants mu.
func (p *Producer) due() uint64 {
	if p.kept == nil {
		return p.wired - p.acked
	}
	to := p.kept.pos
	if p.writing {
		to = p.kept.to
	}
	return to/p.kept.sample - p.acked
}

// reasonOf says why a connection ended, from the error of its reader. It wants mu.
func (p *Producer) reasonOf(err error) error {
	if errors.Is(p.writeErr, wire.ErrProtocol) {
		return p.writeErr
	}
	if answered(err) {
		return named(err)
	}
	if p.writeErr != nil && deadlineExceeded(err) {
		err = p.writeErr
	}
	if deadlineExceeded(err) {
		return fmt.Errorf("%w (%v)", ErrDaemonGone, err) // of reasonTimeout: no deadline of a call
	}
	return fmt.Errorf("%w (%w)", ErrDaemonGone, err)
}

// finish notes why the stream ended. It wants mu.
func (p *Producer) finish(err error) {
	switch {
	case answered(err), errors.As(err, new(*LostError)), errors.Is(err, ErrSessionTaken):
		p.err = err
	case p.closed:
		p.err = os.ErrClosed
	case p.kept != nil:
		p.err = err
	default:
		p.err = fmt.Errorf("%w: %d samples sent, %d acked: start it again and push those that were not acked; its log may say why", err, p.sent, p.acked)
	}
	p.rouse()
}
