package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// dialTLS connects and shakes hands.
func (t *TLS) dialTLS(ctx context.Context, base dialer, address string) (net.Conn, error) {
	cfg, err := t.config(address)
	if err != nil {
		return nil, err
	}
	below, err := base(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	out := newOutbox(below)
	c := &tlsConn{Conn: tls.Client(out, cfg), out: out}
	if err := c.HandshakeContext(ctx); err != nil {
		_ = c.Close()
		return nil, err
	}
	if got := c.ConnectionState().NegotiatedProtocol; got != wire.ALPN { // package tls takes a server that answers nothing
		_ = c.Close()
		return nil, fmt.Errorf("%w: TLS was agreed on for the protocol %q, and not for %s", wire.ErrProtocol, got, wire.ALPN)
	}
	return c, nil
}

// tlsConn is a connection with TLS whose writes may be interrupted by a deadline and then go on, as those of sockets may. Package tls cannot do that: a record must go out whole.
// So records go through an outbox, and one is begun only when that has room for it.
type tlsConn struct {
	*tls.Conn
	out *outbox
}

// recordBytes is the most that one record of TLS holds.
const recordBytes = 16 << 10

// Write implements net.Conn. As with a socket, what it took is on its way, and no more.
func (c *tlsConn) Write(b []byte) (written int, err error) {
	for written < len(b) {
		if err := c.out.awaitRoom(); err != nil {
			return written, err
		}
		n, err := c.Conn.Write(b[written:min(len(b), written+recordBytes)])
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// outboxBytes is how much waits in an outbox before it is full; as much again is being written.
const outboxBytes = 128 << 10

// outbox is a connection whose writes never wait: a goroutine of its own makes them.
type outbox struct {
	net.Conn

	mu       sync.Mutex
	waiting  []byte // taken and not being written yet
	spare    []byte
	err      error // of a write
	deadline time.Time
	closing  bool
	changed  chan struct{} // closed at a change that somebody waits for
	work     chan struct{} // that there is something to do; of capacity 1
}

func newOutbox(c net.Conn) *outbox {
	o := &outbox{Conn: c, changed: make(chan struct{}), work: make(chan struct{}, 1)}
	go o.run()
	return o
}

// run writes until Close, what was taken before it included.
func (o *outbox) run() {
	defer o.Conn.Close()
	for range o.work {
		o.mu.Lock()
		out := o.waiting
		o.waiting, o.spare = o.spare[:0], nil
		failed, closing := o.err != nil, o.closing
		o.tell()
		o.mu.Unlock()
		var err error
		if !failed && len(out) > 0 {
			_, err = o.Conn.Write(out)
		}
		o.mu.Lock()
		o.spare = out
		if err != nil {
			o.err = err
			o.tell()
		}
		o.mu.Unlock()
		if closing {
			return
		}
	}
}

// tell wakes who waits. It wants mu.
func (o *outbox) tell() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *outbox) wake() {
	select {
	case o.work <- struct{}{}:
	default: // it will look
	}
}

// Write takes all of b.
func (o *outbox) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return 0, o.err
	}
	if o.closing {
		return 0, net.ErrClosed
	}
	o.waiting = append(o.waiting, b...)
	o.wake()
	return len(b), nil
}

// Read implements net.Conn.
func (o *outbox) Read(b []byte) (int, error) {
	n, err := o.Conn.Read(b)
	if err != nil && n == 0 {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.closing {
			err = net.ErrClosed
		}
	}
	return n, err
}

// awaitRoom waits until another record may be taken, until the deadline.
func (o *outbox) awaitRoom() error {
	for {
		o.mu.Lock()
		full, err, closing, deadline, changed := len(o.waiting) >= outboxBytes, o.err, o.closing, o.deadline, o.changed
		o.mu.Unlock()
		left := time.Until(deadline)
		switch {
		case err != nil:
			return err
		case closing:
			return net.ErrClosed
		case !deadline.IsZero() && left <= 0:
			return os.ErrDeadlineExceeded
		case !full:
			return nil
		case deadline.IsZero():
			<-changed
			continue
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// SetWriteDeadline is for awaitRoom: what was taken is written whatever it says.
func (o *outbox) SetWriteDeadline(t time.Time) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.deadline = t
	o.tell()
	return nil
}

// SetDeadline implements net.Conn.
func (o *outbox) SetDeadline(t time.Time) error {
	_ = o.SetWriteDeadline(t)
	return o.SetReadDeadline(t)
}

// closeTimeout is how long a closed connection goes on writing what was taken.
const closeTimeout = time.Second

// Close gives the peer what was taken, if it takes it soon, but does not wait for that.
func (o *outbox) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing {
		return net.ErrClosed
	}
	o.closing = true
	o.tell()
	_ = o.Conn.SetReadDeadline(past)
	_ = o.Conn.SetWriteDeadline(time.Now().Add(closeTimeout))
	o.wake()
	return nil
}
