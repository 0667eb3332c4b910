package crc32c

import "unsafe"

// unaligned returns how many bytes of b, which is not empty, come before a multiple of blockBytes.
func unaligned(b []byte) int {
	// Safety: the address is only counted with; b has a first byte, as the comment above demands.
	return int(-uintptr(unsafe.Pointer(&b[0])) & (blockBytes - 1))
}
