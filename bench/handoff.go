package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/spsc"
)

// handoffOptions are the flags of the two processes of the bare ring. The channel is descriptor 3, the payload descriptor 4.
type handoffOptions struct {
	produce     bool
	sampleBytes int64
	samples     int
	batch       int
}

// handoff is the bare shared ring: two processes, one queue of descriptors there and one back, the payload in place, and nobody between them. Samples are handed
// over and given back in batches, and both sides spin.
type handoff struct {
	opt     handoffOptions
	payload []byte
	there   []byte // memory of the two queues
	back    []byte

	samples atomic.Uint64
	wrong   atomic.Uint64
	failed  chan error
}

func handoffCommand() *cobra.Command {
	var opt handoffOptions
	cmd := &cobra.Command{
		Use:    "_handoff",
		Short:  "One side of the bare ring of bench shm; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runHandoff(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.BoolVar(&opt.produce, "produce", false, "the producing side")
	f.Int64Var(&opt.sampleBytes, "sample-bytes", kib, "bytes of a sample")
	f.IntVar(&opt.samples, "samples", 64, "samples that the payload holds")
	f.IntVar(&opt.batch, "batch", 16, "samples that are handed over together")
	return cmd
}

func (o handoffOptions) capacity() int {
	capacity := spsc.SharedCapacityMin
	for capacity < o.samples {
		capacity *= 2
	}
	return capacity
}

func (o handoffOptions) channelBytes() int64 { return 2 * int64(spsc.SharedBytes(o.capacity())) }

// startHandoff makes the memory and starts both sides.
func startHandoff(opt *Options, c Case) (*rig, error) {
	o := handoffOptions{sampleBytes: c.SampleBytes, samples: c.BatchSize * c.Batches, batch: c.BatchSize}
	channel, err := newSharedFile("ingestd bench channel", o.channelBytes())
	if err != nil {
		return nil, err
	}
	defer channel.Close()
	payload, err := newSharedFile("ingestd bench payload", c.dataBytes())
	if err != nil {
		return nil, err
	}
	defer payload.Close()
	args := []string{
		"bench", "_handoff", "--sample-bytes", strconv.FormatInt(o.sampleBytes, 10), "--samples", strconv.Itoa(o.samples), "--batch", strconv.Itoa(o.batch),
	}
	g := &rig{opt: opt, c: c, name: contenderBare}
	files := []*os.File{channel, payload}
	// The producing side first: it writes the payload before it is ready.
	if g.sender, _, err = (launch{name: "bare producer", binary: opt.Binary, args: append(args, "--produce"), files: files}).child(); err != nil {
		return g, err
	}
	g.receiver, _, err = launch{name: "bare consumer", binary: opt.Binary, args: args, files: files}.child()
	g.server = g.receiver
	return g, err
}

// newSharedFile makes memory for children to map. Its owner closes it.
func newSharedFile(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("%s: memfd_create: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: sizing to %d bytes: %w", name, size, err), f.Close())
	}
	return f, nil
}

// mapInherited maps a descriptor that the parent passed. Pages come with their first touch, which of the payload is one per sample.
func mapInherited(fd int, size int64) ([]byte, error) {
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of descriptor %d: %w", size, fd, err)
	}
	return mem, nil
}

func runHandoff(ctx context.Context, opt handoffOptions) error {
	h := &handoff{opt: opt, failed: make(chan error, 1)}
	channel, err := mapInherited(3, opt.channelBytes())
	if err != nil {
		return err
	}
	half := len(channel) / 2
	h.there, h.back = channel[:half], channel[half:]
	if h.payload, err = mapInherited(4, opt.sampleBytes*int64(opt.samples)); err != nil {
		return err
	}
	loop := h.consume
	if opt.produce {
		if err := h.prepare(); err != nil {
			return err
		}
		loop = h.produce
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() {
		if err := loop(ctx); err != nil {
			h.failed <- err
		}
	})
	err = serveControl(os.Stdin, os.Stdout, &ready{}, h.handle)
	cancel()
	running.Wait()
	return err
}

// prepare makes the queues, and fills every sample once.
func (h *handoff) prepare() error {
	for _, queue := range [][]byte{h.there, h.back} {
		if err := spsc.FormatShared(queue, h.opt.capacity()); err != nil {
			return err
		}
	}
	for i := range h.opt.samples {
		putStamp(h.sample(i), closedStamp)
	}
	return nil
}

func (h *handoff) sample(i int) []byte { return h.payload[int64(i)*h.opt.sampleBytes:] }

// produce hands batches over in turn; a batch comes back before it is handed over again.
func (h *handoff) produce(ctx context.Context) error {
	there, err := spsc.NewProducer(h.there, h.opt.capacity())
	if err != nil {
		return err
	}
	back, err := spsc.NewConsumer(h.back, h.opt.capacity())
	if err != nil {
		return err
	}
	batch := make([]spsc.Desc, h.opt.batch)
	returned := make([]spsc.Desc, h.opt.samples)
	room := h.opt.samples
	at := 0
	for sent := uint64(0); ; sent += uint64(len(batch)) {
		for round := 0; room < len(batch); round++ {
			n, err := back.TryPop(returned)
			if err != nil {
				return err
			}
			room += n
			if n == 0 && !pauseRing(ctx, round) {
				return nil
			}
		}
		for i := range batch {
			batch[i] = spsc.Desc{A: sent + uint64(i), B: uint64(at)}
			if at++; at == h.opt.samples {
				at = 0
			}
		}
		if n, err := there.TryPush(batch); err != nil || n != len(batch) {
			return errors.Join(err, fmt.Errorf("%d of %d descriptors found room", n, len(batch)))
		}
		room -= len(batch)
		h.samples.Store(sent + uint64(len(batch)))
	}
}

// consume checks the order, looks at the first sample of each batch and gives the batch back.
func (h *handoff) consume(ctx context.Context) error {
	there, err := spsc.NewConsumer(h.there, h.opt.capacity())
	if err != nil {
		return err
	}
	back, err := spsc.NewProducer(h.back, h.opt.capacity())
	if err != nil {
		return err
	}
	batch := make([]spsc.Desc, h.opt.batch)
	for got := uint64(0); ; {
		n := 0
		for round := 0; n == 0; round++ {
			if n, err = there.TryPop(batch); err != nil {
				return err
			}
			if n == 0 && !pauseRing(ctx, round) {
				return nil
			}
		}
		for i, d := range batch[:n] {
			if d.A != got+uint64(i) || d.B >= uint64(h.opt.samples) || i == 0 && readStamp(h.sample(int(d.B))) != closedStamp {
				h.wrong.Add(1)
			}
		}
		if m, err := back.TryPush(batch[:n]); err != nil || m != n {
			return errors.Join(err, fmt.Errorf("%d of %d descriptors found room on the way back", m, n))
		}
		got += uint64(n)
		h.samples.Store(got)
	}
}

// pauseRing waits a little, for another goroutine first and then for another process; false when it is over.
func pauseRing(ctx context.Context, round int) bool {
	if round%64 < 63 {
		runtime.Gosched()
		return true
	}
	_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	return ctx.Err() == nil
}

func (h *handoff) handle(ask request) (reply, error) {
	select {
	case err := <-h.failed:
		return reply{}, err
	default:
	}
	if ask.Do != doSnapshot {
		return reply{}, unknownRequest(ask)
	}
	snap, err := takeSnapshot(ask.Pids)
	if err != nil {
		return reply{}, err
	}
	snap.Samples, snap.Wrong = h.samples.Load(), h.wrong.Load()
	return reply{Snapshot: snap}, nil
}
