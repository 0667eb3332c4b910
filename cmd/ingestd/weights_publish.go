package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/wire"
)

type publishOptions struct {
	target
	generation uint64
	stream     bool
	deadline   time.Duration
	timeout    time.Duration
	progress   string
	json       bool
}

func weightsPublishCommand(std streams) *cobra.Command {
	o := &publishOptions{}
	cmd := &cobra.Command{
		Use:   "publish [flags] FILE",
		Short: "Make a safetensors file the newest generation of a table",
		Long: `Publish the tensors of FILE: a .safetensors file, or the .json index of a sharded one. Readers see the new generation at once,
when all of it is in and verified; if the command ends before that, nothing is left of it. Over a unix socket the tensors are copied into the daemon's memory,
where the daemon permits that; else, and over tcp://, they are sent.

While readers hold all generations but the newest, it waits, for as long as --deadline says, and then names them.`,
		Example: `  ingestd weights publish --table model model.safetensors
  ingestd weights publish --table model --addr tcp://127.0.0.1:7420 model.safetensors.index.json`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.run(cmd.Context(), std, args[0])
		},
	}
	o.flags(cmd, "unix://"+daemon.DefaultSocket())
	o.tlsFlags(cmd)
	f := cmd.Flags()
	f.Uint64Var(&o.generation, "generation", 0, "number of the generation, above the newest; 0: the next one")
	f.BoolVar(&o.stream, "stream", false, "send the tensors over a unix socket, too")
	f.DurationVar(&o.deadline, "deadline", 0, "longest wait for a place that no reader holds (exit code 5); 0: for ever")
	f.DurationVar(&o.timeout, "timeout", 0, "give up after so long (exit code 5); 0: never")
	f.StringVar(&o.progress, "progress", "auto", "progress bar: "+progressModes)
	f.BoolVar(&o.json, "json", false, "print the result as JSON")
	return cmd
}

// publishResult is what was published.
type publishResult struct {
	generationResult
	InPlace bool   `json:"in_place"` // written into the daemon's memory, and not sent
	Error   string `json:"error,omitempty"`
}

func (o *publishOptions) run(ctx context.Context, std streams, path string) (err error) {
	if o.deadline < 0 || o.timeout < 0 || o.wait < 0 {
		return usagef("weights publish: --deadline, --timeout and --wait must not be negative")
	}
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	ctx, stop := deadline(ctx, o.timeout, "--timeout")
	defer stop()
	file, err := safetensors.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	p, err := o.open(ctx, std.err, file)
	if err != nil {
		return because(ctx, err)
	}
	total := file.Manifest().DataBytes()
	bar, err := newProgress(std.err, o.progress, "publish "+path, total)
	if err != nil {
		return errors.Join(err, p.Close())
	}
	if total == 0 {
		bar = &progress{}
	}
	r := publishResult{InPlace: o.inPlace()}
	r.generationResult = generationResult{Table: o.table, Tensors: file.Manifest().Len(), Bytes: tensorBytes(file.Manifest())}
	began := time.Now()
	ended := bar.follow(p.SentBytes)
	done, err := o.publish(ctx, p, file)
	ended()
	if err == nil { // what lies between tensors does not count
		bar.add(total - max(p.SentBytes(), 1))
	}
	bar.done(std.err)
	took := time.Since(began)
	r.Generation, r.Digest, r.Seconds = done.Generation, done.Digest.String(), took.Seconds()
	if err != nil {
		r.Digest = ""
	}
	err = because(ctx, err)
	return errors.Join(o.print(std.out, r, took, err), err, p.Close())
}

// inPlace says whether the tensors are written into the daemon's memory.
func (o *publishOptions) inPlace() bool { return !o.stream && !strings.HasPrefix(o.addr, "tcp://") }

// open becomes the publisher: in place where the daemon permits it.
func (o *publishOptions) open(ctx context.Context, log io.Writer, file *safetensors.File) (*client.Publisher, error) {
	token, err := o.token()
	if err != nil {
		return nil, err
	}
	until := time.Now().Add(o.wait)
	for {
		var p *client.Publisher
		err := o.retry(ctx, func() (err error) {
			p, err = client.OpenPublisher(ctx, o.addr, client.PublisherConfig{
				Table: o.table, Manifest: file.Manifest(), Stream: o.stream, Client: "ingestd weights publish/" + version(), Token: token, TLS: o.tls,
			})
			return err
		})
		refusal := (*wire.Refusal)(nil)
		switch {
		case err == nil || !errors.As(err, &refusal):
			return p, err
		case o.inPlace() && (refusal.Code == wire.CodeNotPermitted || refusal.Code == wire.CodeWrongRole):
			fmt.Fprintf(log, "ingestd: sending the tensors, since the daemon does not let this process write into its memory: %s\n", refusal.Reason)
			o.stream = true
			continue
		case refusal.Code != wire.CodePublisherActive || time.Now().Add(connectPause).After(until):
			return nil, err
		}
		select {
		case <-time.After(connectPause):
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), err)
		}
	}
}

// publish writes one generation.
func (o *publishOptions) publish(ctx context.Context, p *client.Publisher, file *safetensors.File) (client.Published, error) {
	waiting, stop := deadline(ctx, o.deadline, "--deadline")
	defer stop()
	g, err := p.Begin(waiting, o.generation)
	if old := (*client.OldGenerationError)(nil); errors.As(err, &old) {
		return client.Published{}, &codeError{exitRefused, err}
	}
	if err != nil {
		return client.Published{}, err
	}
	for i := range file.Manifest().Len() {
		if err := g.PutAt(ctx, i, file.Data(i)); err != nil {
			return client.Published{}, err
		}
	}
	return g.Commit(ctx)
}

func (o *publishOptions) print(w io.Writer, r publishResult, took time.Duration, err error) error {
	if o.json {
		if err != nil {
			r.Error = err.Error()
		}
		return printJSON(w, r)
	}
	if err != nil {
		return nil
	}
	_, printed := fmt.Fprintf(w, "published generation %d of table %q: %d tensors, %s\n  digest %s\n",
		r.Generation, r.Table, r.Tensors, rateText(r.Bytes, took), r.Digest)
	return printed
}
