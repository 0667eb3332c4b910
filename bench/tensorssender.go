package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// gradSenderOptions are the flags of the producers' process.
type gradSenderOptions struct {
	address   string
	table     string
	bytes     int64
	tensors   int
	producers int
	noCRC     bool
	inPlace   bool
	upto      bool
	window    int64
}

// gradSender is several producers of steps, each with a connection and gradients of its own.
type gradSender struct {
	opt       gradSenderOptions
	manifest  *tensor.Manifest
	producers []*client.StepProducer
	pace      *stepPace
	steps     atomic.Uint64 // committed, of all producers together
	failed    chan error
}

func gradSenderCommand() *cobra.Command {
	var opt gradSenderOptions
	cmd := &cobra.Command{
		Use:    "_gradsender",
		Short:  "The producers of bench tensors; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runGradSender(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.address, "address", "", "where to send: tcp://host:port, or unix:///path")
	f.StringVar(&opt.table, "table", tableName, "table to send to")
	f.Int64Var(&opt.bytes, "bytes", mib, "bytes of one producer's step")
	f.IntVar(&opt.tensors, "tensors", 1, "tensors of a step")
	f.IntVar(&opt.producers, "producers", 1, "producers")
	f.BoolVar(&opt.noCRC, "no-crc", false, "do not sum chunks")
	f.BoolVar(&opt.inPlace, "in-place", false, "write chunks in place; the address is a unix socket")
	f.Int64Var(&opt.window, "window-bytes", 0, "most bytes without an ack; 0: the daemon chooses; not in place")
	f.BoolVar(&opt.upto, "upto", false, "wait to be told how many steps to send")
	return cmd
}

// benchManifest is so many F32 vectors of equal length.
func benchManifest(size int64, tensors int) (*tensor.Manifest, error) {
	all := make([]tensor.Tensor, tensors)
	for i := range all {
		all[i] = tensor.Tensor{Name: fmt.Sprintf("layers.%d.weight", i), DType: spec.F32, Shape: []int64{size / 4 / int64(tensors)}}
	}
	m, err := tensor.NewManifest(all, nil)
	if err != nil {
		return nil, fmt.Errorf("manifest of %d tensors of %d bytes in all: %w", tensors, size, err)
	}
	return m, nil
}

// producerName makes names whose order is that of the numbers.
func producerName(i int) string { return fmt.Sprintf("producer-%03d", i) }

// gradientValue is every element of a producer's gradients: sums of a few are exact.
func gradientValue(producer int) float32 { return float32(producer + 1) }

func runGradSender(ctx context.Context, opt gradSenderOptions) error {
	m, err := benchManifest(opt.bytes, opt.tensors)
	if err != nil {
		return err
	}
	s := &gradSender{opt: opt, manifest: m, failed: make(chan error, 1)}
	upto := uint64(math.MaxUint64)
	if opt.upto {
		upto = 0
	}
	s.pace = newStepPace(opt.producers, upto)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range opt.producers {
		p, err := client.DialSteps(ctx, opt.address, client.StepsConfig{
			Table: opt.table, Name: producerName(i), Manifest: m, NoCRC: opt.noCRC, InPlace: opt.inPlace, WindowBytes: opt.window,
			Client: "ingestd-bench", ReconnectFor: -1,
		})
		if err != nil {
			return err
		}
		defer p.Abort()
		s.producers = append(s.producers, p)
	}
	var running sync.WaitGroup
	for i := range s.producers {
		running.Go(func() {
			if err := s.send(ctx, i); err != nil && ctx.Err() == nil {
				select {
				case s.failed <- err:
				default:
				}
			}
		})
	}
	err = serveControl(os.Stdin, os.Stdout, &ready{}, s.handle)
	cancel()
	for _, p := range s.producers {
		p.Abort()
	}
	s.pace.close()
	running.Wait()
	return err
}

// send commits steps until its context ends.
func (s *gradSender) send(ctx context.Context, producer int) error {
	arrays := make([][]float32, s.manifest.Len())
	for i := range arrays {
		t := s.manifest.Tensor(i)
		arrays[i] = make([]float32, t.Elements())
		for j := range arrays[i] {
			arrays[i][j] = gradientValue(producer)
		}
	}
	for step := uint64(0); s.pace.await(step); step++ {
		if err := s.sendStep(ctx, s.producers[producer], step, arrays); err != nil {
			return err
		}
		s.pace.commit(producer)
		s.steps.Add(1)
	}
	return nil
}

func (s *gradSender) sendStep(ctx context.Context, p *client.StepProducer, step uint64, arrays [][]float32) error {
	tx, err := p.Step(ctx, step)
	if err != nil {
		return err
	}
	for i, array := range arrays {
		if err := tx.PutFloats(s.manifest.Tensor(i).Name, array); err != nil {
			tx.Abort()
			return err
		}
	}
	return tx.Commit(ctx)
}

func (s *gradSender) handle(ask request) (reply, error) {
	select {
	case err := <-s.failed:
		s.failed <- err
		return reply{}, err
	default:
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		snap.Samples = s.steps.Load()
		return reply{Snapshot: snap}, nil
	case doFill:
		if !s.opt.upto {
			return reply{}, errors.New("these producers send without being told")
		}
		s.pace.raise(ask.Upto)
		return reply{}, nil
	default:
		return reply{}, unknownRequest(ask)
	}
}

// stepPace holds producers until their next step is allowed. As in training, none runs away from the others.
type stepPace struct {
	mu      sync.Mutex
	changed sync.Cond
	upto    uint64   // steps below this one are allowed
	done    []uint64 // steps that each producer has committed
	closed  bool
}

// aheadMax is how many steps a producer may begin beyond those that all have committed.
const aheadMax = 2

func newStepPace(producers int, upto uint64) *stepPace {
	p := &stepPace{upto: upto, done: make([]uint64, producers)}
	p.changed.L = &p.mu
	return p
}

// raise allows more steps.
func (p *stepPace) raise(upto uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upto = max(p.upto, upto)
	p.changed.Broadcast()
}

// close lets everybody go.
func (p *stepPace) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.changed.Broadcast()
}

// commit counts a step of one producer.
func (p *stepPace) commit(producer int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done[producer]++
	p.changed.Broadcast()
}

// await returns when the step is allowed; false when there will be no more.
func (p *stepPace) await(step uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.closed && (step >= p.upto || step >= slices.Min(p.done)+aheadMax) {
		p.changed.Wait()
	}
	return !p.closed
}
