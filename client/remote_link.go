//go:build linux

package client

import (
	"bufio"
	"context"
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
	switch c := conn.(type) {
	case *net.TCPConn:
		l.raw, _ = c.SyscallConn()
	case *net.UnixConn:
		l.raw, _ = c.SyscallConn()
	}
	l.pollFn = l.look
	return l
}

// hungUp tells whether the other side of a socket has ended it, though not all that it sent may be read yet. False where the connection is no socket: then what was read of it
// was copied when it was sent.
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
