package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
)

// trainerOptions are the flags of the trainer's process.
type trainerOptions struct {
	address  string
	table    string
	prefetch int
	sparse   bool   // look at the first sample of a batch only
	hold     bool   // never release
	notify   string // unix socket of a watcher to connect to, so that it sees this process end
	reattach bool   // attach again when the daemon is gone
	times    bool   // note when the last batch came
}

// touch says what the trainer does with a sample, for the table and the record.
const touch = "reads the first 8 bytes of each sample's first leaf and compares them with what the sender wrote, then releases the batch"

// trainerLoop leases batches, touches each sample once and releases. Its counters have one writer.
type trainerLoop struct {
	opt       trainerOptions
	latency   *recorder
	recording atomic.Bool
	samples   atomic.Uint64
	batches   atomic.Uint64
	wrong     atomic.Uint64
	last      atomic.Int64 // when the last batch came; only with times

	mu  sync.Mutex
	err error
}

func trainerCommand() *cobra.Command {
	var opt trainerOptions
	cmd := &cobra.Command{
		Use:    "_trainer",
		Short:  "The trainer of bench tcp; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runTrainer(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.address, "address", "", "where to attach: unix:///path")
	f.StringVar(&opt.table, "table", "bench", "table to read")
	f.IntVar(&opt.prefetch, "prefetch", 0, "most batches to hold; 0: the daemon's choice")
	f.BoolVar(&opt.sparse, "sparse", false, "look at the first sample of a batch only")
	f.BoolVar(&opt.hold, "hold", false, "never release a batch")
	f.StringVar(&opt.notify, "notify", "", "unix socket to be connected to for as long as this process lives")
	f.BoolVar(&opt.times, "times", false, "note when the last batch came")
	f.BoolVar(&opt.reattach, "reattach", false, "attach again when the daemon is gone")
	return cmd
}

func runTrainer(ctx context.Context, opt trainerOptions) error {
	if opt.notify != "" {
		conn, err := net.Dial("unix", opt.notify)
		if err != nil {
			return fmt.Errorf("connect to the watcher: %w", err)
		}
		defer conn.Close()
	}
	t := &trainerLoop{opt: opt, latency: newRecorder()}
	trainer, err := t.attach(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() { t.fail(t.stay(ctx, trainer)) })
	err = serveControl(os.Stdin, os.Stdout, &ready{}, t.handle)
	cancel()
	running.Wait()
	return err
}

func (t *trainerLoop) attach(ctx context.Context) (*client.Trainer, error) {
	return client.Attach(ctx, t.opt.address, client.TrainerConfig{Table: t.opt.table, Prefetch: t.opt.prefetch})
}

// reattachPause is between two tries to attach to a daemon that is being started again.
const reattachPause = 2 * time.Millisecond

// stay reads until the stream ends, over the daemon's restarts if it was told so.
func (t *trainerLoop) stay(ctx context.Context, trainer *client.Trainer) error {
	for {
		err := t.run(ctx, trainer)
		err = errors.Join(err, trainer.Close())
		if !t.opt.reattach || !errors.Is(err, client.ErrDaemonGone) {
			return err
		}
		for trainer = nil; trainer == nil; {
			if sleep(ctx, reattachPause) != nil {
				return nil
			}
			trainer, _ = t.attach(ctx) // why not: it is not up yet
		}
	}
}

func (t *trainerLoop) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
}

func (t *trainerLoop) failure() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// run reads batches until the stream ends or the process is told to stop.
func (t *trainerLoop) run(ctx context.Context, trainer *client.Trainer) error {
	for {
		batch, err := trainer.Next(ctx)
		switch {
		case errors.Is(err, io.EOF), ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("next batch: %w", err)
		}
		if t.opt.times {
			t.last.Store(monotonic())
		}
		t.take(batch)
		if !t.opt.hold {
			batch.Release()
		}
	}
}

// take touches the samples of a batch.
func (t *trainerLoop) take(b *client.Batch) {
	if t.recording.Load() {
		t.note(b)
	} else {
		column := b.Column(0)
		stride := len(column) / b.Count()
		if t.opt.sparse {
			stride = len(column)
		}
		wrong := uint64(0)
		for at := 0; at < len(column); at += stride {
			if v := readStamp(column[at:]); v != closedStamp && v >= timeMax {
				wrong++
			}
		}
		if wrong != 0 {
			t.wrong.Add(wrong)
		}
	}
	t.samples.Store(t.samples.Load() + uint64(b.Count()))
	t.batches.Store(t.batches.Load() + 1)
}

// note records the latencies of a batch of the open loop. Samples of the phase before, which may share its first batch, are left out.
func (t *trainerLoop) note(b *client.Batch) {
	now := time.Now().UnixNano()
	column, arrivals := b.Column(0), b.Arrivals()
	stride := len(column) / b.Count()
	t.latency.mu.Lock()
	defer t.latency.mu.Unlock()
	for i, arrival := range arrivals {
		switch v := readStamp(column[i*stride:]); {
		case v < timeMax:
			record(t.latency.intended, now-int64(v), 1)
			record(t.latency.arrival, now-int64(arrival), 1)
		case v != closedStamp:
			t.wrong.Add(1)
		}
	}
}

// handle answers the parent.
func (t *trainerLoop) handle(ask request) (reply, error) {
	if err := t.failure(); err != nil {
		return reply{}, err
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		snap.Samples, snap.Batches, snap.Wrong = t.samples.Load(), t.batches.Load(), t.wrong.Load()
		snap.Last = t.last.Load()
		return reply{Snapshot: snap}, nil
	case doRecord:
		t.recording.Store(true)
		return reply{}, nil
	case doHistograms:
		t.recording.Store(false)
		h, err := t.latency.encode()
		return reply{Histograms: h}, err
	default:
		return reply{}, unknownRequest(ask)
	}
}
