package main

import (
	"sync/atomic"
	"unsafe"
)

// word is the first word of a mapping.
//
// Safety: the mapping is whole pages, so it is aligned and large enough, and it is never unmapped. The other process maps the same page; both only use
// the word atomically.
func word(mem []byte) *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(mem))) }
