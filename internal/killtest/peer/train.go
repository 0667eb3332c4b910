//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/killtest"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// unreachable says whether nobody listened, or the listener died while we knocked.
func unreachable(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EAGAIN)
}

func (o *options) train(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := o.attachment(ctx); err != nil {
			return err
		}
		wait(ctx, again)
	}
	return nil
}

// attachment attaches and reads until the daemon is gone or ctx ends.
func (o *options) attachment(ctx context.Context) error {
	t, err := client.Attach(context.WithoutCancel(ctx), o.addr, client.TrainerConfig{Table: o.table, Spec: o.spec, Group: o.group, Prefetch: o.most, Client: "peer"})
	if err != nil {
		return comeback(err)
	}
	defer t.Close()
	seen, err := shm.Observe(context.WithoutCancel(ctx), strings.TrimPrefix(o.addr, "unix://"), wire.Hello{Table: o.table, Client: "peer"})
	if err != nil {
		return comeback(err)
	}
	defer seen.Close()
	var held []*client.Batch
	defer func() {
		for _, b := range held {
			b.Release()
		}
	}()
	for ctx.Err() == nil {
		for len(held) >= t.Prefetch() || len(held) > 0 && o.rnd.IntN(2) == 0 {
			i := o.rnd.IntN(len(held))
			held[i].Release()
			held[i] = held[len(held)-1]
			held = held[:len(held)-1]
		}
		b, err := t.Next(ctx)
		switch {
		case err == io.EOF || ctx.Err() != nil:
			return nil
		case err != nil:
			return comeback(err)
		}
		held = append(held, b)
		if err := o.read(b, seen.View()); err != nil {
			return err
		}
		o.rest(ctx)
	}
	return nil
}

// read checks a batch and writes down that it was delivered.
func (o *options) read(b *client.Batch, view *ring.View) error {
	rows := killtest.Rows{Streams: b.Streams(), Numbers: b.Numbers()}
	for leaf := range b.Columns() {
		rows.Columns = append(rows.Columns, b.Column(leaf))
	}
	spans, err := rows.Read(o.spec)
	if !ours(b.Number(), view) {
		return nil // The daemon died while we read, and its successor has given the place to others: whoever gets the batch from it reads it.
	}
	if err != nil {
		return broken("batch %d: %v", b.Number(), err)
	}
	_, err = fmt.Fprintln(os.Stdout, killtest.Delivery{Batch: b.Number(), Spans: spans})
	return err
}

// ours tells whether some place holds the batch, leased. It stays so from before a batch is delivered until after it is released, also over a restart of the
// daemon, so what was read before it was still so was whole.
func ours(number uint64, view *ring.View) bool {
	for i := range view.Batches() {
		if s := view.BatchState(i); s.State == ring.Leased && s.Number == number {
			return true
		}
	}
	return false
}
