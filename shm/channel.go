//go:build linux

package shm

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/ingestd/ingestd/spsc"
)

// The channel's header; docs/segment-format.md, "Channel".
const (
	channelVersion  = 1
	channelHeader   = 64
	offChanVersion  = 8
	offChanCapacity = 12
	offChanDeliver  = 16
	offChanGiveback = 24
	offChanBytes    = 32
	channelLine     = 64
)

var channelMagic = [8]byte{'I', 'N', 'G', 'D', 'C', 'H', 'N', '1'}

// channelBytesMax bounds what a client maps, whatever it is told.
const channelBytesMax = channelHeader + 2*(256+spsc.DescBytes*spsc.SharedCapacityMax+channelLine)

// channelCapacity returns the capacity of a channel through which at most held batches are out at once: neither queue can ever be
// full of honest descriptors.
func channelCapacity(held int) int {
	return max(spsc.SharedCapacityMin, 1<<bits.Len(uint(held-1)))
}

func channelBytes(capacity int) int64 {
	return channelHeader + 2*roundUp(int64(spsc.SharedBytes(capacity)), channelLine)
}

// formatChannel makes mem, which is all zero, a channel of two empty queues.
func formatChannel(mem []byte, capacity int) (deliver, giveback []byte, err error) {
	giveOffset := channelHeader + roundUp(int64(spsc.SharedBytes(capacity)), channelLine)
	binary.LittleEndian.PutUint32(mem[offChanVersion:], channelVersion)
	binary.LittleEndian.PutUint32(mem[offChanCapacity:], uint32(capacity))
	binary.LittleEndian.PutUint64(mem[offChanDeliver:], channelHeader)
	binary.LittleEndian.PutUint64(mem[offChanGiveback:], uint64(giveOffset))
	binary.LittleEndian.PutUint64(mem[offChanBytes:], uint64(channelBytes(capacity)))
	copy(mem, channelMagic[:])
	deliver, giveback = mem[channelHeader:giveOffset], mem[giveOffset:]
	if err := spsc.FormatShared(deliver, capacity); err != nil {
		return nil, nil, err
	}
	return deliver, giveback, spsc.FormatShared(giveback, capacity)
}

// openChannel checks a channel's header and returns its queues. The header is copied first: the other side can write it meanwhile.
func openChannel(mem []byte) (deliver, giveback []byte, capacity int, err error) {
	if len(mem) < channelHeader {
		return nil, nil, 0, fmt.Errorf("channel of %d bytes: shorter than its header of %d", len(mem), channelHeader)
	}
	header := [channelHeader]byte(mem)
	if [8]byte(header[:]) != channelMagic {
		return nil, nil, 0, fmt.Errorf("channel starts with % x, not with % x", header[:8], channelMagic)
	}
	if v := binary.LittleEndian.Uint32(header[offChanVersion:]); v != channelVersion {
		return nil, nil, 0, fmt.Errorf("channel of version %d, this program speaks %d", v, channelVersion)
	}
	if n := binary.LittleEndian.Uint64(header[offChanBytes:]); n != uint64(len(mem)) {
		return nil, nil, 0, fmt.Errorf("channel says it has %d bytes, it was announced with %d", n, len(mem))
	}
	wide := binary.LittleEndian.Uint32(header[offChanCapacity:])
	if wide < spsc.SharedCapacityMin || wide > spsc.SharedCapacityMax || bits.OnesCount32(wide) != 1 {
		return nil, nil, 0, fmt.Errorf("channel of %d descriptors: must be a power of two from %d to %d", wide, spsc.SharedCapacityMin,
			spsc.SharedCapacityMax)
	}
	capacity = int(wide)
	need := uint64(spsc.SharedBytes(capacity))
	d, g := binary.LittleEndian.Uint64(header[offChanDeliver:]), binary.LittleEndian.Uint64(header[offChanGiveback:])
	for _, at := range [...]uint64{d, g} {
		if at%channelLine != 0 || at < channelHeader || at > uint64(len(mem)) || uint64(len(mem))-at < need {
			return nil, nil, 0, fmt.Errorf("channel of %d bytes: a queue of %d bytes cannot start at byte %d", len(mem), need, at)
		}
	}
	if max(d, g)-min(d, g) < need {
		return nil, nil, 0, fmt.Errorf("channel: its queues, at bytes %d and %d, overlap", d, g)
	}
	return mem[d : d+need], mem[g : g+need], capacity, nil
}
