package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
)

type watchOptions struct {
	reading
	count int64
}

func weightsWatchCommand(std streams) *cobra.Command {
	o := &watchOptions{}
	cmd := &cobra.Command{
		Use:   "watch [flags]",
		Short: "Print a line for each new generation",
		Long: `Print a line for the newest generation and for each one that follows, until a signal or --count. Generations that are replaced before they
can be looked at are skipped. Over tcp:// each generation is transferred, as any reader there gets it.`,
		Example: `  ingestd weights watch --table model
  ingestd weights watch --table model --count 1 --newer-than 7 --deadline 10m`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), std)
		},
	}
	o.flags(cmd)
	cmd.Flags().Int64Var(&o.count, "count", 0, "stop after so many generations; 0: go on")
	return cmd
}

func (o *watchOptions) run(ctx context.Context, std streams) error {
	if o.deadline < 0 || o.wait < 0 || o.count < 0 {
		return usagef("weights watch: --deadline, --wait and --count must not be negative")
	}
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	w := &watcher{watchOptions: o, std: std, last: o.newerThan}
	for {
		err := w.watch(ctx)
		if !errors.Is(err, client.ErrReplaced) { // else the table has another manifest now
			return because(ctx, err)
		}
	}
}

// watcher prints generations.
type watcher struct {
	*watchOptions
	std  streams
	last uint64
	seen int64
}

// watch prints what one subscription brings.
func (w *watcher) watch(ctx context.Context) (err error) {
	limited, stop := deadline(ctx, w.deadline, "--deadline")
	defer stop()
	s, err := w.subscribe(limited, "watch", true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	for w.count == 0 || w.seen < w.count {
		if err := w.next(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (w *watcher) next(ctx context.Context, s *client.Subscription) error {
	ctx, stop := deadline(ctx, w.deadline, "--deadline")
	defer stop()
	g, err := s.Wait(ctx, w.last)
	if err != nil {
		return err
	}
	defer g.Release()
	w.last = g.Generation()
	w.seen++
	r := resultOf(w.table, g)
	if w.json {
		return printJSON(w.std.out, r)
	}
	_, err = fmt.Fprintf(w.std.out, "generation %d published %s: %d tensors, %s, digest %s\n",
		r.Generation, r.Published.Format(time.RFC3339Nano), r.Tensors, bytesText(float64(r.Bytes)), r.Digest)
	return err
}
