package crc32c

import "unsafe"

// unaligned returns how many bytes of b, which is not empty, come before a multiple of blockBytes.
func unaligned(b []byte) int {
	return int(-uintptr(unsafe.Pointer(&b[0])) & (blockBytes - 1))
}
