//go:build linux

package pollfd

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// Now returns which of the events asked for are the case of fd, and of POLLHUP, POLLERR and POLLNVAL.
func Now(fd uintptr, events int16) int16 {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Poll(fds[:], 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil || n < 0:
			return unix.POLLNVAL
		default:
			return fds[0].Revents
		}
	}
}

// Conn is Now of a connection; POLLNVAL when it is closed.
func Conn(raw syscall.RawConn, events int16) int16 {
	revents := int16(unix.POLLNVAL)
	_ = raw.Control(func(fd uintptr) { revents = Now(fd, events) })
	return revents
}
