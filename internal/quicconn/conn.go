package quicconn

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"

	"github.com/quic-go/quic-go"
)

// Codes with which streams and connections are closed: nothing more than what the bytes on the stream have said already.
const (
	CodeDone        = 0 // in order
	CodeStopped     = 1 // of a stream: nothing more is read, or written
	CodeIdle        = 2 // of a connection: it has no stream
	CodeShutdown    = 3 // of a connection: the daemon is stopping
	CodeConnections = 4 // of a connection: there are too many
)

// Conn is one stream.
type Conn struct {
	*quic.Stream
	of *quic.Conn

	mu      sync.Mutex
	writing int  // writes under way
	written bool // something was
	short   bool // a write did not take all
	ended   bool // by CloseWrite or Close
}

// New returns the stream as a connection.
func New(of *quic.Conn, s *quic.Stream) *Conn { return &Conn{Stream: s, of: of} }

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Stream.Read(b)
	if err != nil {
		err = plain(err)
	}
	return n, err
}

// plain turns an end in order into io.EOF.
func plain(err error) error {
	var closed *quic.ApplicationError
	if errors.As(err, &closed) && closed.Remote && closed.ErrorCode == CodeDone {
		return io.EOF
	}
	return err
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.writing++
	c.mu.Unlock()
	n, err := c.Stream.Write(b)
	c.wrote(n, err)
	return n, err
}

func (c *Conn) wrote(n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writing--
	c.written = c.written || n > 0
	c.short = c.short || err != nil
}

// Offer writes b if that goes without waiting for the peer, else nothing.
func (c *Conn) Offer(b []byte) int {
	if c.TryWriteAll(b) != nil {
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written = true
	return len(b)
}

// CloseWrite tells the peer that nothing more comes. What was written still arrives.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	return c.Stream.Close()
}

// Close ends both directions. The peer is told to send no more. As of a socket, what was written still arrives; but if a write did not take all of its bytes, or waits
// just now, or there was none, the peer is told that this is not all, and may not get what was written either.
func (c *Conn) Close() error {
	c.CancelRead(CodeStopped)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended:
	case c.written && !c.short && c.writing == 0:
		c.ended = true
		_ = c.Stream.Close()
	default:
		c.ended = true
		c.CancelWrite(CodeStopped)
	}
	return nil
}

// LocalAddr returns the QUIC connection's.
func (c *Conn) LocalAddr() net.Addr { return c.of.LocalAddr() }

// RemoteAddr returns where the QUIC connection's peer is just now.
func (c *Conn) RemoteAddr() net.Addr { return c.of.RemoteAddr() }

// ConnectionState returns that of the QUIC connection's TLS, which all of its streams have in common.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.of.ConnectionState().TLS }

// Ready tells whether a Read would return at once. It says no: a Read takes all that has come, so that asking between two of them is of no use.
func (c *Conn) Ready() bool { return false }

// HungUp tells whether nothing that is written will arrive any more: the peer wants no more of this stream, or its connection is over.
func (c *Conn) HungUp() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.ended && c.Context().Err() != nil
}
