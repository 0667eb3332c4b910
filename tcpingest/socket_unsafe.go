package tcpingest

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is a list of places to read into, kept by its connection so that a read allocates nothing.
type vector struct {
	parts []unix.Iovec
	bytes int
}

func (v *vector) reset() { v.parts, v.bytes = v.parts[:0], 0 }

// add appends a place, or makes the last one longer if b follows it in memory.
//
// Safety: b is alive because it lies in the ring's memory, which outlives every connection, or in a buffer that the caller holds during the read; the
// kernel writes no more than SetLen says. The address is compared, never followed.
func (v *vector) add(b []byte) {
	if len(b) == 0 {
		return
	}
	v.bytes += len(b)
	p := unsafe.SliceData(b)
	if n := len(v.parts); n > 0 {
		last := &v.parts[n-1]
		if unsafe.Add(unsafe.Pointer(last.Base), last.Len) == unsafe.Pointer(p) {
			last.SetLen(int(last.Len) + len(b))
			return
		}
	}
	v.parts = append(v.parts, unix.Iovec{Base: p})
	v.parts[len(v.parts)-1].SetLen(len(b))
}

// part returns place i.
//
// Safety: Base and Len are those of a slice that add was given, or of several that follow each other in one piece of memory.
func (v *vector) part(i int) []byte {
	p := &v.parts[i]
	return unsafe.Slice(p.Base, int(p.Len))
}

// copy copies b to the places, as far as it goes or they reach.
func (v *vector) copy(b []byte) int {
	done := 0
	for i := range v.parts {
		n := copy(v.part(i), b[done:])
		if done += n; done == len(b) {
			break
		}
	}
	return done
}

// read reads once from a non-blocking socket into v. It does not tell the scheduler: the call never waits, and handing the processor away for the 50 µs
// of a 256 KiB copy costs more than it gives.
//
// Safety: the parts are kept alive by v, and their memory as add says; nothing here moves, as neither heap nor mappings do.
func (v *vector) read(fd int) (int, unix.Errno) {
	if len(v.parts) == 1 {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(v.parts[0].Base)), uintptr(v.parts[0].Len))
		return int(n), errno
	}
	n, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(v.parts))), uintptr(len(v.parts)))
	return int(n), errno
}

// queued returns how many bytes the socket holds.
//
// Safety: the kernel writes one int32 to n, which lives on this frame until the call returns.
func queued(fd int) (int, unix.Errno) {
	var n int32
	_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCINQ, uintptr(unsafe.Pointer(&n)))
	return int(n), errno
}

// peek looks whether a socket without bytes has ended: 0 without an error is the end, EAGAIN says that there may be more.
//
// Safety: MSG_PEEK writes at most the one byte of b, which lives on this frame.
func peek(fd int) (int, unix.Errno) {
	var b [1]byte
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b)), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}
