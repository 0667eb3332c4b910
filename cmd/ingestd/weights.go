package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

func weightsCommand(std streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "weights",
		Short: "Publish a model's weights, read them back, and see who holds which generation",
		Long: `Weights are whole generations of named tensors in a table of kind weights. publish makes a safetensors file the newest generation;
readers see all of it, or nothing. get, verify and watch read the newest one: over a unix socket where it lies in the
daemon's memory, over tcp:// as a copy that was verified.`,
		Example: `  ingestd serve --table model --kind weights
  ingestd weights publish --table model model.safetensors
  ingestd weights get --table model -o copy.safetensors
  ingestd weights watch --table model --addr tcp://trainer:7420`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usagef("weights: no command given")
		},
	}
	cmd.AddCommand(weightsPublishCommand(std), weightsGetCommand(std), weightsVerifyCommand(std), weightsWatchCommand(std), weightsListCommand(std))
	return cmd
}

// reading is what the commands that read generations share.
type reading struct {
	target
	newerThan uint64
	deadline  time.Duration
	json      bool
}

func (o *reading) flags(cmd *cobra.Command) {
	o.target.flags(cmd, "unix://"+daemon.DefaultSocket())
	o.tlsFlags(cmd)
	f := cmd.Flags()
	f.Uint64Var(&o.newerThan, "newer-than", 0, "wait for a generation above this number")
	f.DurationVar(&o.deadline, "deadline", 0, "longest wait for a generation (exit code 5); 0: with --newer-than for ever, else there must be one")
	f.BoolVar(&o.json, "json", false, "print the result as JSON")
}

// subscribe opens a subscription. With wait it waits until something was published.
func (o *reading) subscribe(ctx context.Context, command string, wait bool) (*client.Subscription, error) {
	token, err := o.token()
	if err != nil {
		return nil, err
	}
	var s *client.Subscription
	err = o.retry(ctx, func() (err error) {
		s, err = client.Subscribe(ctx, o.addr, client.SubscribeConfig{Table: o.table, Wait: wait, Client: "ingestd weights " + command + "/" + version(), Token: token, TLS: o.tls})
		return err
	})
	return s, err
}

// use calls f with the newest generation that the flags allow, shown with a bar while it comes over a connection.
func (o *reading) use(ctx context.Context, std streams, command, mode string, f func(w *client.Weights) error) (err error) {
	if o.deadline < 0 || o.wait < 0 {
		return usagef("weights %s: --deadline and --wait must not be negative", command)
	}
	limited, stop := deadline(ctx, o.deadline, "--deadline")
	defer stop()
	s, err := o.subscribe(limited, command, o.deadline > 0 || o.newerThan > 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	total := s.Manifest().DataBytes()
	bar, err := newProgress(std.err, mode, "receive "+o.table, total)
	if err != nil {
		return err
	}
	if _, remote := s.RemoteStats(); !remote || total == 0 {
		bar = &progress{} // nothing comes
	}
	ended := bar.follow(func() int64 {
		st, _ := s.RemoteStats()
		if st.Generations > 0 {
			return total
		}
		return st.ReceivingBytes
	})
	w, err := s.Wait(limited, o.newerThan)
	ended()
	bar.done(std.err)
	if err != nil {
		return err
	}
	defer w.Release()
	return f(w)
}

// followEvery is how often a bar looks how far what it shows is.
const followEvery = 100 * time.Millisecond

// follow shows how far something is, of more than 0 bytes, until the function that it returns is called.
func (p *progress) follow(done func() int64) (ended func()) {
	if p.bar == nil {
		return func() {}
	}
	shown := int64(1)
	p.add(shown) // the bar's clock begins with the first byte
	show := func() {
		if now := done(); now > shown {
			p.add(now - shown)
			shown = now
		}
	}
	stop := make(chan struct{})
	var following sync.WaitGroup
	following.Go(func() {
		tick := time.NewTicker(followEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				show()
			case <-stop:
				return
			}
		}
	})
	return func() {
		close(stop)
		following.Wait()
		show()
	}
}

// generationResult is what the commands say of a generation.
type generationResult struct {
	Table      string     `json:"table"`
	Generation uint64     `json:"generation"`
	Digest     string     `json:"digest"`
	Published  *time.Time `json:"published,omitempty"`
	Tensors    int        `json:"tensors"`
	Bytes      int64      `json:"bytes"` // of the tensors
	Seconds    float64    `json:"seconds,omitempty"`
}

func resultOf(table string, w *client.Weights) generationResult {
	published := w.Published()
	return generationResult{
		Table: table, Generation: w.Generation(), Digest: w.Digest().String(), Published: &published, Tensors: w.Manifest().Len(), Bytes: tensorBytes(w.Manifest()),
	}
}

// tensorBytes is the size of all tensors, without what lies between them.
func tensorBytes(m *tensor.Manifest) (n int64) {
	for i := range m.Len() {
		n += m.EncodedBytes(i)
	}
	return n
}

func printJSON(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }

// rateText writes bytes and how fast they went.
func rateText(bytes int64, took time.Duration) string {
	return fmt.Sprintf("%s in %.2f s, %s/s", bytesText(float64(bytes)), took.Seconds(), bytesText(perSecond(float64(bytes), took)))
}

// weightsAdvice adds what to do about a daemon's refusal of weights.
func weightsAdvice(r *wire.Refusal) string {
	switch r.Code {
	case wire.CodeNoGeneration:
		return "publish first: ingestd weights publish FILE; or wait for one with --deadline"
	case wire.CodePublisherActive:
		return "another publisher has the table: ingestd weights ls says which; --wait keeps trying"
	case wire.CodeWrongKind:
		return "weights need a table of that kind: ingestd serve --table NAME --kind weights"
	}
	return ""
}
