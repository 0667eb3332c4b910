package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// wakeOptions are the flags of the two processes of the bare wake-up. The eventfd is descriptor 3.
type wakeOptions struct {
	ring bool
	rate int
}

// waker is one side of a bare eventfd between two processes: one writes it at a slow pace, the other sleeps in read(2). The value that is written is the time, so
// nothing else need be shared.
type waker struct {
	opt       wakeOptions
	latency   *recorder
	recording atomic.Bool
	samples   atomic.Uint64
	failed    chan error
}

func wakeCommand() *cobra.Command {
	var opt wakeOptions
	cmd := &cobra.Command{
		Use:    "_wake",
		Short:  "One side of the bare eventfd of bench shm; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runWake(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.BoolVar(&opt.ring, "ring", false, "the writing side")
	f.IntVar(&opt.rate, "rate", pace, "writes per second")
	return cmd
}

// startWake starts both sides.
func startWake(opt *Options, c Case) (*rig, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	file := os.NewFile(uintptr(fd), "eventfd")
	defer file.Close()
	g := &rig{opt: opt, c: c, name: contenderWake}
	if g.receiver, _, err = (launch{name: "bare sleeper", binary: opt.Binary, args: []string{"bench", "_wake"}, files: []*os.File{file}}).child(); err != nil {
		return g, err
	}
	g.server = g.receiver
	g.sender, _, err = launch{name: "bare waker", binary: opt.Binary, args: []string{"bench", "_wake", "--ring"}, files: []*os.File{file}}.child()
	return g, err
}

// runWake ends with its parent's word; the goroutine that sleeps in read ends with the process.
func runWake(ctx context.Context, opt wakeOptions) error {
	w := &waker{opt: opt, latency: newRecorder(), failed: make(chan error, 1)}
	loop := w.sleep
	if opt.ring {
		loop = w.ring
	}
	go func() {
		if err := loop(ctx); err != nil {
			w.failed <- err
		}
	}()
	return serveControl(os.Stdin, os.Stdout, &ready{}, w.handle)
}

func (w *waker) ring(ctx context.Context) error {
	var word [8]byte
	p := newPacer(w.opt.rate)
	for p.wait(ctx) {
		binary.NativeEndian.PutUint64(word[:], uint64(time.Now().UnixNano()))
		if _, err := unix.Write(3, word[:]); err != nil {
			return fmt.Errorf("write the eventfd: %w", err)
		}
		w.samples.Add(1)
	}
	return nil
}

func (w *waker) sleep(context.Context) error {
	runtime.LockOSThread()
	var word [8]byte
	for {
		if _, err := unix.Read(3, word[:]); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("read the eventfd: %w", err)
		}
		now := time.Now().UnixNano()
		// Two writes before one read add up to a time far ahead: of neither is it known how long it took.
		if at := binary.NativeEndian.Uint64(word[:]); at <= uint64(now) && w.recording.Load() {
			w.latency.mu.Lock()
			record(w.latency.intended, now-int64(at), 1)
			w.latency.mu.Unlock()
		}
		w.samples.Add(1)
	}
}

func (w *waker) handle(ask request) (reply, error) {
	select {
	case err := <-w.failed:
		return reply{}, err
	default:
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		snap.Samples = w.samples.Load()
		return reply{Snapshot: snap}, nil
	case doRecord:
		w.recording.Store(true)
		return reply{}, nil
	case doHistograms:
		w.recording.Store(false)
		h, err := w.latency.encode()
		return reply{Histograms: h}, err
	default:
		return reply{}, unknownRequest(ask)
	}
}

// pacer sleeps until one of evenly spaced moments, exactly: the runtime's timers would be late by up to a millisecond.
type pacer struct {
	next     unix.Timespec
	interval int64
}

func newPacer(rate int) *pacer {
	return &pacer{next: unix.NsecToTimespec(monotonic()), interval: int64(time.Second) / int64(max(rate, 1))}
}

// wait sleeps until the next moment; false when it is over. Moments that have passed are left out.
func (p *pacer) wait(ctx context.Context) bool {
	at := max(p.next.Nano(), monotonic()-p.interval) + p.interval
	p.next = unix.NsecToTimespec(at)
	for errors.Is(unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &p.next, nil), unix.EINTR) {
	}
	return ctx.Err() == nil
}
