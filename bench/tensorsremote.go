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

// Figures of the case remote, in GB/s. Each contender has those of its costs, too: its sender's, and both sides'.
const (
	figureRemote      = "remote"        // the daemon to a trainer over TCP
	figureRemoteBare  = "bare sendfile" // the bare loop into as many buffers
	figureRemoteWrite = "bare write"    // a loop that copies what it sends
	figureBothCPU     = ": both sides' CPU"
	remoteSampleBytes = 64 * kib
	remotePrefetch    = 8
	remoteRateMin     = 0.85 // to the bare loop's
)

func remoteKind() tensorKind {
	return tensorKind{
		title: "Batches of samples over TCP on loopback to one remote trainer, which releases each at once. The ring was filled before, and each turn is another group's.\n" +
			"bare: a process that sends a memfd of that size, with sendfile or with write(), to one that reads it into as many buffers, in turn.",
		measure: (*tensorRunner).remote,
		rows: []tensorRow{
			{figureRemote, "daemon to trainer", figureRemoteBare},
			{figureRemoteBare, "bare sendfile loop", ""},
			{figureRemoteWrite, "bare write() loop", figureRemoteBare},
			{figureRemote + figureServerCPU, "the daemon", figureRemoteWrite + figureServerCPU},
			{figureRemoteBare + figureServerCPU, "bare sendfile loop, sender", figureRemoteWrite + figureServerCPU},
			{figureRemoteWrite + figureServerCPU, "bare write() loop, sender", ""},
			{figureRemote + figureBothCPU, "daemon and trainer", figureRemoteWrite + figureBothCPU},
			{figureRemoteBare + figureBothCPU, "bare sendfile loop, both sides", figureRemoteWrite + figureBothCPU},
			{figureRemoteWrite + figureBothCPU, "bare write() loop, both sides", ""},
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
	return interleave(r.opt.Runs, []string{figureRemote, figureRemoteBare, figureRemoteWrite}, func(run int, name string) error {
		err := error(nil)
		if name == figureRemote {
			err = r.remoteOne(ctx, out)
		} else {
			err = r.remoteBare(ctx, out, name)
		}
		if err != nil {
			return err
		}
		r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s, the sender takes %.3f CPU-s/GB", out.Figures[name].Runs[run], out.Figures[name+figureServerCPU].Runs[run]))
		return nil
	})
}

// turns are the transfers of one run: how fast each was, and what they cost.
type turns struct {
	rates []float64
	from  *snapshot // of the CPU clocks of the sender and of this process, which receives, before the first
}

// turn notes a transfer. The first is warm-up.
func (t *turns) turn(k int, size int64, took time.Duration, sender *process) (err error) {
	if k > 0 {
		t.rates = append(t.rates, float64(size)/1e9/took.Seconds())
		return nil
	}
	t.from, err = takeSnapshot([]int{sender.pid(), selfPid})
	return err
}

// note adds a run's figures.
func (t *turns) note(out *TensorResult, name string, sender *process) error {
	to, err := takeSnapshot([]int{sender.pid(), selfPid})
	if err != nil {
		return err
	}
	out.add(name, "GB/s", median(t.rates))
	perGB := func(ns int64) float64 { return float64(ns) / float64(out.Bytes) / float64(len(t.rates)) }
	sent, received := to.CPU[sender.pid()]-t.from.CPU[sender.pid()], to.CPU[selfPid]-t.from.CPU[selfPid]
	out.add(name+figureServerCPU, "CPU-s/GB", perGB(sent))
	out.add(name+figureBothCPU, "CPU-s/GB", perGB(sent+received))
	return nil
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
	var all turns
	for k := range transfersRun + 1 {
		took, err := readRemote(ctx, d.TCP, fmt.Sprintf("g%d", k), batches)
		if err == nil {
			err = all.turn(k, out.Bytes, took, d.process)
		}
		if err != nil {
			return err
		}
	}
	return all.note(out, figureRemote, d.process)
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

// remoteBare receives as many bytes as a turn has from a bare loop.
func (r *tensorRunner) remoteBare(ctx context.Context, out *TensorResult, name string) error {
	sender, first, err := startChild(name+" sender", r.opt.Binary, "_sendfile", "--bytes", strconv.FormatInt(out.Bytes, 10),
		"--write="+strconv.FormatBool(name == figureRemoteWrite))
	if err != nil {
		return err
	}
	all, err := receiveBare(ctx, sender, first.Address, out.Bytes, out.ChunkBytes)
	if err == nil {
		err = all.note(out, name, sender)
	}
	return errors.Join(err, stopAll(err != nil, sender))
}

func receiveBare(ctx context.Context, sender *process, address string, size, part int64) (*turns, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to the bare loop: %w", err)
	}
	defer conn.Close()
	all := new(turns)
	var buffers [remotePrefetch][]byte
	for i := range buffers {
		buffers[i] = make([]byte, part)
	}
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
		if err := all.turn(k, size, time.Since(begin), sender); err != nil {
			return nil, err
		}
	}
	return all, nil
}
