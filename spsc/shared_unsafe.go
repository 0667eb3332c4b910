package spsc

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// The layout is fixed by docs/segment-format.md; these fail to compile if a type or an offset drifts from it.
var (
	_ = [1]struct{}{}[unsafe.Sizeof(Desc{})-DescBytes]
	_ = [1]struct{}{}[offsetSlots%unsafe.Alignof(Desc{})]
	_ = [1]struct{}{}[unsafe.Sizeof(atomic.Uint64{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(atomic.Uint32{})-4]
)

// viewShared returns the words and slots of the queue that lies in mem.
func viewShared(mem []byte, capacity int) (shared, error) {
	if err := checkShared(mem, capacity); err != nil {
		return shared{}, err
	}
	base := unsafe.Pointer(unsafe.SliceData(mem))
	if uintptr(base)%8 != 0 {
		return shared{}, fmt.Errorf("shared queue at address %#x: it must lie on a multiple of 8, and of 64 where processes share it", base)
	}
	// Safety: checkShared saw that mem covers every offset used here up to its slots' end, and base is aligned to 8, which every
	// offset keeps, so no word straddles a cache line. The pointers keep heap memory alive; mapped memory is kept by its owner, who
	// unmaps it only after the last use of this view. The bytes are aliased by the peer's view of the same memory: every word is
	// accessed atomically, and a slot only by the side that the cursors give it to; a peer that writes it all the same changes only
	// values that its reader must check anyhow.
	return shared{
		produced: (*atomic.Uint64)(unsafe.Add(base, offsetProduced)),
		consumed: (*atomic.Uint64)(unsafe.Add(base, offsetConsumed)),
		waiting:  (*atomic.Uint32)(unsafe.Add(base, offsetWaiting)),
		closed:   (*atomic.Uint32)(unsafe.Add(base, offsetClosed)),
		slots:    unsafe.Slice((*Desc)(unsafe.Add(base, offsetSlots)), capacity),
	}, nil
}
