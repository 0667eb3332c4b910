//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/killtest"
	"github.com/ingestd/ingestd/wire"
)

// producer sends the samples of one session.
type producer struct {
	*options
	book  *killtest.Ledger
	acked uint64 // as the ledger says
	next  uint64 // number of the next sample
	room  []byte
}

func (o *options) produce(ctx context.Context) error {
	book, err := killtest.OpenLedger(o.ledger)
	if err != nil {
		return err
	}
	defer book.Close()
	p := &producer{options: o, book: book, room: make([]byte, int64(o.most)*o.spec.SampleBytes())}
	if _, p.acked, err = book.Read(); err != nil {
		return err
	}
	for {
		done, err := p.connection(ctx)
		if done || err != nil {
			return err
		}
		wait(ctx, again)
	}
}

// connection dials and sends until the daemon is gone, or all is said. It tells which.
func (p *producer) connection(ctx context.Context) (done bool, err error) {
	c, err := client.Dial(context.WithoutCancel(ctx), p.addr, client.Config{Table: p.table, Spec: p.spec, Session: p.name, Ack: wire.AckCommitted, Client: "peer"})
	if err != nil {
		return ctx.Err() != nil, comeback(err)
	}
	defer c.Abort()
	if p.name == "" && p.next > 0 {
		return true, nil // nobody would know which of its samples are there
	}
	if p.next = c.Held(); p.next < p.acked {
		return true, broken("%d samples of session %q were acked, and the daemon holds %d", p.acked, p.name, p.next)
	}
	base := p.next
	if err := p.note(base); err != nil {
		return true, err
	}
	stop := p.watch(c, base)
	err = p.send(ctx, c)
	if err == nil { // asked to end
		err = p.end(ctx, c)
		done = err == nil
	}
	if wrote := stop(); wrote != nil {
		return true, wrote
	}
	return done, comeback(err)
}

// send pushes until ctx ends.
func (p *producer) send(ctx context.Context, c *client.Producer) error {
	size := int(p.spec.SampleBytes())
	for ctx.Err() == nil {
		n := 1 + p.rnd.IntN(p.most)
		for i := range n {
			killtest.Fill(p.room[i*size:(i+1)*size], p.spec, p.session, p.next+uint64(i))
		}
		if err := p.book.SetSent(p.next + uint64(n)); err != nil {
			return err
		}
		took, err := c.PushMany(ctx, n, p.room[:n*size])
		p.next += uint64(took)
		if err != nil && ctx.Err() == nil {
			return err
		}
		p.rest(ctx)
	}
	return nil
}

// end ends the stream in order.
func (p *producer) end(ctx context.Context, c *client.Producer) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	return c.Close(ctx)
}

// watch writes the acks down as they come, until the function it returns is called, which writes the last.
func (p *producer) watch(c *client.Producer, base uint64) (stop func() error) {
	quit, ended := make(chan struct{}), make(chan error)
	go func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				ended <- p.note(base + c.Acked())
				return
			case <-tick.C:
				if err := p.note(base + c.Acked()); err != nil {
					<-quit
					ended <- err
					return
				}
			}
		}
	}()
	return func() error {
		close(quit)
		return <-ended
	}
}

func (p *producer) note(acked uint64) error {
	if acked <= p.acked {
		return nil
	}
	p.acked = acked
	return p.book.SetAcked(acked)
}

// comeback returns nil for what a daemon that was killed, is stopping, or has no room or no descriptors just now leaves behind, and any other error as it is.
func comeback(err error) error {
	var refusal *wire.Refusal
	var notice *wire.Notice
	switch {
	case err == nil, errors.Is(err, client.ErrDaemonGone), unreachable(err):
		return nil
	case errors.As(err, &refusal) && slices.Contains([]wire.Code{wire.CodeShuttingDown, wire.CodeTooManyConnections, wire.CodeInternal}, refusal.Code):
		return nil
	case errors.As(err, &notice) && notice.Code == wire.CodeShuttingDown:
		return nil
	case errors.As(err, &notice) && (notice.Code == wire.CodeSessionTaken || notice.Code == wire.CodeStalled):
		return nil
	}
	return fmt.Errorf("for no reason of ours: %w", err)
}
