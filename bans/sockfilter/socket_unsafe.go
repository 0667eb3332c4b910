package sockfilter

import (
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dropsOf asks for SK_MEMINFO_DROPS.
//
// Safety: the kernel writes at most size bytes, the size of info, to it, and both are alive and unmoved, on the stack, during the call.
func dropsOf(fd int) (uint32, error) {
	var info [unix.SK_MEMINFO_VARS]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	switch {
	case errno != 0:
		return 0, errno
	case size <= unix.SK_MEMINFO_DROPS*4: // a kernel that does not count them (before 4.7)
		return 0, io.ErrUnexpectedEOF
	}
	return info[unix.SK_MEMINFO_DROPS], nil
}
