package client

import (
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/tensor"
)

const (
	blockBytes = 256 << 10 // what a core takes at a time

	// pastBytes is the size of a manifest's data from which on it is copied past the caches. A publisher turns through several places, and a producer of steps through the ring,
	// which no cache holds then. With sums, 16 MiB were copied through the caches at 11 GB/s and past them at 24; 4 MiB at 26 and 29, but a reader then found them in the cache. For
	// chunks of 1 MiB in a ring of 256 MiB that are read at once it was 7.4 GB/s and 9.1.
	pastBytes = 8 << 20
)

// blocks is the bytes of a manifest's tensors, cut so that several cores can share the work. It is made once and may be used by one goroutine at a time.
type blocks struct {
	manifest *tensor.Manifest
	all      []block
	sums     []uint32     // per block
	moved    atomic.Int64 // bytes copied and summed in this run, or in the last one; any goroutine may read it
}

// block is a part of a tensor.
type block struct {
	tensor    int
	offset, n int64 // in the tensor
}

func newBlocks(m *tensor.Manifest) *blocks {
	b := &blocks{manifest: m}
	for i := range m.Len() {
		bytes := m.EncodedBytes(i)
		for at := int64(0); at < bytes; at += blockBytes {
			b.all = append(b.all, block{i, at, min(blockBytes, bytes-at)})
		}
	}
	b.sums = make([]uint32, len(b.all))
	return b
}

// sum returns the CRC of each tensor in flat bytes.
func (b *blocks) sum(data []byte) []uint32 {
	return b.run(data, nil)
}

// run copies tensors into flat bytes, from those sources that are not nil, and returns the CRC of each tensor there.
func (b *blocks) run(data []byte, sources [][]byte) []uint32 {
	var next atomic.Int64
	b.moved.Store(0)
	copying := tensor.CopyCRC
	if len(data) >= pastBytes {
		copying = tensor.CopyPastCRC
	}
	work := func() {
		for {
			i := next.Add(1) - 1
			if i >= int64(len(b.all)) {
				return
			}
			part := b.all[i]
			from := b.manifest.Offset(part.tensor) + part.offset
			dst := data[from : from+part.n]
			if sources != nil && sources[part.tensor] != nil {
				b.sums[i] = copying(0, dst, sources[part.tensor][part.offset:][:part.n])
				failpoint.Hit("client/publisher/copied")
			} else {
				b.sums[i] = tensor.CRC(dst) // was written in place
			}
			b.moved.Add(part.n)
		}
	}
	var others sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(b.all)) - 1 {
		others.Go(work)
	}
	work()
	others.Wait()
	sums := make([]uint32, b.manifest.Len())
	for i, part := range b.all {
		if part.offset == 0 {
			sums[part.tensor] = b.sums[i]
			continue
		}
		sums[part.tensor] = tensor.CombineCRC(sums[part.tensor], b.sums[i], part.n)
	}
	return sums
}
