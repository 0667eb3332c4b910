package quicingest

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/wire"
)

// conn is one connection of QUIC, from its first packet on. It is a stranger's until somebody was let in on a stream of it: a handshake of its address that is half open.
type conn struct {
	*quic.Conn // nil until QUIC's handshake is done
	server     *Server
	peer       net.Addr // where it began

	mu       sync.Mutex
	verified bool // the peer is where its packets say
	visit    *bans.Visit
	opened   time.Time   // when QUIC's handshake was done; zero: it is not
	streams  int         // just now
	used     bool        // there was one
	known    bool        // it is no stranger's
	unused   time.Time   // known: when its last stream ended
	timer    *time.Timer // runs expire
	closing  string      // why the daemon closes it, as it is counted
	over     bool        // under server.mu, too
}

type connKey struct{}

var (
	errTooMany  = errors.New("quicingest: too many connections")
	errBanned   = errors.New("quicingest: the address is banned")
	errStopping = errors.New("quicingest: the daemon is stopping")
)

// begin is called before anything is done for a new connection. The context ends with it.
func (s *Server) begin(ctx context.Context, from *quic.ClientInfo) (context.Context, error) {
	c := &conn{server: s, peer: from.RemoteAddr, verified: from.AddrVerified}
	code, err := s.enter(c)
	if err != nil {
		s.refused.Add(string(code))
		return nil, err
	}
	context.AfterFunc(ctx, func() { c.end(context.Cause(ctx)) })
	return context.WithValue(ctx, connKey{}, c), nil
}

// enter counts a new connection, or says why it may not come in. An address that is not verified is not held responsible: anybody could have written it into the packet. When
// RetryAbove handshakes are half open, all are verified before they come here.
func (s *Server) enter(c *conn) (code wire.Code, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopping:
		return wire.CodeShuttingDown, errStopping
	case s.open >= s.cfg.MaxConnections:
		return wire.CodeTooManyConnections, errTooMany
	case !c.verified && s.door.Banned(c.peer):
		return wire.CodeBanned, errBanned
	}
	if c.verified {
		switch c.visit, code = s.door.Enter(c.peer); code {
		case "":
		case wire.CodeBanned:
			return code, errBanned
		default:
			return code, errTooMany
		}
	}
	s.open++
	s.halfOpen.Add(1)
	return "", nil
}

// start gives a connection whose handshake is done its goroutine.
func (s *Server) start(qc *quic.Conn) {
	c, ok := qc.Context().Value(connKey{}).(*conn)
	if !ok {
		return // it is over
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch reason, code := c.complete(qc, s.stopping); {
	case c.over:
	case reason != "":
		go c.close(reason, code)
	default:
		s.conns[c] = struct{}{}
		s.running.Go(c.run)
	}
}

// complete notes that the handshake is done. It returns why the connection is closed nevertheless, and with which code.
func (c *conn) complete(qc *quic.Conn, stopping bool) (reason string, code quic.ApplicationErrorCode) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return "", 0
	}
	c.Conn, c.opened = qc, time.Now()
	c.server.halfOpen.Add(-1)
	if stopping {
		return string(wire.CodeShuttingDown), quicconn.CodeShutdown
	}
	if !c.verified {
		c.verified = true
		var refused wire.Code
		c.visit, refused = c.server.door.Enter(c.peer)
		return string(refused), quicconn.CodeConnections
	}
	return "", 0
}

// close ends the connection, and counts why.
func (c *conn) close(reason string, code quic.ApplicationErrorCode) {
	c.mu.Lock()
	if c.closing == "" {
		c.closing = reason
	}
	c.mu.Unlock()
	_ = c.CloseWithError(code, closeTexts[code])
}

// closeTexts are what clients are told.
var closeTexts = map[quic.ApplicationErrorCode]string{
	quicconn.CodeIdle:        "nobody used the connection",
	quicconn.CodeShutdown:    "the daemon is stopping",
	quicconn.CodeConnections: "too many connections",
}

// run serves streams until the connection ends.
func (c *conn) run() {
	c.mu.Lock()
	c.timer = time.AfterFunc(time.Until(c.due()), c.expire)
	c.mu.Unlock()
	defer c.timer.Stop()
	var serving sync.WaitGroup
	for {
		st, err := c.AcceptStream(context.Background())
		if err != nil {
			break
		}
		c.use(1)
		serving.Go(func() {
			served := c.server.streams.ServeStream(quicconn.New(c.Conn, st), c.meet)
			if c.use(-1); !served {
				c.dismiss()
			}
		})
	}
	serving.Wait()
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	delete(c.server.conns, c)
}

// due returns when the connection is closed if nothing happens until then; the zero time: never. A stranger has the time of a handshake for its first stream, and no
// more than twice that, and what its address has to wait, until it was let in on one. Others have as long as a stream may be without a sample. c.mu is held.
func (c *conn) due() time.Time {
	cfg := &c.server.cfg.Streams
	switch {
	case c.known && c.streams > 0:
		return time.Time{}
	case c.known:
		return c.unused.Add(max(cfg.IdleTimeout, cfg.LingerTimeout))
	case c.streams == 0:
		return c.opened.Add(cfg.HandshakeTimeout)
	}
	due := c.opened.Add(2 * cfg.HandshakeTimeout)
	if c.visit != nil {
		due = due.Add(c.visit.Wait)
	}
	return due
}

// wait sets the timer for what is due. c.mu is held.
func (c *conn) wait() {
	if due := c.due(); due.IsZero() {
		c.timer.Stop()
	} else {
		c.timer.Reset(time.Until(due))
	}
}

// expire closes the connection, unless it is not due any more.
func (c *conn) expire() {
	c.mu.Lock()
	due := c.due()
	if due.IsZero() || time.Until(due) > 0 {
		c.wait()
		c.mu.Unlock()
		return
	}
	reason := string(wire.CodeHandshakeTimeout)
	if c.known {
		reason = string(wire.CodeIdleTimeout)
	}
	c.mu.Unlock()
	c.close(reason, quicconn.CodeIdle)
}

// use counts streams.
func (c *conn) use(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams += n
	c.used = true
	c.unused = time.Now()
	c.wait()
}

// dismiss ends a stranger's connection of which a stream was closed without a word: its address is banned, or has its hands full. What was sent on that stream would
// stay in memory as long as the connection.
func (c *conn) dismiss() {
	c.mu.Lock()
	known := c.known
	c.mu.Unlock()
	switch {
	case known:
	case c.server.door.Banned(c.peer):
		c.close(string(wire.CodeBanned), quicconn.CodeConnections)
	default:
		c.close(string(wire.CodeTooManyConnections), quicconn.CodeConnections)
	}
}

// meet is called when somebody was let in on a stream.
func (c *conn) meet() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known = true
	c.visit.Leave()
	c.wait()
}

// end is called when the connection is over, however far it got.
func (c *conn) end(why error) {
	s := c.server
	s.mu.Lock()
	c.mu.Lock()
	s.open--
	c.over = true
	if c.opened.IsZero() {
		s.halfOpen.Add(-1)
	}
	end := c.verdict(why, s.stopping)
	visit := c.visit
	if end.failed {
		visit.Failed()
	}
	visit.Leave()
	c.mu.Unlock()
	s.mu.Unlock()
	if end.failed && visit == nil {
		s.door.Failed(c.peer)
	}
	if !end.refused {
		s.ended.Add(end.reason)
		return
	}
	s.refused.Add(end.reason)
	s.cfg.Streams.Log.Info("no connection", "component", "quicingest", "peer", c.peer.String(), "code", end.reason, "err", why)
}

// ending is how a connection is counted.
type ending struct {
	reason  string
	refused bool // it was not of use to anybody; else it ended
	failed  bool // that is held against its address
}

// verdict says how a connection is counted that is over. c.mu is held.
func (c *conn) verdict(why error, stopping bool) ending {
	var closed *quic.ApplicationError // only sent, or taken, when the handshake is done
	if c.opened.IsZero() && !errors.As(why, &closed) {
		reason, ours := unshaken(why, stopping)
		return ending{reason: reason, refused: true, failed: !ours && (c.verified || verifies(why))}
	}
	silent := !c.known && !c.used && !stopping // it had the daemon shake hands, and asked for nothing
	var broken *quic.TransportError
	switch {
	case c.closing != "":
		return ending{reason: c.closing, refused: !c.known, failed: silent && c.closing == string(wire.CodeHandshakeTimeout)}
	case errors.As(why, &closed) && closed.Remote && closed.ErrorCode == quicconn.CodeDone:
		return ending{reason: ingest.EndClean, failed: silent}
	case errors.As(why, &broken) && !broken.Remote: // it does not keep to QUIC
		return ending{reason: string(wire.CodeBadPeer), failed: !c.known}
	}
	return ending{reason: ingest.EndReset, failed: silent}
}

// unshaken says why a handshake came to nothing, and whether the daemon wanted it so.
func unshaken(why error, stopping bool) (reason string, ours bool) {
	var late *quic.HandshakeTimeoutError
	var idle *quic.IdleTimeoutError
	var broken *quic.TransportError
	switch {
	case stopping:
		return string(wire.CodeShuttingDown), true
	case errors.As(why, &late), errors.As(why, &idle):
		return string(wire.CodeHandshakeTimeout), false
	case !errors.As(why, &broken):
	case broken.Remote:
		return ingest.RefusedByPeer, false
	case broken.ErrorCode == quic.ConnectionRefused: // more were done at once than are accepted at once
		return string(wire.CodeTooManyConnections), true
	case certificateAlert(alertOf(broken)):
		return ingest.RefusedCertificate, false
	}
	return ingest.RefusedTLS, false
}

// Alerts of TLS (RFC 8446, 6).
const (
	alertBadCertificate      = 42 // from here on to
	alertUnknownCertificate  = 46 // all about a certificate
	alertUnknownAuthority    = 48
	alertAccessDenied        = 49
	alertDecryptError        = 51
	alertCertificateRequired = 116
)

// alertOf returns the alert with which this side ended the handshake, 0 for none.
func alertOf(e *quic.TransportError) int {
	if e.Remote || !e.ErrorCode.IsCryptoError() {
		return 0
	}
	return int(e.ErrorCode - 0x100) // RFC 9001, 4.8
}

func certificateAlert(alert int) bool {
	return alert >= alertBadCertificate && alert <= alertUnknownCertificate || alert == alertUnknownAuthority || alert == alertAccessDenied
}

// verifies tells whether a handshake failed at something that only a client can have sent that has received what the daemon sent first, so that it is at its address
// (RFC 9000, 8.1): its certificate, that there is none, or a proof.
func verifies(why error) bool {
	var failed *quic.TransportError
	if !errors.As(why, &failed) {
		return false
	}
	alert := alertOf(failed)
	return certificateAlert(alert) || alert == alertCertificateRequired || alert == alertDecryptError
}
