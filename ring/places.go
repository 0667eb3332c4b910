package ring

import "sync/atomic"

// places is the list of free places: a stack, so that the place freed last, whose memory is still in the cache, is used next.
//
// It lies on the heap of the process that owns the ring. The state lines of the segment say the same and more; the list can be made anew from them.
type places struct {
	top  atomic.Uint64 // changes<<32 | place+1; the count of changes keeps a slow pop from taking a stale top
	_    [7]uint64
	next []atomic.Uint32 // place+1 of the one below
}

func (p *places) push(index uint32) {
	for {
		top := p.top.Load()
		p.next[index].Store(uint32(top))
		// edge(place): release - the link, and all that was done to the place, come before it is on top.
		if p.top.CompareAndSwap(top, (top>>32+1)<<32|uint64(index+1)) {
			return
		}
	}
}

func (p *places) pop() (uint32, bool) {
	for {
		// edge(place): acquire - after this load, the top place's link is the one that was pushed with it.
		top := p.top.Load()
		if uint32(top) == 0 {
			return 0, false
		}
		index := uint32(top) - 1
		if p.top.CompareAndSwap(top, (top>>32+1)<<32|uint64(p.next[index].Load())) {
			return index, true
		}
	}
}

func (p *places) empty() bool { return uint32(p.top.Load()) == 0 }
