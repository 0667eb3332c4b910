package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/spec"
)

// Figures of the case remote, in GB/s.
const (
	figureRemote      = "remote"        // the daemon to a trainer over TCP
	figureRemoteBare  = "bare sendfile" // the bare loop into as many buffers
	remoteSampleBytes = 64 * kib
	remotePrefetch    = 8
	remoteRateMin     = 0.85 // to the bare loop's
)

func remoteKind() tensorKind {
	return tensorKind{
		title: "Batches of samples over TCP on loopback to one remote trainer, which releases each at once. The ring was filled before, and each turn is another group's.\n" +
			"bare: a process that sends a memfd of that size with sendfile to one that reads it into as many buffers, in turn.",
		measure: (*tensorRunner).remote,
		rows: []tensorRow{
			{figureRemote, "daemon to trainer", figureRemoteBare},
			{figureRemoteBare, "bare sendfile loop", ""},
		},
		targets: remoteTargets,
	}
}

func remoteTargets(r *TensorResult) []Target {
	if v, ok := r.ratio(figureRemote, figureRemoteBare); ok {
		return []Target{atLeast(r.Name, "GB/s to the bare sendfile loop's", v, remoteRateMin)}
	}
	return nil
}

func (r *tensorRunner) remote(ctx context.Context, out *TensorResult) error {
	return interleave(r.opt.Runs, []string{figureRemote, figureRemoteBare}, func(run int, name string) error {
		measure := r.remoteOne
		if name == figureRemoteBare {
			measure = r.remoteBare
		}
		if err := measure(ctx, out); err != nil {
			return err
		}
		r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s", out.Figures[name].Runs[run]))
		return nil
	})
}

// remoteOne fills a ring and lets one group after the other read it.
func (r *tensorRunner) remoteOne(ctx context.Context, out *TensorResult) (err error) {
	rows, batches := out.ChunkBytes/remoteSampleBytes, out.Bytes/out.ChunkBytes
	var groups []string
	for k := range transfersRun + 1 {
		groups = append(groups, fmt.Sprintf("{name: g%d}", k))
	}
	layout := fmt.Sprintf("x:U8[%d]", remoteSampleBytes)
	d, err := startConfigured(ctx, r.options(), fmt.Sprintf("tables:\n  - {name: %s, spec: %q, batch_size: %d, batches: %d, groups: [%s]}\n",
		tableName, layout, rows, batches+2*remotePrefetch, strings.Join(groups, ", ")))
	if err != nil {
		return err
	}
	defer func() {
		d.kill() // it would wait for trainers to read what is left
		err = errors.Join(err, d.cleanUp())
	}()
	if err := fillRing(ctx, d.Unix, layout, rows*batches); err != nil {
		return err
	}
	var rates []float64
	for k := range transfersRun + 1 {
		took, err := readRemote(ctx, d.TCP, fmt.Sprintf("g%d", k), batches)
		if err != nil {
			return err
		}
		if k > 0 { // the first is warm-up
			rates = append(rates, float64(out.Bytes)/1e9/took.Seconds())
		}
	}
	out.add(figureRemote, "GB/s", median(rates))
	return nil
}

// fillRing pushes samples, and returns when all are in the ring.
func fillRing(ctx context.Context, address, layout string, samples int64) error {
	s, err := spec.ParseText(layout)
	if err != nil {
		return err
	}
	p, err := client.Dial(ctx, address, client.Config{Table: tableName, Spec: s})
	if err != nil {
		return err
	}
	sample := make([]byte, remoteSampleBytes)
	for i := range sample {
		sample[i] = byte(i * 7)
	}
	for range samples {
		if err := p.Push(ctx, sample); err != nil {
			return errors.Join(err, p.Close(ctx))
		}
	}
	return p.Close(ctx)
}

// readRemote reads so many batches for a group and says how long that took, from the first on.
func readRemote(ctx context.Context, address, group string, batches int64) (took time.Duration, err error) {
	t, err := client.Attach(ctx, address, client.TrainerConfig{Table: tableName, Group: group, Prefetch: remotePrefetch, Client: "ingestd-bench"})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	begin := time.Now()
	for range batches {
		b, err := t.Next(ctx)
		if err != nil {
			return 0, err
		}
		b.Release()
	}
	return time.Since(begin), nil
}

// remoteBare receives as many bytes as a turn has from the bare loop.
func (r *tensorRunner) remoteBare(ctx context.Context, out *TensorResult) error {
	sender, first, err := startChild("sendfile sender", r.opt.Binary, "_sendfile", "--bytes", strconv.FormatInt(out.Bytes, 10))
	if err != nil {
		return err
	}
	rates, err := receiveBare(ctx, first.Address, out.Bytes, out.ChunkBytes)
	if err == nil {
		out.add(figureRemoteBare, "GB/s", median(rates))
	}
	return errors.Join(err, stopAll(err != nil, sender))
}

func receiveBare(ctx context.Context, address string, size, part int64) ([]float64, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to the sendfile loop: %w", err)
	}
	defer conn.Close()
	var buffers [remotePrefetch][]byte
	for i := range buffers {
		buffers[i] = make([]byte, part)
	}
	var rates []float64
	for k := range transfersRun + 1 {
		begin := time.Now()
		if _, err := conn.Write([]byte{1}); err != nil {
			return nil, fmt.Errorf("ask for a transfer: %w", err)
		}
		for i := range size / part {
			if _, err := io.ReadFull(conn, buffers[i%remotePrefetch]); err != nil {
				return nil, fmt.Errorf("read a transfer: %w", err)
			}
		}
		if k > 0 { // the first is warm-up
			rates = append(rates, float64(size)/1e9/time.Since(begin).Seconds())
		}
	}
	return rates, nil
}
