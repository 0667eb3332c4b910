package tcpingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/wire"
)

// netConn is what all connections offer.
type netConn interface {
	net.Conn
	CloseWrite() error
}

// conn is one connection. Its fields belong to its goroutine but for those marked.
type conn struct {
	netConn
	server *Server
	from   source
	id     uint64
	opened time.Time
	visit  *bans.Visit // its handshake
	large  bool        // it has a place of largeHellos
	meet   func()      // called when it is let in; may be nil
	token  string      // with which it was let in

	state      atomic.Int64 // state<<56 | low bits of Unix nanoseconds since opened; read by status
	samples    atomic.Uint64
	bytes      atomic.Uint64
	agreed     atomic.Pointer[agreed]
	stopping   atomic.Bool // set by Shutdown
	refused    bool        // it is being told why it is refused; under server.mu
	readUntil  time.Time   // the read deadline in force
	writeUntil time.Time
	readFor    time.Duration // how far ahead readUntil was set

	// ctx ends when the connection may wait no longer: by giveUp, by the end of its peer (see watch), or with server.hurry.
	ctx     context.Context
	endWait context.CancelFunc
	taken   atomic.Bool // set by giveUp
	gone    atomic.Bool // set by watch
	ending  sync.Mutex
	settled bool // nothing more will be taken of the peer, and giveUp has nothing left to do; under ending
	watch   watch

	vec vector // where the next read goes; kept here so that it allocates nothing
}

// agreed is what the handshake settled, for status.
type agreed struct {
	table, session, client string
	token                  string
	ack                    wire.AckMode
	stream                 uint64
}

// What a connection is doing.
const (
	stateHandshake = iota
	stateReceiving
	stateWaitingForData
	stateWaitingForSlot
	stateClosing
)

var stateNames = [...]string{"handshake", "receiving", "waiting-for-data", "waiting-for-slot", "closing"}

const stateShift = 56

func newConn(s *Server, nc netConn, id uint64) (*conn, error) {
	c := &conn{netConn: nc, server: s, id: id, opened: time.Now()}
	switch nc := nc.(type) {
	case Stream:
		c.from = newAhead(nc, c)
	case syscall.Conn:
		socket, err := newSocket(nc)
		if err != nil {
			return nil, err
		}
		c.from = socket
	default:
		return nil, fmt.Errorf("tcpingest: connections of type %T cannot be served", nc)
	}
	c.ctx, c.endWait = context.WithCancel(s.hurry)
	return c, nil
}

// peer is where the connection's other side is just now: over QUIC it may move. Of unix sockets, which have no name there, it is what they are.
func (c *conn) peer() string {
	if name := c.netConn.RemoteAddr().String(); name != "" && name != "@" {
		return name
	}
	return c.netConn.LocalAddr().Network()
}

func (c *conn) setState(state int) {
	c.state.Store(int64(state)<<stateShift | int64(time.Since(c.opened)))
}

// status is called from other goroutines.
func (c *conn) status() ingest.Connection {
	state := c.state.Load()
	st := ingest.Connection{
		ID:      c.id,
		Peer:    c.peer(),
		State:   stateNames[state>>stateShift],
		Since:   c.opened.Add(time.Duration(state & (1<<stateShift - 1))),
		Opened:  c.opened,
		Samples: c.samples.Load(),
		Bytes:   c.bytes.Load(),
	}
	if a := c.agreed.Load(); a != nil {
		st.Table, st.Session, st.Client, st.Token, st.Stream, st.Ack = a.table, a.session, a.client, a.token, a.stream, string(a.ack)
	}
	return st
}

// stop makes the connection end at the next sample boundary. Called by Shutdown.
func (c *conn) stop() {
	c.stopping.Store(true)
	_ = c.SetReadDeadline(time.Unix(1, 0))
}

// giveUp makes the connection end at once, since another one has asked for its session: neither a read, nor a write, nor a wait for a slot holds that up.
// Called from any goroutine.
func (c *conn) giveUp() {
	c.taken.Store(true)
	c.endWait()
	c.ending.Lock()
	defer c.ending.Unlock()
	if !c.settled {
		_ = c.SetDeadline(time.Unix(1, 0))
	}
}

// settle says that nothing more will be taken of the peer: from here on giveUp changes no deadline.
func (c *conn) settle() {
	c.ending.Lock()
	defer c.ending.Unlock()
	c.settled, c.writeUntil = true, time.Time{}
}

// interrupted says why a wait ended that neither the peer nor a timeout did.
func (c *conn) interrupted() error {
	switch {
	case c.taken.Load():
		return errTaken
	case c.gone.Load():
		return errGone
	}
	return errInterrupted
}

// allowRead sets the read deadline about d ahead, for a read that may wait. A deadline costs a timer, so one that is near enough stays.
func (c *conn) allowRead(d time.Duration) {
	now := time.Now()
	if d == c.readFor && c.readUntil.Sub(now) > d-d/8 {
		return
	}
	c.readFor, c.readUntil = d, now.Add(d)
	_ = c.SetReadDeadline(c.readUntil)
	if c.stopping.Load() || c.taken.Load() { // either may have come just before
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
}

// What a wait returns when somebody else wants the connection to end.
var (
	errInterrupted = errors.New("tcpingest: stopping")
	errTaken       = errors.New("tcpingest: the session was taken")
	errGone        = errors.New("tcpingest: the peer is gone")
)

// atHand returns how many bytes can be read without waiting, 0 when the first has not come. io.EOF is the peer's end.
func (c *conn) atHand() (int, error) { return c.result(c.from.atHand()) }

// wait is atHand that waits, until the read deadline.
func (c *conn) wait() (int, error) { return c.result(c.from.wait()) }

// readNow reads into c.vec what is at hand, 0 bytes when it would have to wait.
func (c *conn) readNow() (int, error) { return c.result(c.from.readNow(&c.vec)) }

// readWait is readNow that waits for the first byte, until the read deadline.
func (c *conn) readWait() (int, error) { return c.result(c.from.readWait(&c.vec)) }

// result tells a deadline that passed from one that was set to end the wait.
func (c *conn) result(n int, err error) (int, error) {
	if err != nil && (c.stopping.Load() || c.taken.Load()) && errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, c.interrupted()
	}
	return n, err
}

// ackBytes is what acks are written from.
var ackBytes = func() []byte {
	b := make([]byte, 16<<10)
	for i := range b {
		b[i] = wire.Ack
	}
	return b
}()

// ack writes n acks and returns how many it could not write.
func (c *conn) ack(n int64) (int64, error) {
	now, patience := time.Now(), c.server.cfg.AckTimeout
	if left := c.writeUntil.Sub(now); left < patience*7/8 || left > patience { // more than that was for the handshake
		c.allowWrite(now.Add(patience))
	}
	if err := c.finishNote(); err != nil {
		return n, err
	}
	for n > 0 {
		k, err := c.Write(ackBytes[:min(n, int64(len(ackBytes)))])
		n -= int64(k)
		if err != nil {
			return n, err
		}
	}
	return 0, nil
}

// allowWrite sets the write deadline.
func (c *conn) allowWrite(until time.Time) {
	c.ending.Lock()
	defer c.ending.Unlock()
	c.writeUntil = until
	if c.taken.Load() && !c.settled {
		until = time.Unix(1, 0)
	}
	_ = c.SetWriteDeadline(until)
}

// dismiss tells the peer why it is ended, or nothing if say is empty, and closes so that the peer can read it: our side first, then
// what it still sends is read and dropped for a while, since closing over unread bytes would reset the connection and take the reason along.
func (c *conn) dismiss(ctx context.Context, say []byte) {
	defer c.Close()
	if !c.tell(say) {
		return
	}
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	_, _ = io.CopyN(io.Discard, onlyReader{c.netConn}, lingerBytes)
}

// tell writes the last that the peer is told, and ends our side.
func (c *conn) tell(say []byte) bool {
	c.setState(stateClosing)
	_ = c.SetDeadline(time.Now().Add(c.server.cfg.LingerTimeout))
	if err := c.finishNote(); err != nil {
		return false
	}
	if len(say) > 0 {
		if _, err := c.Write(say); err != nil {
			return false
		}
	}
	return c.CloseWrite() == nil
}

// lingerBytes is the most that is read and dropped while a peer reads why it was ended.
const lingerBytes = 64 << 20

// onlyReader hides the connection's other methods, so that the copy goes through a small buffer and no splice.
type onlyReader struct{ io.Reader }
