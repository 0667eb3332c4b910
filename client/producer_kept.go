package client

import (
	"context"
	"fmt"

	"github.com/ingestd/ingestd/wire"
)

// kept is the memory of the samples that are not acked yet: sample i lies at place i modulo the number of places. They are written
// from here, so that what is sent again is what was sent first. Its fields but the content of mem want Producer.mu.
type kept struct {
	mem    []byte
	lent   *lent  // where they lie instead, if not in mem
	sample uint64 // bytes of one
	pos    uint64 // the next byte to write, counted from the Producer's first sample
	to     uint64 // where the write that is going on ends
}

// pieceBytes are written at a time: that many are still in the second-level cache when they were just copied.
const pieceBytes = 256 << 10

func newKept(samples uint64, sampleBytes int64) *kept {
	return &kept{mem: make([]byte, samples*uint64(sampleBytes)), sample: uint64(sampleBytes)}
}

// span is the memory of n bytes from byte from on; the second part is where it starts again from the front.
func (k *kept) span(from, n uint64) (a, b []byte) {
	from %= uint64(len(k.mem))
	if room := uint64(len(k.mem)) - from; n > room {
		return k.mem[from:], k.mem[:n-room]
	}
	return k.mem[from : from+n], nil
}

// halted says whether samples are being taken back, so that nothing is to be written.
func (k *kept) halted() bool { return k != nil && k.lent != nil && k.lent.halted.Load() }

// inside says whether pos is inside of a sample.
func (k *kept) inside() bool { return k.pos%k.sample != 0 }

// writeTo is the byte of kept up to which the window lets us write. It wants mu.
func (p *Producer) writeTo() uint64 {
	return min(p.sent, p.acked+p.window) * p.kept.sample
}

// inUse is how many places are taken, as the window counts them: by samples that are not acked, and by those that somebody is
// still writing although they are. It wants mu.
func (p *Producer) inUse() uint64 {
	free := p.acked
	if p.kept != nil && p.writing {
		free = min(free, p.kept.pos/p.kept.sample)
	}
	return p.sent - free
}

// writeKept writes a piece of what the window allows. It wants mu and lets go of it meanwhile.
func (p *Producer) writeKept(ctx context.Context) error {
	n := min(p.writeTo()-p.kept.pos, uint64(max(p.fillBytes, pieceBytes)))
	a, b := p.kept.span(p.kept.pos, n)
	p.beginKept(p.kept.pos + n)
	written, err := p.write(ctx, a)
	if err == nil && len(b) > 0 {
		var more int
		more, err = p.write(ctx, b)
		written += more
	}
	p.mu.Lock()
	return p.endKept(written, err)
}

// beginKept claims the connection to write up to a byte, and lets go of mu.
func (p *Producer) beginKept(to uint64) {
	p.kept.to = to
	wired := max(p.wired, (to+p.kept.sample-1)/p.kept.sample)
	if p.wired < p.begun {
		p.stats.Resent += min(wired, p.begun) - p.wired
	}
	p.wired, p.begun = wired, max(wired, p.begun)
	p.beginWrite()
}

// endKept gives it back; it wants mu.
func (p *Producer) endKept(written int, err error) error {
	p.kept.pos += uint64(written)
	if whole := p.kept.pos / p.kept.sample; whole < p.acked {
		err = fmt.Errorf("%w: the daemon acked %d samples more than it was sent", wire.ErrProtocol, p.acked-whole)
		p.conn.Close() // the attendant finds the reason in writeErr
	}
	p.endWrite(err)
	return err
}

// keep copies one sample, given as its leaves, into its place. The window is open for it. It wants mu.
func (p *Producer) keep(ctx context.Context, op string, leaves [][]byte) error {
	place, _ := p.kept.span(p.sent*p.kept.sample, p.kept.sample)
	if len(place) < directBytes {
		copied := 0
		for _, leaf := range leaves {
			copied += copy(place[copied:], leaf)
		}
		p.taken(ctx, 1)
		return nil
	}
	if !p.writing && !p.down && p.writeErr == nil && p.kept.pos == p.sent*p.kept.sample && p.sent < p.acked+p.window {
		p.keepAndWrite(ctx, place, leaves)
		return nil
	}
	// Something is to be written before it, by somebody else perhaps, who does not look beyond sent.
	p.mu.Unlock()
	copied := 0
	for _, leaf := range leaves {
		copied += copy(place[copied:], leaf)
	}
	p.mu.Lock()
	if p.err != nil || p.closed {
		return p.usable(ctx, op)
	}
	p.taken(ctx, 1)
	return nil
}

// keepAndWrite copies a large sample, and writes each piece of it while it is in the cache. If a write fails or is interrupted, the
// rest is copied all the same, to be written later: the sample is taken.
func (p *Producer) keepAndWrite(ctx context.Context, place []byte, leaves [][]byte) {
	p.watch(ctx)
	p.sent++
	p.beginKept(p.sent * p.kept.sample)
	copied, written, piece := 0, 0, 0
	var err error
	for _, leaf := range leaves {
		for len(leaf) > 0 {
			n := copy(place[copied:], leaf[:min(len(leaf), pieceBytes-piece)])
			leaf, copied, piece = leaf[n:], copied+n, piece+n
			if piece < pieceBytes && copied < len(place) {
				continue
			}
			piece = 0
			if err == nil {
				n, err = p.write(ctx, place[written:copied])
				written += n
			}
		}
	}
	p.mu.Lock()
	if p.endKept(written, err) == errInterrupted {
		p.kickWriter()
	}
}

// keepMany copies some of n samples, for which the window is open, and returns how many. It wants mu.
func (p *Producer) keepMany(ctx context.Context, op string, data []byte, n int) (int, error) {
	size := int(p.sampleBytes)
	if size >= directBytes {
		p.vec = append(p.vecRoom[:0], data[:size])
		err := p.keep(ctx, op, p.vec)
		clear(p.vec)
		if err != nil {
			return 0, err
		}
		return 1, nil
	}
	n = min(n, max(1, p.fillBytes/size))
	a, b := p.kept.span(p.sent*p.kept.sample, uint64(n*size))
	copy(b, data[copy(a, data):n*size])
	p.taken(ctx, n)
	return n, nil
}
