package bench

import (
	"bytes"
	"encoding/binary"
)

// patternBytes keeps what samples are made of in the L1 cache, so that writing is all that a write costs.
const patternBytes = 16 * kib

// newPattern returns what fills samples: it begins with the stamp of a sample that was sent at full speed.
func newPattern(sampleBytes int64) []byte {
	p := bytes.Repeat([]byte{0xE5}, int(min(sampleBytes, patternBytes)))
	binary.LittleEndian.PutUint64(p, closedStamp)
	return p
}

// writePattern writes a whole sample.
func writePattern(into, pattern []byte) {
	for at := 0; at < len(into); {
		at += copy(into[at:], pattern)
	}
}
