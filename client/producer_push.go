package client

import (
	"context"
	"fmt"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// Push sends one sample, given as its leaves in spec order. It returns nil once the sample is taken: it is written, or
// copied and will be, at the latest when every sample before it is acked. It blocks while the window is closed, and with a session
// that means while it waits for another connection too. After an error the sample was not taken. If ctx ends while a large sample is half
// written, the rest is copied and the sample is taken.
func (p *Producer) Push(ctx context.Context, leaves ...[]byte) error {
	if err := checkLeaves(p.spec, p.leafBytes, leaves); err != nil {
		return err
	}
	const op = "push"
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.admit(ctx, op); err != nil {
		return err
	}
	if p.kept != nil {
		return p.keep(ctx, op, leaves)
	}
	if p.direct {
		if err := p.drainBuffer(ctx, op); err != nil {
			return err
		}
		p.vec = append(p.vecRoom[:0], leaves...)
		_, err := p.writeDirect(ctx, op, 1)
		return err
	}
	if err := p.makeRoom(ctx, op); err != nil {
		return err
	}
	for _, leaf := range leaves {
		p.buf = append(p.buf, leaf...)
	}
	p.taken(ctx, 1)
	return nil
}

// PushMany sends n samples that lie one after another in data, each with its leaves concatenated in spec order. It returns
// how many were taken, which is n unless there is an error.
func (p *Producer) PushMany(ctx context.Context, n int, data []byte) (int, error) {
	if n < 0 || int64(len(data))/p.sampleBytes != int64(n) || int64(len(data))%p.sampleBytes != 0 {
		return 0, fmt.Errorf("client: push: %d bytes are not %d samples of %d bytes; give whole samples of %s",
			len(data), n, p.sampleBytes, brief(p.spec))
	}
	const op = "push"
	p.mu.Lock()
	defer p.mu.Unlock()
	for done := 0; done < n; {
		if err := p.admit(ctx, op); err != nil {
			return done, err
		}
		open := min(n-done, int(min(p.window-p.inUse(), 1<<30)))
		rest := data[int64(done)*p.sampleBytes:]
		k, err := p.pushSome(ctx, op, rest[:int64(open)*p.sampleBytes], open)
		done += k
		if err != nil {
			return done, err
		}
	}
	return n, nil
}

// pushSome takes some of n samples for which the window is open.
func (p *Producer) pushSome(ctx context.Context, op string, data []byte, n int) (int, error) {
	if p.kept != nil {
		return p.keepMany(ctx, op, data, n)
	}
	if p.direct || len(data) >= directBytes && p.target.cfg.Compression == wire.CompressionNone { // what is compressed cannot be taken back
		if err := p.drainBuffer(ctx, op); err != nil {
			return 0, err
		}
		p.vec = append(p.vecRoom[:0], data)
		return p.writeDirect(ctx, op, n)
	}
	if err := p.makeRoom(ctx, op); err != nil {
		return 0, err
	}
	n = min(n, (p.fillBytes-len(p.buf))/int(p.sampleBytes))
	p.buf = append(p.buf, data[:n*int(p.sampleBytes)]...)
	p.taken(ctx, n)
	return n, nil
}

// admit returns when the window is open for a sample.
func (p *Producer) admit(ctx context.Context, op string) error {
	for {
		if p.err != nil || p.kept == nil && p.writeErr != nil || p.closed || ctx.Err() != nil {
			if err := p.usable(ctx, op); err != nil {
				return err
			}
		}
		if p.inUse() < p.window {
			return nil
		}
		if p.sendable() {
			if err := p.writeBuffered(ctx, op); err != nil {
				return err
			}
			continue
		}
		// Woken at every ack, we would send a sample at a time from here on; a quarter of the window is worth a write.
		if err := p.sleep(ctx, op, p.sent-(p.window-max(1, p.window/4))); err != nil {
			return err
		}
	}
}

// makeRoom returns when a sample fits into buf.
func (p *Producer) makeRoom(ctx context.Context, op string) error {
	for len(p.buf)+int(p.sampleBytes) > p.fillBytes {
		if err := p.writeBuffered(ctx, op); err != nil {
			return err
		}
	}
	return nil
}

// drainBuffer returns when nobody writes and buf is empty.
func (p *Producer) drainBuffer(ctx context.Context, op string) error {
	for p.writing || len(p.buf) > 0 {
		if err := p.writeBuffered(ctx, op); err != nil {
			return err
		}
	}
	return nil
}

// taken counts n samples that were put into buf or kept, and writes if it is full or if no ack is due that would set the
// leftover writer going. A failure shows in the next call: these samples are taken.
func (p *Producer) taken(ctx context.Context, n int) {
	p.sent += uint64(n)
	if p.down {
		p.needed()
		return
	}
	if p.writing {
		return
	}
	if p.wired == p.acked || p.unwritten()+int(p.sampleBytes) > p.fillBytes {
		_ = p.writeBuffered(ctx, "push")
	}
}

// needed tells the attendant that a connection is needed again.
func (p *Producer) needed() {
	select {
	case p.use <- struct{}{}:
	default:
	}
}

// unwritten is how many bytes lie in buf or kept that nobody has begun to write.
func (p *Producer) unwritten() int {
	if p.kept != nil {
		return int(p.sent*p.kept.sample - p.kept.pos)
	}
	return len(p.buf)
}

// checkLeaves sees that leaves are those of one sample.
func checkLeaves(s *spec.Spec, leafBytes []int64, leaves [][]byte) error {
	if len(leaves) != len(leafBytes) {
		return fmt.Errorf("client: push: %d leaves given, but a sample has %d: %s", len(leaves), len(leafBytes), brief(s))
	}
	for i, leaf := range leaves {
		if int64(len(leaf)) != leafBytes[i] {
			l := s.Leaf(i)
			return fmt.Errorf("client: push: leaf %d (%q) has %d bytes, but %s has %d", i, l.Name, len(leaf), l.Type(), leafBytes[i])
		}
	}
	return nil
}

// brief is the spec's text, cut for an error.
func brief(s *spec.Spec) string {
	text := s.Text()
	if len(text) > 500 {
		return text[:500] + "..."
	}
	return text
}
