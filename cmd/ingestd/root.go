package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// streams is where a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// run runs one command line and returns its exit code.
func run(args []string, std streams) int {
	root := rootCommand(std)
	root.SetArgs(args)
	err := root.Execute()
	if err != nil {
		report(std.err, err)
	}
	return exitCode(err)
}

func rootCommand(std streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "ingestd",
		Short: "Bring tensor samples from many producers into shared memory, as batches that trainers read in place",
		Long: `ingestd takes tensor samples from producers over TCP and unix sockets and lays them out in shared memory, where trainers read whole batches as plain
arrays without a copy.

  ingestd serve --table digits --spec image:F32[8,8],label:I32      start a daemon
  ingestd push --table digits train.npz                             push a file to it
  ingestd pull --table digits --out back.npz                        read the batches`,
		Args:          usageArgs(cobra.NoArgs),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%s: %w", cmd.CommandPath(), err)
	})
	root.AddCommand(serveCommand(std), pushCommand(std), pullCommand(std), statusCommand(std), inspectCommand(std), checkCommand(std), weightsCommand(std), certCommand(std), tokenCommand(std), bansCommand(std), versionCommand(std), exitCodesCommand())
	root.AddCommand(benchCommands()...)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.RunE = func(cmd *cobra.Command, args []string) error {
		_ = cmd.Help()
		return usagef("no command given")
	}
	return root
}

// usageArgs makes a wrong number of arguments a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usagef("%s: %w", cmd.CommandPath(), err)
		}
		return nil
	}
}

// errSignal is the cause of a context that a signal ended.
var errSignal = errors.New("interrupted by a signal")

// untilSignal returns a context that ends with the first SIGINT or SIGTERM; a second one kills the process as usual.
func untilSignal(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		select {
		case <-signals:
			cancel(errSignal)
		case <-ctx.Done():
		}
		signal.Stop(signals)
	}()
	return ctx, func() { cancel(context.Canceled) }
}

// because names the signal where a context's end was one.
func because(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errSignal) {
		return fmt.Errorf("%w (%w)", errSignal, err)
	}
	return err
}

func versionCommand(std streams) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print version, protocol version and platform",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(std.out, "ingestd %s, protocol %d, segment format %d, %s %s/%s\n", version(), protocolVersion, segmentVersion, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// stamp is the version that make sets through -ldflags, from git describe.
var stamp string

// version is the stamp, or of a plain go build the module's version, with the commit where the build knows it.
func version() string {
	if stamp != "" {
		return stamp
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	v, commit, dirty := info.Main.Version, "", ""
	if v == "" || v == "(devel)" {
		v = "devel"
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = " " + s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+"
		}
	}
	return v + commit + dirty
}
