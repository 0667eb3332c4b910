package ring

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// word returns the 8 bytes at off as an atomic word.
//
// Safety: in bounds because the slice expression checks it (and, unlike an index, reads nothing); aligned because every offset of the format is a multiple of 8 and checkMemory demands
// a 64-byte aligned base; alive because the pointer keeps heap memory reachable, and a mapping outlives its Ring or View by contract of their
// makers; aliased only by other atomic accesses: no plain access is ever made to these words after formatting.
func word(mem []byte, off int64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(mem[off : off+8])))
}

// words returns n 8-byte words at off as a slice that aliases mem.
//
// Safety: as word; plain accesses are ordered by the batch's progress and state words.
func words(mem []byte, off, n int64) []uint64 {
	b := mem[off : off+8*n : off+8*n]
	return unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), n)
}

// checkMemory refuses memory that cannot hold atomic words where the format puts them, and machines of the other byte order.
//
// Safety: the address is only looked at, never kept.
func checkMemory(mem []byte) error {
	if len(mem) < headerBytes {
		return formatError("%d bytes of memory, shorter than the header of %d", len(mem), headerBytes)
	}
	if base := uintptr(unsafe.Pointer(&mem[0])); base%columnAlign != 0 {
		return formatError("memory starts at %#x, must start on a multiple of %d", base, columnAlign)
	}
	probe := [1]uint64{1}
	if *(*byte)(unsafe.Pointer(&probe)) != 1 {
		return fmt.Errorf("segment: the format is little-endian, and this machine is not")
	}
	return nil
}

// AlignedBytes returns size bytes of heap memory that start on a multiple of 64, for rings of one process.
//
// Safety: the address is only used to choose where to cut the slice.
func AlignedBytes(size int64) []byte {
	b := make([]byte, size+columnAlign)
	skip := int64(-uintptr(unsafe.Pointer(&b[0])) % columnAlign)
	return b[skip : skip+size : skip+size]
}
