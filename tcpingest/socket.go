package tcpingest

import (
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/pollfd"
)

// source is where the bytes of a connection come from. There are two: a socket, and what was read ahead of another stream. Its methods belong to the connection's
// goroutine, but for the last two, which are the watch's while that goroutine waits for a slot.
type source interface {
	// atHand returns how many bytes can be read without waiting, 0 when the first has not come. io.EOF is the peer's end.
	atHand() (int, error)
	// wait is atHand that waits, until the connection's read deadline.
	wait() (int, error)
	// readNow reads into v what is at hand, 0 bytes when it would have to wait.
	readNow(v *vector) (int, error)
	// readWait is readNow that waits for the first byte, until the read deadline.
	readWait(v *vector) (int, error)
	// more tells whether bytes have come that readNow did not see, so that readWait will not wait for long.
	more() bool

	// hungUp tells whether the connection is over in both directions, so that no ack would arrive.
	hungUp() bool
	// offer writes what goes without waiting for the peer, and returns how much that was.
	offer(b []byte) int
}

// socket is the source of TCP and unix connections. The bytes wait in the kernel, which knows how many there are.
type socket struct {
	raw syscall.RawConn

	// Arguments and results of the callbacks given to raw; kept here so that a read allocates nothing.
	vec            *vector
	got            int
	errno          unix.Errno
	lookFn, takeFn func(fd uintptr)
	waitFn, readFn func(fd uintptr) bool
}

func newSocket(c syscall.Conn) (*socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{raw: raw}
	s.lookFn, s.takeFn, s.waitFn, s.readFn = s.look, s.take, s.tryWait, s.tryRead
	return s, nil
}

func (s *socket) atHand() (int, error) { return s.result(s.raw.Control(s.lookFn)) }

func (s *socket) wait() (int, error) { return s.result(s.raw.Read(s.waitFn)) }

func (s *socket) readNow(v *vector) (int, error) {
	s.vec = v
	return s.result(s.raw.Control(s.takeFn))
}

func (s *socket) readWait(v *vector) (int, error) {
	s.vec = v
	return s.result(s.raw.Read(s.readFn))
}

func (s *socket) more() bool { return false }

func (s *socket) look(fd uintptr) {
	if s.got, s.errno = queued(int(fd)); s.got == 0 && s.errno == 0 {
		if s.got, s.errno = peek(int(fd)); s.got > 0 { // came since
			s.got, s.errno = queued(int(fd))
		}
	}
}

func (s *socket) take(fd uintptr) {
	for s.errno = unix.EINTR; s.errno == unix.EINTR; {
		s.got, s.errno = s.vec.read(int(fd))
	}
}

func (s *socket) tryWait(fd uintptr) bool {
	s.look(fd)
	return s.errno != unix.EAGAIN
}

func (s *socket) tryRead(fd uintptr) bool {
	s.take(fd)
	return s.errno != unix.EAGAIN
}

func (s *socket) result(err error) (int, error) {
	switch {
	case err != nil:
		return 0, err
	case s.errno == unix.EAGAIN:
		return 0, nil
	case s.errno != 0:
		return 0, os.NewSyscallError("read", s.errno)
	case s.got == 0:
		return 0, io.EOF
	}
	return s.got, nil
}

// hungUp implements source. A peer that only closed its writing side, as one does after its last sample, is there still, and one over TCP that died is found when
// something was written to it.
func (s *socket) hungUp() bool {
	return pollfd.Conn(s.raw, 0)&(unix.POLLHUP|unix.POLLERR) != 0
}

func (s *socket) offer(b []byte) (sent int) {
	_ = s.raw.Control(func(fd uintptr) {
		n, err := unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if err == nil {
			sent = n
		}
	})
	return sent
}
