package sockfilter

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// socket is what the kernel filters for.
type socket interface {
	// attach puts a program in the place of the one that is there, if there is one.
	attach(code []bpf.RawInstruction) error
	// detach takes it away. It is no error if there is none.
	detach() error
	// drops is how many packets the kernel has dropped here, a count that wraps.
	drops() (uint32, error)
}

// rawSocket is a socket of this process. Once it is closed, everything fails with net.ErrClosed.
type rawSocket struct{ syscall.RawConn }

func newRawSocket(c syscall.Conn) (rawSocket, error) {
	raw, err := c.SyscallConn()
	return rawSocket{raw}, err
}

func (s rawSocket) control(name string, do func(fd int) error) error {
	var err error
	failed := s.Control(func(fd uintptr) { err = os.NewSyscallError(name, do(int(fd))) })
	return errors.Join(failed, err)
}

func (s rawSocket) attach(code []bpf.RawInstruction) error {
	filter := make([]unix.SockFilter, len(code))
	for i, c := range code {
		filter[i] = unix.SockFilter{Code: c.Op, Jt: c.Jt, Jf: c.Jf, K: c.K}
	}
	return s.control("setsockopt SO_ATTACH_FILTER", func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	})
}

func (s rawSocket) detach() error {
	err := s.control("setsockopt SO_DETACH_FILTER", func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (s rawSocket) drops() (n uint32, err error) {
	err = s.control("getsockopt SO_MEMINFO", func(fd int) (err error) {
		n, err = dropsOf(fd)
		return err
	})
	return n, err
}

// protocol is IPPROTO_TCP, IPPROTO_MPTCP and so on.
func (s rawSocket) protocol() (p int, err error) {
	err = s.control("getsockopt SO_PROTOCOL", func(fd int) (err error) {
		p, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		return err
	})
	return p, err
}

// release takes away what an accepted socket inherited. Where that fails the program stays, and passes all that comes on a connection.
func release(c net.Conn) {
	if sc, ok := c.(syscall.Conn); ok {
		if s, err := newRawSocket(sc); err == nil {
			_ = s.detach()
		}
	}
}
