package client

import "unsafe"

// littleEndian says whether this machine stores numbers as they are sent.
var littleEndian = func() bool {
	one := uint16(1)
	// Safety: the first byte of a variable that is alive.
	return *(*byte)(unsafe.Pointer(&one)) == 1
}()

// bytesOfFloats returns the memory of values.
func bytesOfFloats(values []float32) []byte {
	// Safety: the slice has 4*len(values) bytes; bytes have no alignment and no value that is not one. The result keeps the memory alive.
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(values))), 4*len(values))
}
