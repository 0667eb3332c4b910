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
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

type pushOptions struct {
	target
	spec          string
	generate      int64
	count         int64
	repeat        int64
	rate          float64
	ack           string
	compress      string
	session       string
	reconnectFor  time.Duration
	windowSamples int64
	windowBytes   daemon.Size
	timeout       time.Duration
	progress      string
	json          bool
}

func pushCommand(std streams) *cobra.Command {
	o := &pushOptions{}
	cmd := &cobra.Command{
		Use:   "push [flags] FILE... | - | --generate N",
		Short: "Push samples from files, standard input or a generator",
		Long: `Push samples to a table and wait until all are acked.

FILE is a .npy, .npz or .safetensors file whose first axis counts the samples; each array is a leaf, and leaves that the table has in another order are
put in that order. Any other file, and - for standard input, holds raw samples one after another, leaves concatenated, little-endian; it needs --spec.

--generate N sends N samples whose bytes follow from their stream and number, which ingestd pull --verify checks.`,
		Example: `  ingestd push --table digits train.npz
  ingestd push --table digits --repeat 0 --rate 5000 train.npz
  cat samples.bin | ingestd push --table digits --spec image:F32[8,8],label:I32 -
  ingestd push --table digits --generate 100000`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.run(cmd.Context(), std, args)
		},
	}
	o.flags(cmd, "tcp://"+daemon.DefaultTCP)
	o.tlsFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.spec, "spec", "", "what a sample is: text form, JSON or @file; for raw input, and for BF16 and F8 arrays of numpy")
	f.Int64Var(&o.generate, "generate", 0, "send so many samples that prove themselves, instead of files")
	f.Int64Var(&o.count, "count", 0, "stop after so many samples; 0: all")
	f.Int64Var(&o.repeat, "repeat", 1, "send the input so many times; 0: until stopped")
	f.Float64Var(&o.rate, "rate", 0, "samples per second at most; 0: as fast as the daemon takes them")
	f.StringVar(&o.ack, "ack", "", "when the daemon acks: queued, or committed to the ring; default: committed with --session, else queued")
	f.StringVar(&o.compress, "compress", "", "compress on the way, if the daemon offers it: s2, zstd, s2+shuffle, zstd+shuffle")
	f.StringVar(&o.session, "session", "", "name of the session: what the daemon holds of it is not sent again, and a broken connection is made anew")
	f.DurationVar(&o.reconnectFor, "reconnect-for", client.DefaultReconnectFor, "with --session: give up when the daemon was away for so long; 0: at once")
	f.Int64Var(&o.windowSamples, "window-samples", 0, "most samples without an ack; 0: the daemon's limit")
	f.Var(&o.windowBytes, "window-bytes", "most bytes without an ack; 0: the daemon chooses")
	f.DurationVar(&o.timeout, "timeout", 0, "give up after so long (exit code 5); 0: never")
	f.StringVar(&o.progress, "progress", "auto", "progress bar: "+progressModes)
	f.BoolVar(&o.json, "json", false, "print the result as JSON")
	return cmd
}

// pushResult is what a push did.
type pushResult struct {
	Table   string  `json:"table"`
	Stream  uint64  `json:"stream"`
	Sent    uint64  `json:"sent"`
	Acked   uint64  `json:"acked"`
	Bytes   uint64  `json:"bytes"` // acked
	Seconds float64 `json:"seconds"`
	Error   string  `json:"error,omitempty"`
}

func (o *pushOptions) check(args []string) error {
	switch {
	case o.generate < 0 || o.count < 0 || o.repeat < 0 || o.rate < 0 || o.timeout < 0 || o.wait < 0 || o.reconnectFor < 0:
		return usagef("push: --generate, --count, --repeat, --rate, --timeout, --wait and --reconnect-for must not be negative")
	case o.generate > 0 && len(args) > 0:
		return usagef("push: give files or --generate, not both")
	case o.generate == 0 && len(args) == 0:
		return usagef("push: nothing to push: name a file, - for standard input, or --generate N")
	case !wire.Compression(o.compress).Known():
		return usagef("push: --compress is %q: must be s2, zstd, s2+shuffle or zstd+shuffle", o.compress)
	case o.ack != "" && o.ack != string(wire.AckQueued) && o.ack != string(wire.AckCommitted):
		return usagef("push: --ack is %q: must be %s or %s", o.ack, wire.AckQueued, wire.AckCommitted)
	}
	return nil
}

func (o *pushOptions) run(ctx context.Context, std streams, args []string) (err error) {
	if err := o.check(args); err != nil {
		return err
	}
	want, err := optionalSpec(o.spec)
	if err != nil {
		return err
	}
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	ctx, stop := deadline(ctx, o.timeout, "--timeout")
	defer stop()
	in, err := o.open(std.in, args, want)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	cfg := client.Config{
		Spec: in.spec(), Session: o.session, Ack: wire.AckMode(o.ack), WindowSamples: o.windowSamples, WindowBytes: int64(o.windowBytes),
		Compression: wire.Compression(o.compress),
	}
	if o.session != "" && o.reconnectFor > 0 {
		cfg.ReconnectFor = o.reconnectFor
	} else {
		cfg.ReconnectFor = -1
	}
	p, err := o.dial(ctx, cfg, in.settle)
	if err != nil {
		return because(ctx, err)
	}
	return o.push(ctx, std, p, in)
}

// push sends everything, then says what became of it.
func (o *pushOptions) push(ctx context.Context, std streams, p *client.Producer, in input) error {
	total := in.samples()
	if total > 0 {
		total *= o.repeat
	}
	if o.repeat == 0 {
		total = -1
	}
	if o.count > 0 && (total < 0 || total > o.count) {
		total = o.count
	}
	bar, err := newProgress(std.err, o.progress, "push "+in.name(), max(total, -1)*p.Spec().SampleBytes())
	if err != nil {
		p.Abort()
		return err
	}
	began := time.Now()
	s := &sender{p: p, pace: newPace(o.rate), bar: bar, left: o.count}
	if o.count == 0 {
		s.left = -1
	}
	err = s.all(ctx, in, o.repeat)
	if errors.Is(err, errEnough) {
		err = nil
	}
	if closing := o.finish(ctx, p); !is[*wire.Notice](err) && !errors.Is(err, client.ErrDaemonGone) { // else both say the same
		err = errors.Join(err, closing)
	}
	err = because(ctx, err)
	bar.done(std.err)
	took := time.Since(began)
	r := pushResult{Table: o.table, Stream: p.Accepted().Stream, Sent: p.Sent(), Acked: p.Acked(), Seconds: took.Seconds()}
	r.Bytes = r.Acked * uint64(p.Spec().SampleBytes())
	return errors.Join(o.print(std.out, r, took, err), err)
}

// finishTimeout is how long an interrupted push still waits for the acks of what it has sent.
const finishTimeout = 5 * time.Second

// finish waits for the acks that are due. What a signal interrupted gets a moment for it.
func (o *pushOptions) finish(ctx context.Context, p *client.Producer) error {
	if errors.Is(context.Cause(ctx), errSignal) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
		defer cancel()
	}
	return p.Close(ctx)
}

func (o *pushOptions) print(w io.Writer, r pushResult, took time.Duration, err error) error {
	if o.json {
		if err != nil {
			r.Error = err.Error()
		}
		return json.NewEncoder(w).Encode(r)
	}
	_, printed := fmt.Fprintf(w, "pushed %d samples to table %q as stream %d: %d acked, %s in %.2f s, %.0f samples/s, %s/s\n",
		r.Sent, r.Table, r.Stream, r.Acked, bytesText(float64(r.Bytes)), r.Seconds, perSecond(float64(r.Acked), took), bytesText(perSecond(float64(r.Bytes), took)))
	return printed
}

// input is what a push sends.
type input interface {
	name() string
	spec() *spec.Spec
	samples() int64 // -1: not known
	// settle adapts to the table's spec, or says that it cannot.
	settle(table *spec.Spec) (*spec.Spec, error)
	// each calls send with all samples in order.
	each(stream uint64, send func(*tensorfile.Chunk) error) error
	close() error
}

func (o *pushOptions) open(stdin io.Reader, args []string, want *spec.Spec) (input, error) {
	if o.generate > 0 {
		return &generated{n: o.generate, layout: want}, nil
	}
	in := &files{}
	for _, path := range args {
		var src *tensorfile.Source
		var err error
		if path == "-" && want == nil {
			err = usagef("push: standard input holds raw samples: say what one is with --spec")
		} else if path == "-" {
			src = tensorfile.Raw(stdin, "standard input", want)
		} else {
			src, err = tensorfile.Open(path, want)
		}
		if err == nil && len(in.sources) > 0 {
			if no := src.Select(in.spec()); no != nil {
				err = fmt.Errorf("%s and %s do not hold the same: %w", in.sources[0].Name(), path, no)
				_ = src.Close()
			}
		}
		if err != nil {
			return nil, errors.Join(err, in.close())
		}
		in.sources = append(in.sources, src)
	}
	return in, nil
}

// files sends the samples of one file after another.
type files struct{ sources []*tensorfile.Source }

func (f *files) spec() *spec.Spec { return f.sources[0].Spec() }

func (f *files) name() string {
	if len(f.sources) == 1 {
		return f.sources[0].Name()
	}
	return fmt.Sprintf("%d files", len(f.sources))
}

func (f *files) samples() int64 {
	n := int64(0)
	for _, s := range f.sources {
		if s.Samples() < 0 {
			return -1
		}
		n += s.Samples()
	}
	return n
}

func (f *files) settle(table *spec.Spec) (*spec.Spec, error) {
	for _, s := range f.sources {
		if err := s.Select(table); err != nil {
			return nil, err
		}
	}
	return table, nil
}

func (f *files) each(_ uint64, send func(*tensorfile.Chunk) error) error {
	for _, s := range f.sources {
		for {
			c, err := s.Next(0)
			if errors.Is(err, io.EOF) {
				break
			}
			if err == nil {
				err = send(c)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *files) rewind() error {
	for _, s := range f.sources {
		if err := s.Rewind(); err != nil {
			return err
		}
	}
	return nil
}

func (f *files) close() (err error) {
	for _, s := range f.sources {
		err = errors.Join(err, s.Close())
	}
	return err
}

// generated sends samples that prove themselves.
type generated struct {
	n      int64
	layout *spec.Spec // nil: the table's, which the daemon tells
	next   uint64
	buffer []byte
}

// askSpec is offered when the spec is not known: no table has it, so the refusal tells the table's.
var askSpec = func() *spec.Spec {
	s, err := spec.ParseText("what-is-the-spec:U8")
	if err != nil {
		panic(err)
	}
	return s
}()

func (g *generated) name() string   { return "generated samples" }
func (g *generated) samples() int64 { return g.n }
func (g *generated) close() error   { return nil }

func (g *generated) spec() *spec.Spec {
	if g.layout == nil {
		return askSpec
	}
	return g.layout
}

func (g *generated) settle(table *spec.Spec) (*spec.Spec, error) {
	if g.layout != nil {
		return nil, spec.Check(g.layout, table)
	}
	g.layout = table
	return table, nil
}

func (g *generated) each(stream uint64, send func(*tensorfile.Chunk) error) error {
	size := g.layout.SampleBytes()
	if g.buffer == nil {
		g.buffer = make([]byte, max(tensorfile.ChunkBytes/size, 1)*size)
	}
	for left := g.n; left > 0; {
		n := min(left, int64(len(g.buffer))/size)
		for i := range n {
			proof.Sample(g.buffer[i*size:(i+1)*size], g.layout, stream, g.next)
			g.next++
		}
		if err := send(&tensorfile.Chunk{Count: int(n), Samples: g.buffer[:n*size]}); err != nil {
			return err
		}
		left -= n
	}
	return nil
}
