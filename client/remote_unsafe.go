//go:build linux

package client

import "unsafe"

// alignedBytes returns memory that starts on a multiple of 64.
func alignedBytes(n int64) []byte {
	b := make([]byte, n+63)
	// Safety: only the number of the address is looked at; the memory does not move.
	skip := int64(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & 63)
	return b[skip : skip+n : skip+n]
}

// words returns little-endian words as they lie in memory.
func words(b []byte) []uint64 {
	// Safety: b starts on a multiple of 64 (alignedBytes, receivedLayout) and has whole words. Words have no pointers, and every bit pattern is one. The slice keeps
	// the memory alive. The byte order of machines that ingestd runs on is little (shm).
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}
