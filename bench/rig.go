package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// rig is the processes of one measurement: a sender, and either the bare loop or the daemon with its trainer.
type rig struct {
	opt      *Options
	c        Case
	name     string
	sender   *process
	receiver *process // counts the samples: the bare loop, or the trainer
	server   *process // whose CPU time is compared: the bare loop, or the daemon
	daemon   *daemon  // nil for the bare loop
	window   ready    // in force
	folder   string   // removed at the end
}

// Measurement is one run of one contender.
type Measurement struct {
	SamplesPerSecond float64 `json:"samples_per_second"`
	GBPerSecond      float64 `json:"gb_per_second"`
	Seconds          float64 `json:"seconds"`

	// CPU-seconds per GB: the daemon's or bare loop's own, the sender's, the trainer's. For copy, its own.
	ServerCPU  float64 `json:"server_cpu_s_per_gb"`
	SenderCPU  float64 `json:"sender_cpu_s_per_gb,omitempty"`
	TrainerCPU float64 `json:"trainer_cpu_s_per_gb,omitempty"`

	MinShare float64 `json:"min_share,omitempty"` // of the slowest stream, as a ratio to its fair share

	MallocsPerSample float64 `json:"mallocs_per_sample,omitempty"`
	MallocsPerBatch  float64 `json:"mallocs_per_batch,omitempty"`
	MallocsPerSecond float64 `json:"mallocs_per_second,omitempty"`

	OpenRate float64 `json:"open_rate,omitempty"` // samples/s offered in the open loop
	Spilled  float64 `json:"spilled,omitempty"`   // share of the bytes that a reader of steps has copied out of the ring
	Memory   *Memory `json:"memory,omitempty"`
}

// startBare starts the bare loop and a sender for it, which is given the window that the daemon granted if that is known.
func startBare(opt *Options, c Case, window ready) (*rig, error) {
	layout, err := c.spec()
	if err != nil {
		return nil, err
	}
	args := []string{
		"_bare", "--spec", layout.Text(), "--memory-bytes", strconv.FormatInt(c.dataBytes(), 10),
		"--connections", strconv.Itoa(c.Connections), "--read-bytes", strconv.Itoa(opt.BareRead), "--transport", c.Transport,
		"--host", opt.sites.host(), "--certs", string(opt.certs),
	}
	if window.WindowSamples > 0 {
		args = append(args, "--window-samples", strconv.FormatInt(window.WindowSamples, 10), "--window-bytes", strconv.FormatInt(window.WindowBytes, 10))
	}
	bare, first, err := startChildAt(opt.sites.server, "bare loop", opt.Binary, args...)
	if err != nil {
		return nil, err
	}
	g := &rig{opt: opt, c: c, name: contenderBare, receiver: bare, server: bare}
	return g, g.startSender(first.Address, layout.Text())
}

// startFull starts the daemon, its trainer and a sender.
func startFull(ctx context.Context, opt *Options, c Case) (*rig, error) {
	layout, err := c.spec()
	if err != nil {
		return nil, err
	}
	d, err := startDaemon(ctx, opt, c, opt.certs.serve(c.Transport, opt.sites.host())...)
	if err != nil {
		return nil, err
	}
	g := &rig{opt: opt, c: c, name: contenderFull, daemon: d, server: d.process}
	if err := d.weighAsking(ctx); err != nil {
		return g, err
	}
	g.receiver, _, err = startChild("trainer", opt.Binary, "_trainer", "--address", d.Unix, "--table", tableName)
	if err != nil {
		return g, err
	}
	return g, g.startSender(d.address(c.Transport), layout.Text())
}

func (g *rig) startSender(address, layout string) error {
	args := []string{
		"_sender", "--address", address, "--table", tableName, "--spec", layout,
		"--connections", strconv.Itoa(g.c.Connections), "--write-bytes", strconv.Itoa(g.opt.WriteBytes),
		"--send-buffer", strconv.Itoa(g.opt.SendBuffer), "--source-bytes", strconv.Itoa(g.opt.SourceBytes),
		"--window-samples", strconv.FormatInt(g.opt.AskSamples, 10), "--window-bytes", strconv.FormatInt(g.opt.AskBytes, 10),
	}
	if g.opt.certs != "" {
		args = append(args, "--tls-ca", g.opt.certs.authority())
	}
	if g.opt.Client {
		args = append(args, "--client")
	}
	sender, first, err := startChildAt(g.opt.sites.sender, "sender", g.opt.Binary, args...)
	if err != nil {
		return err
	}
	g.sender, g.window = sender, *first
	return nil
}

// stop ends all processes in order: the sender, then the daemon, which drains to its trainer, then that. After an error it kills them.
func (g *rig) stop(failed bool) error {
	var errs []error
	end := func(p *process, stop func() error) {
		switch {
		case p == nil:
		case failed:
			p.kill()
		default:
			errs = append(errs, stop())
		}
	}
	if g.sender != nil {
		end(g.sender, g.sender.stop)
	}
	if g.daemon != nil {
		end(g.daemon.process, g.daemon.terminate)
		errs = append(errs, g.daemon.cleanUp())
	}
	if g.receiver != nil {
		end(g.receiver, g.receiver.stop)
	}
	if g.folder != "" {
		errs = append(errs, os.RemoveAll(g.folder))
	}
	return errors.Join(errs...)
}

// measure runs the window at full speed and then the open loop.
func (g *rig) measure(ctx context.Context, profile bool, latency *recorder) (*Measurement, error) {
	if err := sleep(ctx, g.opt.Warmup); err != nil {
		return nil, err
	}
	if profile {
		if err := g.profileChildren(); err != nil {
			return nil, err
		}
	}
	m, err := g.fullSpeed(ctx, profile && g.daemon != nil)
	if err != nil {
		return nil, err
	}
	if g.opt.OpenDuration > 0 && !g.opt.Client {
		if err := g.openLoop(ctx, m, latency); err != nil {
			return nil, err
		}
	}
	if g.daemon != nil {
		if m.Memory, err = readMemory(g.server.pid(), g.c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// profileChildren has everybody but the daemon, who is asked in another way, write a profile until it ends.
func (g *rig) profileChildren() error {
	for _, p := range []*process{g.sender, g.receiver} {
		if _, err := p.ask(request{Do: doProfile, Path: g.profileFile(p)}); err != nil {
			return err
		}
	}
	return nil
}

func (g *rig) profileFile(p *process) string {
	name := strings.NewReplacer("/", "-", " ", "-").Replace(g.c.Name + "-" + g.name + "-" + p.name + ".pprof")
	return filepath.Join(g.opt.CPUProfile, name)
}

// window is what was read at the two ends of a measured window.
type window struct {
	from, to         *snapshot // of the receiver, with everybody's CPU clocks
	sentFrom, sentTo *snapshot
}

// progressTimeout bounds a window in which nothing arrives; a machine that is busy with other things can make a short one such.
const progressTimeout = 30 * time.Second

// watch measures one window, which is longer than asked for if no sample arrived in it.
func (g *rig) watch(ctx context.Context, length time.Duration) (*window, error) {
	pids := []int{g.server.pid(), g.sender.pid(), g.receiver.pid()}
	var w window
	var err error
	if w.from, err = g.receiver.snapshot(pids...); err != nil {
		return nil, err
	}
	if w.sentFrom, err = g.sender.snapshot(); err != nil {
		return nil, err
	}
	for begin := time.Now(); ; length = max(length, time.Millisecond) {
		if err := sleep(ctx, length); err != nil {
			return nil, err
		}
		if w.to, err = g.receiver.snapshot(pids...); err != nil {
			return nil, err
		}
		if w.sentTo, err = g.sender.snapshot(); err != nil {
			return nil, err
		}
		if w.to.Samples > w.from.Samples && w.sentTo.Samples > w.sentFrom.Samples {
			return &w, nil
		}
		if time.Since(begin) > length+progressTimeout {
			return nil, g.server.fail(fmt.Errorf("no sample arrived within %v", time.Since(begin)))
		}
	}
}

func (g *rig) fullSpeed(ctx context.Context, profile bool) (*Measurement, error) {
	var before, after float64
	var err error
	if g.daemon != nil {
		if before, err = g.daemon.mallocs(ctx); err != nil {
			return nil, err
		}
	}
	profiled := make(chan error, 1)
	if profile {
		go func() { profiled <- g.daemon.profile(ctx, g.profileFile(g.server), g.opt.Duration) }()
	} else {
		profiled <- nil
	}
	w, err := g.watch(ctx, g.opt.Duration)
	if err != nil {
		return nil, err
	}
	m, err := g.evaluate(w.from, w.to)
	if err != nil {
		return nil, err
	}
	if g.c.Connections > 1 {
		m.MinShare = minShare(w.sentFrom.Streams, w.sentTo.Streams)
	}
	if g.daemon != nil {
		if after, err = g.daemon.mallocs(ctx); err != nil {
			return nil, err
		}
		mallocs := max(0, after-before-g.daemon.asking)
		if profile {
			mallocs = 0 // the profiler allocates
		}
		m.MallocsPerSample = mallocs / float64(w.to.Samples-w.from.Samples)
		m.MallocsPerBatch = mallocs / float64(max(1, w.to.Batches-w.from.Batches))
		m.MallocsPerSecond = mallocs / m.Seconds
	}
	return m, <-profiled
}

// evaluate turns two snapshots into rates and costs.
func (g *rig) evaluate(from, to *snapshot) (*Measurement, error) {
	samples := float64(to.Samples - from.Samples)
	if to.Wrong != 0 {
		return nil, g.server.fail(fmt.Errorf("%d samples arrived with wrong first bytes", to.Wrong))
	}
	gb := samples * float64(g.c.SampleBytes) / 1e9
	m := &Measurement{Seconds: float64(to.Mono-from.Mono) / 1e9}
	m.SamplesPerSecond = samples / m.Seconds
	m.GBPerSecond = gb / m.Seconds
	perGB := func(p *process) float64 { return float64(to.CPU[p.pid()]-from.CPU[p.pid()]) / 1e9 / gb }
	m.ServerCPU, m.SenderCPU = perGB(g.server), perGB(g.sender)
	if g.receiver != g.server {
		m.TrainerCPU = perGB(g.receiver)
	}
	return m, nil
}

// minShare is the smallest share of a stream in what was acked, as a ratio to an equal share.
func minShare(from, to []uint64) float64 {
	least, sum := math.Inf(1), 0.0
	for i := range to {
		n := float64(to[i] - from[i])
		least = min(least, n)
		sum += n
	}
	return least * float64(len(to)) / sum
}

// openLoop offers a fraction of the rate just measured and notes latencies.
func (g *rig) openLoop(ctx context.Context, m *Measurement, latency *recorder) error {
	m.OpenRate = g.opt.OpenFraction * m.SamplesPerSecond
	if _, err := g.sender.ask(request{Do: doOpen, Rate: m.OpenRate}); err != nil {
		return err
	}
	return g.noteLatencies(ctx, openLead+g.opt.Warmup, g.opt.OpenDuration, latency)
}

// noteLatencies lets the receiver note latencies for so long after a warm-up.
func (g *rig) noteLatencies(ctx context.Context, warmup, length time.Duration, latency *recorder) error {
	if err := sleep(ctx, warmup); err != nil {
		return err
	}
	if _, err := g.receiver.ask(request{Do: doRecord}); err != nil {
		return err
	}
	if err := sleep(ctx, length); err != nil {
		return err
	}
	answer, err := g.receiver.ask(request{Do: doHistograms})
	if err != nil {
		return err
	}
	if _, err := g.sender.snapshot(); err != nil { // it may have failed meanwhile
		return err
	}
	return latency.merge(answer.Histograms)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
