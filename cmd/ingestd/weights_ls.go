package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/tensor"
)

type listOptions struct {
	reading
	admin   string
	timeout time.Duration
	long    bool
	named   bool // --table was given
}

func weightsListCommand(std streams) *cobra.Command {
	o := &listOptions{}
	cmd := &cobra.Command{
		Use:   "ls [flags]",
		Short: "List generations, who holds them, and a table's tensors",
		Long: `List the tables of weights of a running daemon with their generations, who pins them and since when, who publishes and
who reads; --table shows that one alone. This asks the admin endpoint (--admin of ingestd serve) and changes nothing.
If that asks for a token, the one of --token-file is sent there in the clear. With -l list the tensors of --table instead, which asks the daemon at --addr.`,
		Example: `  ingestd weights ls
  ingestd weights ls -l --table model`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.named = cmd.Flags().Changed("table")
			return o.run(cmd.Context(), std.out)
		},
	}
	o.target.flags(cmd, "unix://"+daemon.DefaultSocket())
	o.tlsFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.admin, "admin", "http://"+daemon.DefaultAdmin, adminAddress)
	f.DurationVar(&o.timeout, "timeout", 10*time.Second, "for the daemon to answer (exit code 5)")
	f.BoolVarP(&o.long, "long", "l", false, "list the tensors of the newest generation of --table")
	f.BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

func (o *listOptions) run(ctx context.Context, w io.Writer) error {
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	ctx, stop := deadline(ctx, o.timeout, "--timeout")
	defer stop()
	if o.long {
		return because(ctx, o.tensors(ctx, w))
	}
	text, err := (&adminTarget{o.admin, o.tokenFile}).ask(ctx, "weights ls", http.MethodGet, "/status")
	if err != nil {
		return because(ctx, err)
	}
	var s daemon.Status
	if err := json.Unmarshal(text, &s); err != nil || s.State == "" {
		return &codeError{exitUnreachable, fmt.Errorf("what answers at %s is no ingestd: its status is not one", o.admin)}
	}
	tables := s.Weights
	if o.named {
		tables = nil
		for _, t := range s.Weights {
			if t.Name == o.table {
				tables = append(tables, t)
			}
		}
		if len(tables) == 0 {
			return &codeError{exitRefused, fmt.Errorf("the daemon has no table %q of weights: see ingestd status", o.table)}
		}
	}
	if o.json {
		if tables == nil {
			tables = []daemon.WeightsStatus{}
		}
		return printJSON(w, tables)
	}
	if len(tables) == 0 {
		_, err := fmt.Fprintln(w, "the daemon has no table of weights: ingestd serve --table NAME --kind weights makes one")
		return err
	}
	var b strings.Builder
	for i := range tables {
		weightsText(&b, &s, &tables[i])
	}
	_, err = io.WriteString(w, strings.TrimPrefix(b.String(), "\n"))
	return err
}

// tensorResult is a tensor of a table.
type tensorResult struct {
	Name     string  `json:"name"`
	DType    string  `json:"dtype"`
	Shape    []int64 `json:"shape"`
	Encoding string  `json:"encoding,omitempty"`
	Bytes    int64   `json:"bytes"`
}

// tensors lists what a table's generations have.
func (o *listOptions) tensors(ctx context.Context, w io.Writer) (err error) {
	var s *client.Subscription
	s, err = o.subscribe(ctx, "ls", false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	m := s.Manifest()
	if o.json {
		list := make([]tensorResult, m.Len())
		for i := range list {
			t := m.Tensor(i)
			list[i] = tensorResult{Name: t.Name, DType: t.DType.String(), Shape: t.Shape, Bytes: m.EncodedBytes(i)}
			if t.Encoding.Kind != tensor.Raw {
				list[i].Encoding = t.Encoding.String()
			}
		}
		return printJSON(w, list)
	}
	widest := 0
	for i := range m.Len() {
		widest = max(widest, len(m.Tensor(i).Name))
	}
	var b strings.Builder
	for i := range m.Len() {
		t := m.Tensor(i)
		fmt.Fprintf(&b, "%-*s  %-24s %s\n", min(widest, 64), t.Name, t.Type(), bytesText(float64(m.EncodedBytes(i))))
	}
	fmt.Fprintf(&b, "%d tensors, %s\n", m.Len(), bytesText(float64(tensorBytes(m))))
	_, err = io.WriteString(w, b.String())
	return err
}
