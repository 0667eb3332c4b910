//go:build linux

package client

import (
	"bytes"
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

// gradLease is a batch of the ring that is held. A Batch is one.
type gradLease interface {
	Release()
	Intact() bool
}

// gradBatch is a lease with the chunks that lie in it.
type gradBatch struct {
	lease  gradLease
	chunks []*gradChunk // not dropped yet
	rows   int          // not looked at yet
}

// gradChunk is a verified chunk with data.
type gradChunk struct {
	flat  int64
	data  []byte
	batch *gradBatch // in whose memory the data lies; nil: on the heap
}

func (c *gradChunk) end() int64 { return c.flat + int64(len(c.data)) }

// gradTx is what came of one transaction.
type gradTx struct {
	producer *gradProducer
	step     uint64
	layout   *gradLayout
	covered  *tensor.Coverage
	chunks   []*gradChunk // by flat offset
	subset   []uint32     // tensors of which it consists; nil: all, or not known yet
	latest   time.Time    // when its last chunk came
	lacks    []int64      // per unit of the sum that is being made: bytes that it needs and has not
}

// at returns the data at a flat offset, to the end of its chunk.
func (t *gradTx) at(flat int64) []byte {
	i, found := slices.BinarySearchFunc(t.chunks, flat, func(c *gradChunk, flat int64) int { return cmp.Compare(c.flat, flat) })
	if !found {
		i--
	}
	c := t.chunks[i]
	return c.data[flat-c.flat:]
}

// has says whether the transaction has a tensor.
func (t *gradTx) has(i int) bool {
	if t.subset == nil {
		return true
	}
	_, found := slices.BinarySearch(t.subset, uint32(i))
	return found
}

func (t *gradTx) progress() string {
	have, of := t.covered.Bytes(t.subset)
	return fmt.Sprintf("incomplete: %d of %d bytes", have, of)
}

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

	tx       *gradTx            // that is coming in; nil: none
	ends     map[uint64]gradEnd // by step
	newest   uint64             // the last step that it began
	began    bool
	damaged  string // why the last chunk of unknown step was dropped
	manifest uint64 // of the last chunk that told
}

// gradCore takes chunks and keeps track of producers and their steps. It belongs to one goroutine, and neither waits nor does it know where chunks come from.
type gradCore struct {
	chunkBytes int
	keep       time.Duration // how long an incomplete step may rest that nobody asked for
	now        func() time.Time
	name       func(stream uint64) (string, bool)
	manifest   func(id uint64, again bool) (*gradLayout, error) // nil, nil: the daemon does not know it; again: it may do so now

	producers map[uint64]*gradProducer // by stream
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

// add takes a batch of so many rows, each of which is to be given to take.
func (c *gradCore) add(lease gradLease, rows int) *gradBatch {
	b := &gradBatch{lease: lease, rows: rows}
	c.held = append(c.held, b)
	c.holding++
	return b
}

// looked says that one row of a batch was dealt with.
func (c *gradCore) looked(b *gradBatch) {
	b.rows--
	c.letGo(b)
}

// letGo gives a batch back when nothing of it is needed.
func (c *gradCore) letGo(b *gradBatch) {
	if b.rows > 0 || len(b.chunks) > 0 || b.lease == nil {
		return
	}
	b.lease.Release()
	b.lease = nil
	c.holding--
	if len(c.held) > 2*c.holding+16 {
		c.held = slices.DeleteFunc(c.held, func(b *gradBatch) bool { return b.lease == nil })
	}
}

// drop forgets a chunk.
func (c *gradCore) drop(chunk *gradChunk) {
	b := chunk.batch
	if b == nil {
		c.counts.spilled.Add(-int64(len(chunk.data)))
		return
	}
	if i := slices.Index(b.chunks, chunk); i >= 0 {
		b.chunks = slices.Delete(b.chunks, i, i+1)
	}
	chunk.batch = nil
	c.letGo(b)
}

func (c *gradCore) dropAll(t *gradTx) {
	for _, chunk := range t.chunks {
		c.drop(chunk)
	}
	t.chunks = nil
}

// spill copies what is held of the oldest batch to the heap and gives the batch back. It returns how many bytes that were, and false if there is nothing to give back, or what was
// copied was no longer there.
func (c *gradCore) spill() (n int64, ok bool) {
	for len(c.held) > 0 && c.held[0].lease == nil {
		c.held = c.held[1:]
	}
	if len(c.held) == 0 || c.held[0].rows > 0 {
		return 0, false
	}
	b := c.held[0]
	for _, chunk := range b.chunks {
		chunk.data = bytes.Clone(chunk.data)
		chunk.batch = nil
		n += int64(len(chunk.data))
	}
	intact := b.lease.Intact()
	b.chunks = nil
	c.letGo(b)
	c.counts.spilled.Add(n)
	c.counts.spilledAll.Add(uint64(n))
	return n, intact
}

// producer finds or makes what is known of a stream's producer.
func (c *gradCore) producer(stream, id uint64) (*gradProducer, error) {
	p := c.producers[stream]
	if p != nil {
		return p, nil
	}
	name, ok := c.name(stream)
	if !ok || tensor.ProducerID(name) != id {
		return nil, fmt.Errorf("it is of stream %d and producer %016x, which the table's sessions do not have", stream, id)
	}
	for other, q := range c.producers { // a session that was forgotten, and is there again
		if q.name == name {
			c.remove(other)
		}
	}
	p = &gradProducer{name: name, id: id, stream: stream, ends: map[uint64]gradEnd{}}
	c.producers[stream] = p
	return p, nil
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
// could not be had. All that is wrong with the chunk is counted, and its producer's.
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
	defer c.looked(b)
	herald := h.Flags&(tensor.FlagOpened|tensor.FlagClosed) != 0
	if layout == nil {
		err = fmt.Errorf("its manifest %016x is not known any more", h.Manifest)
	} else {
		err = h.Check(layout.m, c.chunkBytes)
	}
	if err == nil && herald != (stream != h.Stream) {
		err = fmt.Errorf("it came in stream %d and says that it is of stream %d", stream, h.Stream)
	}
	var p *gradProducer
	if err == nil {
		p, err = c.producer(h.Stream, h.Producer)
	}
	if err == nil && p.id != h.Producer {
		err = fmt.Errorf("it says that it is of producer %016x, and its stream is that of %016x", h.Producer, p.id)
	}
	switch {
	case err != nil:
		c.damaged(stream, number, err)
		return nil
	case herald:
		c.comesOrGoes(p, &h)
		return nil
	}
	if !c.inOrder(p, number) {
		return nil
	}
	c.alive(p, h.Manifest)
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

// comesOrGoes deals with what the daemon says of a producer.
func (c *gradCore) comesOrGoes(p *gradProducer, h *tensor.Header) {
	if h.Flags&tensor.FlagOpened != 0 {
		c.alive(p, h.Manifest)
		return
	}
	p.live, p.left = false, c.now()
	c.changed = true
}

// alive notes that a producer is there.
func (c *gradCore) alive(p *gradProducer, manifest uint64) {
	if !p.live || p.manifest != manifest {
		p.live, p.manifest = true, manifest
		c.newest = manifest // all that are there at one time have the same
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

// addChunk verifies the data of a chunk and adds it to its transaction.
func (c *gradCore) addChunk(b *gradBatch, t *gradTx, h *tensor.Header, data []byte) error {
	data = data[:h.Length:h.Length]
	if err := h.CheckData(t.layout.m, data); err != nil {
		return err
	}
	t.latest = c.now()
	if h.Flags&tensor.FlagEnd != 0 {
		subset, err := tensor.ParseEnd(t.layout.m, data)
		if err != nil {
			return err
		}
		return c.setSubset(t, subset)
	}
	if h.Length == 0 {
		return nil
	}
	flat := h.Flat(t.layout.m)
	if err := t.layout.checkSparse(flat, data); err != nil {
		return err
	}
	switch added := t.covered.Add(flat, h.Length, h.DataCRC); added {
	case tensor.Same:
		if h.Flags&tensor.FlagNoCRC != 0 && !bytes.Equal(t.at(flat)[:len(data)], data) {
			return &tensor.ChunkError{Tensor: t.layout.m.Tensor(int(h.Tensor)).Name, Offset: int64(h.Offset), Reason: "other bytes came for this place before"}
		}
		c.counts.duplicates.Add(1)
		return nil
	case tensor.New:
	default:
		return &tensor.ChunkError{Tensor: t.layout.m.Tensor(int(h.Tensor)).Name, Offset: int64(h.Offset), Reason: fmt.Sprintf("%v: bytes of it came before", added)}
	}
	chunk := &gradChunk{flat: flat, data: data, batch: b}
	b.chunks = append(b.chunks, chunk)
	i := len(t.chunks)
	if i > 0 && t.chunks[i-1].flat > flat {
		i, _ = slices.BinarySearchFunc(t.chunks, flat, func(c *gradChunk, flat int64) int { return cmp.Compare(c.flat, flat) })
	}
	t.chunks = slices.Insert(t.chunks, i, chunk)
	if t.subset != nil {
		if err := t.onlySubset(chunk); err != nil {
			return err
		}
	}
	switch {
	case c.asked == nil || c.asked.step != t.step:
	case c.changed: // its members may not be what they were
		t.lacks = nil
	default:
		c.asked.arrived(t, chunk)
	}
	return nil
}

// setSubset notes of which tensors a transaction consists. There may be bytes of no others.
func (c *gradCore) setSubset(t *gradTx, subset []uint32) error {
	t.subset, t.lacks = subset, nil
	for _, chunk := range t.chunks {
		if err := t.onlySubset(chunk); err != nil {
			return err
		}
	}
	c.changed = true
	return nil
}

// onlySubset checks that a chunk has bytes of no tensor that the transaction's end does not list.
func (t *gradTx) onlySubset(chunk *gradChunk) error {
	m := t.layout.m
	for i := m.At(chunk.flat); i < m.Len() && m.Offset(i) < chunk.end(); i++ {
		if m.EncodedBytes(i) > 0 && !t.has(i) {
			return fmt.Errorf("chunk: the step's end does not list tensor %q, of which bytes came", m.Tensor(i).Name)
		}
	}
	return nil
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
		return fmt.Sprintf("incomplete: 0 bytes, it is at step %d", p.newest)
	}
	return "incomplete: 0 bytes"
}

// release gives everything back, at the end.
func (c *gradCore) release() {
	for _, b := range c.held {
		if b.lease != nil {
			b.lease.Release()
			b.lease, b.rows, b.chunks = nil, 0, nil
		}
	}
	c.held, c.holding = nil, 0
	clear(c.producers)
}
