//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/killtest"
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
		if err := o.read(b); err != nil {
			return err
		}
		o.rest(ctx)
	}
	return nil
}

// read checks a batch and writes down that it was delivered.
func (o *options) read(b *client.Batch) error {
	rows := killtest.Rows{Streams: b.Streams(), Numbers: b.Numbers()}
	for leaf := range b.Columns() {
		rows.Columns = append(rows.Columns, b.Column(leaf))
	}
	spans, err := rows.Read(o.spec)
	if !b.Intact() {
		return nil // The daemon died while we read, and its successor has given the place to others: whoever gets the batch from it reads it.
	}
	if err != nil {
		return broken("batch %d: %v", b.Number(), err)
	}
	_, err = fmt.Fprintln(os.Stdout, killtest.Delivery{Batch: b.Number(), Spans: spans})
	return err
}
