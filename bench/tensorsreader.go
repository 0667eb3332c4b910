package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/tensor"
)

// gradReaderOptions are the flags of the reader's process.
type gradReaderOptions struct {
	address   string
	table     string
	bytes     int64
	tensors   int
	producers int
	run       bool // sum step after step while chunks arrive; otherwise when asked, and not before the step is complete
	noSum     bool // with run: verify the steps, no more
}

// gradReader reads steps and sums them. Its counters have one writer.
type gradReader struct {
	opt      gradReaderOptions
	reader   *client.GradReader
	manifest *tensor.Manifest
	out      map[string][]float32
	want     float32     // each element of a sum
	loopFrom [][]float32 // of the plain loop: as much as the producers send
	loopInto []float32

	steps  atomic.Uint64
	last   atomic.Int64 // when the last step was summed
	wrong  atomic.Uint64
	failed chan error
}

func gradReaderCommand() *cobra.Command {
	var opt gradReaderOptions
	cmd := &cobra.Command{
		Use:    "_gradreader",
		Short:  "The reader of steps of bench tensors; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runGradReader(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.address, "address", "", "where to attach: unix:///path")
	f.StringVar(&opt.table, "table", tableName, "table to read")
	f.Int64Var(&opt.bytes, "bytes", mib, "bytes of one producer's step")
	f.IntVar(&opt.tensors, "tensors", 1, "tensors of a step")
	f.IntVar(&opt.producers, "producers", 1, "producers that a step waits for")
	f.BoolVar(&opt.run, "run", false, "sum step after step, while chunks arrive")
	f.BoolVar(&opt.noSum, "no-sum", false, "with --run: verify the steps, but do not sum them")
	return cmd
}

func runGradReader(ctx context.Context, opt gradReaderOptions) error {
	m, err := benchManifest(opt.bytes, opt.tensors)
	if err != nil {
		return err
	}
	g := &gradReader{opt: opt, manifest: m, out: map[string][]float32{}, failed: make(chan error, 1)}
	for i := range m.Len() {
		t := m.Tensor(i)
		g.out[t.Name] = make([]float32, t.Elements())
	}
	for i := range opt.producers {
		g.want += gradientValue(i)
	}
	if g.reader, err = client.OpenGrads(ctx, opt.address, client.GradConfig{Table: opt.table, Client: "ingestd-bench"}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	if opt.run {
		running.Go(func() {
			if err := g.run(ctx); err != nil && ctx.Err() == nil {
				g.failed <- err
			}
		})
	} else {
		g.prepareLoop()
	}
	err = serveControl(os.Stdin, os.Stdout, &ready{}, func(ask request) (reply, error) { return g.handle(ctx, ask) })
	cancel()
	running.Wait()
	return errors.Join(err, g.reader.Close())
}

// stepPatience is how long a step may take; a daemon that has lost its producers is a failure.
const stepPatience = time.Minute

// run takes one step after the other, and sums them while their chunks arrive, unless it is to verify them only.
func (g *gradReader) run(ctx context.Context) error {
	for step := uint64(0); ctx.Err() == nil; step++ {
		var err error
		if g.opt.noSum {
			err = g.verify(ctx, step)
		} else {
			_, err = g.sum(ctx, step, true)
		}
		if err != nil {
			return err
		}
		g.last.Store(monotonic())
		g.steps.Store(step + 1)
	}
	return nil
}

// sum waits for a step of all producers and sums it; eager lets that begin with the first chunk. It returns how long the sum took, without the wait.
func (g *gradReader) sum(ctx context.Context, step uint64, eager bool) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepPatience)
	defer cancel()
	options := client.StepOptions{Quorum: g.opt.producers}
	if eager {
		options.Into = g.out
	}
	s, err := g.reader.Step(ctx, step, options)
	if err != nil {
		return 0, fmt.Errorf("step %d: %w", step, err)
	}
	defer s.Release()
	begin := time.Now()
	if err := s.Sum(g.out); err != nil {
		return 0, fmt.Errorf("sum of step %d: %w", step, err)
	}
	took := time.Since(begin)
	g.check()
	return took, nil
}

// lookEvery is how often a reader that does not sum looks into a tensor: that copies one of more than a chunk.
const lookEvery = 8

// verify waits for a step of all producers, whose chunks the reader has compared with their sums then. It looks at the ends of one tensor now and then.
func (g *gradReader) verify(ctx context.Context, step uint64) error {
	ctx, cancel := context.WithTimeout(ctx, stepPatience)
	defer cancel()
	s, err := g.reader.Step(ctx, step, client.StepOptions{Quorum: g.opt.producers})
	if err != nil {
		return fmt.Errorf("step %d: %w", step, err)
	}
	defer s.Release()
	if step%lookEvery != 0 {
		return nil
	}
	turn := int(step / lookEvery)
	producer := turn % g.opt.producers
	data, err := s.Tensor(producerName(producer), g.manifest.Tensor(turn/g.opt.producers%g.manifest.Len()).Name)
	if err != nil {
		return fmt.Errorf("step %d: %w", step, err)
	}
	for _, at := range []int{0, len(data) - 4} {
		if math.Float32frombits(binary.LittleEndian.Uint32(data[at:])) != gradientValue(producer) {
			g.wrong.Add(1)
		}
	}
	return nil
}

// check looks at the ends and the middle of each sum.
func (g *gradReader) check() {
	for _, sum := range g.out {
		for _, at := range []int{0, len(sum) / 2, len(sum) - 1} {
			if sum[at] != g.want {
				g.wrong.Add(1)
			}
		}
	}
}

// prepareLoop makes what the plain loop adds.
func (g *gradReader) prepareLoop() {
	elements := int(g.opt.bytes / 4)
	g.loopInto = make([]float32, elements)
	for i := range g.opt.producers {
		from := make([]float32, elements)
		for j := range from {
			from[j] = gradientValue(i)
		}
		g.loopFrom = append(g.loopFrom, from)
	}
}

// loop is what ours is compared with: each producer's array is added to the accumulator, element by element.
func (g *gradReader) loop() (time.Duration, error) {
	clear(g.loopInto)
	begin := time.Now()
	for _, from := range g.loopFrom {
		addLoop(g.loopInto, from)
	}
	took := time.Since(begin)
	if got := g.loopInto[len(g.loopInto)/2]; got != g.want {
		return 0, fmt.Errorf("the plain loop got %v, not %v", got, g.want)
	}
	return took, nil
}

//go:noinline
func addLoop(out, x []float32) {
	x = x[:len(out)]
	for i := range out {
		out[i] += x[i]
	}
}

func (g *gradReader) handle(ctx context.Context, ask request) (reply, error) {
	select {
	case err := <-g.failed:
		g.failed <- err
		return reply{}, err
	default:
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		snap.Samples, snap.Last, snap.Wrong, snap.Spilled = g.steps.Load(), g.last.Load(), g.wrong.Load(), g.reader.Stats().SpilledBytes
		return reply{Snapshot: snap}, nil
	case doStep:
		took, err := g.sum(ctx, ask.Upto, false)
		if err != nil {
			return reply{}, err
		}
		if n := g.wrong.Load(); n != 0 {
			return reply{}, fmt.Errorf("%d elements of the sums are wrong", n)
		}
		return reply{Values: map[string]int64{valueTook: int64(took), valueSpilled: int64(g.reader.Stats().SpilledBytes)}}, nil
	case doLoop:
		took, err := g.loop()
		return reply{Values: map[string]int64{valueTook: int64(took)}}, err
	default:
		return reply{}, unknownRequest(ask)
	}
}
