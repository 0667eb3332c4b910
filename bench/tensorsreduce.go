package bench

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Figures of the case reduce, all in GB/s of what is summed.
const (
	figureSum       = "sum"         // ours, with the processor's vector instructions
	figureSumGo     = "sum, Go"     // ours, kernels in Go alone
	figureLoop      = "loop"        // out[i] += x[i]
	figureSumPython = "sum, Python" // ours
	figureNumpy     = "numpy"       // np.add(out, x, out=out)
	stepsRun        = 3             // measured in a run, after one that is not
)

// plainKernels makes package reduce use its kernels in Go: it asks golang.org/x/sys/cpu, which listens to this.
const plainKernels = "GODEBUG=cpu.avx2=off"

// sumScript answers as the reader of steps does.
//
//go:embed tensorsreduce.py
var sumScript []byte

func reduceKind() tensorKind {
	return tensorKind{
		title: "Reduction: the sum of one step of all producers that is complete and verified in the ring before the clock starts. loop: `out[i] += x[i]` in Go over arrays\n" +
			"of as many bytes, and numpy: `np.add(out, x, out=out)`, each in the reader's own process. GB/s are of what is added.",
		measure: (*tensorRunner).reduce,
		rows: []tensorRow{
			{figureSum, "sum, vector instructions", figureLoop},
			{figureSumGo, "sum, kernels in Go", figureLoop},
			{figureLoop, "plain loop in Go", ""},
			{figureSumPython, "sum, Python", figureNumpy},
			{figureNumpy, "np.add(out, x, out=out)", ""},
		},
		targets: func(r *TensorResult) []Target {
			var all []Target
			if v, ok := r.ratio(figureSum, figureLoop); ok {
				all = append(all, atLeast(r.Name, "GB/s to a plain loop's in Go", v, reduceRateMin))
			}
			if v, ok := r.ratio(figureSumPython, figureNumpy); ok {
				all = append(all, atLeast(r.Name, "GB/s to np.add's in Python", v, reduceRateMin))
			}
			return all
		},
	}
}

// reduce measures the readers, interleaved, each beside its own plain loop.
func (r *tensorRunner) reduce(ctx context.Context, out *TensorResult) error {
	who := []string{figureSum, figureSumGo}
	if r.opt.Python != "" {
		who = append(who, figureSumPython)
	} else {
		out.note("Python was not measured: --python .venv/bin/python measures it.")
	}
	return interleave(r.opt.Runs, who, func(run int, name string) error {
		g, err := r.startReduce(ctx, &out.TensorCase, name)
		if err == nil && name != figureSumPython {
			err = r.profile(&out.TensorCase, run, name, g.receiver)
		}
		if err == nil {
			err = g.measureSums(ctx, out, name)
		}
		if g != nil {
			err = errors.Join(err, g.stopSteps(err != nil))
		}
		if err == nil {
			r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s", out.Figures[name].Runs[run]))
		}
		return err
	})
}

// startReduce starts a daemon, producers that send when they are told, and the reader.
func (r *tensorRunner) startReduce(ctx context.Context, c *TensorCase, name string) (*rig, error) {
	opt := r.options()
	d, err := startConfigured(ctx, opt, tensorsConfig(c))
	if err != nil {
		return nil, err
	}
	g := &rig{opt: opt, c: Case{Name: c.Name, SampleBytes: c.Bytes, Connections: c.Peers}, name: name, daemon: d, server: d.process}
	flags := append([]string{"--address", d.Unix}, gradientFlags(c)...)
	reader := launch{name: "reader", binary: opt.Binary, args: append([]string{"bench", "_gradreader"}, flags...)}
	switch name {
	case figureSumGo:
		reader.env = []string{plainKernels}
	case figureSumPython:
		script := filepath.Join(d.folder, "reader.py")
		if err := os.WriteFile(script, sumScript, 0o600); err != nil {
			return g, err
		}
		reader = launch{name: "reader in Python", binary: r.opt.Python, args: append([]string{script}, flags...), env: []string{"OPENBLAS_NUM_THREADS=1"}}
	}
	if g.receiver, _, err = reader.child(); err != nil {
		return g, err
	}
	g.sender, _, err = startChild("producers", opt.Binary, append([]string{"_gradsender", "--address", d.TCP, "--upto"}, gradientFlags(c)...)...)
	return g, err
}

// measureSums lets the reader sum steps and run its plain loop in turn; a run's figures are medians of its own.
func (g *rig) measureSums(ctx context.Context, out *TensorResult, name string) error {
	total := float64(out.Bytes) * float64(out.Peers)
	baseline := figureLoop
	if name == figureSumPython {
		baseline = figureNumpy
	}
	rates := map[string][]float64{}
	for step := range stepsRun + 1 {
		if err := g.fillStep(ctx, uint64(step), out.Peers); err != nil {
			return err
		}
		for turn := range 2 {
			ask, figure := request{Do: doStep, Upto: uint64(step)}, name
			if (turn+step)%2 == 1 {
				ask, figure = request{Do: doLoop}, baseline
			}
			told, err := g.receiver.values(ask, valueTook)
			if err != nil {
				return err
			}
			if spilled := told[valueSpilled]; spilled != 0 {
				return g.receiver.fail(fmt.Errorf("%d bytes of the step were copied out of the ring: give it a larger one", spilled))
			}
			if step > 0 {
				rates[figure] = append(rates[figure], total/float64(told[valueTook]))
			}
		}
	}
	for figure, values := range rates {
		if figure == figureLoop && name == figureSumGo {
			continue // one loop per run is enough, and the figures of a run stay together
		}
		out.add(figure, "GB/s", median(values))
	}
	return nil
}

// fillStep has the producers send steps up to and including this one, and waits until the daemon has them.
func (g *rig) fillStep(ctx context.Context, step uint64, producers int) error {
	want := (step + 1) * uint64(producers)
	if _, err := g.sender.ask(request{Do: doFill, Upto: step + 1}); err != nil {
		return err
	}
	for begin := time.Now(); ; {
		snap, err := g.sender.snapshot()
		if err != nil {
			return err
		}
		if snap.Samples >= want {
			return nil
		}
		if time.Since(begin) > progressTimeout {
			return g.sender.fail(errors.New("has sent " + strconv.FormatUint(snap.Samples, 10) + " of " + strconv.FormatUint(want, 10) + " steps"))
		}
		if err := sleep(ctx, 2*time.Millisecond); err != nil {
			return err
		}
	}
}
