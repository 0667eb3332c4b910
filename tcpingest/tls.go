package tcpingest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
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

// Close says so to the peer, unless that would have to be waited for: the peer may be one that does not read.
func (t *tlsConn) Close() error {
	if pollfd.Conn(t.socket.raw, unix.POLLOUT)&unix.POLLOUT == 0 {
		return t.NetConn().Close()
	}
	return t.Conn.Close()
}

// SetLinger is that of a TCP socket below: with 0, what was not sent when it is closed never is.
func (t *tlsConn) SetLinger(sec int) error {
	if c, ok := t.NetConn().(*net.TCPConn); ok {
		return c.SetLinger(sec)
	}
	return nil
}

// secure shakes hands, within the deadline in force.
func (s *Server) secure(c *conn, t *tlsConn, began time.Time) bool {
	err := t.HandshakeContext(c.ctx)
	state := t.ConnectionState()
	switch {
	case err == nil && state.NegotiatedProtocol == wire.ALPN:
		return true
	case err == nil:
		err = fmt.Errorf("the client does not ask for the protocol %s (ALPN)", wire.ALPN)
	case wentAway(err) && state.Version == 0: // which its first message settles
		s.unheard(c, err, true, began)
		return false
	}
	reason := RefusedTLS(err)
	if c.stopping.Load() { // which ends it, too
		reason = string(wire.CodeShuttingDown)
	} else {
		c.visit.Failed()
	}
	s.counters.Refused.Add(reason)
	s.cfg.Log.Info("no TLS", "component", "tcpingest", "peer", c.peer(), "reason", reason, "err", err)
	return false
}

// RefusedTLS is as what a handshake of TLS counts that failed with err.
func RefusedTLS(err error) string {
	var timeout interface{ Timeout() bool }
	var certificate *tls.CertificateVerificationError
	var alert *net.OpError
	switch {
	case errors.As(err, &certificate):
		return ingest.RefusedCertificate
	case errors.As(err, &alert) && alert.Op == "remote error": // which is what package tls calls alerts of the peer
		return ingest.RefusedByPeer
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout():
		return string(wire.CodeHandshakeTimeout)
	}
	return ingest.RefusedTLS
}

// NewTLSListener makes a listener of TLS for Serve of one of sockets.
func NewTLSListener(l net.Listener, c *tls.Config) net.Listener {
	return tls.NewListener(l, TLSConfig(c))
}

var _ Stream = (*tlsConn)(nil)

var _ interface{ HandshakeContext(context.Context) error } = (*tlsConn)(nil)
