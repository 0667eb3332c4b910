package bench

import (
	"fmt"
	"io"
)

// printShm prints the tables of bench shm.
func printShm(out io.Writer, r *ShmRecord) {
	printMachine(out, &r.Machine)
	fmt.Fprintf(out, "Medians of %d runs, contenders interleaved; windows of %v after %v of warm-up.\n\n", r.Options.Runs, r.Options.Duration, r.Options.Warmup)
	printShmRates(out, r)
	printShmLatencies(out, r.Cases)
	printShmTimes(out, r.Cases)
	printTargets(out, r.Targets)
}

func printShmRates(out io.Writer, r *ShmRecord) {
	var t *rows
	missing := false
	for i := range r.Cases {
		c := &r.Cases[i]
		full := c.Rates[contenderFull]
		if full == nil {
			continue
		}
		if t == nil {
			t = newRows(out, "Rates. full: producer, daemon, trainer as processes; bare: two processes and a queue of descriptors, no daemon; shmipc: two processes over\n"+
				"shmipc-go; memory: one process that writes memory of the ring's size. In place the producer writes each place once and the trainer looks at the\n"+
				"first sample of each batch and its number; written: the producer writes every sample, the trainer looks at every one.",
				"case", "who", "batch x ring", "Msamples/s", "GB/s", "server ns", "sender ns", "trainer ns", "allocs/batch", "full/this")
		}
		for _, name := range []string{contenderFull, contenderBare, contenderShmipc, contenderMemory} {
			one := c.Rates[name]
			if one == nil {
				missing = missing || name == contenderShmipc && c.Kind == kindPlace
				continue
			}
			m := &one.Median
			gb, allocs := "", ""
			if c.Kind == kindWrite {
				gb = fmt.Sprintf("%.2f", m.GBPerSecond)
			}
			if name == contenderFull {
				allocs = fmt.Sprintf("%.4f", m.MallocsPerBatch)
			}
			t.add(c.Name, name, fmt.Sprintf("%d x %d", c.BatchSize, c.Batches), fmt.Sprintf("%.3f", m.SamplesPerSecond/1e6), gb,
				nsText(m.ServerCPU, c), nsText(m.SenderCPU, c), nsText(m.TrainerCPU, c), allocs, fmt.Sprintf("%.2f", full.Median.SamplesPerSecond/m.SamplesPerSecond))
		}
	}
	if t != nil {
		t.end()
	}
	if missing {
		fmt.Fprint(out, "shmipc-go was not measured: `make bench-shmipc` builds its peer, and --shmipc bin/shmipc-peer measures it.\n\n")
	}
}

// nsText turns CPU-seconds per GB into nanoseconds per sample: in place, bytes say nothing.
func nsText(perGB float64, c *ShmResult) string {
	if perGB == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", perGB*float64(c.SampleBytes))
}

func printShmLatencies(out io.Writer, cases []ShmResult) {
	for i := range cases {
		c := &cases[i]
		wake := c.Times[contenderWake]
		if c.Kind != kindLatency || wake == nil {
			continue
		}
		t := newRows(out, fmt.Sprintf("Latency in us from the producer's commit to the trainer's lease, %d samples/s, each a batch of its own. full: everybody sleeps; poll: the daemon polls;\n"+
			"eventfd: one bare wake-up between two processes. p50 is the median of the runs' p50, the others are of all runs together.", pace),
			"case", "who", "p50", "p99", "p99.9", "max", "samples", "this/eventfd")
		for _, name := range []string{contenderFull, contenderPoll, contenderWake} {
			if one := c.Times[name]; one != nil && one.Latency != nil {
				l := one.Latency
				t.add(c.Name, name, fmt.Sprintf("%.1f", one.Median), fmt.Sprintf("%.1f", l.P99), fmt.Sprintf("%.1f", l.P999), fmt.Sprintf("%.0f", l.Max),
					countText(float64(l.Count)), fmt.Sprintf("%.2f", one.Median/wake.Median))
			}
		}
		t.end()
	}
}

func printShmTimes(out io.Writer, cases []ShmResult) {
	var t *rows
	for i := range cases {
		c := &cases[i]
		for _, figure := range []struct{ name, text string }{
			{figureRestart, "daemon killed to ready again"},
			{figureStall, "longest time in which a producer got no ack"},
			{figureCost, "the same, less the restart"},
			{figureReady, "daemon started to ready, ring full"},
			{figureMap, "mapping and populating the same file"},
			{figureEOF, "trainer killed to end of file on a bare socket of it"},
			{figureBack, "trainer killed to its last lease in another's hands"},
			{figureAfter, "the same, less the end of file"},
		} {
			one := c.Times[figure.name]
			if one == nil || c.Kind == kindLatency {
				continue
			}
			if t == nil {
				t = newRows(out, "Faults, in ms", "case", "figure", "median", "least", "most")
			}
			least, most := one.Runs[0], one.Runs[0]
			for _, v := range one.Runs {
				least, most = min(least, v), max(most, v)
			}
			t.add(c.Name, figure.text, fmt.Sprintf("%.2f", one.Median), fmt.Sprintf("%.2f", least), fmt.Sprintf("%.2f", most))
		}
	}
	if t != nil {
		t.end()
	}
}
