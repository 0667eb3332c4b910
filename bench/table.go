package bench

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// printRecord prints the tables of bench tcp.
func printRecord(out io.Writer, r *Record) {
	printMachine(out, &r.Machine)
	fmt.Fprintf(out, "Medians of %d runs of %v each after %v of warm-up, contenders interleaved. full: sender, daemon, trainer as processes; bare: sender and a\n"+
		"process that only reads the connection into mapped memory and acks; copy: plain copy() into memory of that size, one goroutine, no socket.\n"+
		"The trainer %s.\n\n", r.Options.Runs, r.Options.Duration, r.Options.Warmup, r.Trainer)
	printRates(out, r.Cases)
	printLatencies(out, r)
	printDaemon(out, r.Cases)
	printTargets(out, r.Targets)
}

func printMachine(out io.Writer, m *Machine) {
	fmt.Fprintf(out, "%s, %d cores, L2 %s, L3 %s, %.1f GiB", m.CPU, m.Cores, m.Caches["L2"], m.Caches["L3"], float64(m.MemoryBytes)/(1<<30))
	if m.Hypervisor {
		fmt.Fprint(out, ", virtual machine")
	}
	fmt.Fprintf(out, "; %s, %s, %s; load before: %s\n", m.Kernel, m.Go, m.Platform, m.Load)
}

// rows prints aligned columns: the first to the left, the others to the right.
type rows struct {
	w *tabwriter.Writer
}

func newRows(out io.Writer, title string, header ...string) *rows {
	fmt.Fprintln(out, title)
	r := &rows{tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)}
	r.add(header...)
	return r
}

func (r *rows) add(cells ...string) {
	// With AlignRight every cell is padded on the left; the first gets its padding by hand.
	fmt.Fprintln(r.w, fmt.Sprintf("%-14s", cells[0])+"\t"+strings.Join(cells[1:], "\t")+"\t")
}

func (r *rows) end() {
	r.w.Flush()
	fmt.Fprintln(r.w)
	r.w.Flush()
}

func printRates(out io.Writer, cases []CaseResult) {
	t := newRows(out, "Throughput, and CPU-seconds per GB",
		"case", "who", "samples/s", "GB/s", "server", "sender", "trainer", "all", "min share", "rate/bare", "CPU/bare")
	for i := range cases {
		c := &cases[i]
		for _, part := range []struct {
			name string
			r    *Result
		}{{contenderFull, c.Full}, {contenderBare, c.Bare}, {contenderCopy, c.Copy}} {
			if part.r == nil {
				continue
			}
			m := &part.r.Median
			share, rate, cpu := "", "", ""
			if m.MinShare > 0 {
				share = fmt.Sprintf("%.2f", m.MinShare)
			}
			if c.Bare != nil {
				rate = fmt.Sprintf("%.2f", m.SamplesPerSecond/c.Bare.Median.SamplesPerSecond)
				cpu = fmt.Sprintf("%.2f", m.ServerCPU/c.Bare.Median.ServerCPU)
			}
			t.add(c.Name, part.name, countText(m.SamplesPerSecond), fmt.Sprintf("%.2f", m.GBPerSecond), cpuText(m.ServerCPU), cpuText(m.SenderCPU),
				cpuText(m.TrainerCPU), cpuText(m.ServerCPU+m.SenderCPU+m.TrainerCPU), share, rate, cpu)
		}
	}
	t.end()
}

func printLatencies(out io.Writer, r *Record) {
	any := false
	for i := range r.Cases {
		for _, result := range []*Result{r.Cases[i].Full, r.Cases[i].Bare} {
			any = any || result != nil && result.Intended != nil
		}
	}
	if !any {
		return
	}
	t := newRows(out, fmt.Sprintf("Latency in µs, open loop at %.2f of the measured rate, all runs together; a sample waits until its batch is full (batch: samples in one, fill:\n"+
		"time to fill it at that rate). bare: intended send time to the end of the read.", r.Options.OpenFraction),
		"case", "from, to", "batch", "fill", "p50", "p99", "p99.9", "max", "samples")
	for i := range r.Cases {
		c := &r.Cases[i]
		line := func(name string, result *Result, l *Latency) {
			if l == nil {
				return
			}
			batch, fill := "", ""
			if result == c.Full {
				batch, fill = fmt.Sprint(c.BatchSize), fmt.Sprintf("%.0f", 1e6*float64(c.BatchSize)/result.Median.OpenRate)
			}
			t.add(c.Name, name, batch, fill, fmt.Sprintf("%.0f", l.P50), fmt.Sprintf("%.0f", l.P99), fmt.Sprintf("%.0f", l.P999),
				fmt.Sprintf("%.0f", l.Max), countText(float64(l.Count)))
		}
		if c.Full != nil {
			line("arrival, lease", c.Full, c.Full.Arrival)
			line("intended, lease", c.Full, c.Full.Intended)
		}
		if c.Bare != nil {
			line("intended, bare", c.Bare, c.Bare.Intended)
		}
	}
	t.end()
}

func printDaemon(out io.Writer, cases []CaseResult) {
	var t *rows
	for i := range cases {
		c := &cases[i]
		if c.Full == nil || c.Full.Median.Memory == nil {
			continue
		}
		if t == nil {
			t = newRows(out, "Daemon: window in force, peak memory in MiB beside its bound (ring + 64 MiB + 512 KiB per connection), allocations at full speed",
				"case", "window", "KiB", "ring", "peak", "bound", "heap etc.", "allocs/sample", "allocs/batch", "allocs/s")
		}
		m := &c.Full.Median
		t.add(c.Name, fmt.Sprint(c.WindowSamples), fmt.Sprint(c.WindowBytes/kib), mibText(m.Memory.RingBytes), mibText(m.Memory.PeakBytes),
			mibText(m.Memory.BoundBytes), mibText(m.Memory.AnonBytes), fmt.Sprintf("%.5f", m.MallocsPerSample), fmt.Sprintf("%.3f", m.MallocsPerBatch),
			fmt.Sprintf("%.0f", m.MallocsPerSecond))
	}
	if t != nil {
		t.end()
	}
}

func printTargets(out io.Writer, all []Target) {
	if len(all) == 0 {
		return
	}
	t := newRows(out, "Targets", "case", "figure", "measured", "target", "")
	for _, one := range all {
		verdict, sign := "pass", "at least"
		if !one.Pass {
			verdict = "FAIL"
		}
		if one.AtMost {
			sign = "at most"
		}
		t.add(one.Case, one.Figure, fmt.Sprintf("%.3f", one.Measured), fmt.Sprintf("%s %.3g", sign, one.Limit), verdict)
	}
	t.end()
}

func countText(n float64) string {
	switch {
	case n >= 1e6:
		return fmt.Sprintf("%.3fM", n/1e6)
	case n >= 1e4:
		return fmt.Sprintf("%.1fk", n/1e3)
	default:
		return fmt.Sprintf("%.0f", n)
	}
}

func cpuText(seconds float64) string {
	if seconds == 0 {
		return ""
	}
	return fmt.Sprintf("%.3f", seconds)
}

func mibText(n int64) string { return fmt.Sprintf("%.1f", float64(n)/mib) }
