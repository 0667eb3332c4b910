package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/inspect"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// Versions that `ingestd version` prints.
const (
	protocolVersion = wire.Version
	segmentVersion  = ring.Version
)

type inspectOptions struct {
	target
	json    bool
	save    string
	timeout time.Duration
}

func inspectCommand(std streams) *cobra.Command {
	o := &inspectOptions{}
	cmd := &cobra.Command{
		Use:   "inspect [flags] [FILE]",
		Short: "Show spec, capacity and states of a live segment or of a file",
		Long: `Show what a segment holds: its spec, capacity, cursors, and the state of each batch. Without FILE, of a table of a running daemon, over its unix socket; this
disturbs nobody. --save copies the live segment to a file that ingestd check accepts; a batch that changes while it is copied is left out.`,
		Example: `  ingestd inspect --table digits
  ingestd inspect --table digits --save digits.seg && ingestd check digits.seg`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return o.file(std.out, args[0])
			}
			return o.live(cmd.Context(), std.out)
		},
	}
	o.flags(cmd, "unix://"+daemon.DefaultSocket())
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	cmd.Flags().StringVar(&o.save, "save", "", "copy the live segment to this new file")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 10*time.Second, "for the daemon to answer (exit code 5)")
	return cmd
}

func (o *inspectOptions) live(ctx context.Context, w io.Writer) error {
	path, ok := strings.CutPrefix(o.addr, "unix://")
	if !ok {
		return usagef("inspect: --addr is %q: a live segment is looked at over the daemon's unix socket, unix:///path", o.addr)
	}
	token, err := o.token()
	if err != nil {
		return err
	}
	hello := wire.Hello{Table: o.table, Client: "ingestd inspect/" + version()}
	hello.SetToken(token)
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	ctx, stop := deadline(ctx, o.wait+o.timeout, "--timeout")
	defer stop()
	var seen *shm.Observation
	err = o.retry(ctx, func() (err error) {
		seen, err = shm.Observe(ctx, path, hello)
		return err
	})
	if err != nil {
		return because(ctx, err)
	}
	report, err := inspect.New(seen.View())
	if err == nil && o.save != "" {
		err = inspect.Save(o.save, seen.View(), seen.Bytes())
	}
	if err == nil {
		err = o.print(w, report)
	}
	return errors.Join(err, seen.Close())
}

func (o *inspectOptions) file(w io.Writer, path string) error {
	if o.save != "" {
		return usagef("inspect: --save copies a live segment; %s is a file already", path)
	}
	return mapped(path, func(mem []byte) error {
		v, err := ring.OpenView(mem)
		if err != nil {
			return err
		}
		report, err := inspect.New(v)
		if err != nil {
			return err
		}
		return o.print(w, report)
	})
}

func (o *inspectOptions) print(w io.Writer, r *inspect.Report) error {
	if !o.json {
		_, err := io.WriteString(w, r.Text())
		return err
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// mapped runs f on the bytes of a file.
func mapped(path string, f func(mem []byte) error) error {
	file, err := os.Open(path)
	if err != nil {
		return &codeError{exitUsage, err}
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular() || info.Size() == 0:
		return dataf("%s: not a segment: it is empty or not a regular file", path)
	}
	m, err := shm.MapReadOnly(int(file.Fd()), info.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer m.Close()
	if err := inspect.Guard(func() error { return f(m.Bytes()) }); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func checkCommand(std streams) *cobra.Command {
	quiet := false
	cmd := &cobra.Command{
		Use:   "check [flags] FILE...",
		Short: "Verify segment files",
		Long: `Verify files that hold a segment, such as ingestd inspect --save writes: header and checksum, spec and fingerprint, cursors, every state line, and for each
readable batch that its rows were written and each stream's samples are in order. Ends with code 6 if anything is wrong.`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			var errs []error
			for _, path := range args {
				errs = append(errs, checkFile(std.out, path, quiet))
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing about files that are right")
	return cmd
}

func checkFile(w io.Writer, path string, quiet bool) error {
	return mapped(path, func(mem []byte) error {
		r, problems, err := inspect.Check(mem)
		if err != nil {
			return err
		}
		for _, p := range problems {
			fmt.Fprintf(w, "%s: %s\n", path, p)
		}
		if len(problems) > 0 {
			return dataf("%d things are wrong with this segment", len(problems))
		}
		if !quiet {
			fmt.Fprintf(w, "%s: right: table %q, %s, %d batches published, %d of them leased\n", path, r.Table, specText(r.Spec), r.Published, r.Leased)
		}
		return nil
	})
}

func specText(s *spec.Spec) string { return cut(s.Text(), 100) }
