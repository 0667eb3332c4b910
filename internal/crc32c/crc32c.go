package crc32c

import "hash/crc32"

const (
	polynomial = crc32.Castagnoli // x^31 is its lowest bit
	blockBytes = 64               // the kernels do whole blocks
	leastBytes = 4 * blockBytes   // and no fewer than these
)

var table = crc32.MakeTable(polynomial)

// Update is the CRC of what sum is of, followed by b. The CRC of nothing is 0.
func Update(sum uint32, b []byte) uint32 {
	if accelerated && len(b) >= leastBytes {
		var n int
		sum, n = sumBlocks(sum, b)
		if b = b[n:]; len(b) == 0 {
			return sum
		}
	}
	return updatePlain(sum, b)
}

// aheadBytes are asked for while as many before them are summed: the processor alone fetches what is summed too late. Of 64 MiB in memory, 4 KiB ahead gave 18 GB/s
// instead of 7, and twice or four times as much less than that.
const aheadBytes = 4 << 10

// updatePlain does it without kernels.
func updatePlain(sum uint32, b []byte) uint32 {
	for len(b) >= 2*aheadBytes {
		prefetch(&b[aheadBytes], aheadBytes/64)
		sum = crc32.Update(sum, table, b[:aheadBytes])
		b = b[aheadBytes:]
	}
	return crc32.Update(sum, table, b)
}

// Copy copies src to the beginning of dst, which must be as long, and returns what Update(sum, src) does. The sum is of what was stored, also if src changes
// meanwhile.
func Copy(sum uint32, dst, src []byte) uint32 {
	dst = dst[:len(src)]
	if accelerated && len(src) >= leastBytes {
		var n int
		sum, n = copyBlocks(sum, dst, src)
		dst, src = dst[n:], src[n:]
	}
	return copyPlain(sum, dst, src)
}

// CopyPast does the same past the processor's caches. It is faster where dst is not in them and is not read soon; the copy is visible to other cores
// when it returns.
func CopyPast(sum uint32, dst, src []byte) uint32 {
	dst = dst[:len(src)]
	if accelerated && len(src) >= leastBytes+blockBytes {
		n := unaligned(dst)
		sum = copyPlain(sum, dst[:n], src[:n])
		dst, src = dst[n:], src[n:]
		sum, n = streamBlocks(sum, dst, src)
		dst, src = dst[n:], src[n:]
	}
	return copyPlain(sum, dst, src)
}

// plainBytes are copied and then summed at a time, so that they are summed from the nearest cache.
const plainBytes = 8 << 10

// copyPlain does it without kernels.
func copyPlain(sum uint32, dst, src []byte) uint32 {
	for len(src) > 0 {
		n := copy(dst, src[:min(len(src), plainBytes)])
		sum = crc32.Update(sum, table, dst[:n])
		dst, src = dst[n:], src[n:]
	}
	return sum
}
