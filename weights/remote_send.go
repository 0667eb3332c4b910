//go:build linux

package weights

import (
	"bytes"
	"context"

	"github.com/ingestd/ingestd/internal/sendfile"
)

// announce says what to send of a generation to a reader that has base: what differs, or all of it if base is nil or there is little to gain.
func announce(held, base *Held) *Announcement {
	n := held.Manifest().DataBytes()
	a := &Announcement{
		Op: OpGeneration, Generation: held.Generation(), Digest: held.Digest(), Published: held.Published().UnixNano(),
		Ranges: []Range{{0, n}}, Bytes: n,
	}
	if base == nil {
		return a
	}
	if ranges, changed := differing(held, base); changed <= n-n/8 {
		a.Base, a.Ranges, a.Bytes = base.Generation(), ranges, changed
	}
	return a
}

// differing returns the tensors that differ, neighbours joined, and how many bytes they have. Equal sums say nothing: bytes are compared.
func differing(held, base *Held) (ranges []Range, sum int64) {
	m, a, b := held.Manifest(), held.Data(), base.Data()
	newSums, oldSums := held.Sums(), base.Sums()
	ranges = []Range{}
	last := -1 // the tensor that the last range ends with
	for i := range m.Len() {
		from, to := m.Offset(i), endOf(m, i)
		if from == to || newSums[i] == oldSums[i] && bytes.Equal(a[from:to], b[from:to]) {
			continue
		}
		if k := len(ranges) - 1; k >= 0 && m.Offset(last+1) == from { // nothing but a gap between
			ranges[k][1] = to - ranges[k][0]
		} else {
			ranges = append(ranges, Range{from, to - from})
		}
		last = i
	}
	for _, r := range ranges {
		sum += r[1]
	}
	return ranges, sum
}

// sender writes to a peer, and fails when that takes nothing for too long.
type sender struct{ sendfile.Sender }

// write writes from this process's memory.
func (s *sender) write(ctx context.Context, b []byte) error { return s.Write(ctx, b) }

// send sends flat bytes of a generation: from its memory to the socket with no copy in between, where that is memory of a file. sent is told of each part.
func (s *sender) send(ctx context.Context, held *Held, flat, n int64, sent func(n int64)) error {
	if fd, offset, ok := held.Descriptor(); ok && s.Socket() {
		return s.File(ctx, fd, offset+flat, n, sent)
	}
	for data := held.Data()[flat : flat+n]; len(data) > 0; {
		part := data[:min(len(data), receiveBytes)]
		if err := s.write(ctx, part); err != nil {
			return err
		}
		sent(int64(len(part)))
		data = data[len(part):]
	}
	return nil
}
