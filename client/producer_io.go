package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// How long the daemon's reason may take to arrive after a write has failed, or once it has begun.
const reasonTimeout = 5 * time.Second

// errInterrupted is a write that stopped because its context ended.
var errInterrupted = errors.New("interrupted")

// writeBuffered writes buf, or waits for the write that is going on. It wants mu and lets go of it meanwhile. If ctx ends
// first, the leftover writer goes on with the rest.
func (p *Producer) writeBuffered(ctx context.Context, op string) error {
	if err := p.usable(ctx, op); err != nil {
		return err
	}
	if p.writing {
		return p.sleep(ctx, op, never)
	}
	if len(p.buf) == 0 {
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

// writeOut writes buf, which nobody else may be doing, and puts back what was not written.
func (p *Producer) writeOut(ctx context.Context) error {
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
		if ctx.Err() != nil {
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

// watch lets the end of ctx interrupt a write. It costs nothing while the same context comes again.
func (p *Producer) watch(ctx context.Context) {
	done := ctx.Done()
	if done == p.watched {
		return
	}
	if p.unwatch != nil {
		p.unwatch()
		p.unwatch = nil
	}
	if p.watched = done; done != nil {
		p.unwatch = context.AfterFunc(ctx, func() { p.conn.SetWriteDeadline(past) })
	}
}

// kickWriter asks the leftover writer to write buf.
func (p *Producer) kickWriter() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// writeLeftovers writes what lies in buf when the pushing goroutine has no reason to: when all that was written is
// acked, and after an interruption. The ack reader must not do it, for it would then not read.
func (p *Producer) writeLeftovers() {
	defer close(p.writerEnded)
	for {
		select {
		case <-p.ended:
			return
		case <-p.kick:
		}
		p.mu.Lock()
		for first := true; !p.writing && len(p.buf) > 0 && p.writeErr == nil && p.err == nil; first = false {
			if !first && p.wired != p.acked {
				break // its acks will kick us
			}
			_ = p.writeOut(context.Background())
		}
		p.mu.Unlock()
	}
}

// readAcks counts acks until the connection ends, and then says why it did.
func (p *Producer) readAcks() {
	defer close(p.ended)
	buf := make([]byte, 16<<10)
	for {
		n, err := p.conn.Read(buf)
		acks := 0
		for acks < n && buf[acks] == wire.Ack {
			acks++
		}
		if ackErr := p.ack(uint64(acks)); ackErr != nil {
			err = ackErr
		} else if acks < n {
			err = p.closingWords(buf[acks:n])
		}
		if err != nil {
			p.end(err)
			return
		}
	}
}

func (p *Producer) ack(n uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n > p.wired-p.acked {
		return fmt.Errorf("%w: the daemon acked %d samples more than it was sent", wire.ErrProtocol, n-(p.wired-p.acked))
	}
	p.acked += n
	if p.acked >= p.wakeAt {
		p.rouse()
	}
	if p.acked == p.wired && len(p.buf) > 0 {
		p.kickWriter()
	}
	return nil
}

// closingWords reads what follows the last ack.
func (p *Producer) closingWords(b []byte) error {
	if b[0] != wire.NoticeMark {
		return fmt.Errorf("%w: the daemon sent the byte %#02x where an ack or a closing notice must be", wire.ErrProtocol, b[0])
	}
	p.conn.SetReadDeadline(time.Now().Add(reasonTimeout))
	notice, err := wire.ReadNotice(io.MultiReader(bytes.NewReader(b[1:]), p.conn))
	if err != nil {
		return err
	}
	return notice
}

// end notes why the connection ended.
func (p *Producer) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var notice *wire.Notice
	switch {
	case errors.As(err, &notice), errors.Is(err, wire.ErrProtocol):
		p.err = err
	case p.closed:
		p.err = os.ErrClosed
	default:
		if p.writeErr != nil && deadlineExceeded(err) {
			err = p.writeErr
		}
		p.err = fmt.Errorf("%w: %d samples sent, %d acked (%w): start it again and push those that were not acked; its log may say why", ErrDaemonGone, p.sent, p.acked, err)
	}
	p.conn.Close() // a write that blocks must return
	p.rouse()
}
