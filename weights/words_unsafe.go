package weights

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// word returns the 8 bytes at off as an atomic word.
//
// Safety: in bounds because the slice expression checks it; aligned because every offset of the format is a multiple of 8 and checkBase demands a base that
// is one of 64; alive because the pointer keeps heap memory reachable, and a mapping outlives its users by contract of its maker; aliased only by other
// atomic accesses: no plain access is ever made to these words after formatting.
func word(mem []byte, off int64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(mem[off : off+8])))
}

// checkBase refuses memory that cannot hold atomic words where the format puts them, and machines of the other byte order.
//
// Safety: the address is only looked at, never kept.
func checkBase(mem []byte) error {
	if base := uintptr(unsafe.Pointer(unsafe.SliceData(mem))); base%lineBytes != 0 {
		return formatError("memory starts at %#x, must start on a multiple of %d", base, lineBytes)
	}
	probe := [1]uint64{1}
	if *(*byte)(unsafe.Pointer(&probe)) != 1 {
		return fmt.Errorf("weights: the format is little-endian, and this machine is not")
	}
	return nil
}

// alignedBytes returns size bytes of heap memory that start on a multiple of 64.
//
// Safety: the address is only used to choose where to cut the slice.
func alignedBytes(size int64) []byte {
	b := make([]byte, size+lineBytes)
	skip := int64(-uintptr(unsafe.Pointer(&b[0])) % lineBytes)
	return b[skip : skip+size : skip+size]
}
