//go:build linux

package shm

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// noNowait is set on kernels before 5.8, whose eventfd cannot be told per call not to block.
var noNowait atomic.Bool

// readEventfd takes the count and unsets it; unix.EAGAIN says that it is 0. It does not block whatever the file's flags say, and so need not tell the Go scheduler
// of the call, which in a process that was idle wakes another thread first: 5 to 10 µs between the bell and who waits for it.
func readEventfd(fd int) error {
	var count uint64
	if !noNowait.Load() {
		// Safety: count and vec live on this stack frame for the length of the call, which is all the kernel uses them for; the
		// length given is that of count. The conversions to uintptr are in the call's own argument list, as package unsafe wants.
		vec := unix.Iovec{Base: (*byte)(unsafe.Pointer(&count))}
		vec.SetLen(int(unsafe.Sizeof(count)))
		_, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&vec)), 1, ^uintptr(0), ^uintptr(0), unix.RWF_NOWAIT)
		switch errno {
		case 0:
			return nil
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
			noNowait.Store(true)
		default:
			return errno
		}
	}
	// Safety: as above.
	_, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&count)), unsafe.Sizeof(count))
	if errno != 0 {
		return errno
	}
	return nil
}

// writeEventfd adds 1 to the count. quick does not tell the Go scheduler of the call, as readEventfd does not; it is for an eventfd whose other side is trusted, since
// anybody who has it can make a write block.
func writeEventfd(fd int, quick bool) {
	one := uint64(1)
	if quick {
		// Safety: one lives on this stack frame for the length of the call, which reads exactly its 8 bytes.
		_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
		return
	}
	// Safety: as above.
	_, _, _ = unix.Syscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
}
