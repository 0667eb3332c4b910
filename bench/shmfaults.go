package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/client"
)

const (
	sharedMemoryFolder = "/dev/shm" // segments that are kept lie on tmpfs
	restartProducers   = 4          // of the restart case
	deathHeld          = 4          // batches that the trainer holds when it is killed
	faultPoll          = time.Millisecond
	stallRoom          = 50 * time.Millisecond // watched after everybody has acks again
)

// keptDaemon starts a daemon whose segment lies in a folder of its own on tmpfs and outlives it. The caller removes the folder.
func keptDaemon(ctx context.Context, opt *Options, c Case) (*daemon, string, error) {
	folder, err := os.MkdirTemp(sharedMemoryFolder, "ingestd-bench-")
	if err != nil {
		return nil, "", fmt.Errorf("make a folder for the segment: %w", err)
	}
	d, err := startDaemon(ctx, opt, c, "--segment-dir", folder)
	if err != nil {
		return nil, "", errors.Join(err, os.RemoveAll(folder))
	}
	return d, folder, nil
}

// until asks again and again until done says so.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	for begin := time.Now(); ; {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Since(begin) > progressTimeout {
			return fmt.Errorf("waited %v for %s", time.Since(begin), what)
		}
		if err := sleep(ctx, faultPoll); err != nil {
			return err
		}
	}
}

// restarts kills the daemon under load and starts it again; producers with sessions go on by themselves. One daemon and its peers serve all runs.
func (r *shmRunner) restarts(ctx context.Context, out *ShmResult) (err error) {
	opt := r.options()
	d, folder, err := keptDaemon(ctx, opt, out.Case)
	if err != nil {
		return err
	}
	layout, err := out.spec()
	if err != nil {
		return err
	}
	g := &rig{opt: opt, c: out.Case, name: contenderFull, daemon: d, server: d.process, folder: folder}
	defer func() {
		g.server = d.process
		err = errors.Join(err, g.stop(err != nil))
	}()
	if g.receiver, _, err = startChild("trainer", opt.Binary, "_trainer", "--address", d.Unix, "--table", tableName, "--reattach"); err != nil {
		return err
	}
	g.sender, _, err = startChild("sessions", opt.Binary, "_sessions", "--address", d.TCP, "--table", tableName, "--spec", layout.Text(),
		"--producers", strconv.Itoa(restartProducers))
	if err != nil {
		return err
	}
	for run := range r.opt.Runs {
		if err := r.restart(ctx, g, out, run); err != nil {
			return fmt.Errorf("run %d: %w", run+1, err)
		}
	}
	trained, err := g.receiver.snapshot()
	if err == nil && trained.Wrong != 0 {
		err = fmt.Errorf("%d samples arrived with wrong first bytes", trained.Wrong)
	}
	return err
}

func (r *shmRunner) restart(ctx context.Context, g *rig, out *ShmResult, run int) error {
	if err := g.awaitAcks(ctx); err != nil {
		return err
	}
	if err := sleep(ctx, r.opt.Warmup); err != nil {
		return err
	}
	if _, err := g.sender.ask(request{Do: doRecord}); err != nil {
		return err
	}
	if err := sleep(ctx, r.opt.Warmup); err != nil { // the record also says what stalls without a restart
		return err
	}
	killed, _, ready, err := g.daemon.restart(ctx, func() error { return nil })
	if err != nil {
		return err
	}
	if err := g.awaitAcks(ctx); err != nil {
		return err
	}
	if err := sleep(ctx, stallRoom); err != nil {
		return err
	}
	after, err := g.sender.snapshot()
	if err != nil {
		return err
	}
	if after.Lost != 0 {
		return fmt.Errorf("%d acked samples were lost", after.Lost)
	}
	out.addMS(figureRestart, ready-killed)
	out.addMS(figureStall, after.Stall)
	out.addMS(figureCost, after.Stall-(ready-killed))
	r.progress(out.ShmCase, run, figureRestart, fmt.Sprintf("%.1f ms, longest stall %.1f ms", float64(ready-killed)/1e6, float64(after.Stall)/1e6))
	return nil
}

// awaitAcks waits until every producer has had acks.
func (g *rig) awaitAcks(ctx context.Context) error {
	before, err := g.sender.snapshot()
	if err != nil {
		return err
	}
	return until(ctx, "acks for every producer", func() (bool, error) {
		now, err := g.sender.snapshot()
		if err != nil {
			return false, err
		}
		for i, n := range now.Streams {
			if n == before.Streams[i] {
				return false, nil
			}
		}
		return true, nil
	})
}

// recoveries kills a daemon whose ring is full, maps the file alone, and lets a daemon take it up again.
func (r *shmRunner) recoveries(ctx context.Context, out *ShmResult) (err error) {
	opt := r.options()
	d, folder, err := keptDaemon(ctx, opt, out.Case)
	if err != nil {
		return err
	}
	g := &rig{opt: opt, c: out.Case, name: contenderFull, daemon: d, folder: folder}
	defer func() {
		if g.sender != nil { // its daemon was killed, which it may have taken as an error
			g.sender.kill()
			g.sender = nil
		}
		d.kill() // a full ring without a trainer would wait for one
		g.daemon = nil
		err = errors.Join(err, d.cleanUp(), g.stop(err != nil))
	}()
	if g.sender, _, err = startChild("filler", opt.Binary, "_filler", "--address", d.Unix, "--table", tableName); err != nil {
		return err
	}
	if err := g.fillRing(ctx); err != nil {
		return err
	}
	for run := range r.opt.Runs {
		var mapping int64
		_, started, ready, err := d.restart(ctx, func() error {
			var err error
			mapping, err = mapAlone(folder)
			return err
		})
		if err != nil {
			return fmt.Errorf("run %d: %w", run+1, err)
		}
		if err := checkRecovered(ctx, d, out.Case); err != nil {
			return fmt.Errorf("run %d: %w", run+1, err)
		}
		out.addMS(figureReady, ready-started)
		out.addMS(figureMap, mapping)
		r.progress(out.ShmCase, run, figureReady, fmt.Sprintf("%.1f ms, mapping alone %.1f ms", float64(ready-started)/1e6, float64(mapping)/1e6))
	}
	return nil
}

// fillRing waits until the producer finds no more room.
func (g *rig) fillRing(ctx context.Context) error {
	const quiet = 100 * time.Millisecond
	last, since := uint64(0), time.Now()
	return until(ctx, "the ring to be full", func() (bool, error) {
		now, err := g.sender.snapshot()
		if err != nil {
			return false, err
		}
		if now.Samples != last {
			last, since = now.Samples, time.Now()
		}
		return last > uint64(g.c.BatchSize*g.c.Batches/2) && time.Since(since) > quiet, nil
	})
}

// mapAlone maps the segment's file and sees that every page is there, as whoever takes it up must.
func mapAlone(folder string) (int64, error) {
	path, size, err := segmentFile(folder)
	if err != nil {
		return 0, err
	}
	begin := monotonic()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("map %s: %w", path, err)
	}
	err = unix.Madvise(mem, unix.MADV_POPULATE_WRITE)
	took := monotonic() - begin
	return took, errors.Join(err, unix.Munmap(mem))
}

// segmentFile finds the largest file, which is the segment.
func segmentFile(folder string) (path string, size int64, err error) {
	err = filepath.WalkDir(folder, func(name string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if err == nil && info.Size() > size {
			path, size = name, info.Size()
		}
		return err
	})
	if err == nil && path == "" {
		err = fmt.Errorf("the daemon left no segment in %s", folder)
	}
	return path, size, err
}

// checkRecovered wants the samples of the ring back, as a trainer sees them. It holds one batch and gives it back unread by leaving.
func checkRecovered(ctx context.Context, d *daemon, c Case) error {
	ctx, cancel := context.WithTimeout(ctx, progressTimeout)
	defer cancel()
	t, err := client.Attach(ctx, d.Unix, client.TrainerConfig{Table: tableName, Client: "ingestd-bench"})
	if err != nil {
		return err
	}
	b, err := t.Next(ctx)
	if err == nil {
		column := b.Column(0)
		for at := 0; at < len(column) && err == nil; at += int(c.SampleBytes) {
			if readStamp(column[at:]) != closedStamp {
				err = fmt.Errorf("batch %d came back with wrong first bytes", b.Number())
			}
		}
	}
	return errors.Join(err, t.Close())
}

// deaths kills a trainer that holds leases while another waits for them.
func (r *shmRunner) deaths(ctx context.Context, out *ShmResult) error {
	for run := range r.opt.Runs {
		if err := r.death(ctx, out, run); err != nil {
			return fmt.Errorf("run %d: %w", run+1, err)
		}
	}
	return nil
}

func (r *shmRunner) death(ctx context.Context, out *ShmResult, run int) (err error) {
	opt := r.options()
	d, err := startDaemon(ctx, opt, out.Case)
	if err != nil {
		return err
	}
	g := &rig{opt: opt, c: out.Case, name: contenderFull, daemon: d, server: d.process}
	var watcher, holder *process
	defer func() {
		for _, p := range []*process{watcher, holder} {
			if p != nil {
				p.kill()
			}
		}
		err = errors.Join(err, g.stop(err != nil))
	}()
	socket := filepath.Join(d.folder, "watcher.sock")
	if watcher, _, err = startChild("watcher", opt.Binary, "_watcher", "--socket", socket); err != nil {
		return err
	}
	prefetch := strconv.Itoa(deathHeld)
	// It connects to the watcher before it attaches, so that the kernel closes that socket first.
	holder, _, err = startChild("holder", opt.Binary, "_trainer", "--address", d.Unix, "--table", tableName, "--prefetch", prefetch, "--hold", "--notify", socket)
	if err != nil {
		return err
	}
	if g.sender, _, err = startChild("filler", opt.Binary, "_filler", "--address", d.Unix, "--table", tableName, "--upto"); err != nil {
		return err
	}
	if _, err := g.sender.ask(request{Do: doFill, Upto: uint64(deathHeld * out.BatchSize)}); err != nil {
		return err
	}
	holds := func(p *process) func() (bool, error) {
		return func() (bool, error) {
			now, err := p.snapshot()
			return err == nil && now.Batches == deathHeld, err
		}
	}
	if err := until(ctx, "the trainer to hold its batches", holds(holder)); err != nil {
		return err
	}
	if g.receiver, _, err = startChild("heir", opt.Binary, "_trainer", "--address", d.Unix, "--table", tableName, "--prefetch", prefetch, "--times"); err != nil {
		return err
	}
	if err := sleep(ctx, r.opt.Warmup); err != nil { // until it sleeps
		return err
	}
	killed := monotonic()
	holder.kill()
	if err := until(ctx, "the leases of the dead trainer", holds(g.receiver)); err != nil {
		return err
	}
	heir, err := g.receiver.snapshot()
	if err != nil {
		return err
	}
	seen, err := watcher.snapshot()
	if err != nil {
		return err
	}
	if seen.Samples != 1 {
		return errors.New("the watcher saw no end of its connection")
	}
	out.addMS(figureEOF, seen.Last-killed)
	out.addMS(figureBack, heir.Last-killed)
	out.addMS(figureAfter, heir.Last-seen.Last)
	r.progress(out.ShmCase, run, figureBack, fmt.Sprintf("%.2f ms, end of file after %.2f ms", float64(heir.Last-killed)/1e6, float64(seen.Last-killed)/1e6))
	return nil
}
