//go:build linux

package shm

import (
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// Mapping is memory of another process, mapped into this one.
type Mapping struct {
	whole         []byte
	size          int
	device, inode uint64
}

// same tells whether two mappings are of the same memory.
func (m *Mapping) same(other *Mapping) bool {
	return m.device == other.device && m.inode == other.inode
}

// MapReadOnly maps size bytes of another process's memory for reading. It first sees that the memory has that size and cannot be
// shrunk under us, which would end this process with SIGBUS at its next touch: a memfd must carry the seals, a named file must come
// on a descriptor that was opened read-only, so that we know its owner means to keep it. The descriptor is not kept.
func MapReadOnly(fd int, size int64) (*Mapping, error) {
	return mapPeer(fd, size, unix.PROT_READ, false)
}

// mapShared is MapReadOnly for memory that both sides write.
func mapShared(fd int, size int64) (*Mapping, error) {
	return mapPeer(fd, size, unix.PROT_READ|unix.PROT_WRITE, false)
}

// mapFillable is MapReadOnly for a segment that we write. A named file cannot be sealed, and is taken only from a daemon of our own user.
func mapFillable(fd int, size int64) (*Mapping, error) {
	return mapPeer(fd, size, unix.PROT_READ|unix.PROT_WRITE, true)
}

func mapPeer(fd int, size int64, prot int, ownNamed bool) (*Mapping, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("looking at the memory received: %w", err)
	}
	page := int64(max(int(st.Blksize), os.Getpagesize())) // st_blksize is the huge page's size on huge pages
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("the descriptor received is no memory (mode %#o)", st.Mode)
	case size < 1 || size > math.MaxInt-page:
		return nil, fmt.Errorf("the size received, %d bytes, cannot be mapped on this machine", size)
	case st.Size < size:
		return nil, fmt.Errorf("the memory received has %d bytes, %d were announced", st.Size, size)
	}
	const needed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || seals&needed != needed {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		named := st.Nlink > 0 && (flags&unix.O_ACCMODE == unix.O_RDONLY || ownNamed && int(st.Uid) == os.Geteuid())
		if err != nil || !named {
			return nil, fmt.Errorf("the memory received is not sealed against shrinking (seals %#x): refusing to map it", max(seals, 0))
		}
	}
	whole, err := unix.Mmap(fd, 0, int(roundUp(size, page)), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", bytesText(size), err)
	}
	return &Mapping{whole: whole, size: int(size), device: uint64(st.Dev), inode: st.Ino}, nil
}

// Bytes returns the memory; it must not be touched after Close.
func (m *Mapping) Bytes() []byte { return m.whole[:m.size:m.size] }

// Close unmaps. Closing twice is no error.
func (m *Mapping) Close() error {
	if m.whole == nil {
		return nil
	}
	err := unix.Munmap(m.whole)
	m.whole, m.size = nil, 0
	if err != nil {
		return fmt.Errorf("unmapping: %w", err)
	}
	return nil
}
