//go:build linux

package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/pollfd"
	"github.com/ingestd/ingestd/internal/sendfile"
	"github.com/ingestd/ingestd/wire"
)

// trainerLink is one connection. Its goroutine reads; answers are written by who releases.
type trainerLink struct {
	conn net.Conn
	in   io.Reader

	raw    syscall.RawConn // nil: no socket
	ended  bool            // the result of hungUp
	pollFn func(fd uintptr)

	mu     sync.Mutex
	out    sendfile.Sender
	number [wire.AnswerBytes]byte
}

const (
	// answerTimeout is how long an answer may not get away. The daemon reads them at once, and they are few bytes.
	answerTimeout = 10 * time.Second
	// linkBytes is read at once where columns are small.
	linkBytes = 16 << 10
)

func newTrainerLink(conn net.Conn) *trainerLink {
	l := &trainerLink{conn: conn, in: bufio.NewReaderSize(conn, linkBytes), out: sendfile.Sender{Conn: conn, Stall: answerTimeout}}
	l.raw, _ = socketOf(conn)
	l.pollFn = l.look
	return l
}

// socketOf returns the socket of a connection whose bytes come as they were sent; nil where they are encrypted on their way: then they were copied when they were sent. ok is false if it is
// neither, and nobody can tell whether the daemon has ended it.
func socketOf(conn net.Conn) (raw syscall.RawConn, ok bool) {
	for {
		if _, encrypted := conn.(interface{ ConnectionState() tls.ConnectionState }); encrypted {
			return nil, true
		}
		switch c := conn.(type) {
		case syscall.Conn:
			raw, err := c.SyscallConn()
			return raw, err == nil
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil, false
		}
	}
}

// hungUp tells whether the other side of a socket has ended it, though not all that it sent may be read yet. False where the connection is encrypted.
func (l *trainerLink) hungUp() bool {
	if l.raw == nil {
		return false
	}
	return l.raw.Control(l.pollFn) != nil || l.ended // the error: we have closed it
}

func (l *trainerLink) look(fd uintptr) {
	l.ended = pollfd.Now(fd, unix.POLLRDHUP) != 0
}

// answer tells the daemon. If it cannot be told the connection is closed, which the goroutine that receives sees.
func (l *trainerLink) answer(number uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	binary.LittleEndian.PutUint64(l.number[:], number)
	if err := l.out.Write(context.Background(), l.number[:]); err != nil {
		l.conn.Close()
	}
}

// leave tells the daemon that of the batches that came over this connection only so many were begun, after all answers. Nothing is written any more.
func (l *trainerLink) leave(begun uint64) {
	_ = l.conn.SetWriteDeadline(time.Now().Add(partingTimeout)) // also of an answer that is stuck
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.conn.SetWriteDeadline(time.Now().Add(partingTimeout))
	_, _ = l.conn.Write(binary.LittleEndian.AppendUint64(nil, wire.AnswerLeaves|begun))
	if half, ok := l.conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}
