package client

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// stepPush sends chunks as the samples of a Producer that lends its caller's memory.
type stepPush struct {
	p     *Producer
	noCRC bool
}

func pushSteps(ctx context.Context, addr string, cfg StepsConfig) (stepWay, int, error) {
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, 0, err
	}
	t := target{addr: addr, network: network, address: address, manifest: cfg.Manifest.JSON(), cfg: Config{
		Table: cfg.Table, Session: cfg.Name, Ack: wire.AckCommitted, WindowBytes: cfg.WindowBytes, BufferBytes: DefaultBufferBytes,
		HandshakeTimeout: cfg.HandshakeTimeout, Client: cfg.Client, Token: cfg.Token, ReconnectFor: cfg.ReconnectFor, ReconnectFrom: cfg.ReconnectFrom, ReconnectTo: cfg.ReconnectTo,
		ContinueAfterLoss: true, Dialer: cfg.Dialer,
	}}
	conn, accepted, err := t.connect(ctx, cfg.HandshakeTimeout)
	if err != nil {
		return nil, 0, fmt.Errorf("client: %w", err)
	}
	t.cfg.Spec, err = chunkSpec(accepted.ChunkBytes)
	if err == nil {
		err = checkAgreed(accepted, &t.cfg)
	}
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("client: dial %s, table %q: %w", addr, cfg.Table, err), conn.Close())
	}
	return &stepPush{start(ctx, conn, accepted, t), cfg.NoCRC}, int(accepted.ChunkBytes), nil
}

func (w *stepPush) begin() {
	p := w.p
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept.lent.open = nil
}

func (w *stepPush) send(_ context.Context, op string, h tensor.Header, data [][]byte) error {
	return w.p.lend(op, &lentSample{header: h, pieces: slices.Clone(data), noCRC: w.noCRC})
}

func (w *stepPush) commit(ctx context.Context, step uint64) error {
	p := w.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.flush(ctx, "commit"); err != nil {
		return err
	}
	if err := p.refusal(step); err != nil {
		return err
	}
	p.kept.lent.open = nil
	return nil
}

func (w *stepPush) refused(step uint64) error {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	return w.p.refusal(step)
}

func (w *stepPush) takeBack() bool { return w.p.takeBack() }

func (w *stepPush) stats() StepStats {
	s := w.p.Stats()
	return StepStats{Chunks: s.Sent, Acked: s.Acked, Reconnects: s.Reconnects, Resent: s.Resent, Replays: s.Replays, Lost: s.Lost}
}

func (w *stepPush) close(ctx context.Context) error { return w.p.Close(ctx) }

func (w *stepPush) abort() { w.p.Abort() }
