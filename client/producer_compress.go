package client

import (
	"net"
	"time"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// compressBytes are compressed at a time, and written before the next.
const compressBytes = 256 << 10

// compressedConn compresses what is written to it. Each Write flushes, so what it took is under way when it returns without an error.
//
// A write that is interrupted cannot take back what it has compressed, so it says that all but the last byte of that was written. The Producer keeps that byte and
// writes it again, first of all; then the rest of the compressed bytes goes out, and the byte is left out. The daemon cannot ack that byte's sample before: the
// block that has it is not whole.
type compressedConn struct {
	net.Conn
	to   *compress.Writer
	out  []byte // compressed and not written
	owed bool   // the next byte given is compressed already
}

func newCompressedConn(conn net.Conn, kind wire.Compression, s *spec.Spec) (*compressedConn, error) {
	c := &compressedConn{Conn: conn}
	w, err := compress.NewWriter((*pending)(c), kind, s)
	c.to = w
	return c, err
}

// pending collects compressed bytes.
type pending compressedConn

func (p *pending) Write(b []byte) (int, error) {
	p.out = append(p.out, b...)
	return len(b), nil
}

func (c *compressedConn) Write(b []byte) (int, error) {
	n := 0
	for n < len(b) {
		if err := c.send(); err != nil {
			return n, err
		}
		if c.owed {
			c.owed = false
			n++
			continue
		}
		some := b[n:min(n+compressBytes, len(b))]
		if _, err := c.to.Write(some); err != nil {
			return n, err
		}
		if err := c.to.Flush(); err != nil {
			return n, err
		}
		n += len(some)
		if err := c.send(); err != nil {
			c.owed = true
			return n - 1, err
		}
	}
	return n, nil
}

// send writes what is compressed.
func (c *compressedConn) send() error {
	for sent := 0; sent < len(c.out); {
		n, err := c.Conn.Write(c.out[sent:])
		if sent += n; err != nil && sent < len(c.out) {
			c.out = c.out[:copy(c.out, c.out[sent:])]
			return err
		}
	}
	c.out = c.out[:0]
	return nil
}

// CloseWrite ends the compressed stream and then the writing side. All samples were acked, so there is room for the little that is left.
func (c *compressedConn) CloseWrite() error {
	if err := c.to.Close(); err != nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(reasonTimeout)); err != nil {
		return err
	}
	if err := c.send(); err != nil {
		return err
	}
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return c.Close()
}
