//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/killtest"
	"github.com/ingestd/ingestd/tensor"
)

// publish publishes generations whose content proves itself, in place, until SIGTERM. It writes one line for each that the daemon says is published.
func (o *options) publish(ctx context.Context) error {
	m, err := killtest.WeightsManifest()
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		p, err := client.OpenPublisher(ctx, o.addr, client.PublisherConfig{Table: o.table, Manifest: m, Client: o.name, Stream: o.role == "stream"})
		if err != nil {
			wait(ctx, again)
			continue
		}
		for err == nil && ctx.Err() == nil {
			err = o.publishOne(ctx, p, m)
		}
		_ = p.Close()
		if err != nil && !errors.Is(err, client.ErrDaemonGone) && !errors.Is(err, client.ErrShuttingDown) && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

func (o *options) publishOne(ctx context.Context, p *client.Publisher, m *tensor.Manifest) error {
	limited, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	g, err := p.Begin(limited, 0)
	if err != nil {
		return err
	}
	for i := range m.Len() {
		b := make([]byte, m.EncodedBytes(i))
		killtest.WeightsContent(b, g.Number(), i)
		if err := g.PutAt(limited, i, b); err != nil {
			return err
		}
	}
	done, err := g.Commit(limited)
	if err == nil {
		fmt.Printf("%d\n", done.Generation)
	}
	return err
}

// subscribe reads generations and checks every byte of them, until SIGTERM. With role hold it keeps the first one it reads and reads no more. It writes one
// line for each.
func (o *options) subscribe(ctx context.Context) error {
	s, err := client.Subscribe(ctx, o.addr, client.SubscribeConfig{Table: o.table, Wait: true, Client: o.name, ReconnectFor: time.Minute})
	if err != nil {
		return err
	}
	defer s.Close()
	for newest := uint64(0); ctx.Err() == nil; {
		w, err := s.Wait(ctx, newest)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		newest = w.Generation()
		for range 2 { // and again: nothing may change
			if err := checkWeights(w); err != nil {
				return err
			}
			o.rest(ctx)
		}
		fmt.Printf("%d\n", newest)
		if o.role == "hold" {
			<-ctx.Done()
			if err := checkWeights(w); err != nil {
				return err
			}
		}
		w.Release()
	}
	return nil
}

func checkWeights(w *client.Weights) error {
	if err := w.Verify(); err != nil {
		return broken("generation %d: %v", w.Generation(), err)
	}
	for i := range w.Manifest().Len() {
		got := w.At(i)
		want := make([]byte, len(got))
		if killtest.WeightsContent(want, w.Generation(), i); !bytes.Equal(got, want) {
			return broken("generation %d: tensor %d is not that generation's", w.Generation(), i)
		}
	}
	return nil
}
