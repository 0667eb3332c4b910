//go:build linux

package client

import (
	"bufio"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// newLinkReader reads ahead a little; parts that are larger are read straight to where they belong.
func newLinkReader(conn net.Conn) io.Reader { return bufio.NewReaderSize(conn, linkBytes) }

// hungUp tells whether the other side of a socket has ended it, though not all that it sent may be read yet. False where the connection is no socket: then what was read of it
// was copied when it was sent.
func hungUp(conn net.Conn) bool {
	var raw syscall.RawConn
	switch c := conn.(type) {
	case *net.TCPConn:
		raw, _ = c.SyscallConn()
	case *net.UnixConn:
		raw, _ = c.SyscallConn()
	}
	if raw == nil {
		return false
	}
	ended := false
	if raw.Control(func(fd uintptr) {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p[:], 0)
		ended = err == nil && n > 0
	}) != nil {
		return true // closed by us
	}
	return ended
}
