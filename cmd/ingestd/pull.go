package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/internal/tensorfile"
	"github.com/ingestd/ingestd/wire"
)

type pullOptions struct {
	target
	spec     string
	group    string
	batches  uint64
	samples  uint64
	prefetch int
	verify   bool
	gapless  bool
	out      string
	deadline time.Duration
	progress string
	json     bool
}

func pullCommand(std streams) *cobra.Command {
	o := &pullOptions{}
	cmd := &cobra.Command{
		Use:   "pull [flags]",
		Short: "Read batches as a trainer does: count, verify, or write .npz",
		Long: `Attach to a table as a trainer, read its batches and give them back: in shared memory through a unix socket, or sent over TCP, until the stream ends or --samples or --batches were read.
Each batch goes to one trainer of every group: what pull reads, no other trainer of its group gets. With a --group of its own it takes nothing
from anybody, but producers wait for it as for any other group, unless the table lets groups lose what they are too slow for: then the losses are counted.

--verify checks every byte of samples made by ingestd push --generate, and that each stream's samples come in order, none twice. With --gapless
a missing number is an error, too: for a pull that is the table's only trainer from the start.`,
		Example: `  ingestd pull --table digits --samples 1797 --out back.npz
  ingestd pull --table digits --verify --gapless --deadline 10s
  ingestd pull --addr tcp://gpu1:7420 --table digits --samples 1797`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), std)
		},
	}
	o.flags(cmd, "unix://"+daemon.DefaultSocket())
	f := cmd.Flags()
	f.StringVar(&o.spec, "spec", "", "demand this spec; default: take the table's")
	f.StringVar(&o.group, "group", wire.GroupDefault, "group of trainers to join; made if there is none of that name")
	f.Uint64Var(&o.batches, "batches", 0, "stop after so many batches; 0: at the end of the stream")
	f.Uint64Var(&o.samples, "samples", 0, "stop after the batch with which so many samples are complete; 0: at the end of the stream")
	f.IntVar(&o.prefetch, "prefetch", 0, "batches held at once; 0: the daemon's default")
	f.BoolVar(&o.verify, "verify", false, "check samples made by push --generate")
	f.BoolVar(&o.gapless, "gapless", false, "with --verify: a number that is missing in a stream is an error")
	f.StringVarP(&o.out, "out", "o", "", "write the samples to this .npz file")
	f.DurationVar(&o.deadline, "deadline", 0, "longest wait for a batch (exit code 5); 0: for ever")
	f.StringVar(&o.progress, "progress", "auto", "progress bar: "+progressModes)
	f.BoolVar(&o.json, "json", false, "print the result as JSON")
	return cmd
}

// pullResult is what a pull did.
type pullResult struct {
	Table   string  `json:"table"`
	Batches uint64  `json:"batches"`
	Samples uint64  `json:"samples"`
	Bytes   uint64  `json:"bytes"`
	Streams int     `json:"streams"`
	Seconds float64 `json:"seconds"`
	Lost    uint64  `json:"lost_batches,omitempty"` // that the group was too slow for
	Ended   bool    `json:"ended"`                  // the stream ended
	*Verdict
	Error string `json:"error,omitempty"`
}

func (o *pullOptions) run(ctx context.Context, std streams) error {
	switch {
	case o.prefetch < 0 || o.deadline < 0 || o.wait < 0:
		return usagef("pull: --prefetch, --deadline and --wait must not be negative")
	case o.gapless && !o.verify:
		return usagef("pull: --gapless is for --verify")
	}
	want, err := optionalSpec(o.spec)
	if err != nil {
		return err
	}
	token, err := o.token()
	if err != nil {
		return err
	}
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	var t *client.Trainer
	err = o.retry(ctx, func() (err error) {
		cfg := client.TrainerConfig{Table: o.table, Spec: want, Group: o.group, Prefetch: o.prefetch, Client: "ingestd pull/" + version(), Token: token}
		t, err = client.Attach(ctx, o.addr, cfg)
		return err
	})
	if err != nil {
		return because(ctx, err)
	}
	r := &puller{pullOptions: o, trainer: t, result: pullResult{Table: o.table}, streams: map[uint64]struct{}{}}
	err = r.run(ctx, std)
	return errors.Join(err, t.Close())
}

// puller reads the batches.
type puller struct {
	*pullOptions
	trainer *client.Trainer
	writer  *tensorfile.Writer // nil without --out
	bar     *progress
	result  pullResult
	streams map[uint64]struct{}
}

func (r *puller) run(ctx context.Context, std streams) (err error) {
	if r.verify {
		r.result.Verdict = &Verdict{next: map[uint64]uint64{}}
	}
	if r.out != "" {
		if r.writer, err = tensorfile.Create(r.out, r.trainer.Spec()); err != nil {
			return &codeError{exitUsage, fmt.Errorf("--out: %w", err)}
		}
		defer r.writer.Abort()
	}
	total := int64(-1)
	if r.samples > 0 {
		total = int64(r.samples) * r.trainer.Spec().SampleBytes()
	}
	if r.bar, err = newProgress(std.err, r.progress, "pull "+r.table, total); err != nil {
		return err
	}
	began := time.Now()
	err = because(ctx, r.all(ctx))
	r.bar.done(std.err)
	took := time.Since(began)
	r.result.Seconds, r.result.Streams = took.Seconds(), len(r.streams)
	if err == nil && r.verify {
		err = r.result.Verdict.err(r.gapless)
	}
	if r.writer != nil && r.writer.Samples() > 0 {
		err = errors.Join(err, r.writer.Close())
	}
	return errors.Join(r.print(std.out, took, err), err)
}

func (r *puller) all(ctx context.Context) error {
	for (r.batches == 0 || r.result.Batches < r.batches) && (r.samples == 0 || r.result.Samples < r.samples) {
		b, err := r.next(ctx)
		if errors.Is(err, io.EOF) {
			r.result.Ended = true
			return r.enough()
		}
		if lost := (*client.LostBatchesError)(nil); errors.As(err, &lost) {
			r.result.Lost += uint64(lost.N)
			continue
		}
		if err == nil {
			err = r.take(b)
			b.Release()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// enough says whether the stream ended too early.
func (r *puller) enough() error {
	if r.result.Batches < r.batches || r.result.Samples < r.samples {
		return dataf("the stream ended after %d samples in %d batches, before all that were asked for", r.result.Samples, r.result.Batches)
	}
	return nil
}

func (r *puller) next(ctx context.Context) (*client.Batch, error) {
	ctx, cancel := deadline(ctx, r.deadline, "--deadline")
	defer cancel()
	return r.trainer.Next(ctx)
}

func (r *puller) take(b *client.Batch) error {
	n := b.Count()
	for _, s := range b.Streams() {
		r.streams[s] = struct{}{}
	}
	if r.verify {
		r.result.Verdict.batch(r.trainer, b)
	}
	if r.writer != nil {
		if err := r.writer.Append(n, b.Column); err != nil {
			return err
		}
	}
	bytes := int64(n) * r.trainer.Spec().SampleBytes()
	r.result.Batches++
	r.result.Samples += uint64(n)
	r.result.Bytes += uint64(bytes)
	r.bar.add(bytes)
	return nil
}

func (r *puller) print(w io.Writer, took time.Duration, err error) error {
	res := &r.result
	if r.json {
		if err != nil {
			res.Error = err.Error()
		}
		return json.NewEncoder(w).Encode(res)
	}
	_, printed := fmt.Fprintf(w, "pulled %d samples in %d batches of %d streams from table %q: %s in %.2f s, %.0f samples/s, %s/s\n",
		res.Samples, res.Batches, res.Streams, res.Table, bytesText(float64(res.Bytes)), res.Seconds, perSecond(float64(res.Samples), took), bytesText(perSecond(float64(res.Bytes), took)))
	if res.Lost > 0 && printed == nil {
		_, printed = fmt.Fprintf(w, "lost: %d batches that group %q was too slow for\n", res.Lost, r.group)
	}
	if v := res.Verdict; v != nil && printed == nil {
		_, printed = fmt.Fprintf(w, "verified: %d wrong, %d out of order, %d missing before later ones\n", v.Wrong, v.Disorder, v.Gaps)
	}
	return printed
}

// Verdict is what --verify found; exported so that it is a part of pullResult in JSON.
type Verdict struct {
	Wrong    uint64 `json:"wrong"`        // samples whose bytes are not their own
	Disorder uint64 `json:"out_of_order"` // samples that came after a later one of their stream, or twice
	Gaps     uint64 `json:"gaps"`         // numbers that are missing before later ones
	First    string `json:"first,omitempty"`

	next map[uint64]uint64 // the number due, by stream
}

func (v *Verdict) batch(t *client.Trainer, b *client.Batch) {
	streams, numbers := b.Streams(), b.Numbers()
	for row, stream := range streams {
		due, n := v.next[stream], numbers[row]
		if n < due {
			v.found(&v.Disorder, "batch %d row %d: sample %d of stream %d, after sample %d", b.Number(), row, n, stream, due-1)
			continue
		}
		v.Gaps += n - due
		v.next[stream] = n + 1
	}
	for leaf := range t.Spec().NumLeaves() {
		l := t.Spec().Leaf(leaf)
		row, at := proof.CheckColumn(b.Column(leaf), l, leaf, streams, numbers)
		if row >= 0 {
			v.found(&v.Wrong, "batch %d row %d: sample %d of stream %d is wrong from byte %d of leaf %q on", b.Number(), row, numbers[row], streams[row], at, l.Name)
			return
		}
	}
}

func (v *Verdict) found(counter *uint64, format string, args ...any) {
	*counter++
	if v.First == "" {
		v.First = fmt.Sprintf(format, args...)
	}
}

func (v *Verdict) err(gapless bool) error {
	switch {
	case v.First != "":
		return dataf("verification failed: %s", v.First)
	case gapless && v.Gaps > 0:
		return dataf("verification failed: %d samples are missing", v.Gaps)
	}
	return nil
}
