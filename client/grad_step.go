//go:build linux

package client

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/reduce"
	"github.com/ingestd/ingestd/tensor"
)

// Missing is a producer that is known and has no complete step.
type Missing struct {
	Producer string // its name
	Reason   string // "incomplete: N of M bytes", "connection ended", "bad chunk ...", "too old", "aborted", "manifest differs"
}

// StepTimeoutError is a deadline that passed before enough producers had completed a step. It is os.ErrDeadlineExceeded and the context's error.
type StepTimeoutError struct {
	Step    uint64
	Quorum  int
	Have    []string  // names of those that have completed it
	Missing []Missing // the others that are known

	// Reconnecting says since when a reader that has its batches sent had no connection at the deadline, and why; nil: it had one.
	Reconnecting *ReconnectingError

	ctx context.Context
}

func (e *StepTimeoutError) Error() string {
	const most = 8
	var missing []string
	for i, m := range e.Missing {
		if i == most {
			missing = append(missing, fmt.Sprintf("and %d more", len(e.Missing)-most))
			break
		}
		missing = append(missing, fmt.Sprintf("%s (%s)", m.Producer, m.Reason))
	}
	who := "no other producer is known"
	if len(missing) > 0 {
		who = "missing: " + strings.Join(missing, ", ")
	}
	if e.Reconnecting != nil {
		who += fmt.Sprintf("; there is no connection since %s: %v", e.Reconnecting.Since.UTC().Format(time.RFC3339Nano), e.Reconnecting.Last)
	}
	return fmt.Sprintf("client: step %d: %d producers have it in time, %d are wanted; %s: %v", e.Step, len(e.Have), e.Quorum, who, e.ctx.Err())
}

// Timeout is true, as net.Error has it for deadlines.
func (e *StepTimeoutError) Timeout() bool { return true }

func (e *StepTimeoutError) Unwrap() []error { return contextErrors(e.ctx) }

// GradStats is what a GradReader has seen so far.
type GradStats struct {
	CompletedSteps    uint64 // steps of producers that came whole
	DroppedIncomplete uint64 // steps of producers that did not
	Unread            uint64 // steps of producers that came whole and that nobody asked for
	Late              uint64 // chunks of steps that were over
	BadChunks         uint64 // chunks with something wrong in header, place or data
	Duplicates        uint64 // chunks that came again
	Refused           uint64 // chunks that the daemon marked as too old
	Lost              uint64 // batches that the reader's group lost, where the table lets it
	SpilledBytes      uint64 // copied to the heap so far
	HeapBytes         int64  // of which are there now
}

// gradCounts are the counts of a GradReader, which other goroutines may read.
type gradCounts struct {
	completed, dropped, unread, late, bad, duplicates, refused, lost, spilledAll atomic.Uint64
	spilled                                                                      atomic.Int64
}

// Stats returns the counts so far.
func (r *GradReader) Stats() GradStats {
	c := &r.core.counts
	return GradStats{
		CompletedSteps: c.completed.Load(), DroppedIncomplete: c.dropped.Load(), Unread: c.unread.Load(), Late: c.late.Load(), BadChunks: c.bad.Load(),
		Duplicates: c.duplicates.Load(), Refused: c.refused.Load(), Lost: c.lost.Load(), SpilledBytes: c.spilledAll.Load(), HeapBytes: c.spilled.Load(),
	}
}

// GradStep is one step of those producers that have completed it. Its memory is the ring's until Release.
type GradStep struct {
	Have    []string  // names of the producers whose tensors are here, in the order of bytes, which is that of summing
	Missing []Missing // the others that are known

	reader  *GradReader
	step    uint64
	layout  *gradLayout
	members []*gradTx
	sum     *gradSum // into the slices of into; nil: nothing was asked for
	into    map[string][]float32
	over    bool
}

// Step returns the step's number.
func (s *GradStep) Step() uint64 { return s.step }

// Manifest returns the tensors that producers may have.
func (s *GradStep) Manifest() *tensor.Manifest { return s.layout.m }

// Producers returns how many producers have a tensor: those that its sum is of.
func (s *GradStep) Producers(name string) (int, error) {
	i, ok := s.layout.m.Index(name)
	if !ok {
		return 0, unknownTensor(s.layout.m, name)
	}
	return s.producers(i), nil
}

func (s *GradStep) producers(i int) (n int) {
	for _, t := range s.members {
		if t.has(i) {
			n++
		}
	}
	return n
}

// Sum stores the sum of each tensor of out over the producers that have it: ((a + b) + c) + ... in the order of their names, in float32, rounded to nearest even at each addition. Where none has it the sum is zero.
func (s *GradStep) Sum(out map[string][]float32) error { return s.reduce("sum", out, false) }

// Mean is Sum divided by the number of producers that have the tensor.
func (s *GradStep) Mean(out map[string][]float32) error { return s.reduce("mean", out, true) }

func (s *GradStep) reduce(what string, out map[string][]float32, mean bool) error {
	if s.over {
		return errReleased(what)
	}
	sum := s.sum
	if sum == nil || !sameSlices(out, s.into) {
		var err error
		if sum, err = newGradSum(s.step, len(s.members), s.layout, out, s.reader.chunkBytes); err != nil {
			return err
		}
		sum.members = s.members
	}
	sum.finish()
	clear(sum.done) // the slices are the caller's again: if asked once more, it is made anew
	if err := s.intact(); err != nil {
		return fmt.Errorf("client: %s of step %d: %w", what, s.step, err)
	}
	for name, values := range out {
		i, _ := s.layout.m.Index(name)
		if n := s.producers(i); mean && n > 1 {
			reduce.Divide(values, float32(n))
		}
	}
	return nil
}

// sameSlices says whether both name the same memory.
func sameSlices(a, b map[string][]float32) bool {
	if len(a) != len(b) {
		return false
	}
	for name, x := range a {
		y, ok := b[name]
		if !ok || len(x) != len(y) || len(x) > 0 && &x[0] != &y[0] {
			return false
		}
	}
	return true
}

// intact says whether all that lies in the ring is still what was verified.
func (s *GradStep) intact() error {
	for _, t := range s.members {
		for _, c := range t.chunks {
			if c.batch != nil && !c.batch.lease.Intact() {
				return fmt.Errorf("%w while a chunk was read, and another one has its memory", ErrDaemonGone)
			}
		}
	}
	return nil
}

// Tensor returns the encoded bytes of one producer's tensor. They may be the ring's own memory: they are to be read only, and not after Release.
func (s *GradStep) Tensor(producer, name string) ([]byte, error) {
	if s.over {
		return nil, errReleased("tensor")
	}
	m := s.layout.m
	i, ok := m.Index(name)
	if !ok {
		return nil, unknownTensor(m, name)
	}
	k := slices.Index(s.Have, producer)
	if k < 0 {
		return nil, fmt.Errorf("client: step %d has nothing of producer %q; it has %q", s.step, producer, s.Have)
	}
	t, size := s.members[k], m.EncodedBytes(i)
	switch {
	case !t.has(i):
		return nil, fmt.Errorf("client: producer %q has sent a part of its tensors in step %d, and not %q", producer, s.step, name)
	case size == 0:
		return nil, nil
	}
	first := t.at(m.Offset(i))
	if int64(len(first)) >= size {
		return first[:size:size], s.intact()
	}
	all := make([]byte, 0, size)
	for int64(len(all)) < size {
		part := t.at(m.Offset(i) + int64(len(all)))
		all = append(all, part[:min(int64(len(part)), size-int64(len(all)))]...)
	}
	return all, s.intact()
}

// Release gives the step's memory back, and drops all that comes of it and of lower steps. Releasing again does nothing, so that it can be deferred.
func (s *GradStep) Release() {
	if s.over {
		return
	}
	s.over = true
	c := s.reader.core
	for _, p := range c.producers { // what was read is not unread
		if slices.Contains(s.members, p.ends[s.step].tx) {
			c.forget(p, s.step)
		}
	}
	s.members, s.sum = nil, nil
	c.asked = nil
	c.below(s.step + 1)
	s.reader.step = nil
}
