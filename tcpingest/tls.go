package tcpingest

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/pollfd"
	"github.com/ingestd/ingestd/wire"
)

// TLSConfig completes what a listener offers: TLS 1.3 only, under the protocol's name. Which certificates there are and which are asked for is the caller's to say, also for each
// client (GetConfigForClient).
// No ticket lets a client in later without its certificate being looked at.
func TLSConfig(base *tls.Config) *tls.Config {
	c := base.Clone()
	c.MinVersion, c.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
	c.NextProtos = []string{wire.ALPN}
	c.SessionTicketsDisabled = true
	if choose := base.GetConfigForClient; choose != nil {
		c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if chosen != nil {
				chosen = TLSConfig(chosen)
			}
			return chosen, err
		}
	}
	return c
}

// tlsConn is TLS over a socket.
type tlsConn struct {
	*tls.Conn
	socket *socket
}

func newTLSConn(c *tls.Conn) (*tlsConn, error) {
	below, ok := c.NetConn().(syscall.Conn)
	if !ok {
		return nil, errors.New("tcpingest: TLS over what is no socket")
	}
	s, err := newSocket(below)
	return &tlsConn{c, s}, err
}

// Ready implements Stream. What the socket holds may be less than a record; package tls may hold one that the socket no longer does.
func (t *tlsConn) Ready() bool {
	n, err := t.socket.atHand()
	return n > 0 && err == nil
}

// HungUp implements Stream.
func (t *tlsConn) HungUp() bool { return t.socket.hungUp() }

// Offer implements Stream. A write that TLS began must go out whole, so it is not begun unless the socket has room for more than a note.
func (t *tlsConn) Offer(b []byte) int {
	if pollfd.Conn(t.socket.raw, unix.POLLOUT)&unix.POLLOUT == 0 {
		return 0
	}
	_ = t.SetWriteDeadline(time.Now().Add(offerTimeout))
	n, _ := t.Write(b)
	return n
}

// offerTimeout ends the connection of who let a socket with room stand still.
const offerTimeout = time.Second

// secure shakes hands, within the deadline in force. A peer that went away before it said anything is not counted as a failure.
func (s *Server) secure(c *conn, t *tlsConn) bool {
	err := t.HandshakeContext(c.ctx)
	if err == nil {
		return true
	}
	if errors.Is(err, io.EOF) && t.ConnectionState().Version == 0 { // which its first message settles
		s.counters.Ended.Add(ingest.EndClean)
		return false
	}
	if !c.stopping.Load() { // which ends it, too
		c.visit.Failed()
	}
	s.counters.Refused.Add(ingest.RefusedTLS)
	s.cfg.Log.Info("no TLS", "component", "tcpingest", "peer", c.peer, "err", err)
	return false
}

// NewTLSListener makes a listener of TLS for Serve of one of sockets.
func NewTLSListener(l net.Listener, c *tls.Config) net.Listener {
	return tls.NewListener(l, TLSConfig(c))
}

var _ Stream = (*tlsConn)(nil)

var _ interface{ HandshakeContext(context.Context) error } = (*tlsConn)(nil)
