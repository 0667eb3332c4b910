//go:build linux

package weights

import (
	"bytes"
	"context"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

// sender writes to a peer, and fails when that takes nothing for stall.
type sender struct {
	conn  netConn
	stall time.Duration
	raw   syscall.RawConn
	until time.Time // the write deadline in force
}

// allow sets the write deadline. It costs a timer, so one that is near enough stays.
func (s *sender) allow(ctx context.Context) {
	if now := time.Now(); s.until.Sub(now) < s.stall*7/8 {
		s.until = now.Add(s.stall)
		_ = s.conn.SetWriteDeadline(s.until)
		if ctx.Err() != nil { // it may have come just before
			_ = s.conn.SetWriteDeadline(past)
		}
	}
}

// sendBytes is handed to the kernel at once.
const sendBytes = 4 << 20

// write writes from this process's memory.
func (s *sender) write(ctx context.Context, b []byte) error {
	for len(b) > 0 {
		s.allow(ctx)
		n, err := s.conn.Write(b[:min(len(b), receiveBytes)])
		b = b[n:]
		if err != nil {
			return err
		}
	}
	return nil
}

// send sends flat bytes of a generation: from its memory to the socket with no copy in between, where that is memory of a file. sent is told of each part.
func (s *sender) send(ctx context.Context, held *Held, flat, n int64, sent func(n int64)) error {
	fd, offset, ok := held.Descriptor()
	if !ok {
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
	if s.raw == nil {
		raw, err := s.conn.SyscallConn()
		if err != nil {
			return err
		}
		s.raw = raw
	}
	for offset += flat; n > 0; {
		s.allow(ctx)
		k := 0
		var failed error
		err := s.raw.Write(func(socket uintptr) bool {
			for {
				at := offset
				k, failed = unix.Sendfile(int(socket), fd, &at, int(min(n, sendBytes)))
				if failed != unix.EINTR {
					return failed != unix.EAGAIN
				}
			}
		})
		if err == nil {
			err = failed
		}
		if err != nil {
			return err
		}
		if k == 0 { // the memory is sealed, so this cannot be its end
			return unix.EIO
		}
		sent(int64(k))
		offset, n = offset+int64(k), n-int64(k)
	}
	return nil
}
