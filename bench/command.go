package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Command returns the command bench with its subcommands, for cmd/ingestd.
func Command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure this machine: the whole path, and its parts, beside their baselines",
		Long: "Measure this machine. Every figure stands beside its baseline from the same run: compare the ratios, the absolute figures are of this\n" +
			"machine and this moment.",
	}
	cmd.AddCommand(tcpCommand(), secureCommand(), linkCommand(), shmCommand(), tensorsCommand(), accessCommand(), compressCommand(), microCommand(), senderCommand(), bareCommand(), trainerCommand(),
		fillerCommand(), handoffCommand(), wakeCommand(), watcherCommand(), sessionsCommand(),
		gradSenderCommand(), gradReaderCommand(), publisherCommand(), subscriberCommand(), sendfileCommand())
	return cmd
}

func defaultCommon() Common {
	return Common{Runs: 5, Duration: 2 * time.Second, Warmup: 300 * time.Millisecond}
}

func defaultOptions() Options {
	return Options{
		Common: defaultCommon(), OpenDuration: time.Second, OpenFraction: 0.5,
		WriteBytes: senderWriteBytes, SendBuffer: senderBuffer, BareRead: bareReadBytes,
	}
}

func tcpCommand() *cobra.Command {
	opt := defaultOptions()
	cmd := &cobra.Command{
		Use:   "tcp",
		Short: "Socket to lease with sender, daemon and trainer as processes, beside a bare loop and copy()",
		Example: "  ingestd bench tcp --json bench.json\n" +
			"  ingestd bench tcp --case 1KiB/8 --runs 3 --cpuprofile profiles/\n" +
			"  ingestd bench tcp --case 256KiB/1 --only bare",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runTCP(ctx, opt, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	opt.Common.flags(f, caseNames(fullCases()))
	f.BoolVar(&opt.All, "all", false, "also the cases that take much memory or time")
	f.DurationVar(&opt.OpenDuration, "open-duration", opt.OpenDuration, "open loop for latencies; 0: none")
	f.Float64Var(&opt.OpenFraction, "open-fraction", opt.OpenFraction, "rate of the open loop, as a fraction of the rate just measured")
	f.StringVar(&opt.Only, "only", "", "only these contenders, separated by commas: full, bare, copy")
	opt.peerFlags(f)
	return cmd
}

// peerFlags are those of sender, bare loop and ring.
func (o *Options) peerFlags(f *pflag.FlagSet) {
	f.Int64Var(&o.RingBytes, "ring-bytes", 0, "sample bytes that a ring holds, instead of the case's own")
	f.IntVar(&o.WriteBytes, "write-bytes", o.WriteBytes, "most bytes of the sender's writes")
	f.IntVar(&o.SendBuffer, "send-buffer", o.SendBuffer, "the sender's SO_SNDBUF; 0: the kernel's choice")
	f.IntVar(&o.BareRead, "bare-read-bytes", o.BareRead, "most bytes of the bare loop's reads")
	f.Int64Var(&o.AskSamples, "window-samples", 0, "window that the sender asks for; 0: the daemon's limit")
	f.Int64Var(&o.AskBytes, "window-bytes", 0, "window that the sender asks for; 0: the daemon's limit")
	f.BoolVar(&o.Client, "client", false, "send with the client library instead of the bench's own loop; without an open loop")
}

func (o *Common) flags(f *pflag.FlagSet, cases string) {
	f.StringVar(&o.Case, "case", "", "only these cases, separated by commas: "+cases)
	f.BoolVar(&o.Smoke, "smoke", false, "tiny sizes and times: does everything work? The figures mean nothing")
	f.IntVar(&o.Runs, "runs", o.Runs, "runs of every contender; the medians count")
	f.DurationVar(&o.Duration, "duration", o.Duration, "measured window at full speed")
	f.DurationVar(&o.Warmup, "warmup", o.Warmup, "before every window")
	f.StringArrayVar(&o.ServeArgs, "serve-arg", nil, "one more argument for the daemon; may be repeated")
	f.StringVar(&o.JSON, "json", "", "write the record here; - is standard output, without the tables")
	f.StringVar(&o.CPUProfile, "cpuprofile", "", "folder for CPU profiles of all processes, from the last run of each case")
	f.StringVar(&o.Binary, "binary", "", "ingestd binary to measure; default: this one")
	f.BoolVar(&o.Check, "check", false, "fail if a target is missed")
	f.BoolVar(&o.Quiet, "quiet", false, "no line per run on standard error")
}

// report writes the record, and fails for missed targets if that is asked for.
func (o *Common) report(record any, all []Target, out io.Writer) error {
	if o.JSON != "" {
		if err := writeRecord(record, o.JSON, out); err != nil {
			return err
		}
	}
	if bad := missed(all); o.Check && len(bad) > 0 {
		return fmt.Errorf("%d of %d targets missed: the table above says which", len(bad), len(all))
	}
	return nil
}

// runTCP measures the cases of bench tcp or bench secure, prints and writes the record.
func runTCP(ctx context.Context, opt Options, out, log io.Writer) error {
	cases, err := opt.settle()
	if err != nil {
		return err
	}
	r := &runner{opt: &opt, log: log}
	record, err := r.runCases(ctx, cases)
	if len(record.Cases) > 0 && opt.JSON != "-" {
		printRecord(out, record)
	}
	if err != nil {
		return err
	}
	return opt.report(record, record.Targets, out)
}

func writeRecord(record any, path string, out io.Writer) error {
	text, err := json.MarshalIndent(record, "", "  ")
	if err != nil {
		return fmt.Errorf("make the record: %w", err)
	}
	text = append(text, '\n')
	if path == "-" {
		_, err = out.Write(text)
	} else {
		err = os.WriteFile(path, text, 0o644)
	}
	return err
}
