package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/tensor"
)

type getOptions struct {
	reading
	out      string
	patterns []string
	progress string
}

func weightsGetCommand(std streams) *cobra.Command {
	o := &getOptions{}
	cmd := &cobra.Command{
		Use:   "get [flags] -o FILE",
		Short: "Write the newest generation of a table to a safetensors file",
		Long: `Write the newest generation, or with --select some of its tensors, to a .safetensors file whose data starts on a multiple of 64 bytes. It is verified
first; the file appears when it is complete, and an existing one is not replaced.`,
		Example: `  ingestd weights get --table model -o copy.safetensors
  ingestd weights get --table model --select 'layers.0.*' --select head.w -o part.safetensors
  ingestd weights get --table model --addr tcp://127.0.0.1:7420 --newer-than 7 --deadline 1m -o next.safetensors`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), std)
		},
	}
	o.flags(cmd)
	f := cmd.Flags()
	f.StringVarP(&o.out, "out", "o", "", "the file to write")
	f.StringArrayVar(&o.patterns, "select", nil, "only tensors whose names match: * for any characters, ? for one; may be given again")
	f.StringVar(&o.progress, "progress", "auto", "progress bar: "+progressModes)
	return cmd
}

// getResult is what was written.
type getResult struct {
	generationResult
	Out   string `json:"out"`
	Error string `json:"error,omitempty"`
}

func (o *getOptions) run(ctx context.Context, std streams) error {
	if o.out == "" {
		return usagef("weights get: name the file to write: -o FILE")
	}
	if _, err := os.Lstat(o.out); err == nil {
		return usagef("weights get: %s exists, and is not replaced: move it away or choose another name", o.out)
	}
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	began := time.Now()
	r := getResult{generationResult: generationResult{Table: o.table}, Out: o.out}
	err := because(ctx, o.use(ctx, std, "get", o.progress, func(w *client.Weights) error {
		r.generationResult = resultOf(o.table, w)
		return o.write(w, &r, std.err)
	}))
	r.Seconds = time.Since(began).Seconds()
	return errors.Join(o.print(std.out, r, time.Since(began), err), err)
}

// write writes what was selected.
func (o *getOptions) write(w *client.Weights, r *getResult, log io.Writer) error {
	numbers, err := o.selected(w)
	if err != nil {
		return err
	}
	tensors := make([]tensor.Tensor, len(numbers))
	for k, i := range numbers {
		tensors[k] = w.Manifest().Tensor(i)
		if tensors[k].Encoding.Kind != tensor.Raw {
			return dataf("tensor %q is kept as %s, which a safetensors file cannot say: leave it out with --select", tensors[k].Name, tensors[k].Encoding)
		}
	}
	m, err := tensor.NewManifest(tensors, nil)
	if err != nil {
		return err
	}
	if err := w.Verify(); err != nil {
		return &codeError{exitData, err}
	}
	r.Tensors, r.Bytes = m.Len(), tensorBytes(m)
	bar, err := newProgress(log, o.progress, "write "+o.out, r.Bytes)
	if err != nil {
		return err
	}
	defer bar.done(log)
	written := int64(0) // of the tensor before
	err = safetensors.Write(o.out, m, w.Manifest().Metadata(), func(k int) []byte {
		bar.add(written)
		written = m.EncodedBytes(k)
		return w.At(numbers[k])
	})
	if err == nil {
		bar.add(written)
	}
	return err
}

// selected returns the numbers of the tensors to write, each once, in the manifest's order.
func (o *getOptions) selected(w *client.Weights) ([]int, error) {
	wanted := make([]bool, w.Manifest().Len())
	for _, pattern := range o.patterns {
		found, err := w.Select(pattern)
		if err != nil {
			return nil, usagef("weights get: --select: %w", err)
		}
		if len(found) == 0 {
			return nil, dataf("no tensor of table %q matches %q: ingestd weights ls -l shows their names", o.table, pattern)
		}
		for _, s := range found {
			wanted[s.Index] = true
		}
	}
	var numbers []int
	for i, w := range wanted {
		if w || len(o.patterns) == 0 {
			numbers = append(numbers, i)
		}
	}
	return numbers, nil
}

func (o *getOptions) print(w io.Writer, r getResult, took time.Duration, err error) error {
	if o.json {
		if err != nil {
			r.Error = err.Error()
		}
		return printJSON(w, r)
	}
	if err != nil {
		return nil
	}
	_, printed := fmt.Fprintf(w, "wrote generation %d of table %q to %s: %d tensors, %s\n  digest %s\n",
		r.Generation, r.Table, r.Out, r.Tensors, rateText(r.Bytes, took), r.Digest)
	return printed
}
