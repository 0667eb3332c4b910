package client

import (
	"encoding/binary"
	"sort"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
)

// received is memory of a remote subscription, and the generation that lies in it.
type received struct {
	data       []byte // the flat bytes
	sums       []uint32
	generation uint64
	digest     spec.Fingerprint
	published  time.Time

	holds int // callers that have not released it; under remoteWeights.mu
}

// receivedLeast is the least that is allocated for one generation: from 32 KiB on the runtime starts memory on a page, and tensors are to start on 64 bytes.
const receivedLeast = 64 << 10

func newReceived(m *tensor.Manifest) *received {
	n := m.DataBytes()
	return &received{data: make([]byte, max(n, receivedLeast))[:n:n], sums: make([]uint32, m.Len())}
}

// incoming is a generation that is being received.
type incoming struct {
	*received
	announced weights.Announcement
	base      *received // what the bytes outside the ranges are of; nil: nothing lies outside
	at        int64     // bytes of the ranges that are here
	span      int       // the range that is being received
	spanAt    int64     // and how many of its bytes are here
	check     sumCheck
}

// next returns where the next bytes go, at most so many, and their flat offset. It returns none when all are here.
func (in *incoming) next(most int64) (b []byte, flat int64) {
	for in.span < len(in.announced.Ranges) {
		r := in.announced.Ranges[in.span]
		if left := r[1] - in.spanAt; left > 0 {
			flat = r[0] + in.spanAt
			return in.data[flat : flat+min(left, most)], flat
		}
		in.span, in.spanAt = in.span+1, 0
	}
	return nil, 0
}

// came notes that the first bytes of what next returned are here.
func (in *incoming) came(b []byte, flat int64) {
	in.check.add(flat, b)
	in.at += int64(len(b))
	in.spanAt += int64(len(b))
}

// setSums takes the sums as they were sent, and says whether the digest is theirs.
func (in *incoming) setSums(text []byte, m *tensor.Manifest) bool {
	for i := range in.sums {
		in.sums[i] = binary.LittleEndian.Uint32(text[4*i:])
	}
	return weights.Digest(m, in.sums) == in.announced.Digest
}

// copyBase copies from base what is not sent.
func (in *incoming) copyBase() (copied int64) {
	at := int64(0)
	for _, r := range in.announced.Ranges {
		copied += int64(copy(in.data[at:r[0]], in.base.data[at:]))
		at = r[0] + r[1]
	}
	return copied + int64(copy(in.data[at:], in.base.data[at:]))
}

// verify compares the sums of all that came, and of what did not with those of the base, whose bytes were verified when they came. It returns the first tensor
// whose sum is wrong, or -1.
func (in *incoming) verify() int {
	in.check.end()
	if in.check.bad >= 0 || in.base == nil {
		return in.check.bad
	}
	m, r := in.check.manifest, 0
	for i := range in.sums {
		for r < len(in.announced.Ranges) && in.announced.Ranges[r][0]+in.announced.Ranges[r][1] <= m.Offset(i) {
			r++
		}
		sent := r < len(in.announced.Ranges) && in.announced.Ranges[r][0] <= m.Offset(i)
		if !sent && in.sums[i] != in.base.sums[i] {
			return i
		}
	}
	return -1
}

// sumCheck sums tensors while their bytes arrive, which they do by ascending flat offset, and compares.
type sumCheck struct {
	manifest *tensor.Manifest
	sums     []uint32 // what they should be
	tensor   int      // that is being summed; Len(): none is left
	crc      uint32   // of its bytes so far
	at       int64    // flat offset up to which all is summed
	bad      int      // first tensor whose sum is wrong, or -1
	badSum   uint32   // what it has
}

// add takes bytes from flat offset flat on. Where that is not the offset up to which all is summed, it is the first of a tensor.
func (c *sumCheck) add(flat int64, b []byte) {
	m := c.manifest
	if flat != c.at {
		c.end()
		c.tensor = sort.Search(m.Len(), func(i int) bool { return m.Offset(i) >= flat })
	}
	c.at = flat + int64(len(b))
	for len(b) > 0 && c.tensor < m.Len() {
		if gap := m.Offset(c.tensor) - flat; gap > 0 {
			n := min(gap, int64(len(b)))
			flat, b = flat+n, b[n:]
			continue
		}
		left := m.Offset(c.tensor) + m.EncodedBytes(c.tensor) - flat
		n := min(left, int64(len(b)))
		c.crc = tensor.UpdateCRC(c.crc, b[:n])
		flat, b = flat+n, b[n:]
		if n == left {
			c.done()
		}
	}
}

// done compares the tensor that is summed, and goes on to the next.
func (c *sumCheck) done() {
	if c.crc != c.sums[c.tensor] && c.bad < 0 {
		c.bad, c.badSum = c.tensor, c.crc
	}
	c.tensor, c.crc = c.tensor+1, 0
}

// end looks at the empty tensors that follow what was summed, of which no byte comes.
func (c *sumCheck) end() {
	for m := c.manifest; c.tensor < m.Len() && m.EncodedBytes(c.tensor) == 0 && m.Offset(c.tensor) <= (c.at+tensor.Align-1)/tensor.Align*tensor.Align; {
		c.done()
	}
}
