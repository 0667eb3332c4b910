package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// sessionsOptions are the flags of the process that pushes over connections that come back.
type sessionsOptions struct {
	address   string
	table     string
	spec      string
	producers int
}

// sessions pushes at full speed with the client library, under session names, and watches how long a producer goes without an ack.
type sessions struct {
	producers []*client.Producer
	spec      *spec.Spec
	reset     atomic.Bool  // look anew
	stall     atomic.Int64 // ns
	failed    chan error
}

func sessionsCommand() *cobra.Command {
	var opt sessionsOptions
	cmd := &cobra.Command{
		Use:    "_sessions",
		Short:  "The producers of bench shm that survive a restart; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runSessions(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.address, "address", "", "where to push: tcp://host:port")
	f.StringVar(&opt.table, "table", tableName, "table to push to")
	f.StringVar(&opt.spec, "spec", "", "layout of a sample")
	f.IntVar(&opt.producers, "producers", 1, "producers, each with a session of its own")
	return cmd
}

// stallPoll is how often the acks are looked at; a stall is exact to it.
const stallPoll = 200 * time.Microsecond

func runSessions(ctx context.Context, opt sessionsOptions) error {
	layout, err := spec.ParseText(opt.spec)
	if err != nil {
		return err
	}
	s := &sessions{spec: layout, failed: make(chan error, opt.producers)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range opt.producers {
		p, err := client.Dial(ctx, opt.address, client.Config{
			Table: opt.table, Spec: layout, Client: "ingestd-bench", Session: fmt.Sprintf("bench-%d", i), Ack: wire.AckCommitted,
		})
		if err != nil {
			return err
		}
		defer p.Abort()
		s.producers = append(s.producers, p)
	}
	var running sync.WaitGroup
	for _, p := range s.producers {
		running.Go(func() {
			if err := s.push(ctx, p); ctx.Err() == nil {
				s.failed <- err
			}
		})
	}
	running.Go(func() { s.watch(ctx) })
	err = serveControl(os.Stdin, os.Stdout, &ready{}, s.handle)
	cancel()
	for _, p := range s.producers {
		p.Abort()
	}
	running.Wait()
	return err
}

// push pushes the same samples, as many at a time as make a write, until it fails.
func (s *sessions) push(ctx context.Context, p *client.Producer) error {
	sample := s.spec.SampleBytes()
	one := make([]byte, sample)
	putStamp(one, closedStamp)
	n := int(max(1, 256*kib/sample))
	data := bytes.Repeat(one, n)
	for {
		if _, err := p.PushMany(ctx, n, data); err != nil {
			return err
		}
	}
}

// watch notes the longest time that any producer went without an ack.
func (s *sessions) watch(ctx context.Context) {
	acked := make([]uint64, len(s.producers))
	since := make([]int64, len(s.producers))
	for p := newPacer(int(time.Second / stallPoll)); p.wait(ctx); {
		now := monotonic()
		anew := s.reset.Swap(false)
		longest := s.stall.Load()
		if anew {
			longest = 0
		}
		for i, p := range s.producers {
			n := p.Acked()
			if n != acked[i] || anew || since[i] == 0 {
				acked[i], since[i] = n, now
			}
			longest = max(longest, now-since[i])
		}
		s.stall.Store(longest)
	}
}

func (s *sessions) handle(ask request) (reply, error) {
	select {
	case err := <-s.failed:
		return reply{}, err
	default:
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		snap.Stall = s.stall.Load()
		for _, p := range s.producers {
			st := p.Stats()
			snap.Samples += st.Acked
			snap.Lost += st.Lost
			snap.Streams = append(snap.Streams, st.Acked)
		}
		return reply{Snapshot: snap}, nil
	case doRecord:
		s.reset.Store(true)
		return reply{}, nil
	default:
		return reply{}, unknownRequest(ask)
	}
}
