//go:build linux

package shm

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// descriptorsMax is the most descriptors taken with one reply.
const descriptorsMax = 8

// sendWithDescriptors writes b, with the descriptors on its first byte.
func sendWithDescriptors(conn *net.UnixConn, b []byte, fds ...int) error {
	n, _, err := conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	for err == nil && n < len(b) {
		var k int
		k, err = conn.Write(b[n:])
		n += k
	}
	if err != nil {
		return fmt.Errorf("sending the reply with its descriptors: %w", err)
	}
	return nil
}

// descriptorReader reads from a unix socket and keeps the descriptors that come along.
type descriptorReader struct {
	conn *net.UnixConn
	fds  []int
	oob  [64]byte // more than CmsgSpace of descriptorsMax
}

func (r *descriptorReader) Read(b []byte) (int, error) {
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(b, r.oob[:]) // sets close-on-exec
	if oobn > 0 {
		if kept := r.keep(r.oob[:oobn]); err == nil {
			err = kept
		}
	}
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = fmt.Errorf("more than %d descriptors came at once, or this process has too few left (ulimit -n)", descriptorsMax)
	}
	if n == 0 && err == nil && len(b) > 0 {
		err = io.EOF
	}
	return max(n, 0), err // an error of the kernel comes with -1
}

func (r *descriptorReader) keep(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("parsing a control message: %w", err)
	}
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			r.fds = append(r.fds, fds...)
		}
	}
	return nil
}

// take hands descriptor i over to the caller.
func (r *descriptorReader) take(i int) int {
	fd := r.fds[i]
	r.fds[i] = -1
	return fd
}

// close closes what was not taken.
func (r *descriptorReader) close() error {
	var errs []error
	for _, fd := range r.fds {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	r.fds = nil
	return errors.Join(errs...)
}
