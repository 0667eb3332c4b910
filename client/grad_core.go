//go:build linux

package client

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/ingestd/ingestd/tensor"
)

// Why a step of a producer is missing, where that is always said in the same words.
const (
	reasonTooOld   = "too old"
	reasonAborted  = "aborted"
	reasonGone     = "connection ended"
	reasonManifest = "manifest differs"
)

// aheadMax is the most steps of one producer, ended in whatever way, that a reader remembers before somebody asks for them.
const aheadMax = 1024

// gradEnd is how a step of a producer ended: complete, or why not.
type gradEnd struct {
	tx     *gradTx // nil: it is missing
	reason string
}

// gradProducer is what is known of a producer.
type gradProducer struct {
	name   string
	id     uint64
	stream uint64
	live   bool
	left   time.Time // when it was last seen to go away

	numbered bool
	next     uint64 // number of its next sample

	tx      *gradTx            // that is coming in; nil: none
	ends    map[uint64]gradEnd // by step
	newest  uint64             // the last step that it began
	began   bool
	damaged string      // why the last chunk of unknown step was dropped
	layout  *gradLayout // of its last chunk, or of when it came; nil: not known
}

// gradCore takes chunks and keeps track of producers and their steps. It belongs to one goroutine, and neither waits nor does it know where chunks come from.
type gradCore struct {
	chunkBytes int
	keep       time.Duration // how long an incomplete step may rest that nobody asked for
	now        func() time.Time
	name       func(stream uint64) (string, error)              // "", nil: no producer has it
	manifest   func(id uint64, again bool) (*gradLayout, error) // nil, nil: the daemon does not know it; again: it may do so now

	producers map[uint64]*gradProducer // by stream; those of another ring with formerStream
	herald    uint64                   // stream in which the daemon says who comes and goes
	heralds   uint64                   // number of the next chunk in it
	held      []*gradBatch             // oldest first; those given back are taken out now and then
	holding   int
	floor     uint64 // lower steps are not of interest any more
	newest    uint64 // id of the manifest that was opened last
	waiting   bool   // somebody waits for step
	step      uint64
	asked     *gradSum // of step; nil: nobody wants it while it comes
	changed   bool     // who may be part of the step asked for, or what it has, is not what it was
	counts    gradCounts
	oldest    time.Time // no incomplete step rested when it was looked at then
}

func newGradCore(chunkBytes int, keep time.Duration) *gradCore {
	return &gradCore{chunkBytes: chunkBytes, keep: keep, now: time.Now, producers: map[uint64]*gradProducer{}}
}

// formerStream marks streams of a ring that is gone. No daemon counts so far.
const formerStream = 1 << 63

// producer finds or makes what is known of a stream's producer. name is that of a stream of which nothing is known.
func (c *gradCore) producer(stream, id uint64, name string) (*gradProducer, error) {
	p := c.producers[stream]
	if p != nil {
		return p, nil
	}
	if name == "" || stream >= formerStream || tensor.ProducerID(name) != id {
		return nil, fmt.Errorf("it is of stream %d and producer %016x, which the table's sessions do not have", stream, id)
	}
	for other, q := range c.producers {
		if q.name != name {
			continue
		}
		if other >= formerStream { // what it had completed stays
			delete(c.producers, other)
			q.stream = stream
			c.producers[stream] = q
			return q, nil
		}
		c.remove(other) // a session that was forgotten, and is there again
	}
	p = &gradProducer{name: name, id: id, stream: stream, ends: map[uint64]gradEnd{}}
	c.producers[stream] = p
	return p, nil
}

// anew deals with a ring that was made anew: its streams and numbers are others, nothing comes any more of what is not complete, and who comes is said again. A producer that sends a step
// once more begins it.
func (c *gradCore) anew() {
	for _, p := range slices.Collect(maps.Values(c.producers)) {
		if p.tx != nil {
			c.dropAll(p.tx)
			p.tx = nil
			c.counts.dropped.Add(1)
		}
		delete(c.producers, p.stream)
		p.stream |= formerStream
		c.producers[p.stream] = p
		if p.live {
			p.live, p.left = false, c.now()
		}
		p.numbered, p.began, p.damaged = false, false, ""
	}
	c.herald, c.heralds, c.changed = 0, 0, true
}

// remove forgets a producer and all that came of it.
func (c *gradCore) remove(stream uint64) {
	p := c.producers[stream]
	if p.tx != nil {
		c.dropAll(p.tx)
	}
	for step := range p.ends {
		c.forget(p, step)
	}
	delete(c.producers, stream)
	c.changed = true
}

// take deals with one row of a batch: a chunk as it lies there, with the number of its stream and its own in the stream. An error says that it could not be dealt with yet: its manifest
// or its producer's name could not be had. All that is wrong with the chunk is counted, and its producer's.
func (c *gradCore) take(b *gradBatch, header, data []byte, stream, number uint64) error {
	var local [tensor.HeaderBytes]byte // a producer in place may still write to what lies in the ring
	copy(local[:], header)
	h, err := tensor.ParseHeader(local[:])
	if err != nil {
		c.damaged(stream, number, err)
		c.looked(b)
		return nil
	}
	layout, err := c.manifest(h.Manifest, h.Flags&tensor.FlagOpened != 0)
	if err != nil {
		return err
	}
	herald := h.Flags&(tensor.FlagOpened|tensor.FlagClosed) != 0
	if layout == nil {
		err = fmt.Errorf("its manifest %016x is not known any more", h.Manifest)
	} else {
		err = h.Check(layout.m, c.chunkBytes)
	}
	if err == nil && herald != (stream != h.Stream) {
		err = fmt.Errorf("it came in stream %d and says that it is of stream %d", stream, h.Stream)
	}
	name := ""
	if err == nil && c.producers[h.Stream] == nil {
		if name, err = c.name(h.Stream); err != nil {
			return err
		}
	}
	defer c.looked(b)
	var p *gradProducer
	if err == nil {
		p, err = c.producer(h.Stream, h.Producer, name)
	}
	if err == nil && p.id != h.Producer {
		err = fmt.Errorf("it says that it is of producer %016x, and its stream is that of %016x", h.Producer, p.id)
	}
	switch {
	case err != nil:
		c.damaged(stream, number, err)
		return nil
	case herald:
		if c.heard(stream, number) {
			c.comesOrGoes(p, &h, layout)
		}
		return nil
	}
	if !c.inOrder(p, number) {
		return nil
	}
	c.alive(p, layout)
	c.chunk(b, p, layout, &h, data)
	return nil
}

// damaged counts a chunk of which nothing can be believed but the stream in which it came.
func (c *gradCore) damaged(stream, number uint64, err error) {
	c.counts.bad.Add(1)
	p := c.producers[stream]
	if p == nil || !c.inOrder(p, number) {
		return
	}
	reason := fmt.Sprintf("bad chunk: %v", err)
	if p.tx != nil {
		c.fail(p, p.tx.step, reason)
		return
	}
	p.damaged = reason
}

// heard sees whether what the daemon says is news. A batch that comes a second time says what may have changed since.
func (c *gradCore) heard(stream, number uint64) bool {
	if stream < c.herald || stream == c.herald && number < c.heralds {
		c.counts.duplicates.Add(1)
		return false
	}
	c.herald, c.heralds = stream, number+1
	return true
}

// comesOrGoes deals with what the daemon says of a producer.
func (c *gradCore) comesOrGoes(p *gradProducer, h *tensor.Header, layout *gradLayout) {
	if h.Flags&tensor.FlagOpened != 0 {
		c.alive(p, layout)
		return
	}
	p.live, p.left = false, c.now()
	c.changed = true
}

// alive notes that a producer is there.
func (c *gradCore) alive(p *gradProducer, layout *gradLayout) {
	if !p.live || p.layout.m.ID() != layout.m.ID() {
		p.live, p.layout = true, layout
		c.newest = layout.m.ID() // all that are there at one time have the same
		c.changed = true
	}
}

// inOrder sees whether a sample is the one that is due in its stream. One that came before is not looked at again; where some are missing, so are bytes of the transaction,
// or worse, the beginning of another one.
func (c *gradCore) inOrder(p *gradProducer, number uint64) bool {
	switch {
	case p.numbered && number < p.next:
		c.counts.duplicates.Add(1)
		return false
	case p.numbered && number > p.next && p.tx != nil:
		c.fail(p, p.tx.step, fmt.Sprintf("incomplete: %d chunks did not come to this reader", number-p.next))
	}
	p.numbered, p.next = true, number+1
	return true
}

// chunk deals with a chunk of a producer whose header is right.
func (c *gradCore) chunk(b *gradBatch, p *gradProducer, layout *gradLayout, h *tensor.Header, data []byte) {
	end, ended := p.ends[h.Step]
	switch {
	case h.Step < c.floor:
		c.counts.late.Add(1)
		return
	case h.Flags&tensor.FlagRefused != 0:
		c.counts.refused.Add(1)
		if end.reason != reasonTooOld && end.tx == nil {
			c.fail(p, h.Step, reasonTooOld)
		}
		return
	case end.tx != nil: // complete, and sent again
		c.counts.duplicates.Add(1)
		return
	case h.Flags&tensor.FlagAbort != 0:
		c.fail(p, h.Step, reasonAborted)
		return
	case h.Flags&tensor.FlagBegin != 0:
		c.begin(p, layout, h.Step)
	case p.tx == nil || p.tx.step != h.Step || p.tx.layout.m.ID() != h.Manifest:
		if !ended {
			reason := "incomplete: its beginning did not come to this reader"
			if p.damaged != "" {
				reason = p.damaged
			}
			c.fail(p, h.Step, reason)
		}
		return
	}
	p.damaged = ""
	if err := c.addChunk(b, p.tx, h, data); err != nil {
		c.counts.bad.Add(1)
		c.fail(p, h.Step, "bad "+err.Error())
		return
	}
	if t := p.tx; t.covered.Complete(t.subset) {
		c.end(p, t.step, gradEnd{tx: t})
		c.counts.completed.Add(1)
	}
}

// begin begins a transaction. The one before is dropped: steps only grow, so that nothing more comes of it, or it is begun again.
func (c *gradCore) begin(p *gradProducer, layout *gradLayout, step uint64) {
	if p.tx != nil && p.tx.step != step {
		c.fail(p, p.tx.step, p.tx.progress())
	} else if p.tx != nil {
		c.dropAll(p.tx)
	}
	delete(p.ends, step)
	p.tx = &gradTx{producer: p, step: step, layout: layout, covered: tensor.NewCoverage(layout.m), latest: c.now()}
	p.newest, p.began = step, true
	c.changed = true
}

// fail notes why a step of a producer is missing, and drops what came of it.
func (c *gradCore) fail(p *gradProducer, step uint64, reason string) {
	if p.tx != nil && p.tx.step == step {
		c.dropAll(p.tx)
		p.tx = nil
	}
	if _, ended := p.ends[step]; !ended {
		c.counts.dropped.Add(1)
	}
	c.end(p, step, gradEnd{reason: reason})
}

func (c *gradCore) end(p *gradProducer, step uint64, end gradEnd) {
	if p.tx != nil && p.tx.step == step {
		p.tx = nil
	}
	if !p.began || step > p.newest {
		p.newest, p.began = step, true
	}
	p.ends[step] = end
	c.changed = true
	if len(p.ends) > aheadMax {
		c.forget(p, slices.Min(slices.Collect(maps.Keys(p.ends))))
	}
}

// forget forgets a step that has ended.
func (c *gradCore) forget(p *gradProducer, step uint64) {
	end, ok := p.ends[step]
	if !ok {
		return
	}
	delete(p.ends, step)
	if end.tx != nil {
		c.dropAll(end.tx)
	}
}

// below drops all steps lower than step, which are not of interest any more.
func (c *gradCore) below(step uint64) {
	if step <= c.floor {
		return
	}
	c.floor = step
	for _, p := range c.producers {
		if p.tx != nil && p.tx.step < step {
			c.fail(p, p.tx.step, p.tx.progress())
		}
		for s, end := range p.ends {
			if s < step {
				if end.tx != nil {
					c.counts.unread.Add(1)
				}
				c.forget(p, s)
			}
		}
	}
}

// tidy drops incomplete steps that have rested for too long, unless somebody waits for them, and producers that have been gone for as long.
func (c *gradCore) tidy() {
	now := c.now()
	if now.Sub(c.oldest) < c.keep/4 {
		return
	}
	c.oldest = now
	for stream, p := range c.producers {
		if t := p.tx; t != nil && now.Sub(t.latest) >= c.keep && !(c.waiting && c.step == t.step) {
			c.fail(p, t.step, t.progress())
		}
		if !p.live && p.tx == nil && now.Sub(p.left) >= c.keep && !slices.ContainsFunc(slices.Collect(maps.Values(p.ends)), func(e gradEnd) bool { return e.tx != nil }) {
			c.remove(stream)
		}
	}
}

// byName returns all producers in the order of their names.
func (c *gradCore) byName() []*gradProducer {
	return slices.SortedFunc(maps.Values(c.producers), func(a, b *gradProducer) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.stream, b.stream))
	})
}

// complete returns the transaction of a step if it is complete and of the manifest that counts.
func (c *gradCore) complete(p *gradProducer, step uint64) *gradTx {
	if t := p.ends[step].tx; t != nil && t.layout.m.ID() == c.newest {
		return t
	}
	return nil
}

// mayCome says whether a producer that is there may still complete a step.
func (c *gradCore) mayCome(p *gradProducer, step uint64) bool {
	if !p.live {
		return false
	}
	if _, ended := p.ends[step]; ended {
		return false
	}
	if p.tx != nil && p.tx.step == step {
		return true
	}
	return !p.began || p.newest < step
}

// why says why a producer has no complete step.
func (c *gradCore) why(p *gradProducer, step uint64) string {
	end, ended := p.ends[step]
	switch {
	case ended && end.tx != nil:
		return reasonManifest
	case ended:
		return end.reason
	case !p.live:
		return reasonGone
	case p.tx != nil && p.tx.step == step:
		return p.tx.progress()
	case p.began && p.newest > step:
		return fmt.Sprintf("incomplete: 0 of %d bytes, and it is at step %d", p.layout.all(), p.newest)
	}
	return fmt.Sprintf("incomplete: 0 of %d bytes", p.layout.all())
}
