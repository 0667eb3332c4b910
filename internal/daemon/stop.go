package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/steps"
)

const (
	// aloneTimeout bounds the draining where no trainer is attached: producers need only a moment to reach the end of a sample, and where
	// the ring is full nobody will ever make room.
	aloneTimeout = 2 * time.Second
	// farewellTimeout is how long trainers that have had everything may take to notice and leave by themselves.
	farewellTimeout = 2 * time.Second
)

// errDrainTimeout is why draining ended early.
var errDrainTimeout = errors.New("the drain timeout is over")

// stop ends everything but the memory, in the order that the package's doc lists.
func (d *Daemon) stop() error {
	d.state.Store(stateDraining)
	timeout := time.Duration(d.plan.DrainTimeout)
	if d.attachedTrainers() == 0 {
		timeout = min(timeout, aloneTimeout)
	}
	d.log.Info("stopping: draining", "timeout", timeout)
	began := time.Now()
	drain, cancel := context.WithTimeoutCause(d.now, timeout, errDrainTimeout)
	defer cancel()

	gone := make(chan error, 1)
	go func() { gone <- d.shutdown(drain) }()
	filled := make(chan struct{})
	go func() {
		d.trainers.StopFilling(drain)
		close(filled)
	}()
	d.endTables(drain)
	d.awaitReaders(drain)
	d.countChunks()
	d.farewell(drain)
	err := <-gone
	<-filled
	// Every connection is gone now and has closed its stream, so this ends, and the drainers have nothing left when they stop.
	d.endTables(context.Background())
	unread := d.unread()
	switch {
	case d.now.Err() != nil:
		err = ErrStoppedAtOnce
	case err != nil:
		d.log.Warn("connections were cut off", "err", err)
		err = nil
	}
	d.log.Info("stopped", "dur", time.Since(began), "unread", unread.samples(), "kept", d.kept())
	if unread.samples() == 0 {
		return err
	}
	return errors.Join(err, unread)
}

func (d *Daemon) attachedTrainers() int {
	n := 0
	for _, t := range d.tables {
		n += int(t.attached.Load())
	}
	return n
}

// endTables waits for the streams' ends, publishes what is there and ends the rings, table by table at once.
func (d *Daemon) endTables(ctx context.Context) {
	var group sync.WaitGroup
	for _, t := range d.tables {
		group.Go(func() {
			if err := t.Close(ctx); err != nil {
				d.log.Warn("not everything was drained", "table", t.Name(), "err", err)
			}
		})
	}
	group.Wait()
}

// awaitReaders waits until every batch was read, or nobody is there to read, or ctx ends.
func (d *Daemon) awaitReaders(ctx context.Context) {
	var group sync.WaitGroup
	for _, t := range d.tables {
		group.Go(func() { t.awaitReaders(ctx) })
	}
	group.Wait()
}

func (t *table) awaitReaders(ctx context.Context) {
	if t.Steps() != nil {
		t.awaitGradReaders(ctx)
		return
	}
	over := func() bool { return t.attached.Load() == 0 || t.unread() == 0 }
	seat, space := park.NewWaiter(), &t.Ring().Space
	for !over() {
		space.Add(seat)
		if over() || seat.Wait(ctx) != nil {
			space.Remove(seat)
			return
		}
	}
}

// handedOut is how often it is looked whether readers of tensors have been given everything: no event tells that.
const handedOut = 10 * time.Millisecond

// awaitGradReaders waits until readers of tensors have been given every chunk. They keep those of steps that are not complete, and none will be any more.
func (t *table) awaitGradReaders(ctx context.Context) {
	again := time.NewTicker(handedOut)
	defer again.Stop()
	for t.attached.Load() > 0 {
		unread := 0
		for _, g := range t.Sampler().Stats().Groups {
			if g.Members > 0 {
				unread = max(unread, g.Unread)
			}
		}
		if unread == 0 {
			return
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// countChunks counts the chunks with data that no reader was given, of tables of tensors; what a reader has is its own affair.
func (d *Daemon) countChunks() {
	held := map[string]map[uint64]bool{}
	for _, tr := range d.trainers.Stats().Trainers {
		for _, l := range tr.Held {
			if held[tr.Table] == nil {
				held[tr.Table] = map[uint64]bool{}
			}
			held[tr.Table][l.Number] = true
		}
	}
	for _, t := range d.tables {
		if t.Steps() == nil {
			continue
		}
		t.left = 0
		r := t.Ring()
		for i := range r.Batches() {
			if b := r.BatchState(i); (b.State == ring.Published || b.State == ring.Leased) && !held[t.Name()][b.Number] {
				t.left += steps.CountData(r.PlaceColumn(ring.Place{Index: uint32(i)}, 0), b.Count)
			}
		}
	}
}

// lost counts the samples that are gone with the table.
func (t *table) lost() uint64 {
	if t.Steps() != nil {
		return t.left
	}
	return t.unread()
}

// unread counts the samples that are published or in the hands of a trainer.
func (t *table) unread() uint64 {
	n, r := uint64(0), t.Ring()
	for i := range r.Batches() {
		if b := r.BatchState(i); b.State == ring.Published || b.State == ring.Leased {
			n += uint64(b.Count)
		}
	}
	return n
}

// farewell lets the trainers find the end of the stream by themselves, then cuts off those that stay.
func (d *Daemon) farewell(drain context.Context) {
	ctx, cancel := context.WithTimeout(drain, farewellTimeout)
	defer cancel()
	for _, t := range d.tables {
		seat, space := park.NewWaiter(), &t.Ring().Space
		for t.attached.Load() > 0 {
			space.Add(seat)
			if t.attached.Load() == 0 || seat.Wait(ctx) != nil {
				space.Remove(seat)
				break
			}
		}
	}
	if n := d.attachedTrainers(); n > 0 {
		d.log.Info("trainers are cut off", "trainers", n)
	}
	d.cut()
	d.mu.Lock()
	d.leaving = true
	d.mu.Unlock()
	d.attachments.Wait()
}

// kept counts the unread samples that stay in segments for the next daemon.
func (d *Daemon) kept() (n uint64) {
	for _, t := range d.tables {
		if t.plan.path != "" {
			n += t.unread()
		}
	}
	return n
}

// leaveClean writes the segments that are kept through to their disks, and says in each that it was left in order. Nobody uses them any more.
func (d *Daemon) leaveClean() error {
	var errs []error
	for _, t := range d.tables {
		if t.plan.path == "" {
			continue
		}
		err := t.memory.Sync() // before the word that says so
		if err == nil {
			t.Ring().SetClean()
			err = t.memory.Sync()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("table %q: its segment may not outlive the machine: %w", t.Name(), err))
		}
	}
	return errors.Join(errs...)
}

// UnreadError says that the daemon stopped with samples that no trainer has read, and whose table is not kept.
type UnreadError struct {
	Samples map[string]uint64 // by table
}

func (d *Daemon) unread() *UnreadError {
	e := &UnreadError{Samples: map[string]uint64{}}
	for _, t := range d.tables {
		if n := t.lost(); n > 0 && t.plan.path == "" {
			e.Samples[t.Name()] = n
		}
	}
	return e
}

func (e *UnreadError) samples() (n uint64) {
	for _, k := range e.Samples {
		n += k
	}
	return n
}

func (e *UnreadError) Error() string {
	var parts []string
	for name, n := range e.Samples {
		parts = append(parts, fmt.Sprintf("%d of table %q", n, name))
	}
	return "samples that no trainer has read are lost: " + strings.Join(parts, ", ") +
		"; stop producers first and let trainers read to the end, or raise --drain-timeout, or keep the table with --segment-dir"
}
