package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
)

// weightsReader waits for generations and notes when it saw each, and how long its first look took.
type weightsReader struct {
	subscription *client.Subscription
	tensor       string // the one it looks at

	mu    sync.Mutex
	grown sync.Cond
	seen  map[int64]sight // by generation
	err   error
}

// sight is what was noted of one generation.
type sight struct {
	at    int64 // CLOCK_MONOTONIC, ns: when its first byte had been looked at
	view  time.Duration
	shown time.Duration
	first byte
}

func subscriberCommand() *cobra.Command {
	var opt weightsOptions
	cmd := &cobra.Command{
		Use:    "_subscriber",
		Short:  "A reader of weights of bench tensors; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runSubscriber(cmd.Context(), opt) },
	}
	opt.flags(cmd)
	return cmd
}

func runSubscriber(ctx context.Context, opt weightsOptions) error {
	m, err := benchManifest(opt.bytes, opt.tensors)
	if err != nil {
		return err
	}
	r := &weightsReader{tensor: m.Tensor(m.Len() - 1).Name, seen: map[int64]sight{}}
	r.grown.L = &r.mu
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.subscription, err = client.Subscribe(ctx, opt.address, client.SubscribeConfig{Table: opt.table, Wait: true, Client: "ingestd-bench"}); err != nil {
		return err
	}
	var running sync.WaitGroup
	running.Go(func() {
		err := r.follow(ctx)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.err = err
		r.grown.Broadcast()
	})
	err = serveControl(os.Stdin, os.Stdout, &ready{}, r.handle)
	cancel()
	running.Wait()
	return errors.Join(err, r.subscription.Close())
}

// follow looks at every generation that it gets, until there is an error.
func (r *weightsReader) follow(ctx context.Context) error {
	newest := uint64(0)
	for {
		w, err := r.subscription.Wait(ctx, newest)
		if err != nil {
			return err
		}
		awake := time.Now()
		w.Release()
		// Wait has pinned the generation and let it go: what a reader does from being awake to its first view is done here again, in one piece.
		if w, err = r.subscription.Latest(); err != nil {
			return err
		}
		data, err := w.Tensor(r.tensor)
		if err != nil {
			return err
		}
		s := sight{first: data[0], view: time.Since(awake)}
		s.at, s.shown = monotonic(), time.Since(w.Published())
		newest = w.Generation()
		w.Release()
		r.note(int64(newest), s)
	}
}

func (r *weightsReader) note(generation int64, s sight) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[generation] = s
	delete(r.seen, generation-64)
	r.grown.Broadcast()
}

// await waits until a generation was seen.
func (r *weightsReader) await(generation int64) (sight, error) {
	late := time.AfterFunc(stepPatience, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.err = fmt.Errorf("generation %d did not come within %v", generation, stepPatience)
		r.grown.Broadcast()
	})
	defer late.Stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if s, ok := r.seen[generation]; ok || r.err != nil {
			return s, r.err
		}
		r.grown.Wait()
	}
}

func (r *weightsReader) handle(ask request) (reply, error) {
	if ask.Do != doSeen {
		return reply{}, unknownRequest(ask)
	}
	s, err := r.await(int64(ask.Upto))
	if err != nil {
		return reply{}, err
	}
	return reply{Values: map[string]int64{
		valueSeen: s.at, valueView: int64(s.view), valueShown: int64(s.shown), valueFirst: int64(s.first),
	}}, nil
}
