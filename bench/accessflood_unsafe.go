package bench

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// disconnect makes a socket ready for another connect; a connection that is there is reset.
//
// Safety: the kernel reads as many bytes as the address has, which is alive and unmoved, on the stack, during the call.
func disconnect(fd int) error {
	none := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&none)), unsafe.Sizeof(none)); errno != 0 {
		return errno
	}
	return nil
}
