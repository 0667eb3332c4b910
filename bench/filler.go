package bench

import (
	"context"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
)

// fillerOptions are the flags of the producer's process.
type fillerOptions struct {
	address  string
	table    string
	prefetch int
	write    bool // write every sample, instead of the first one of each place once
	rate     int  // samples per second, each stamped with its time; 0: full speed
	upto     bool // commit nothing until it is said how many
}

// filler fills places of the daemon's ring itself, a whole batch at a time.
type filler struct {
	opt     fillerOptions
	more    chan uint64 // samples that may be committed in all
	samples atomic.Uint64
	failed  chan error
}

func fillerCommand() *cobra.Command {
	var opt fillerOptions
	cmd := &cobra.Command{
		Use:    "_filler",
		Short:  "The producer of bench shm; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runFiller(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.address, "address", "", "where to attach: unix:///path")
	f.StringVar(&opt.table, "table", tableName, "table to fill")
	f.IntVar(&opt.prefetch, "prefetch", 0, "most places to be lent; 0: the daemon's choice")
	f.BoolVar(&opt.write, "write", false, "write every sample; otherwise a place gets its content when it is first lent, and keeps it")
	f.IntVar(&opt.rate, "rate", 0, "samples per second, each with the time as its first bytes; 0: full speed")
	f.BoolVar(&opt.upto, "upto", false, "wait to be told how many samples to commit")
	return cmd
}

func runFiller(ctx context.Context, opt fillerOptions) error {
	f := &filler{opt: opt, more: make(chan uint64, 1), failed: make(chan error, 1)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := client.AttachFiller(ctx, opt.address, client.FillerConfig{Table: opt.table, Prefetch: opt.prefetch, Client: "ingestd-bench"})
	if err != nil {
		return err
	}
	var running sync.WaitGroup
	running.Go(func() {
		if err := f.fill(ctx, p); err != nil && ctx.Err() == nil {
			f.failed <- err
		}
	})
	err = serveControl(os.Stdin, os.Stdout, &ready{}, f.handle)
	cancel()
	running.Wait()
	p.Abort()
	return err
}

// fill goes on until its context ends.
func (f *filler) fill(ctx context.Context, p *client.Filler) error {
	batch := int(p.Accepted().BatchSize)
	sample := int(p.Spec().Leaf(0).Bytes())
	pattern := newPattern(int64(sample))
	known := map[*byte]bool{} // places that have their content
	var pace *pacer
	if f.opt.rate > 0 {
		pace = newPacer(f.opt.rate)
	}
	limit := uint64(math.MaxUint64)
	if f.opt.upto {
		limit = 0
	}
	for sent := uint64(0); ctx.Err() == nil; { // Reserve looks at it only when it has to wait
		for sent >= limit {
			select {
			case limit = <-f.more:
			case <-ctx.Done():
				return nil
			}
		}
		slots, err := p.Reserve(ctx, batch)
		if err != nil {
			return err
		}
		column := slots.Column(0)
		switch {
		case pace != nil:
			if !pace.wait(ctx) {
				return nil
			}
			putStamp(column, uint64(time.Now().UnixNano()))
		case f.opt.write:
			for at := 0; at < len(column); at += sample {
				writePattern(column[at:at+sample], pattern)
			}
		case !known[&column[0]]:
			known[&column[0]] = true
			for at := 0; at < len(column); at += sample {
				putStamp(column[at:], closedStamp)
			}
		}
		if err := slots.Commit(); err != nil {
			return err
		}
		sent += uint64(slots.N())
		f.samples.Store(sent)
	}
	return nil
}

func (f *filler) handle(ask request) (reply, error) {
	select {
	case err := <-f.failed:
		return reply{}, err
	default:
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		snap.Samples = f.samples.Load()
		return reply{Snapshot: snap}, nil
	case doFill:
		f.more <- ask.Upto
		return reply{}, nil
	default:
		return reply{}, unknownRequest(ask)
	}
}
