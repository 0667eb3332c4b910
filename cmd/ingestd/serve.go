package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
)

type serveOptions struct {
	file        string
	printConfig bool
	table       daemon.Table
	flagged     daemon.Config // what the flags say; only those that were given count
}

func serveCommand(std streams) *cobra.Command {
	o := &serveOptions{flagged: daemon.DefaultConfig()}
	cmd := &cobra.Command{
		Use:   "serve [flags]",
		Short: "Run the daemon",
		Long: `Run the daemon until SIGTERM or SIGINT. Then it takes no new connections, lets producers finish the samples under way, publishes what is there, lets
trainers read it, and ends with code 0; 6 if samples were left that no trainer has read and that are not kept. A second signal stops it at once, with code 7.

With --segment-dir the tables lie in files there, one each, and the next daemon takes them up, however this one ended: what no trainer released is offered again,
and each session's producers go on where it was. A segment that cannot be taken up is told with the reason, and the daemon does not start.

Settings come from the defaults, then --config, then flags. --table and the flags after it add one table, or change the one of that name in the file.
docs/operations.md describes the file; --print-config writes the settings in force as such a file, and checks them.`,
		Example: `  ingestd serve --table digits --spec image:F32[8,8],label:I32 --batch-size 64
  ingestd serve --config /etc/ingestd.yaml --log-format json
  ingestd serve --table digits --spec image:F32[8,8],label:I32 --segment-dir /var/lib/ingestd --ack committed
  ingestd serve --table grads --kind tensors --capacity 2GiB --max-lag 4
  ingestd serve --table model --kind weights --listen tcp://127.0.0.1:0`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(std, cmd.Flags())
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&o.file, "config", "c", "", "YAML file with settings")
	f.BoolVar(&o.printConfig, "print-config", false, "check the settings, print them as YAML and end")
	f.StringVarP(&o.table.Name, "table", "t", daemon.DefaultTable, "name of the table")
	f.StringVar(&o.table.Kind, "kind", string(ingest.KindSamples), "what the table holds: samples, tensors (gradients: chunks of named tensors) or weights (whole generations of them)")
	f.StringVar(&o.table.Spec, "spec", "", "kind samples: what one sample is: text such as image:F32[8,8],label:I32, or JSON, or @file")
	o.table.ChunkBytes = tensor.ChunkBytesDefault
	f.Var(&o.table.ChunkBytes, "chunk-bytes", "kind tensors: most data bytes of a chunk, 64KiB to 64MiB")
	f.Uint64Var(&o.table.MaxLag, "max-lag", 0, "kind tensors: how many steps a chunk may be behind the newest step begun; 0: any number")
	f.IntVar(&o.table.Generations, "generations", weights.PlacesDefault, "kind weights: generations that are there at once")
	f.IntVar(&o.table.BatchSize, "batch-size", daemon.DefaultBatchSize, "samples in a batch; kind tensors: 1, unless given")
	f.IntVar(&o.table.Batches, "batches", 0, "capacity in batches; default: what fits in 256MiB, at least 4")
	f.Var(&o.table.Capacity, "capacity", "capacity as memory, such as 2GiB, instead of --batches; kind weights: most bytes of all generations, by default 4GiB")
	f.Var(&o.table.Linger, "linger", "publish a batch short when a sample in it has waited so long, or a stream ends; 0 is never")
	f.BoolVar(&o.table.HugePages, "huge-pages", false, "take huge pages if there are any")
	f.StringVar(&o.table.Ack, "ack", "queued", "queued: producers choose; committed: no sample is acked before it is in the ring")
	f.IntVar(&o.table.Sessions, "sessions", ring.SessionsDefault, "most sessions of producers that the table knows")
	o.table.SessionTTL = daemon.DefaultSessionTTL
	f.Var(&o.table.SessionTTL, "session-ttl", "a session that has had no connection for so long may be forgotten")
	c := &o.flagged
	f.StringVar(&c.SegmentDir, "segment-dir", "", "folder, of this daemon alone, in which tables are kept over restarts; default: they lie in memory only")
	f.BoolVar(&c.DiscardSegments, "discard-segments", false, "overwrite kept segments that cannot be taken up")
	f.StringArrayVarP(&c.Listen, "listen", "l", c.Listen, "tcp://host:port, tls://host:port, quic://host:port, unix:///path or echo://host:port/table; repeatable")
	f.StringVar(&c.Admin, "admin", c.Admin, "host:port or unix:///path of the admin HTTP endpoint, or off")
	f.BoolVar(&c.Insecure, "insecure", false, "allow listeners that other machines can reach, though nobody is asked for credentials")
	f.StringVar(&c.Tokens, "tokens", "", "file of tokens, one of which clients must prove to have (ingestd token new); default: everybody who reaches a listener is let in")
	f.BoolVar(&c.Bans.Enabled, "bans", c.Bans.Enabled, "slow addresses from which handshakes fail, and ban them for 5 minutes from the fifth on")
	f.BoolVar(&c.Bans.Loopback, "bans-loopback", false, "bans concern addresses of this machine, too")
	f.BoolVar(&c.Bans.Kernel, "bans-kernel", c.Bans.Kernel, "have the kernel drop what banned addresses send to connect; without, they are answered, and closed")
	f.StringVar(&c.TLS.Cert, "tls-cert", "", "file with the daemon's certificate (PEM), for tls:// and quic:// listeners")
	f.StringVar(&c.TLS.Key, "tls-key", "", "file with its key")
	f.StringVar(&c.TLS.ClientCA, "tls-client-ca", "", "file with authorities; clients at tls:// and quic:// must have a certificate of one of them")
	f.StringSliceVar(&c.Compression, "compression", nil, "offer producers to send compressed: s2, zstd, s2+shuffle, zstd+shuffle, separated by commas; default: none")
	f.IntVar(&c.Drainers, "drainers", c.Drainers, "goroutines that move samples from queues to rings")
	f.Var(&c.DrainTimeout, "drain-timeout", "how long to wait for producers and trainers when stopping")
	f.StringVar(&c.ReadyFile, "ready-file", "", "write the real addresses there as JSON once serving; removed at the end")
	f.StringVar(&c.Log.Level, "log-level", c.Log.Level, "debug, info, warn or error")
	f.StringVar(&c.Log.Format, "log-format", c.Log.Format, "text or json")
	l := &c.Limits
	f.IntVar(&l.MaxConnections, "max-connections", l.MaxConnections, "producers at once")
	f.IntVar(&l.WindowSamples, "window-samples", l.WindowSamples, "most samples of one producer without an ack")
	f.Var(&l.WindowBytes, "window-bytes", "bytes without an ack of a producer that asks for no number, unless two samples are more")
	f.Var(&l.WindowBytesMax, "window-bytes-max", "most bytes of one producer without an ack")
	f.Var(&l.HandshakeTimeout, "handshake-timeout", "for a whole handshake")
	f.Var(&l.IdleTimeout, "idle-timeout", "without a byte between samples")
	f.Var(&l.StallTimeout, "stall-timeout", "without a byte inside a sample")
	f.Var(&l.AckTimeout, "ack-timeout", "for a producer to read its acks")
	f.IntVar(&l.MaxTrainers, "max-trainers", l.MaxTrainers, "trainers of other processes at once")
	f.IntVar(&l.Prefetch, "prefetch", l.Prefetch, "batches a trainer holds at once, unless it asks for another number; 0: as many as 8 MiB are, at least 4")
	f.IntVar(&l.HalfOpen, "half-open", l.HalfOpen, "handshakes under way at once, of the addresses that bans concern")
	f.IntVar(&l.HalfOpenPerAddress, "half-open-per-address", l.HalfOpenPerAddress, "of one such address, or /64 of IPv6")
	return cmd
}

// tableFlags are those that belong to the table that --table names.
var tableFlags = []string{"kind", "chunk-bytes", "max-lag", "generations", "batch-size", "batches", "capacity", "linger", "huge-pages", "ack", "sessions", "session-ttl"}

// config puts defaults, file and flags together.
func (o *serveOptions) config(flags *pflag.FlagSet) (daemon.Config, error) {
	cfg := daemon.DefaultConfig()
	if o.file != "" {
		if err := cfg.LoadFile(o.file); err != nil {
			return cfg, err
		}
	}
	given := flags.Changed
	if given("table") || given("spec") || o.file == "" {
		o.addTable(&cfg, given)
	} else if i := slices.IndexFunc(tableFlags, given); i >= 0 {
		return cfg, usagef("serve: --%s belongs to a table: say --table NAME, too", tableFlags[i])
	}
	from, to := &o.flagged, &cfg
	for name, set := range map[string]func(){
		"listen":                func() { to.Listen = from.Listen },
		"admin":                 func() { to.Admin = from.Admin },
		"insecure":              func() { to.Insecure = from.Insecure },
		"tokens":                func() { to.Tokens = from.Tokens },
		"bans":                  func() { to.Bans.Enabled = from.Bans.Enabled },
		"bans-loopback":         func() { to.Bans.Loopback = from.Bans.Loopback },
		"bans-kernel":           func() { to.Bans.Kernel = from.Bans.Kernel },
		"tls-cert":              func() { to.TLS.Cert = from.TLS.Cert },
		"tls-key":               func() { to.TLS.Key = from.TLS.Key },
		"tls-client-ca":         func() { to.TLS.ClientCA = from.TLS.ClientCA },
		"compression":           func() { to.Compression = from.Compression },
		"half-open":             func() { to.Limits.HalfOpen = from.Limits.HalfOpen },
		"half-open-per-address": func() { to.Limits.HalfOpenPerAddress = from.Limits.HalfOpenPerAddress },
		"drainers":              func() { to.Drainers = from.Drainers },
		"drain-timeout":         func() { to.DrainTimeout = from.DrainTimeout },
		"segment-dir":           func() { to.SegmentDir = from.SegmentDir },
		"discard-segments":      func() { to.DiscardSegments = from.DiscardSegments },
		"ready-file":            func() { to.ReadyFile = from.ReadyFile },
		"log-level":             func() { to.Log.Level = from.Log.Level },
		"log-format":            func() { to.Log.Format = from.Log.Format },
		"max-connections":       func() { to.Limits.MaxConnections = from.Limits.MaxConnections },
		"window-samples":        func() { to.Limits.WindowSamples = from.Limits.WindowSamples },
		"window-bytes":          func() { to.Limits.WindowBytes = from.Limits.WindowBytes },
		"window-bytes-max":      func() { to.Limits.WindowBytesMax = from.Limits.WindowBytesMax },
		"handshake-timeout":     func() { to.Limits.HandshakeTimeout = from.Limits.HandshakeTimeout },
		"idle-timeout":          func() { to.Limits.IdleTimeout = from.Limits.IdleTimeout },
		"stall-timeout":         func() { to.Limits.StallTimeout = from.Limits.StallTimeout },
		"ack-timeout":           func() { to.Limits.AckTimeout = from.Limits.AckTimeout },
		"max-trainers":          func() { to.Limits.MaxTrainers = from.Limits.MaxTrainers },
		"prefetch":              func() { to.Limits.Prefetch = from.Limits.Prefetch },
	} {
		if given(name) {
			set()
		}
	}
	return cfg, cfg.Validate()
}

// addTable adds the table of the flags, or changes the one of that name.
func (o *serveOptions) addTable(cfg *daemon.Config, given func(string) bool) {
	cfg.Tables = slices.Clone(cfg.Tables)
	i := slices.IndexFunc(cfg.Tables, func(t daemon.Table) bool { return t.Name == o.table.Name })
	if i < 0 { // what is not given, its kind decides
		i = len(cfg.Tables)
		cfg.Tables = append(cfg.Tables, daemon.Table{Name: o.table.Name})
	}
	t := &cfg.Tables[i]
	if given("kind") {
		t.Kind = o.table.Kind
	}
	if given("spec") {
		t.Spec = o.table.Spec
	}
	if given("chunk-bytes") {
		t.ChunkBytes = o.table.ChunkBytes
	}
	if given("max-lag") {
		t.MaxLag = o.table.MaxLag
	}
	if given("generations") {
		t.Generations = o.table.Generations
	}
	if given("batch-size") {
		t.BatchSize = o.table.BatchSize
	}
	if given("batches") || given("capacity") {
		t.Batches, t.Capacity = o.table.Batches, o.table.Capacity
	}
	if given("linger") {
		t.Linger = o.table.Linger
	}
	if given("huge-pages") {
		t.HugePages = o.table.HugePages
	}
	if given("ack") {
		t.Ack = o.table.Ack
	}
	if given("sessions") {
		t.Sessions = o.table.Sessions
	}
	if given("session-ttl") {
		t.SessionTTL = o.table.SessionTTL
	}
}

func (o *serveOptions) run(std streams, flags *pflag.FlagSet) error {
	cfg, err := o.config(flags)
	if err != nil {
		return err
	}
	if o.printConfig {
		_, err := io.WriteString(std.out, cfg.YAML())
		return err
	}
	// From here on a signal stops the daemon in order; one that comes while segments are populated, as soon as they are.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	d, err := daemon.New(cfg, logger(std.err, cfg.Log), version())
	if err != nil {
		return err
	}
	fmt.Fprintf(std.out, "# settings in force\n%s\n%s", cfg.YAML(), howToConnect(cfg, d.Addresses()))
	return serve(d, signals)
}

// serve runs the daemon until a first signal, and stops it at once on a second.
func serve(d *daemon.Daemon, signals <-chan os.Signal) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan struct{})
	defer close(done)
	go func() {
		for _, act := range []func(){stop, d.StopNow} {
			select {
			case <-signals:
				act()
			case <-done:
				return
			}
		}
	}()
	return d.Run(ctx)
}

func logger(w io.Writer, l daemon.Log) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(l.Level)) // validated
	opts := &slog.HandlerOptions{Level: level}
	if l.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// howToConnect writes lines to be copied into another terminal.
func howToConnect(cfg daemon.Config, a daemon.Addresses) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-7s %s\n", name, fmt.Sprintf(format, args...))
	}
	for _, at := range [][2]string{{"tcp", a.TCP}, {"tls", a.TLS}, {"quic", a.QUIC}, {"unix", a.Unix}, {"echo", a.Echo}, {"admin", a.Admin}} {
		if at[1] != "" {
			line(at[0], "%s", at[1])
		}
	}
	for i := range cfg.Tables {
		connectTable(line, &b, &cfg.Tables[i], a)
	}
	return b.String()
}

// connectTable writes the lines of one table.
func connectTable(line func(name, format string, args ...any), b *strings.Builder, t *daemon.Table, a daemon.Addresses) {
	in, name := a.TCP, quoted(t.Name)
	if in == "" {
		in = a.Unix
	}
	switch ingest.Kind(t.Kind) {
	case ingest.KindTensors:
		fmt.Fprintf(b, "\n# table %s: tensors in chunks of %v, room for %d\n", t.Name, t.ChunkBytes, t.Batches*t.BatchSize)
		if in != "" {
			line("push", "python3 -c 'import ingestd, numpy as np; g = {\"w\": np.ones(4, \"f4\")}; p = ingestd.StepProducer(%q, table=%q, name=\"w0\", tensors=g); p.send(0, g); p.close()'",
				in, t.Name)
		}
		if a.Unix != "" {
			line("reduce", "python3 -c 'import ingestd; r = ingestd.GradReader(%q, table=%q); print(r.step(0, quorum=1, deadline=60).mean())'", a.Unix, t.Name)
		}
	case ingest.KindWeights:
		fmt.Fprintf(b, "\n# table %s: weights, %d generations in at most %v\n", t.Name, t.Generations, t.Capacity)
		if in != "" {
			line("publish", "ingestd weights publish --addr %s --table %s MODEL.safetensors", in, name)
			line("get", "ingestd weights get --addr %s --table %s -o OUT.safetensors", in, name)
		}
	default:
		fmt.Fprintf(b, "\n# table %s: %s, %d batches of %d\n", t.Name, cut(t.Spec, 200), t.Batches, t.BatchSize)
		if in != "" {
			line("push", "ingestd push --addr %s --table %s FILE.npz", in, name)
		}
		if a.Unix != "" {
			line("pull", "ingestd pull --addr %s --table %s", a.Unix, name)
			line("python", "python3 -c 'import ingestd; r = ingestd.Reader(%q, table=%q); print(r.next(deadline=60))'", a.Unix, t.Name)
		}
	}
}

// quoted quotes a word for a shell where it must be.
func quoted(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
