package client

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// Producer pushes the samples of one stream to a table. See the package's doc for which methods may be called when.
type Producer struct {
	target      target
	spec        *spec.Spec
	leafBytes   []int64
	sampleBytes int64
	first       uint64 // samples of the session that the daemon held at first: the number of our first sample
	fillBytes   int    // a send buffer is written when the next sample does not fit into this
	direct      bool   // Push writes from the caller's memory
	kept        *kept  // what is not acked yet, so that it can be sent again; nil: a broken connection is the end

	life        context.Context // ends with Close and Abort
	die         context.CancelFunc
	wake        chan struct{} // capacity 1: wakes the pushing goroutine
	kick        chan struct{} // capacity 1: asks the leftover writer to write
	use         chan struct{} // capacity 1: a sample was taken while there was no connection
	ended       chan struct{} // closed when the attendant has returned
	writerEnded chan struct{} // closed when the leftover writer has returned

	mu       sync.Mutex
	conn     net.Conn
	down     bool // with kept only: conn has ended, the attendant makes another
	accepted wire.AcceptedPush
	window   uint64 // most samples without an ack, at least 1
	sent     uint64 // samples taken from the caller
	wired    uint64 // of those, samples whose writing has begun (on this connection); the rest lie in buf or kept
	acked    uint64
	buf      []byte     // without kept: taken and not being written; starts inside a sample after an interruption
	spare    []byte     // the other send buffer; nil while it is being written
	writing  bool       // somebody writes to conn without holding mu
	quiet    sync.Cond  // writing has become false
	waiting  bool       // the pushing goroutine sleeps on wake
	wakeAt   uint64     // and wants to be woken by this many acks
	writeErr error      // a write failed; the attendant finds out why the connection ended
	err      error      // why the stream ended
	closed   bool       // Close or Abort was called
	note     *wire.Note // the daemon has waited for a free place since before the next ack; nil: not that we know
	refused  *wire.Note // the last step that it refused
	stats    Stats

	// Of kept only: sample i of ours has the number i+shift in the daemon's count of the session.
	shift  uint64
	begun  uint64 // samples whose writing has ever begun
	gaps   []LostError
	outage outage

	watched     <-chan struct{} // Done of the context that interrupts writes
	watchedConn net.Conn        // to this connection
	unwatch     func() bool

	vec     net.Buffers // of the pushing goroutine: what writeDirect has yet to write
	vecRoom [][]byte
}

// Stats is what a Producer has done so far.
type Stats struct {
	Sent         uint64        // samples taken from the caller
	Acked        uint64        // samples the daemon has acked, or holds
	Buffered     uint64        // samples taken whose writing has not begun
	UnackedBytes int64         // bytes of the samples taken and not acked
	KeptBytes    int64         // memory set aside to send them again: the bytes of the first window; 0 without a session
	SampleBytes  int64         // bytes of one sample
	Window       uint64        // most samples without an ack
	Writes       uint64        // writes to the connection
	Waits        uint64        // times the pushing goroutine slept: for acks, or for the connection
	Waited       time.Duration // how long it slept
	Reconnects   uint64        // connections made after the first
	Resent       uint64        // samples written again, whole or in part
	Replays      uint64        // of a StepProducer: transactions sent again from their beginning, since the daemon had lost what it acked
	Lost         uint64        // samples acked that the daemon did not hold later; see Config.ContinueAfterLoss
}

// Sent is the number of samples that this Producer has taken.
func (p *Producer) Sent() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sent
}

// Acked is the number of samples of this Producer that the daemon has acked, or said after a reconnect that it holds: the first ones
// of those sent.
func (p *Producer) Acked() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.acked
}

// Held is the number of samples of the session that the daemon held when Dial returned; push those after them.
func (p *Producer) Held() uint64 { return p.first }

// Accepted is the daemon's last reply: what was agreed.
func (p *Producer) Accepted() wire.AcceptedPush {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}

// Spec is the layout of the samples.
func (p *Producer) Spec() *spec.Spec { return p.spec }

// Stats returns the counts so far.
func (p *Producer) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Sent, s.Acked, s.Buffered = p.sent, p.acked, p.sent-p.wired
	s.SampleBytes, s.Window = p.sampleBytes, p.window
	s.UnackedBytes = int64(p.sent-p.acked) * p.sampleBytes
	if p.kept != nil {
		s.KeptBytes = int64(len(p.kept.mem))
	}
	return s
}

// Flush sends what is buffered and returns when every sample sent is acked.
func (p *Producer) Flush(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.flush(ctx, "flush")
}

// flush wants mu.
func (p *Producer) flush(ctx context.Context, op string) error {
	for p.acked < p.sent {
		if err := p.usable(ctx, op); err != nil {
			return err
		}
		if p.sendable() {
			if err := p.writeBuffered(ctx, op); err != nil {
				return err
			}
			continue
		}
		if err := p.sleep(ctx, op, p.sent); err != nil {
			return err
		}
	}
	return nil
}

// Close flushes, tells the daemon that no sample follows, waits until it has closed its side too, and frees the
// connection whatever happens. An error means that samples may be lost (Acked says from where on), or that ctx ended before the
// daemon closed its side. Closing again does nothing.
func (p *Producer) Close(ctx context.Context) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	err := p.flush(ctx, "close")
	half := err == nil && p.err == nil && !p.closed && !p.down
	conn := p.conn
	p.closed = true
	p.mu.Unlock()
	if half {
		err = p.awaitEnd(ctx, conn)
	}
	p.release()
	return err
}

// awaitEnd closes the writing side and waits for the end of the acks. All samples are acked, so an end of any kind will do.
func (p *Producer) awaitEnd(ctx context.Context, conn net.Conn) error {
	if w, ok := conn.(interface{ CloseWrite() error }); !ok || w.CloseWrite() != nil {
		return nil
	}
	select {
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return &waitError{ctx, "client: close: all samples are acked, but the daemon did not close its side"}
	}
}

// Abort ends the connection at once: buffered and unacked samples may be lost, and a call that blocks returns an error
// that wraps os.ErrClosed. It may be called from any goroutine and more than once.
func (p *Producer) Abort() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.release()
}

// release closes the connection and waits for both goroutines. closed is set, so that none is made any more.
func (p *Producer) release() {
	p.die()
	p.mu.Lock()
	p.conn.Close() // what it returns is of no use: all that matters was flushed or given up
	p.mu.Unlock()
	<-p.ended
	<-p.writerEnded
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watch(context.Background()) // let go of the last context
}

// usable returns why nothing can be pushed any more, or nil. It wants mu. If a write failed, it waits until the ack reader
// has found the reason, which the daemon may have sent before it closed; where another connection can be made there is no need to.
func (p *Producer) usable(ctx context.Context, op string) error {
	for p.kept == nil && p.writeErr != nil && p.err == nil {
		if err := p.sleep(ctx, op, never); err != nil {
			return err
		}
	}
	switch {
	case p.err != nil:
		return fmt.Errorf("client: %s: %w", op, p.err)
	case p.closed:
		return fmt.Errorf("client: %s: %w", op, os.ErrClosed)
	case ctx.Err() != nil:
		return p.waited(ctx, op)
	}
	return nil
}

// never is a number of acks that does not come.
const never = ^uint64(0)

// sleep lets go of mu until wakeAt samples are acked, a write is over or the connection has ended; its caller looks
// again. It returns an error if ctx ends first.
func (p *Producer) sleep(ctx context.Context, op string, wakeAt uint64) error {
	select {
	case <-p.wake: // of an earlier sleep that its context ended
	default:
	}
	p.waiting, p.wakeAt = true, wakeAt
	p.stats.Waits++
	p.mu.Unlock()
	began := time.Now()
	var err error
	select {
	case <-p.wake:
	case <-ctx.Done():
		err = ctx.Err()
	}
	took := time.Since(began)
	p.mu.Lock()
	p.waiting = false
	p.stats.Waited += took
	if err != nil {
		return p.waited(ctx, op)
	}
	return nil
}

// rouse wakes the pushing goroutine if it sleeps. It wants mu.
func (p *Producer) rouse() {
	if !p.waiting {
		return
	}
	p.waiting = false
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// waited says what the call was waiting for when its context ended. It wants mu.
func (p *Producer) waited(ctx context.Context, op string) error {
	what := fmt.Sprintf("client: %s: %d samples sent, %d acked, window %d", op, p.sent, p.acked, p.window)
	switch {
	case p.down:
		return &ReconnectingError{p.outage.began, p.outage.tries, p.outage.last, what, ctx}
	case p.note != nil && timeout(ctx):
		return newFullError(ctx, p.note, what)
	case p.acked < p.sent:
		what += "; the daemon has not acked the rest: its ring may be full because nobody reads the table"
	}
	return &waitError{ctx, what}
}
