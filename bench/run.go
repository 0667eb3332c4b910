package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Record is everything that bench tcp found out, as --json writes it.
type Record struct {
	Format   int          `json:"format"` // 1
	Started  time.Time    `json:"started"`
	Machine  Machine      `json:"machine"`
	Options  Options      `json:"options"`
	Trainer  string       `json:"trainer"` // what the trainer does with a sample
	Cases    []CaseResult `json:"cases"`
	Targets  []Target     `json:"targets"`
	Finished time.Time    `json:"finished"`
}

// CaseResult is what was measured in one case. A contender that was not asked for is nil.
type CaseResult struct {
	Case
	WindowSamples int64   `json:"window_samples"` // in force, the same for daemon and bare loop
	WindowBytes   int64   `json:"window_bytes"`
	Full          *Result `json:"full,omitempty"`
	Bare          *Result `json:"bare,omitempty"`
	Copy          *Result `json:"copy,omitempty"`
}

// Result is one contender in one case: the median of every figure by itself, the latencies of all runs together, and the runs.
type Result struct {
	Median Measurement `json:"median"`
	// Intended send time to lease (bare loop: to the end of the read), and arrival to lease, in the open loop.
	Intended *Latency      `json:"intended_to_lease,omitempty"`
	Arrival  *Latency      `json:"arrival_to_lease,omitempty"`
	Runs     []Measurement `json:"runs"`

	latency *recorder
}

// runner measures the cases one after the other.
type runner struct {
	opt *Options
	log io.Writer
}

// runCases measures all cases. With an error the record holds those that were finished.
func (r *runner) runCases(ctx context.Context, cases []Case) (*Record, error) {
	record := &Record{Format: 1, Started: time.Now().UTC(), Machine: readMachine(), Options: *r.opt, Trainer: touch}
	for _, c := range cases {
		result, err := r.runCase(ctx, c)
		if err != nil {
			return record, fmt.Errorf("case %s: %w", c.Name, err)
		}
		record.Cases = append(record.Cases, *result)
	}
	record.Targets = targets(record.Cases)
	record.Finished = time.Now().UTC()
	return record, nil
}

// runCase interleaves the contenders; who comes first changes with every run.
func (r *runner) runCase(ctx context.Context, c Case) (*CaseResult, error) {
	who, err := r.opt.contenders()
	if err != nil {
		return nil, err
	}
	out := &CaseResult{Case: c}
	results := map[string]*Result{}
	for _, name := range who {
		results[name] = &Result{latency: newRecorder()}
	}
	err = interleave(r.opt.Runs, who, func(run int, name string) error {
		m, err := r.runOne(ctx, out, name, run, results[name].latency)
		if err != nil {
			return err
		}
		results[name].Runs = append(results[name].Runs, *m)
		if !r.opt.Quiet {
			fmt.Fprintf(r.log, "%-10s run %d/%d  %-4s  %7.2f GB/s  %.3f CPU-s/GB\n", c.Name, run+1, r.opt.Runs, name, m.GBPerSecond, m.ServerCPU)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, result := range results {
		result.summarise()
	}
	out.Full, out.Bare, out.Copy = results[contenderFull], results[contenderBare], results[contenderCopy]
	return out, nil
}

// interleave runs all contenders once per run, each time beginning with another one.
func interleave(runs int, who []string, do func(run int, name string) error) error {
	for run := range runs {
		for i := range who {
			name := who[(run+i)%len(who)]
			if err := do(run, name); err != nil {
				return fmt.Errorf("run %d of %s: %w", run+1, name, err)
			}
		}
	}
	return nil
}

func (r *runner) runOne(ctx context.Context, out *CaseResult, name string, run int, latency *recorder) (*Measurement, error) {
	if name == contenderCopy {
		return measureCopy(ctx, r.opt, out.Case)
	}
	var g *rig
	var err error
	if name == contenderFull {
		g, err = startFull(ctx, r.opt, out.Case)
	} else {
		g, err = startBare(r.opt, out.Case, ready{WindowSamples: out.WindowSamples, WindowBytes: out.WindowBytes})
	}
	var m *Measurement
	if err == nil {
		out.WindowSamples, out.WindowBytes = g.window.WindowSamples, g.window.WindowBytes
		m, err = g.measure(ctx, r.opt.CPUProfile != "" && run == r.opt.Runs-1, latency)
	}
	if g != nil {
		err = errors.Join(err, g.stop(err != nil))
	}
	return m, err
}

// copySourceBytes keeps the source of the plain copy in the L2 cache.
const copySourceBytes = 256 * kib

// measureCopy is the plain copy(): samples from a hot source into memory of the size of the ring.
func measureCopy(ctx context.Context, opt *Options, c Case) (*Measurement, error) {
	source := make([]byte, min(c.SampleBytes, copySourceBytes))
	for i := range source {
		source[i] = byte(i)
	}
	return measureWrite(ctx, opt, c, len(source), func(into []byte) { copy(into, source) })
}

// measureWrite writes memory of the size of the ring over and over, step bytes at a time, in this process.
func measureWrite(ctx context.Context, opt *Options, c Case, step int, write func(into []byte)) (*Measurement, error) {
	memory, err := newMemory(c.dataBytes())
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	into := memory.Bytes()[:c.dataBytes()]
	at := 0
	pass := func(length time.Duration) (float64, time.Duration) {
		begin, written := time.Now(), 0
		for time.Since(begin) < length && ctx.Err() == nil {
			for range max(1, mib/step) { // a clock read per MiB
				write(into[at : at+step])
				written += step
				at += step
				if at+step > len(into) {
					at = 0
				}
			}
		}
		return float64(written), time.Since(begin)
	}
	pass(opt.Warmup / 2)
	from, err := takeSnapshot([]int{selfPid})
	if err != nil {
		return nil, err
	}
	bytes, took := pass(opt.Duration / 2)
	to, err := takeSnapshot([]int{selfPid})
	if err != nil {
		return nil, err
	}
	return &Measurement{
		Seconds:          took.Seconds(),
		SamplesPerSecond: bytes / float64(c.SampleBytes) / took.Seconds(),
		GBPerSecond:      bytes / 1e9 / took.Seconds(),
		ServerCPU:        float64(to.CPU[selfPid]-from.CPU[selfPid]) / bytes,
	}, context.Cause(ctx)
}

// summarise fills in the medians and the quantiles.
func (r *Result) summarise() {
	of := func(pick func(*Measurement) float64) float64 {
		values := make([]float64, len(r.Runs))
		for i := range r.Runs {
			values[i] = pick(&r.Runs[i])
		}
		return median(values)
	}
	m := &r.Median
	m.SamplesPerSecond = of(func(m *Measurement) float64 { return m.SamplesPerSecond })
	m.GBPerSecond = of(func(m *Measurement) float64 { return m.GBPerSecond })
	m.Seconds = of(func(m *Measurement) float64 { return m.Seconds })
	m.ServerCPU = of(func(m *Measurement) float64 { return m.ServerCPU })
	m.SenderCPU = of(func(m *Measurement) float64 { return m.SenderCPU })
	m.TrainerCPU = of(func(m *Measurement) float64 { return m.TrainerCPU })
	m.MinShare = of(func(m *Measurement) float64 { return m.MinShare })
	m.MallocsPerSample = of(func(m *Measurement) float64 { return m.MallocsPerSample })
	m.MallocsPerBatch = of(func(m *Measurement) float64 { return m.MallocsPerBatch })
	m.MallocsPerSecond = of(func(m *Measurement) float64 { return m.MallocsPerSecond })
	m.OpenRate = of(func(m *Measurement) float64 { return m.OpenRate })
	for i := range r.Runs { // memory is a limit: the worst run counts
		if got := r.Runs[i].Memory; got != nil && (m.Memory == nil || got.PeakBytes > m.Memory.PeakBytes) {
			m.Memory = got
		}
	}
	if r.latency.intended.TotalCount() > 0 {
		l := latencyOf(r.latency.intended)
		r.Intended = &l
	}
	if r.latency.arrival.TotalCount() > 0 {
		l := latencyOf(r.latency.arrival)
		r.Arrival = &l
	}
}

func median(values []float64) float64 {
	slices.Sort(values)
	n := len(values)
	if n%2 == 1 {
		return values[n/2]
	}
	return (values[n/2-1] + values[n/2]) / 2
}
