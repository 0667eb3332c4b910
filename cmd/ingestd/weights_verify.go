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
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

type verifyOptions struct {
	reading
	progress string
}

func weightsVerifyCommand(std streams) *cobra.Command {
	o := &verifyOptions{}
	cmd := &cobra.Command{
		Use:   "verify [flags] [FILE]",
		Short: "Check the newest generation's sums, or that a safetensors file has the same tensors",
		Long: `Sum every tensor of the newest generation and compare: with the sums that it was published with, and these with its digest. With FILE, compare its
tensors with the generation's, too: names, types, shapes and bytes. Ends with code 6 if anything differs.`,
		Example: `  ingestd weights verify --table model
  ingestd weights verify --table model model.safetensors`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.run(cmd.Context(), std, args)
		},
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&o.progress, "progress", "auto", "progress bar: "+progressModes)
	return cmd
}

// verifyResult is what was found.
type verifyResult struct {
	generationResult
	File  string `json:"file,omitempty"`
	Right bool   `json:"right"`
	Error string `json:"error,omitempty"`
}

func (o *verifyOptions) run(ctx context.Context, std streams, args []string) (err error) {
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	r := verifyResult{generationResult: generationResult{Table: o.table}}
	var file *safetensors.File
	if len(args) == 1 {
		r.File = args[0]
		if file, err = safetensors.Open(args[0]); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, file.Close()) }()
	}
	began := time.Now()
	err = because(ctx, o.use(ctx, std, "verify", o.progress, func(w *client.Weights) error {
		r.generationResult = resultOf(o.table, w)
		if err := w.Verify(); err != nil {
			return &codeError{exitData, err}
		}
		if file == nil {
			return nil
		}
		return compare(r.File, file, w)
	}))
	r.Right, r.Seconds = err == nil, time.Since(began).Seconds()
	return errors.Join(o.print(std.out, r, time.Since(began), err), err)
}

// compare says in what a file differs from a generation. The order of the tensors may.
func compare(path string, file *safetensors.File, w *client.Weights) error {
	ordered, err := inOrderOf(file.Manifest(), w.Manifest())
	if err != nil {
		return err
	}
	if diff := tensor.DiffManifests(ordered, w.Manifest()); len(diff) > 0 {
		return dataf("%s has other tensors than generation %d: %s", path, w.Generation(), differences(diff))
	}
	different, first := 0, ""
	for i := range w.Manifest().Len() {
		k, _ := file.Manifest().Index(w.Manifest().Tensor(i).Name)
		if string(file.Data(k)) != string(w.At(i)) {
			if different++; different == 1 {
				first = w.Manifest().Tensor(i).Name
			}
		}
	}
	if different > 0 {
		return dataf("%s differs from generation %d in %d of %d tensors, the first is %q", path, w.Generation(), different, w.Manifest().Len(), first)
	}
	return nil
}

// differencesMax is how many tensors that differ are named.
const differencesMax = 8

// differences names tensors that differ.
func differences(diff []spec.Difference) string {
	var list []string
	for _, d := range diff[:min(len(diff), differencesMax)] {
		switch {
		case d.Got == "":
			list = append(list, fmt.Sprintf("%q is missing, it is %s", d.Leaf, d.Want))
		case d.Want == "":
			list = append(list, fmt.Sprintf("%q, %s, is one more", d.Leaf, d.Got))
		default:
			list = append(list, fmt.Sprintf("%q is %s instead of %s", d.Leaf, d.Got, d.Want))
		}
	}
	if more := len(diff) - differencesMax; more > 0 {
		list = append(list, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(list, "; ")
}

// inOrderOf returns got with those tensors that want has in want's order, and the others after them.
func inOrderOf(got, want *tensor.Manifest) (*tensor.Manifest, error) {
	var tensors []tensor.Tensor
	for i := range want.Len() {
		if k, ok := got.Index(want.Tensor(i).Name); ok {
			tensors = append(tensors, got.Tensor(k))
		}
	}
	for k := range got.Len() {
		if _, ok := want.Index(got.Tensor(k).Name); !ok {
			tensors = append(tensors, got.Tensor(k))
		}
	}
	return tensor.NewManifest(tensors, got.Metadata())
}

func (o *verifyOptions) print(w io.Writer, r verifyResult, took time.Duration, err error) error {
	if o.json {
		if err != nil {
			r.Error = err.Error()
		}
		return printJSON(w, r)
	}
	if err != nil {
		return nil
	}
	what := ""
	if r.File != "" {
		what = ", and the same as " + r.File
	}
	_, printed := fmt.Fprintf(w, "generation %d of table %q is right%s: %d tensors, %s\n  digest %s\n",
		r.Generation, r.Table, what, r.Tensors, rateText(r.Bytes, took), r.Digest)
	return printed
}
