//go:build linux

package sendfile

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// writeBytes is handed to the kernel at once from memory: a peer has Stall for each.
	writeBytes = 256 << 10
	// fileBytes is handed to the kernel at once from a file.
	fileBytes = 4 << 20
)

// past is a deadline that makes a blocked write return.
var past = time.Unix(1, 0)

// Sender writes to a peer.
type Sender struct {
	Conn  net.Conn
	Stall time.Duration // how long the peer may take nothing

	raw   syscall.RawConn // nil: not a socket, or not asked yet
	asked bool
	until time.Time // the write deadline in force

	// What file hands to the callback, kept here so that a part allocates nothing.
	from, count int
	offset      int64
	n           int
	failed      error
	fileFn      func(socket uintptr) bool
	bytes       []byte
	moreFn      func(socket uintptr) bool
}

// allow sets the write deadline. It costs a timer, so one that is near enough stays.
func (s *Sender) allow(ctx context.Context) {
	if now := time.Now(); s.until.Sub(now) < s.Stall*7/8 {
		s.until = now.Add(s.Stall)
		_ = s.Conn.SetWriteDeadline(s.until)
		if ctx.Err() != nil { // it may have come just before
			_ = s.Conn.SetWriteDeadline(past)
		}
	}
}

// socket returns the connection's socket, nil if it is none that this process writes to directly.
func (s *Sender) socket() syscall.RawConn {
	if !s.asked {
		s.asked = true
		switch c := s.Conn.(type) { // others may be sockets inside, with something in between
		case *net.TCPConn:
			s.raw, _ = c.SyscallConn()
		case *net.UnixConn:
			s.raw, _ = c.SyscallConn()
		}
		s.fileFn, s.moreFn = s.tryFile, s.tryMore
	}
	return s.raw
}

// Socket tells whether File works: the connection is a socket that nothing stands before.
func (s *Sender) Socket() bool { return s.socket() != nil }

// Write writes from memory.
func (s *Sender) Write(ctx context.Context, b []byte) error {
	for len(b) > 0 {
		s.allow(ctx)
		n, err := s.Conn.Write(b[:min(len(b), writeBytes)])
		b = b[n:]
		if err != nil {
			return err
		}
	}
	return nil
}

// WriteMore is Write with more to follow at once: the kernel need not send a part of a segment.
func (s *Sender) WriteMore(ctx context.Context, b []byte) error {
	raw := s.socket()
	if raw == nil {
		return s.Write(ctx, b)
	}
	for len(b) > 0 {
		s.allow(ctx)
		s.bytes = b
		err := errors.Join(raw.Write(s.moreFn), s.failed)
		s.bytes = nil
		if err != nil {
			return err
		}
		b = b[s.n:]
	}
	return nil
}

func (s *Sender) tryMore(socket uintptr) bool {
	for {
		s.n, s.failed = unix.SendmsgN(int(socket), s.bytes, nil, nil, unix.MSG_MORE|unix.MSG_NOSIGNAL)
		if s.failed != unix.EINTR {
			return s.failed != unix.EAGAIN
		}
	}
}

// File sends n bytes of a file from offset on, without a copy. The file's own offset is neither used nor changed. sent, if not nil, is told of each part.
func (s *Sender) File(ctx context.Context, fd int, offset, n int64, sent func(n int64)) error {
	raw := s.socket()
	if raw == nil {
		return errors.New("sendfile: the connection is no socket")
	}
	for s.from, s.offset = fd, offset; n > 0; {
		s.allow(ctx)
		s.count = int(min(n, fileBytes))
		err := raw.Write(s.fileFn)
		if err == nil {
			err = s.failed
		}
		if err != nil {
			return err
		}
		if s.n == 0 { // memory that is sealed does not end before its time
			return unix.EIO
		}
		if sent != nil {
			sent(int64(s.n))
		}
		s.offset, n = s.offset+int64(s.n), n-int64(s.n)
	}
	return nil
}

func (s *Sender) tryFile(socket uintptr) bool {
	for {
		at := s.offset
		s.n, s.failed = unix.Sendfile(int(socket), s.from, &at, s.count)
		if s.failed != unix.EINTR {
			return s.failed != unix.EAGAIN
		}
	}
}
