package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// rates runs a case's contenders, interleaved.
func (r *shmRunner) rates(ctx context.Context, out *ShmResult) error {
	who := []string{contenderFull, contenderMemory}
	if out.Kind == kindPlace {
		who = []string{contenderFull, contenderBare}
		if r.opt.Shmipc != "" {
			who = append(who, contenderShmipc)
		}
	}
	out.Rates = map[string]*Result{}
	for _, name := range who {
		out.Rates[name] = &Result{latency: newRecorder()}
	}
	err := interleave(r.opt.Runs, who, func(run int, name string) error {
		m, err := r.rate(ctx, out.ShmCase, name, run)
		if err != nil {
			return err
		}
		out.Rates[name].Runs = append(out.Rates[name].Runs, *m)
		r.progress(out.ShmCase, run, name, countText(m.SamplesPerSecond)+" samples/s")
		return nil
	})
	for _, result := range out.Rates {
		if err == nil {
			result.summarise()
		}
	}
	return err
}

func (r *shmRunner) rate(ctx context.Context, c ShmCase, name string, run int) (*Measurement, error) {
	opt := r.options()
	var g *rig
	var err error
	switch name {
	case contenderMemory:
		pattern := newPattern(c.SampleBytes)
		return measureWrite(ctx, opt, c.Case, int(c.SampleBytes), func(into []byte) { writePattern(into, pattern) })
	case contenderFull:
		g, err = r.startFiller(ctx, opt, c, r.prefetch(c.Case))
	case contenderBare:
		g, err = startHandoff(opt, c.Case)
	case contenderShmipc:
		g, err = r.startShmipc(opt, c.Case)
	}
	var m *Measurement
	if err == nil {
		profile := r.opt.CPUProfile != "" && run == r.opt.Runs-1 && name == contenderFull
		m, err = g.measure(ctx, profile, nil)
	}
	if g != nil {
		err = errors.Join(err, g.stop(err != nil))
	}
	return m, err
}

// prefetch shares the places of a ring: a third for the trainer, a third for the producer, the rest for what is published.
func (r *shmRunner) prefetch(c Case) int {
	if r.opt.Prefetch > 0 {
		return r.opt.Prefetch
	}
	return max(1, c.Batches/3)
}

// startFiller starts the daemon, its trainer and a producer that fills in place. prefetch 0 leaves that to the daemon.
func (r *shmRunner) startFiller(ctx context.Context, opt *Options, c ShmCase, prefetch int, serve ...string) (*rig, error) {
	d, err := startDaemon(ctx, opt, c.Case, serve...)
	if err != nil {
		return nil, err
	}
	g := &rig{opt: opt, c: c.Case, name: contenderFull, daemon: d, server: d.process}
	if err := d.weighAsking(ctx); err != nil {
		return g, err
	}
	trainer := []string{"_trainer", "--address", d.Unix, "--table", tableName, "--prefetch", strconv.Itoa(prefetch)}
	if c.Kind == kindPlace {
		trainer = append(trainer, "--sparse")
	}
	if g.receiver, _, err = startChild("trainer", opt.Binary, trainer...); err != nil {
		return g, err
	}
	filler := []string{"_filler", "--address", d.Unix, "--table", tableName, "--prefetch", strconv.Itoa(prefetch)}
	switch c.Kind {
	case kindWrite:
		filler = append(filler, "--write")
	case kindLatency:
		filler = append(filler, "--rate", strconv.Itoa(pace))
	}
	g.sender, _, err = startChild("filler", opt.Binary, filler...)
	return g, err
}

// startShmipc starts the two processes of the shmipc-go baseline.
func (r *shmRunner) startShmipc(opt *Options, c Case) (*rig, error) {
	folder, err := os.MkdirTemp("", "ingestd-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for shmipc-go's socket: %w", err)
	}
	g := &rig{opt: opt, c: c, name: contenderShmipc, folder: folder}
	args := []string{
		"--socket", filepath.Join(folder, "socket"), "--counter", filepath.Join(folder, "counter"), "--sample-bytes", strconv.FormatInt(c.SampleBytes, 10),
		"--samples", strconv.Itoa(c.BatchSize * c.Batches), "--batch", strconv.Itoa(c.BatchSize),
	}
	if g.receiver, _, err = (launch{name: "shmipc reader", binary: r.opt.Shmipc, args: append([]string{"reader"}, args...)}).child(); err != nil {
		return g, err
	}
	g.server = g.receiver
	g.sender, _, err = launch{name: "shmipc writer", binary: r.opt.Shmipc, args: append([]string{"writer"}, args...)}.child()
	return g, err
}

// latencies measures the wait of a sample that is a batch of its own, at a slow pace.
func (r *shmRunner) latencies(ctx context.Context, out *ShmResult) error {
	who := []string{contenderFull, contenderPoll, contenderWake}
	out.Times = map[string]*Times{}
	for _, name := range who {
		out.Times[name] = &Times{Unit: "us", latency: newRecorder()}
	}
	return interleave(r.opt.Runs, who, func(run int, name string) error {
		latency, err := r.latency(ctx, out.ShmCase, name)
		if err != nil {
			return err
		}
		one := latencyOf(latency.intended)
		t := out.Times[name]
		t.Runs = append(t.Runs, one.P50)
		t.latency.intended.Merge(latency.intended)
		r.progress(out.ShmCase, run, name, fmt.Sprintf("p50 %.1f us, p99 %.1f us", one.P50, one.P99))
		return nil
	})
}

func (r *shmRunner) latency(ctx context.Context, c ShmCase, name string) (*recorder, error) {
	opt := r.options()
	var g *rig
	var err error
	switch name {
	case contenderFull:
		g, err = r.startFiller(ctx, opt, c, 0)
	case contenderPoll:
		g, err = r.startPolled(ctx, opt, c)
	case contenderWake:
		g, err = startWake(opt, c.Case)
	}
	latency := newRecorder()
	for begin := time.Now(); err == nil && latency.intended.TotalCount() == 0; { // once, but on a machine that is busy with other things
		if err = g.noteLatencies(ctx, max(r.opt.Warmup, 10*time.Millisecond), r.opt.Duration, latency); err == nil && time.Since(begin) > progressTimeout {
			err = fmt.Errorf("no sample arrived within %v", time.Since(begin))
		}
	}
	if err == nil {
		_, err = g.sender.snapshot() // it may have failed meanwhile
	}
	if g != nil {
		err = errors.Join(err, g.stop(err != nil))
	}
	return latency, err
}

// startPolled is startFiller with a daemon that looks at its producers' queues for so long before it sleeps.
func (r *shmRunner) startPolled(ctx context.Context, opt *Options, c ShmCase) (*rig, error) {
	folder, err := os.MkdirTemp("", "ingestd-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for the daemon's configuration: %w", err)
	}
	file := filepath.Join(folder, "poll.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "local_producers: {poll: %v}\n", pollFor), 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(folder))
	}
	g, err := r.startFiller(ctx, opt, c, 0, "--config", file)
	if g == nil {
		return nil, errors.Join(err, os.RemoveAll(folder))
	}
	g.folder = folder
	return g, err
}
