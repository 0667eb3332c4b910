package bench

import (
	"bytes"
	"context"
	"os"
	"sync"

	"github.com/ingestd/ingestd/client"
)

// runClientSender sends with the client library instead of the bench's own loop, at full speed only.
func runClientSender(ctx context.Context, s *sender) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var producers []*client.Producer
	for range s.opt.connections {
		p, err := client.Dial(ctx, s.opt.address, client.Config{Table: s.opt.table, Spec: s.spec, Client: "ingestd-bench",
			TLS: client.TLS{Authorities: s.opt.authorities}, WindowSamples: s.opt.windowSamples, WindowBytes: s.opt.windowBytes})
		if err != nil {
			return err
		}
		defer p.Abort()
		producers = append(producers, p)
	}
	accepted := producers[0].Accepted()
	s.window.WindowSamples, s.window.WindowBytes = accepted.WindowSamples, accepted.WindowBytes
	var running sync.WaitGroup
	for _, p := range producers {
		running.Go(func() {
			if err := pushForever(ctx, p, s); ctx.Err() == nil {
				s.fail(err)
			}
		})
	}
	err := serveControl(os.Stdin, os.Stdout, &s.window, func(ask request) (reply, error) {
		if err := s.failure(); err != nil {
			return reply{}, err
		}
		if ask.Do != doSnapshot {
			return reply{}, unknownRequest(ask)
		}
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		for _, p := range producers {
			n := p.Acked()
			snap.Samples += n
			snap.Streams = append(snap.Streams, n)
		}
		return reply{Snapshot: snap}, nil
	})
	cancel()
	for _, p := range producers {
		p.Abort()
	}
	running.Wait()
	return err
}

// pushForever pushes the same samples, as many at a time as make a write.
func pushForever(ctx context.Context, p *client.Producer, s *sender) error {
	sample := int(s.spec.SampleBytes())
	n := max(1, s.opt.writeBytes/sample)
	one := make([]byte, sample)
	putStamp(one, closedStamp)
	data := bytes.Repeat(one, n)
	for {
		if _, err := p.PushMany(ctx, n, data); err != nil {
			return err
		}
	}
}
