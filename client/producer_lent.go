package client

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/ingestd/ingestd/tensor"
)

// lent is the memory of samples that stay with the caller until they are acked: chunks of tensors. Its fields want Producer.mu; a sample that is
// being written is not changed.
type lent struct {
	samples []*lentSample // from sample first on
	first   uint64
	open    []*lentSample // all of the transaction that is open: sent again when the daemon lost what it had acked
	halted  atomic.Bool   // nothing may be written: somebody takes samples back
	vec     [][]byte      // room for what is written at once
}

// lentSample is one chunk. Its header is made, and its data summed, just before it is written, so that the data is in the cache.
type lentSample struct {
	header tensor.Header
	pieces [][]byte // the data, header.Length bytes
	noCRC  bool
	sealed bool
	bytes  [tensor.HeaderBytes]byte
}

// zeros is what chunks are padded with.
var zeros [1 << 20]byte

// seal sums the data, unless that was done, and makes the header for a stream.
func (s *lentSample) seal(stream uint64) {
	if s.sealed && s.header.Stream == stream {
		return
	}
	switch {
	case s.noCRC:
		s.header.Flags |= tensor.FlagNoCRC
	case !s.sealed:
		s.header.DataCRC = sumPieces(s.pieces)
	}
	s.header.Stream, s.sealed = stream, true
	s.header.Put(s.bytes[:])
}

func sumPieces(pieces [][]byte) uint32 {
	var sum uint32
	for _, b := range pieces {
		sum = tensor.UpdateCRC(sum, b)
	}
	return sum
}

// appendFrom appends the bytes of the sample, which has so many with its padding, from byte skip on.
func (s *lentSample) appendFrom(vec [][]byte, skip, sampleBytes uint64) [][]byte {
	left := sampleBytes
	add := func(b []byte) {
		left -= uint64(len(b))
		if cut := min(skip, uint64(len(b))); cut > 0 {
			b, skip = b[cut:], skip-cut
		}
		if len(b) > 0 {
			vec = append(vec, b)
		}
	}
	add(s.bytes[:])
	for _, b := range s.pieces {
		add(b)
	}
	for left > 0 {
		add(zeros[:min(left, uint64(len(zeros)))])
	}
	return vec
}

// own copies the data, so that the caller's memory is not needed any more.
func (s *lentSample) own() {
	data := make([]byte, 0, s.header.Length)
	for _, b := range s.pieces {
		data = append(data, b...)
	}
	s.pieces = [][]byte{data}
}

// lend takes a sample without copying it, and never waits: it is written by the leftover writer.
func (p *Producer) lend(op string, s *lentSample) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.err != nil:
		return fmt.Errorf("client: %s: %w", op, p.err)
	case p.closed:
		return fmt.Errorf("client: %s: %w", op, os.ErrClosed)
	case s.header.Flags&tensor.FlagAbort == 0:
		if err := p.refusal(s.header.Step); err != nil {
			return err // the rest would be of no use
		}
	}
	l := p.kept.lent
	l.samples, l.open = append(l.samples, s), append(l.open, s)
	p.sent++
	if p.down {
		p.needed()
	} else {
		p.kickWriter()
	}
	return nil
}

// refusal returns why the daemon refused a step, if it was the last one that it did. It wants mu.
func (p *Producer) refusal(step uint64) error {
	if p.refused == nil || p.refused.Step != step {
		return nil
	}
	return &StepRefusedError{step, p.refused.Reason}
}

// writeLent writes one sample, or the rest of it. It wants mu and lets go of it meanwhile.
func (p *Producer) writeLent(ctx context.Context) error {
	k := p.kept
	number, skip := k.pos/k.sample, k.pos%k.sample
	s, stream := k.lent.samples[number-k.lent.first], p.accepted.Stream
	p.beginKept((number + 1) * k.sample)
	s.seal(stream)
	k.lent.vec = s.appendFrom(k.lent.vec[:0], skip, k.sample)
	p.vec = k.lent.vec
	written, err := p.writeVec(ctx)
	p.mu.Lock()
	clear(k.lent.vec)
	return p.endKept(int(written), err)
}

// forget lets go of what is acked.
func (l *lent) forget(acked uint64) {
	n := min(acked-l.first, uint64(len(l.samples)))
	clear(l.samples[:n])
	l.samples, l.first = l.samples[n:], l.first+n
	if len(l.samples) == 0 {
		l.samples = nil // of an array whose front is never used again
	}
}

// takeBack ends the transaction that is open, so that the caller's memory is free: what was not begun to be written is dropped, what was is copied. It
// says whether the daemon may have seen something of it. It does not wait for the daemon.
func (p *Producer) takeBack() (seen bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, l := p.kept, p.kept.lent
	l.halted.Store(true)
	for p.writing {
		p.conn.SetWriteDeadline(past) // an error of it means that the connection has ended, and the write with it
		p.quiet.Wait()
	}
	l.halted.Store(false)
	begun := max(p.begun, p.acked)
	seen = begun > p.sent-uint64(len(l.open))
	if p.sent > begun {
		l.samples = l.samples[:begun-l.first]
		p.sent = begun
	}
	for _, s := range l.samples {
		s.own()
	}
	l.open = nil
	if !p.down && k.pos < p.writeTo() {
		p.kickWriter()
	}
	return seen
}

// replay sends the transaction that is open again from its beginning, since the daemon does not hold what it acked. It wants mu.
func (p *Producer) replay() {
	l := p.kept.lent
	l.samples, l.first = append([]*lentSample(nil), l.open...), p.acked
	p.sent, p.begun = p.acked+uint64(len(l.open)), p.acked
	if len(l.open) > 0 {
		p.stats.Replays++
	}
}
