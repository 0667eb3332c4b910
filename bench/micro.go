package bench

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// contest is one micro benchmark: ours beside its twins, all doing the same work.
type contest struct {
	name    string
	unit    string // what one operation is
	entries []entry
	// Targets: our rate to the twin's, by the twin's name.
	atLeast map[string]float64
}

// entry runs n operations and returns how long they took, without setting up.
type entry struct {
	name string
	run  func(n int) time.Duration
}

// MicroRecord is what bench micro found out.
type MicroRecord struct {
	Format  int           `json:"format"` // 1
	Started time.Time     `json:"started"`
	Machine Machine       `json:"machine"`
	Runs    int           `json:"runs"`
	Lines   []MicroResult `json:"results"`
	Targets []Target      `json:"targets"`
}

// MicroResult is one contender in one contest. Ratio is ours to this one's: how many times as fast we are.
type MicroResult struct {
	Contest string    `json:"contest"`
	Name    string    `json:"name"`
	Unit    string    `json:"unit"`
	NsPerOp float64   `json:"ns_per_op"` // median
	Ratio   float64   `json:"our_rate_to_this"`
	Runs    []float64 `json:"runs_ns_per_op"`
}

type microOptions struct {
	runs     int
	duration time.Duration
	filter   string
	json     string
	check    bool
	smoke    bool
}

func microCommand() *cobra.Command {
	opt := microOptions{runs: 7, duration: 50 * time.Millisecond}
	cmd := &cobra.Command{
		Use:   "micro",
		Short: "The queue and the ring beside a channel, a mutex ring and a plain copy",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runMicro(opt, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.IntVar(&opt.runs, "runs", opt.runs, "runs of every contender, interleaved; the medians count")
	f.DurationVar(&opt.duration, "duration", opt.duration, "length of a run, about")
	f.StringVar(&opt.filter, "case", "", "only contests whose name contains this")
	f.StringVar(&opt.json, "json", "", "write the record here; - is standard output, without the table")
	f.BoolVar(&opt.check, "check", false, "fail if a target is missed")
	f.BoolVar(&opt.smoke, "smoke", false, "a moment of each: does everything work? The figures mean nothing")
	return cmd
}

func runMicro(opt microOptions, out io.Writer) error {
	if opt.smoke {
		opt.runs, opt.duration = 1, 200*time.Microsecond
	}
	if opt.runs < 1 || opt.duration <= 0 {
		return fmt.Errorf("--runs must be at least 1 and --duration above 0")
	}
	record := &MicroRecord{Format: 1, Started: time.Now().UTC(), Machine: readMachine(), Runs: opt.runs}
	for _, c := range slices.Concat(queueContests(), ringContests()) {
		if strings.Contains(c.name, opt.filter) {
			record.add(&c, opt)
		}
	}
	if len(record.Lines) == 0 {
		return fmt.Errorf("no contest has %q in its name", opt.filter)
	}
	if opt.json != "-" {
		printMicro(out, record)
	}
	if opt.json != "" {
		if err := writeRecord(record, opt.json, out); err != nil {
			return err
		}
	}
	if bad := missed(record.Targets); opt.check && len(bad) > 0 {
		return fmt.Errorf("%d of %d targets missed: the table above says which", len(bad), len(record.Targets))
	}
	return nil
}

// add runs a contest, interleaved.
func (r *MicroRecord) add(c *contest, opt microOptions) {
	ops := make([]int, len(c.entries))
	results := make([]MicroResult, len(c.entries))
	for i, e := range c.entries {
		ops[i] = calibrate(e.run, opt.duration)
		results[i] = MicroResult{Contest: c.name, Name: e.name, Unit: c.unit}
	}
	for run := range opt.runs {
		for i := range c.entries {
			at := (run + i) % len(c.entries)
			runtime.GC() // not in somebody's window
			took := c.entries[at].run(ops[at])
			results[at].Runs = append(results[at].Runs, float64(took)/float64(ops[at]))
		}
	}
	for i := range results {
		results[i].NsPerOp = median(slices.Clone(results[i].Runs))
		results[i].Ratio = results[i].NsPerOp / results[0].NsPerOp
		if limit, ok := c.atLeast[results[i].Name]; ok {
			r.Targets = append(r.Targets, atLeast(c.name, "rate to that of the "+results[i].Name, results[i].Ratio, limit))
		}
	}
	r.Lines = append(r.Lines, results...)
}

// calibrate finds how many operations take about length.
func calibrate(run func(n int) time.Duration, length time.Duration) int {
	for n := 256; ; n *= 4 {
		took := run(n)
		if took >= length/8 || n >= 1<<28 {
			return max(1, int(float64(n)*float64(length)/float64(max(took, 1))))
		}
	}
}

func printMicro(out io.Writer, r *MicroRecord) {
	printMachine(out, &r.Machine)
	t := newRows(out, fmt.Sprintf("Medians of %d interleaved runs. ours/this: how many times the rate of this one ours is.", r.Runs),
		"contest", "who", "per", "ns", "M/s", "ours/this")
	for _, line := range r.Lines {
		t.add(line.Contest, line.Name, line.Unit, fmt.Sprintf("%.1f", line.NsPerOp), fmt.Sprintf("%.2f", 1e3/line.NsPerOp), fmt.Sprintf("%.2f", line.Ratio))
	}
	t.end()
	printTargets(out, r.Targets)
}
