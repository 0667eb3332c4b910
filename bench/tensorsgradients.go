package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/ingestd/ingestd/reduce"
	"github.com/ingestd/ingestd/tensor"
)

// Contenders of the case gradients. Each has a figure of its name, in GB/s of gradients, and those over sockets have some of their costs.
const (
	contenderVerify  = "verified" // as full, but the reader does not sum
	contenderNoCRC   = "no CRC"
	contenderInPlace = "in place"
	contenderCold    = "bare, cold" // the bare loop, and the sender reads as much memory as the producers do
	contenderAdd     = "copy and add"

	figureServerCPU = ": server's CPU"
	figureSenderCPU = ": producers' CPU"
	figureReaderCPU = ": reader's CPU"
	figureShareTime = "CRC, share of the time"
	figureShareCPU  = "CRC, share of all CPU time"
	figureSpilled   = "copied out of the ring"
)

func gradientsKind() tensorKind {
	rows := []tensorRow{
		{contenderVerify, "over TCP, CRC on, verified", contenderBare},
		{contenderVerify, "the same", contenderCold},
		{contenderFull, "over TCP, CRC on, verified and summed", contenderBare},
		{contenderNoCRC, "over TCP, CRC off, summed", contenderBare},
		{contenderBare, "bare loop, source in the cache", ""},
		{contenderCold, "bare loop, source as large as theirs", contenderBare},
		{contenderInPlace, "in place over shared memory", contenderAdd},
		{contenderAdd, "one goroutine: copy to a ring, add", ""},
		{figureShareTime, "CRC's share of the time over TCP", ""},
		{figureShareCPU, "CRC's share of all CPU time over TCP", ""},
		{figureSpilled, "copied out of the ring by the reader over TCP", ""},
	}
	for _, name := range []string{contenderVerify, contenderFull, contenderNoCRC, contenderInPlace, contenderBare, contenderCold} {
		for _, figure := range []string{figureServerCPU, figureSenderCPU, figureReaderCPU} {
			to := contenderBare + figure
			if name == contenderBare {
				to = ""
			}
			rows = append(rows, tensorRow{name + figure, name + figure, to})
		}
	}
	return tensorKind{
		title: "Gradients: producers in one process, daemon, and a reader that verifies whole steps while they arrive, and sums them where that is said. bare: a sender and a\n" +
			"process that reads as many sockets straight into memory of the ring's size and acks; it neither verifies nor sums, so the target is for a reader that only\n" +
			"verifies. CPU in seconds per GB; the server is the daemon, or the bare loop's receiver.",
		measure: (*tensorRunner).gradients,
		rows:    rows,
		targets: func(r *TensorResult) []Target {
			if v, ok := r.ratio(contenderVerify, contenderBare); ok {
				return []Target{atLeast(r.Name, "GB/s over TCP with CRC, verified, to the bare loop's", v, gradientsRateMin)}
			}
			return nil
		},
	}
}

// gradients runs all contenders, interleaved.
func (r *tensorRunner) gradients(ctx context.Context, out *TensorResult) error {
	who := []string{contenderFull, contenderVerify, contenderBare, contenderNoCRC, contenderInPlace, contenderCold, contenderAdd}
	err := interleave(r.opt.Runs, who, func(run int, name string) error {
		m, err := r.gradientsOne(ctx, &out.TensorCase, name, run)
		if err != nil {
			return err
		}
		out.add(name, "GB/s", m.GBPerSecond)
		if name != contenderAdd {
			for figure, cpu := range map[string]float64{figureServerCPU: m.ServerCPU, figureSenderCPU: m.SenderCPU, figureReaderCPU: m.TrainerCPU} {
				if cpu > 0 {
					out.add(name+figure, "s/GB", cpu)
				}
			}
		}
		if name == contenderFull {
			out.add(figureSpilled, "%", 100*m.Spilled)
		}
		r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s", m.GBPerSecond))
		return nil
	})
	if err == nil {
		out.addShares()
	}
	return err
}

// addShares works out from each run what the sums cost: of the time, and of the CPU time of all processes.
func (r *TensorResult) addShares() {
	for run := range r.Figures[contenderFull].Runs {
		at := func(name string) float64 {
			if t := r.Figures[name]; t != nil {
				return t.Runs[run]
			}
			return 0
		}
		cpu := func(name string) float64 {
			return at(name+figureServerCPU) + at(name+figureSenderCPU) + at(name+figureReaderCPU)
		}
		r.add(figureShareTime, "%", 100*(1-at(contenderFull)/at(contenderNoCRC)))
		r.add(figureShareCPU, "%", 100*(1-cpu(contenderNoCRC)/cpu(contenderFull)))
	}
}

func (r *tensorRunner) gradientsOne(ctx context.Context, c *TensorCase, name string, run int) (*Measurement, error) {
	opt := r.options()
	opt.WriteBytes = max(opt.WriteBytes, int(chunkSampleBytes(c)))
	var g *rig
	var err error
	switch name {
	case contenderAdd:
		return measureAdd(ctx, opt, c)
	case contenderBare:
		g, err = startBare(opt, bareCase(c), chunkWindow(c))
	case contenderCold:
		opt.SourceBytes = int(c.Bytes)
		g, err = startBare(opt, bareCase(c), chunkWindow(c))
	default:
		g, err = startGradients(ctx, opt, c, name)
	}
	var m *Measurement
	if err == nil {
		err = r.profile(c, run, name, g.sender, g.receiver)
	}
	if err == nil {
		m, err = g.measureSteps(ctx, c)
	}
	if g != nil {
		err = errors.Join(err, g.stopSteps(err != nil))
	}
	return m, err
}

// chunkSampleBytes is what a chunk is in the ring and on the wire: a header of 64 bytes, and the data.
func chunkSampleBytes(c *TensorCase) int64 { return tensor.HeaderBytes + c.ChunkBytes }

// chunkWindow is what each connection may have without an ack, the bare loop's too: two chunks, which is what the daemon gives to one that asks for nothing.
func chunkWindow(c *TensorCase) ready {
	return ready{WindowSamples: 2, WindowBytes: 2 * chunkSampleBytes(c)}
}

// bareCase is the load of the bare loop: samples of a chunk's size, and memory of the ring's.
func bareCase(c *TensorCase) Case {
	return makeCase(chunkSampleBytes(c), 1, c.Peers, 1, int(c.RingBytes/c.ChunkBytes))
}

// tensorsConfig is a daemon with one table of chunks.
func tensorsConfig(c *TensorCase) string {
	return fmt.Sprintf("tables:\n  - {name: %s, kind: tensors, chunk_bytes: %d, capacity: %d}\n", tableName, c.ChunkBytes, c.RingBytes)
}

// startGradients starts a daemon, producers in one process, and a reader that sums, or only verifies.
func startGradients(ctx context.Context, opt *Options, c *TensorCase, name string) (*rig, error) {
	d, err := startConfigured(ctx, opt, tensorsConfig(c))
	if err != nil {
		return nil, err
	}
	g := &rig{opt: opt, c: Case{Name: c.Name, SampleBytes: c.Bytes, Connections: c.Peers}, name: name, daemon: d, server: d.process}
	reader := append([]string{"_gradreader", "--address", d.Unix, "--run"}, gradientFlags(c)...)
	if name == contenderVerify {
		reader = append(reader, "--no-sum")
	}
	if g.receiver, _, err = startChild("reader", opt.Binary, reader...); err != nil {
		return g, err
	}
	sender := append([]string{"_gradsender"}, gradientFlags(c)...)
	switch name {
	case contenderInPlace:
		sender = append(sender, "--address", d.Unix, "--in-place")
	case contenderNoCRC:
		sender = append(sender, "--no-crc")
		fallthrough
	default:
		sender = append(sender, "--address", d.TCP, "--window-bytes", strconv.FormatInt(chunkWindow(c).WindowBytes, 10))
	}
	g.sender, _, err = startChild("producers", opt.Binary, sender...)
	return g, err
}

// gradientFlags are those that producers and reader share.
func gradientFlags(c *TensorCase) []string {
	return []string{
		"--table", tableName, "--bytes", strconv.FormatInt(c.Bytes, 10), "--tensors", strconv.Itoa(c.Tensors), "--producers", strconv.Itoa(c.Peers),
	}
}

// measureSteps measures a window. A reader of steps counts whole ones, so its window goes from the end of one step to the end of another.
func (g *rig) measureSteps(ctx context.Context, c *TensorCase) (*Measurement, error) {
	if err := sleep(ctx, g.opt.Warmup); err != nil {
		return nil, err
	}
	w, err := g.watch(ctx, g.opt.Duration)
	if err != nil {
		return nil, err
	}
	if g.daemon != nil { // samples are steps of all producers
		w.from.Mono, w.to.Mono = lastOr(w.from), lastOr(w.to)
		w.from.Samples, w.to.Samples = w.from.Samples*uint64(c.Peers), w.to.Samples*uint64(c.Peers)
	}
	m, err := g.evaluate(w.from, w.to)
	if err == nil {
		m.Spilled = float64(w.to.Spilled-w.from.Spilled) / (m.GBPerSecond * 1e9 * m.Seconds)
	}
	if err == nil && !(m.GBPerSecond > 0 && !math.IsInf(m.GBPerSecond, 0)) {
		err = g.server.fail(fmt.Errorf("measured %v GB/s", m.GBPerSecond))
	}
	return m, err
}

// stopSteps ends the sender and the receiver, and kills the daemon: chunks of steps that are half there would hold up its end, and are no loss.
func (g *rig) stopSteps(failed bool) error {
	err := stopAll(failed, g.sender, g.receiver)
	if g.daemon != nil {
		g.daemon.kill()
		err = errors.Join(err, g.daemon.cleanUp())
	}
	return err
}

// lastOr is when the last step was done, or when the snapshot was taken if none was.
func lastOr(s *snapshot) int64 {
	if s.Last > 0 {
		return s.Last
	}
	return s.Mono
}

// measureAdd is what shared memory costs at least: one goroutine copies chunks into memory of the ring's size and adds them to an array.
func measureAdd(ctx context.Context, opt *Options, c *TensorCase) (*Measurement, error) {
	memory, err := newMemory(c.RingBytes)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	ring := memory.Bytes()[:c.RingBytes]
	from, sum := make([]byte, c.Bytes), make([]float32, c.Bytes/4)
	for i := range from {
		from[i] = byte(i)
	}
	chunk := min(c.ChunkBytes, c.Bytes)
	at, source := int64(0), int64(0)
	step := func(int64) {
		copy(ring[at:at+chunk], from[source:source+chunk])
		reduce.Add(sum[source/4:(source+chunk)/4], ring[at:at+chunk], reduce.F32, 1)
		if at += chunk; at+chunk > int64(len(ring)) {
			at = 0
		}
		if source += chunk; source+chunk > c.Bytes {
			source = 0
		}
	}
	ratePass(ctx, chunk, max(opt.Warmup/4, time.Millisecond), step)
	return &Measurement{GBPerSecond: ratePass(ctx, chunk, opt.Duration/4, step)}, context.Cause(ctx)
}
