//go:build linux

package shm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerGroups returns the supplementary groups of the process that connected the socket, or nil where the kernel (before 4.13) does not say.
func peerGroups(fd int) []uint32 {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups) * 4)
		// Safety: groups and size live on for the length of the call, which writes at most size bytes to groups and one value to size; size is the
		// length of groups. The conversions to uintptr are in the call's own argument list, as package unsafe wants.
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(unsafe.SliceData(groups))), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:min(int(size/4), len(groups))]
		case errno == unix.ERANGE && len(groups) < int(size/4) && size <= 4<<16: // NGROUPS_MAX is 65536
			groups = make([]uint32, size/4)
		default:
			return nil
		}
	}
}
