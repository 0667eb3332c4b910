//go:build linux

package shm

import (
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bell is an eventfd that a goroutine waits on through the runtime's poller, so that a thousand waiters need no thousand threads.
//
// The other process holds the same open file, flags included, and can make it blocking. Reads therefore say on each call that they
// must not block, and unstick brings a write back that was made to block.
type bell struct {
	file *os.File
	raw  syscall.RawConn
	read func(fd uintptr) bool // made once, so that a wait allocates nothing
	ring func(fd uintptr)

	trusted bool // the other side is: set before use
	closed  atomic.Bool
	err     error // of the last read; belongs to the one goroutine that waits
}

var noDeadline time.Time

func newBell() (*bell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return openBell(fd)
}

// openBell takes over fd, and closes it on an error.
func openBell(fd int) (*bell, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	file := os.NewFile(uintptr(fd), "eventfd")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := file.SetDeadline(noDeadline); err != nil { // fails where the poller did not take the descriptor
		file.Close()
		return nil, fmt.Errorf("the descriptor received is no eventfd: %w", err)
	}
	b := &bell{file: file, raw: raw}
	b.read = func(fd uintptr) bool {
		b.err = readEventfd(int(fd))
		return b.err != unix.EAGAIN
	}
	b.ring = func(fd uintptr) { writeEventfd(int(fd), b.trusted) }
	return b, nil
}

// openDaemonsBell is openBell for one whose other side is the daemon, whom its clients trust.
func openDaemonsBell(fd int) (*bell, error) {
	b, err := openBell(fd)
	if err == nil {
		b.trusted = true
	}
	return b, err
}

// wait sleeps until the bell was rung since the last wait, and unsets it. The error is os.ErrClosed after close.
func (b *bell) wait() error {
	if err := b.raw.Read(b.read); err != nil {
		if b.closed.Load() { // the poller has an error of its own for this, which it does not export
			return os.ErrClosed
		}
		return fmt.Errorf("waiting on an eventfd: %w", err)
	}
	if b.err != nil {
		return fmt.Errorf("reading an eventfd: %w", b.err)
	}
	return nil
}

// signal rings the bell. It cannot fail in a way that matters: a full eventfd is rung already.
func (b *bell) signal() { _ = b.raw.Control(b.ring) }

// descriptor calls f with the descriptor, for passing it on.
func (b *bell) descriptor(f func(fd int)) error {
	return b.raw.Control(func(fd uintptr) { f(int(fd)) })
}

// unstick lets go a write that a peer made to block.
func (b *bell) unstick() {
	_ = b.raw.Control(func(fd uintptr) { _ = readEventfd(int(fd)) })
}

// close ends every wait. It waits for calls under way, so a writer must have been let go before.
func (b *bell) close() error {
	b.closed.Store(true)
	return b.file.Close()
}
