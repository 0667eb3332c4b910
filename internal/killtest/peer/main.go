//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// brokenPromise is what the daemon must never do.
type brokenPromise struct{ what string }

func (b *brokenPromise) Error() string { return "broken promise: " + b.what }

func broken(format string, args ...any) error { return &brokenPromise{fmt.Sprintf(format, args...)} }

// options are the flags of all kinds of peers.
type options struct {
	addr, table, specText, group, ledger, name, role string
	session                                          uint64
	seed                                             uint64
	most                                             int
	pause                                            time.Duration

	spec *spec.Spec
	rnd  *rand.Rand
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "peer: say produce, fill, train, own, scribble, publish, subscribe or steps")
		os.Exit(2)
	}
	o := &options{}
	f := flag.NewFlagSet("peer "+os.Args[1], flag.ExitOnError)
	f.StringVar(&o.addr, "addr", "", "address of the daemon; own: file of the segment")
	f.StringVar(&o.table, "table", "", "table")
	f.StringVar(&o.specText, "spec", "", "the table's spec")
	f.StringVar(&o.group, "group", "", "train: group")
	f.StringVar(&o.ledger, "ledger", "", "produce: file for what was sent and acked; own: the first part of the names of such files; steps: file with the highest step that may be sent")
	f.StringVar(&o.name, "name", "", "produce: name of the session; empty: none, which cannot come back; steps: name of the producer")
	f.StringVar(&o.role, "role", "train", "scribble: train or fill; subscribe: hold keeps the first generation; publish: stream sends instead of writing in place; steps: push or place")
	f.Uint64Var(&o.session, "session", 0, "produce: number of the session, which stands in its samples; steps: the first step")
	f.Uint64Var(&o.seed, "seed", 0, "of its random choices")
	f.IntVar(&o.most, "most", 8, "produce: samples at once; train: batches held at once")
	f.DurationVar(&o.pause, "pause", 0, "longest pause after a step")
	_ = f.Parse(os.Args[2:])
	o.rnd = rand.New(rand.NewPCG(o.seed, uint64(os.Getpid())))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err := o.run(ctx, os.Args[1])
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "peer %s %s: %v\n", os.Args[1], o.table, err)
	if promise := (*brokenPromise)(nil); errors.As(err, &promise) {
		os.Exit(3)
	}
	os.Exit(1)
}

func (o *options) run(ctx context.Context, kind string) (err error) {
	switch kind {
	case "publish":
		return o.publish(ctx)
	case "subscribe":
		return o.subscribe(ctx)
	case "steps":
		return o.steps(ctx)
	}
	if o.spec, err = spec.ParseText(o.specText); err != nil {
		return err
	}
	switch kind {
	case "produce":
		return o.produce(ctx)
	case "fill":
		return o.fill(ctx)
	case "train":
		return o.train(ctx)
	case "own":
		return o.own(ctx)
	case "scribble":
		return o.scribble(ctx, wire.Role(o.role))
	}
	return fmt.Errorf("there is no kind of peer %q", kind)
}

// rest waits for a while, at most the pause of the options.
func (o *options) rest(ctx context.Context) {
	if o.pause > 0 {
		wait(ctx, time.Duration(o.rnd.Int64N(int64(o.pause))))
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// again is how long a peer waits before it tries anew to reach a daemon that is not there.
const again = 3 * time.Millisecond
