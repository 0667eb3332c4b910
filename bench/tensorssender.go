package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
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
}

// gradSender is several producers of steps, each with a connection and gradients of its own.
type gradSender struct {
	opt       gradSenderOptions
	manifest  *tensor.Manifest
	producers []*client.StepProducer
	limit     stepLimit
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
	s.limit.init(!opt.upto)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range opt.producers {
		p, err := client.DialSteps(ctx, opt.address, client.StepsConfig{
			Table: opt.table, Name: producerName(i), Manifest: m, NoCRC: opt.noCRC, InPlace: opt.inPlace, Client: "ingestd-bench", ReconnectFor: -1,
		})
		if err != nil {
			return err
		}
		defer p.Abort()
		s.producers = append(s.producers, p)
	}
	var running sync.WaitGroup
	for i, p := range s.producers {
		running.Go(func() {
			if err := s.send(ctx, p, gradientValue(i)); err != nil && ctx.Err() == nil {
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
	s.limit.raise(math.MaxUint64)
	running.Wait()
	return err
}

// send commits steps until its context ends.
func (s *gradSender) send(ctx context.Context, p *client.StepProducer, value float32) error {
	arrays := make([][]float32, s.manifest.Len())
	for i := range arrays {
		t := s.manifest.Tensor(i)
		arrays[i] = make([]float32, t.Elements())
		for j := range arrays[i] {
			arrays[i][j] = value
		}
	}
	for step := uint64(0); ctx.Err() == nil; step++ {
		s.limit.await(step)
		if err := s.sendStep(ctx, p, step, arrays); err != nil {
			return err
		}
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
		s.limit.raise(ask.Upto)
		return reply{}, nil
	default:
		return reply{}, unknownRequest(ask)
	}
}

// stepLimit holds producers until their next step is allowed.
type stepLimit struct {
	mu    sync.Mutex
	grown sync.Cond
	upto  uint64 // steps below this one are allowed
}

func (l *stepLimit) init(open bool) {
	l.grown.L = &l.mu
	if open {
		l.upto = math.MaxUint64
	}
}

func (l *stepLimit) raise(upto uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.upto = max(l.upto, upto)
	l.grown.Broadcast()
}

// await returns when the step is allowed.
func (l *stepLimit) await(step uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for step >= l.upto {
		l.grown.Wait()
	}
}
