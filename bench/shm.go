package bench

import (
	"context"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"os"

	"github.com/spf13/cobra"
)

// ShmOptions are the flags of bench shm, kept in the record.
type ShmOptions struct {
	Common
	Shmipc    string `json:"shmipc,omitempty"`
	BatchSize int    `json:"batch_size,omitempty"` // instead of the case's own
	Batches   int    `json:"batches,omitempty"`
	Prefetch  int    `json:"prefetch,omitempty"` // that producer and trainer ask for; 0: shmPrefetch
}

// ShmRecord is everything that bench shm found out, as --json writes it.
type ShmRecord struct {
	Format   int         `json:"format"` // 1
	Started  time.Time   `json:"started"`
	Machine  Machine     `json:"machine"`
	Options  ShmOptions  `json:"options"`
	Cases    []ShmResult `json:"cases"`
	Targets  []Target    `json:"targets"`
	Finished time.Time   `json:"finished"`
}

// ShmResult is what was measured in one case, by contender: rates or times.
type ShmResult struct {
	ShmCase
	Rates map[string]*Result `json:"rates,omitempty"`
	Times map[string]*Times  `json:"times,omitempty"`
}

// Times is what took so long. Latency is of all runs together, and then a run's figure is its median.
type Times struct {
	Unit    string    `json:"unit"` // ms or us
	Median  float64   `json:"median"`
	Runs    []float64 `json:"runs"`
	Latency *Latency  `json:"latency,omitempty"`

	latency *recorder
}

// Contenders of bench shm.
const (
	contenderShmipc = "shmipc"
	contenderMemory = "memory"
	contenderPoll   = "poll"    // the daemon polls
	contenderWake   = "eventfd" // one bare wake-up

	figureRestart = "restart"     // kill to ready
	figureStall   = "stall"       // the longest time in which a producer got no ack
	figureCost    = "cost"        // stall less restart
	figureReady   = "ready"       // start to ready
	figureMap     = "map"         // mapping and populating the same file
	figureEOF     = "end of file" // kill to the end of a bare unix socket
	figureBack    = "back"        // kill to the last lease in another trainer's hands
	figureAfter   = "after"       // back less end of file
)

func shmCommand() *cobra.Command {
	opt := ShmOptions{Common: defaultCommon()}
	cmd := &cobra.Command{
		Use:   "shm",
		Short: "Producer, daemon and trainer over shared memory, beside a bare ring, shmipc-go, memory writes and an eventfd",
		Example: "  ingestd bench shm --json bench.json --shmipc bin/shmipc-peer\n" +
			"  ingestd bench shm --case 64KiB,1MiB,16MiB --runs 3 --cpuprofile profiles/\n" +
			"  ingestd bench shm --case latency,death",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runShm(ctx, opt, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	opt.Common.flags(f, shmCaseNames(shmCases()))
	f.StringVar(&opt.Shmipc, "shmipc", "", "program of the shmipc-go baseline, which `make bench-shmipc` builds; without it that row is missing")
	f.IntVar(&opt.BatchSize, "batch-size", 0, "batch size of the cases that measure rates, instead of their own")
	f.IntVar(&opt.Batches, "batches", 0, "batches of the rings of the cases that measure rates, instead of their own")
	f.IntVar(&opt.Prefetch, "prefetch", 0, "batches that trainer and producer of the cases that measure rates each ask for; 0: a third of the ring's")
	return cmd
}

// runShm measures, prints and writes the record.
func runShm(ctx context.Context, opt ShmOptions, out, log io.Writer) error {
	cases, err := opt.settle()
	if err != nil {
		return err
	}
	r := &shmRunner{opt: &opt, log: log}
	record, err := r.runCases(ctx, cases)
	if len(record.Cases) > 0 && opt.JSON != "-" {
		printShm(out, record)
	}
	if err != nil {
		return err
	}
	return opt.report(record, record.Targets, out)
}

// settle checks the options and returns the cases chosen.
func (o *ShmOptions) settle() ([]ShmCase, error) {
	cases := shmCases()
	if o.Smoke {
		cases = smokeShmCases()
	}
	if err := o.Common.settle(); err != nil {
		return nil, err
	}
	if o.BatchSize < 0 || o.Batches < 0 || o.Prefetch < 0 {
		return nil, fmt.Errorf("--batch-size, --batches and --prefetch must be at least 0")
	}
	if o.Shmipc != "" {
		if _, err := os.Stat(o.Shmipc); err != nil {
			return nil, fmt.Errorf("--shmipc: %w: `make bench-shmipc` builds it", err)
		}
	}
	chosen, err := chooseShmCases(cases, o.Case)
	if err != nil {
		return nil, err
	}
	chosen = slices.Clone(chosen)
	for i := range chosen {
		if c := &chosen[i]; c.Kind == kindPlace || c.Kind == kindWrite {
			if o.BatchSize > 0 {
				c.BatchSize = o.BatchSize
			}
			if o.Batches > 0 {
				c.Batches = o.Batches
			}
		}
	}
	return chosen, nil
}

// shmRunner measures the cases one after the other.
type shmRunner struct {
	opt *ShmOptions
	log io.Writer
}

// options are those of a rig.
func (r *shmRunner) options() *Options { return &Options{Common: r.opt.Common} }

// runCases measures all cases. With an error the record holds those that were finished.
func (r *shmRunner) runCases(ctx context.Context, cases []ShmCase) (*ShmRecord, error) {
	record := &ShmRecord{Format: 1, Started: time.Now().UTC(), Machine: readMachine(), Options: *r.opt}
	for _, c := range cases {
		result := &ShmResult{ShmCase: c}
		var err error
		switch c.Kind {
		case kindPlace, kindWrite:
			err = r.rates(ctx, result)
		case kindLatency:
			err = r.latencies(ctx, result)
		case kindRestart:
			err = r.restarts(ctx, result)
		case kindRecovery:
			err = r.recoveries(ctx, result)
		case kindDeath:
			err = r.deaths(ctx, result)
		}
		if err != nil {
			return record, fmt.Errorf("case %s: %w", c.Name, err)
		}
		for _, t := range result.Times {
			t.Median = median(slices.Clone(t.Runs))
			if t.latency != nil {
				l := latencyOf(t.latency.intended)
				t.Latency = &l
			}
		}
		record.Cases = append(record.Cases, *result)
	}
	record.Targets = shmTargets(record.Cases)
	record.Finished = time.Now().UTC()
	return record, nil
}

// add notes one run's figure.
func (r *ShmResult) add(name, unit string, value float64) {
	if r.Times == nil {
		r.Times = map[string]*Times{}
	}
	t := r.Times[name]
	if t == nil {
		t = &Times{Unit: unit}
		r.Times[name] = t
	}
	t.Runs = append(t.Runs, value)
}

// addMS notes a time in nanoseconds as milliseconds.
func (r *ShmResult) addMS(name string, ns int64) { r.add(name, "ms", float64(ns)/1e6) }

func (r *shmRunner) progress(c ShmCase, run int, name, text string) {
	if !r.opt.Quiet {
		fmt.Fprintf(r.log, "%-14s run %d/%d  %-8s %s\n", c.Name, run+1, r.opt.Runs, name, text)
	}
}
