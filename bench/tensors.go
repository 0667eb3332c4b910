package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// TensorOptions are the flags of bench tensors, kept in the record.
type TensorOptions struct {
	Common
	Python string `json:"python,omitempty"` // interpreter that has the package ingestd; "": none is measured
}

// TensorRecord is everything that bench tensors found out, as --json writes it.
type TensorRecord struct {
	Format   int            `json:"format"` // 1
	Started  time.Time      `json:"started"`
	Machine  Machine        `json:"machine"`
	Options  TensorOptions  `json:"options"`
	Cases    []TensorResult `json:"cases"`
	Targets  []Target       `json:"targets"`
	Finished time.Time      `json:"finished"`
}

// TensorResult is what was measured in one case: figures by name, ours and the baselines alike, each with the values of all runs.
type TensorResult struct {
	TensorCase
	Figures map[string]*Times `json:"figures"`
	Notes   []string          `json:"notes,omitempty"` // what was left out, and why
}

func tensorsCommand() *cobra.Command {
	opt := TensorOptions{Common: defaultCommon()}
	cmd := &cobra.Command{
		Use:   "tensors",
		Short: "Gradients, their reduction, and weights, beside bare loops, plain adds, memcpy and sendfile",
		Example: "  ingestd bench tensors --json bench.json --python .venv/bin/python\n" +
			"  ingestd bench tensors --case gradients,reduce --runs 3\n" +
			"  ingestd bench tensors --case crc",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runTensors(ctx, opt, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	opt.Common.flags(f, tensorCaseNames(tensorCases()))
	f.StringVar(&opt.Python, "python", "", "Python with the package ingestd, such as .venv/bin/python; without it the Python reduction is not measured")
	return cmd
}

// runTensors measures, prints and writes the record.
func runTensors(ctx context.Context, opt TensorOptions, out, log io.Writer) error {
	cases, err := opt.settle()
	if err != nil {
		return err
	}
	r := &tensorRunner{opt: &opt, log: log}
	record, err := r.runCases(ctx, cases)
	if len(record.Cases) > 0 && opt.JSON != "-" {
		printTensors(out, record)
	}
	if err != nil {
		return err
	}
	return opt.report(record, record.Targets, out)
}

// settle checks the options and returns the cases chosen.
func (o *TensorOptions) settle() ([]TensorCase, error) {
	cases := tensorCases()
	if o.Smoke {
		cases = smokeTensorCases()
	}
	if err := o.Common.settle(); err != nil {
		return nil, err
	}
	if o.Python != "" {
		path, err := exec.LookPath(o.Python)
		if err != nil {
			return nil, fmt.Errorf("--python: %w", err)
		}
		o.Python = path
	}
	return chooseTensorCases(cases, o.Case)
}

// tensorRunner measures the cases one after the other.
type tensorRunner struct {
	opt *TensorOptions
	log io.Writer
}

// runCases measures all cases. With an error the record holds those that were finished.
func (r *tensorRunner) runCases(ctx context.Context, cases []TensorCase) (*TensorRecord, error) {
	record := &TensorRecord{Format: 1, Started: time.Now().UTC(), Machine: readMachine(), Options: *r.opt}
	for _, c := range cases {
		result := &TensorResult{TensorCase: c, Figures: map[string]*Times{}}
		if err := c.kind().measure(r, ctx, result); err != nil {
			return record, fmt.Errorf("case %s: %w", c.Name, err)
		}
		for _, t := range result.Figures {
			t.Median = median(slices.Clone(t.Runs))
		}
		record.Cases = append(record.Cases, *result)
	}
	record.Targets = tensorTargets(record.Cases)
	record.Finished = time.Now().UTC()
	return record, nil
}

// options are those of a rig.
func (r *tensorRunner) options() *Options {
	opt := defaultOptions()
	opt.Common, opt.OpenDuration = r.opt.Common, 0
	return &opt
}

// add notes one run's figure.
func (r *TensorResult) add(name, unit string, value float64) {
	t := r.Figures[name]
	if t == nil {
		t = &Times{Unit: unit}
		r.Figures[name] = t
	}
	t.Runs = append(t.Runs, value)
}

// median is that of a figure; false if it was not measured.
func (r *TensorResult) median(name string) (float64, bool) {
	t := r.Figures[name]
	if t == nil || len(t.Runs) == 0 {
		return 0, false
	}
	return t.Median, true
}

// ratio is one figure to another; false if one of them was not measured.
func (r *TensorResult) ratio(name, to string) (float64, bool) {
	a, ok := r.median(name)
	b, also := r.median(to)
	return a / b, ok && also && b != 0
}

// note says once what was left out.
func (r *TensorResult) note(text string) {
	if !slices.Contains(r.Notes, text) {
		r.Notes = append(r.Notes, text)
	}
}

func (r *tensorRunner) progress(c *TensorCase, run int, name, text string) {
	if !r.opt.Quiet {
		fmt.Fprintf(r.log, "%-14s run %d/%d  %-10s %s\n", c.Name, run+1, r.opt.Runs, name, text)
	}
}

// profile has children write CPU profiles until they end, in the last run of a case, if that is asked for.
func (r *tensorRunner) profile(c *TensorCase, run int, name string, all ...*process) error {
	if r.opt.CPUProfile == "" || run != r.opt.Runs-1 {
		return nil
	}
	for i, p := range all {
		file := strings.NewReplacer("/", "-", " ", "-", ",", "").Replace(fmt.Sprintf("%s-%s-%s-%d.pprof", c.Name, name, p.name, i))
		if _, err := p.ask(request{Do: doProfile, Path: filepath.Join(r.opt.CPUProfile, file)}); err != nil {
			return err
		}
	}
	return nil
}

// stopAll ends children in this order; after an error it kills them.
func stopAll(failed bool, all ...*process) error {
	var errs []error
	for _, p := range all {
		switch {
		case p == nil:
		case failed:
			p.kill()
		default:
			errs = append(errs, p.stop())
		}
	}
	return errors.Join(errs...)
}
