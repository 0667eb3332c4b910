package tcpingest

import (
	"errors"
	"io"
	"syscall"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/wire"
)

const (
	// largeHellos is how many hellos of more than wire.HelloBytesSmall are read at a time, of peers that are not exempt: others wait. So strangers make the daemon hold little more
	// than that times the largest hello, beside half_open small ones.
	largeHellos = 8
	// passingBy is how long a peer may stay that says nothing and goes again, as checks of a port do, and nothing is remembered of it.
	passingBy = time.Second
)

// greet lets the peer shake hands and returns its hello; nil if it was not let in, of which it was told.
func (s *Server) greet(c *conn) *wire.Hello {
	began := time.Now()
	_ = c.SetDeadline(began.Add(s.cfg.HandshakeTimeout))
	if c.stopping.Load() {
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
	first := &counting{Reader: c.netConn}
	if secure, ok := c.netConn.(*tlsConn); ok {
		if !s.secure(c, secure, began) {
			return nil
		}
		first.n++ // it has said something
	}
	hello, frame, err := wire.ReadHelloFrameAsking(first, func(int) *wire.Refusal { return s.awaitLarge(c, began) })
	var refusal *wire.Refusal
	switch {
	case errors.As(err, &refusal):
		switch {
		case refusal.Code == wire.CodeShuttingDown || refusal.Code == wire.CodeTooManyConnections:
		case c.stopping.Load():
			refusal = stopping()
		default:
			c.visit.Failed() // also of a bad option: nothing is known of the peer yet
		}
		s.refuse(c, refusal)
		return nil
	case err != nil:
		s.unheard(c, err, first.n == 0, began)
		return nil
	}
	if !s.admit(c, hello, frame) {
		return nil
	}
	c.readLarge(false)
	return hello
}

// counting counts the bytes that a peer has said.
type counting struct {
	io.Reader
	n int
}

func (r *counting) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	r.n += n
	return n, err
}

// unheard ends a handshake whose peer went away, by err. Not to come to the end of it is a failure, but of those who only passed by.
func (s *Server) unheard(c *conn, err error, silent bool, began time.Time) {
	if silent {
		c.visit.Passed(time.Since(began), s.cfg.passingBy)
	} else {
		c.visit.Failed()
	}
	if err == io.EOF {
		s.counters.Ended.Add(ingest.EndClean)
	} else {
		s.counters.Ended.Add(ingest.EndReset)
	}
}

// wentAway tells the end of a connection by its peer from other errors.
func wentAway(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// awaitLarge waits for the place of a large hello, as long as the handshake may last.
func (s *Server) awaitLarge(c *conn, began time.Time) *wire.Refusal {
	if c.visit == nil {
		return nil
	}
	over := time.NewTimer(time.Until(began.Add(s.cfg.HandshakeTimeout)))
	defer over.Stop()
	select {
	case s.large <- struct{}{}:
		c.readLarge(true)
		return nil
	case <-over.C:
		return wire.Refuse(wire.CodeTooManyConnections, "too many large hellos are being read; try again")
	case <-s.halt:
		return stopping()
	}
}

func stopping() *wire.Refusal { return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping") }

// readLarge notes that the connection has the place of a large hello, or gives back the one that it has.
func (c *conn) readLarge(has bool) {
	if c.large && !has {
		<-c.server.large
	}
	c.large = has
}

// slow lets a peer wait from whose address handshakes failed, before anything of it is read.
func (s *Server) slow(c *conn) {
	if c.visit == nil || c.visit.Wait <= 0 {
		return
	}
	over := time.NewTimer(c.visit.Wait)
	defer over.Stop()
	select {
	case <-over.C:
	case <-s.halt:
	}
}

// admit asks the peer who it is, and tells it if that is not enough.
func (s *Server) admit(c *conn, hello *wire.Hello, frame []byte) bool {
	peer, err := auth.PeerOf(c.netConn)
	if err != nil {
		s.refuse(c, wire.Refuse(wire.CodeInternal, "this connection's TLS says nothing that a token can be bound to"))
		return false
	}
	id, refusal := s.cfg.Gate.Admit(c.netConn, hello, frame, peer)
	if refusal != nil {
		if refusal.Code == wire.CodeHandshakeTimeout && c.stopping.Load() {
			refusal = stopping()
		}
		s.refuse(c, refusal)
		return false
	}
	c.token = id.Token
	return true
}
