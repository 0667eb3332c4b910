package steps

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// Why a chunk is bad, as it is counted.
const (
	badHeader   = iota // magic, version, sum, flags
	badForged          // flags that only the daemon sets
	badStream          // another stream's number, or another producer's
	badManifest        // another manifest's id
	badPlace           // outside its tensor, or where no chunk may lie
	badOverlap         // bytes that an earlier chunk of the step has brought
	badList            // the list of tensors that ends a step
	badKinds
)

var badNames = [badKinds]string{"header", "forged", "stream", "manifest", "place", "overlap", "list"}

// BadReasons returns all reasons by which bad chunks are counted.
func BadReasons() []string { return badNames[:] }

// counters are the totals of a Keeper.
type counters struct {
	completed, aborted, refused, cutShort, chunks, late atomic.Uint64
	bad                                                 [badKinds]atomic.Uint64
}

func (c *counters) snapshot() Stats {
	st := Stats{
		Completed: c.completed.Load(), Aborted: c.aborted.Load(), Refused: c.refused.Load(), CutShort: c.cutShort.Load(),
		Chunks: c.chunks.Load(), Late: c.late.Load(), BadChunks: map[string]uint64{},
	}
	for i, name := range badNames {
		st.BadChunks[name] = c.bad[i].Load()
	}
	return st
}

// What has become of a transaction.
const (
	txNone = iota
	txOpen
	txComplete
	txAborted
	txRefused
)

var txNames = [...]string{"none", "incomplete", "complete", "aborted", "refused"}

// transaction is the step that a producer is at.
type transaction struct {
	stream, manifest uint64
	step             uint64
	state            int
	bytes            int64            // of the step's tensors that came
	of               int64            // of those that make it complete
	resumed          bool             // nothing of it came since its connection ended, which was counted
	subset           []uint32         // the tensors that it consists of, once its end has come; nil: all
	came             *tensor.Coverage // what of it; nil before the first
}

// Producer checks the chunks of one producer's stream.
type Producer struct {
	keeper   *Keeper
	name     string
	stream   uint64
	id       uint64 // tensor.ProducerID of the name
	manifest *tensor.Manifest
	all      int64  // bytes of a step that has every tensor
	entry    *known // under keeper.mu
	since    time.Time

	mu     sync.Mutex // taken by Check once per run of chunks, and by who looks
	header [tensor.HeaderBytes]byte
	list   []byte
	at     transaction
	done   uint64 // newest step that came whole through this connection
	isDone bool   // there was one
	notes  []byte
}

func newProducer(k *Keeper, name string, stream uint64, m *tensor.Manifest, entry *known) *Producer {
	p := &Producer{keeper: k, name: name, stream: stream, id: tensor.ProducerID(name), manifest: m, entry: entry, since: time.Now()}
	for i := range m.Len() {
		p.all += m.EncodedBytes(i)
	}
	p.at = transaction{stream: stream, manifest: m.ID(), of: p.all}
	return p
}

// ProducerStats is a snapshot of a Producer.
type ProducerStats struct {
	Name     string
	Stream   uint64
	Manifest uint64 // id
	Since    time.Time
	Step     uint64 // the one it is at
	State    string // of that: none, incomplete, complete, aborted, refused
	Bytes    int64  // of the step that have come
	Of       int64  // bytes of a whole step
}

func (p *Producer) stats() ProducerStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return ProducerStats{
		Name: p.name, Stream: p.stream, Manifest: p.manifest.ID(), Since: p.since, Step: p.at.step, State: txNames[p.at.state], Bytes: p.at.bytes,
		Of: p.at.of,
	}
}

// Close says that all chunks of the stream are in the ring and no more come.
func (p *Producer) Close() { p.keeper.close(p) }

// leave tells whether the producer goes away inside a step, and whether anything of that came through this connection.
func (p *Producer) leave() (inside, came bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at.state == txOpen, !p.at.resumed
}

// BadChunkError says why a chunk was turned down.
type BadChunkError struct {
	Kind string // one of BadReasons
	Err  error  // a *tensor.ChunkError where the chunk itself tells
}

func (e *BadChunkError) Error() string { return e.Err.Error() }

func (e *BadChunkError) Unwrap() error { return e.Err }

func (p *Producer) bad(kind int, err error) error {
	p.keeper.counts.bad[kind].Add(1)
	return &BadChunkError{badNames[kind], err}
}

// Check implements drainer.Checker.
func (p *Producer) Check(columns [][]byte) (good int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	headers, data := columns[headerColumn], columns[dataColumn]
	chunkBytes := p.keeper.cfg.ChunkBytes
	for len(headers) >= tensor.HeaderBytes {
		if err := p.check(headers[:tensor.HeaderBytes], data[:chunkBytes]); err != nil {
			return good, err
		}
		headers, data = headers[tensor.HeaderBytes:], data[chunkBytes:]
		good++
	}
	p.keeper.counts.chunks.Add(uint64(good))
	return good, nil
}

// check judges one chunk.
func (p *Producer) check(header, data []byte) error {
	copy(p.header[:], header) // a producer in place may still write to it
	h, err := tensor.ParseHeader(p.header[:])
	if err != nil {
		return p.bad(badHeader, err)
	}
	switch {
	case h.Flags&(tensor.FlagOpened|tensor.FlagClosed) != 0:
		return p.bad(badForged, fmt.Errorf("chunk: the flags %#x say that a producer comes or goes, which only the daemon says", h.Flags))
	case h.Stream != p.stream:
		return p.bad(badStream, fmt.Errorf("chunk: it is of stream %d; the reply to the hello says that this stream has number %d", h.Stream, p.stream))
	case h.Producer != p.id:
		return p.bad(badStream, fmt.Errorf("chunk: its producer is %016x; that of session %q is %016x", h.Producer, p.name, p.id))
	case h.Manifest != p.manifest.ID():
		return p.bad(badManifest, fmt.Errorf("chunk: its manifest is %016x; that of the hello is %016x", h.Manifest, p.manifest.ID()))
	}
	if err := h.Check(p.manifest, p.keeper.cfg.ChunkBytes); err != nil {
		return p.bad(badPlace, err)
	}
	// What an earlier daemon said of it, in memory that a producer in place has copied from, is judged anew.
	header[flagsByte] &^= tensor.FlagRefused
	if reason := p.tooOld(h.Step); reason != "" {
		p.refuse(&h, header, reason)
		return nil
	}
	return p.take(&h, data)
}

// flagsByte is where a header has the flags that fit in one byte.
const flagsByte = 6

// tooOld says why a step is not taken any more.
func (p *Producer) tooOld(step uint64) string {
	newest, lag := p.keeper.newest.Load(), p.keeper.cfg.MaxLag
	switch {
	case p.isDone && step < p.done:
		return fmt.Sprintf("step %d comes after step %d, which this producer has sent whole: steps only grow; connect anew to go back", step, p.done)
	case lag > 0 && newest > step && newest-step > lag:
		return fmt.Sprintf("step %d is too old: step %d was begun, and the table's max_lag is %d; go on with a newer one", step, newest, lag)
	}
	return ""
}

// refuse marks a chunk as not to be used, and notes it for the producer once per step.
func (p *Producer) refuse(h *tensor.Header, header []byte, reason string) {
	tensor.MarkRefused(header)
	p.keeper.counts.late.Add(1)
	if p.at.state == txRefused && p.at.step == h.Step {
		return
	}
	p.end()
	p.begin(h.Step, txRefused)
	p.keeper.counts.refused.Add(1)
	p.notes = wire.AppendNote(p.notes, &wire.Note{Code: wire.NoteStepRefused, Step: h.Step, Reason: reason})
}

// begin starts over with a step.
func (p *Producer) begin(step uint64, state int) {
	p.at.step, p.at.state, p.at.bytes, p.at.of, p.at.subset, p.at.resumed = step, state, 0, p.all, nil, false
	if p.at.came == nil {
		p.at.came = tensor.NewCoverage(p.manifest)
	} else {
		p.at.came.Reset()
	}
}

// end counts the transaction that gives way to another, or to nothing.
func (p *Producer) end() {
	if p.at.state == txOpen && !p.at.resumed {
		p.keeper.counts.cutShort.Add(1)
	}
	p.at.state = txNone
}

// take adds a chunk to the producer's transaction.
func (p *Producer) take(h *tensor.Header, data []byte) error {
	if h.Flags&tensor.FlagBegin != 0 || p.at.state == txNone || p.at.step != h.Step {
		if p.at.state == txComplete && p.at.step == h.Step { // sent again: its readers ignore it
			return nil
		}
		p.end()
		p.begin(h.Step, txOpen)
		p.keeper.began(h.Step)
	}
	p.at.resumed = false
	switch {
	case p.at.state != txOpen: // what follows an abort, or comes twice
		return nil
	case h.Flags&tensor.FlagAbort != 0:
		p.at.state = txAborted
		p.keeper.counts.aborted.Add(1)
		return nil
	case h.Flags&tensor.FlagEnd != 0:
		if err := p.takeList(h, data); err != nil {
			return err
		}
	case h.Length > 0:
		if err := p.cover(h); err != nil {
			return err
		}
	}
	if p.at.came.Complete(p.at.subset) {
		p.at.state, p.done, p.isDone = txComplete, h.Step, true
		p.keeper.counts.completed.Add(1)
	}
	return nil
}

// takeList reads the list of tensors that ends a step.
func (p *Producer) takeList(h *tensor.Header, data []byte) error {
	p.list = append(p.list[:0], data[:h.Length]...) // a producer in place may still write to it
	if err := h.CheckData(p.manifest, p.list); err != nil {
		return p.bad(badList, err)
	}
	subset, err := tensor.ParseEnd(p.manifest, p.list)
	if err != nil {
		return p.bad(badList, err)
	}
	p.at.subset, p.at.of = subset, 0
	for _, i := range subset {
		p.at.of += p.manifest.EncodedBytes(int(i))
	}
	return nil
}

// cover notes which bytes a chunk has brought.
func (p *Producer) cover(h *tensor.Header) error {
	why := "overlaps another chunk of its step"
	switch p.at.came.Add(h.Flat(p.manifest), h.Length, h.DataCRC) {
	case tensor.New:
		p.at.bytes += int64(h.Length)
		return nil
	case tensor.Same:
		return nil
	case tensor.TooMany:
		why = "the step is cut into too many chunks"
	}
	return p.bad(badOverlap, &tensor.ChunkError{Tensor: p.manifest.Tensor(int(h.Tensor)).Name, Offset: int64(h.Offset), Reason: why})
}

// AppendNotes implements drainer.Checker.
func (p *Producer) AppendNotes(dst []byte) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	dst = append(dst, p.notes...)
	p.notes = p.notes[:0]
	return dst
}
