package fuzz

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

const (
	chunkTable    = "grads"
	chunkSession  = "w0"
	chunkBytes    = tensor.ChunkBytesMin
	chunksMost    = 24 // of one conversation: each is 64 KiB
	chunkLag      = 3
	chunkOpBytes  = 8 // of the input for each chunk
	headerXorAway = 64
)

// chunkManifest has three tensors in 7 blocks of 256 bytes.
func chunkManifest(t testing.TB) *tensor.Manifest {
	return must(tensor.NewManifest([]tensor.Tensor{
		{Name: "w", DType: spec.F32, Shape: []int64{256}}, {Name: "none", DType: spec.F32, Shape: []int64{0}}, {Name: "b", DType: spec.F32, Shape: []int64{150}},
	}, nil))
}

// chunkTalk is one producer of tensors, from its hello to its end, and the model of what the daemon must make of it.
type chunkTalk struct {
	t     *testing.T
	m     *tensor.Manifest
	table *engine.Table
	peer  *net.UnixConn

	stream uint64
	sent   [][]byte // chunks

	// The model.
	good    int // chunks that are taken
	bad     bool
	refused []bool
	noted   []uint64
	step    uint64
	state   string // "", open, complete, aborted, refused
	blocks  map[int64]piece
	subset  []uint32
	done    int64 // newest complete step, -1: none
	begun   uint64

	heard     []byte
	delivered [][]byte // headers
	beside    []uint64 // the stream of each
}

// piece is where a block of 256 bytes came from.
type piece struct {
	flat        int64
	length, sum uint32
}

// FuzzChunks lets a producer of tensors send headers as the input says, most of them nearly right, over a real connection. The daemon takes exactly the chunks
// that a simple model takes, marks those that it refuses, tells of them before their ack, and ends at the first bad one; only its own chunks say who comes and
// goes.
func FuzzChunks(f *testing.F) {
	whole := []byte{1, 5, 0, 0, 4, 0, 64, 0, 0, 5, 2, 0, 3, 0, 64, 0}
	f.Add(whole)
	f.Add(append(bytes.Clone(whole), 1, 4, 0, 0, 4, 0, 64, 0))            // a step that goes back
	f.Add(append(bytes.Clone(whole[:8]), 0, 5, 0, 1, 2, 0, 64, 0))        // an overlap
	f.Add(append(bytes.Clone(whole[:8]), whole[:8]...))                   // begun again
	f.Add([]byte{1, 9, 0, 0, 4, 0, 64, 0, 1, 5, 0, 0, 4, 0, 64, 0})       // too old
	f.Add([]byte{32, 9, 0, 0, 0, 0, 64, 0})                               // forged
	f.Add([]byte{3, 9, 2, 0, 0, 0, 64, 0, 4, 9, 0, 0, 0, 0, 64, 0})       // an end without data, an abort
	f.Add([]byte{1, 9, 0, 0, 4, 0, 7, 1, 1, 9, 0, 0, 4, 0, 64, 0})        // a damaged header
	f.Add([]byte{1, 9, 0, 0, 1, 0, 64, 0, 2, 9, 0, 0, 4, 1, 64, 0, 0, 9}) // a subset

	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	f.Cleanup(func() { stop(); running.Wait() })
	f.Fuzz(func(t *testing.T, ops []byte) {
		c := &chunkTalk{t: t, m: chunkManifest(t), done: -1, blocks: map[int64]piece{}}
		c.talk(pool, ops)
		c.check()
	})
}

// chunk makes one of the input.
func (c *chunkTalk) chunk(op []byte) []byte {
	raw := make([]byte, tensor.HeaderBytes+chunkBytes)
	h := tensor.Header{
		Flags: uint16(op[0]), Step: uint64(op[1] % 16), Stream: c.stream, Producer: tensor.ProducerID(chunkSession), Manifest: c.m.ID(),
		Tensor: uint32(op[2] % 4), Offset: uint64(op[3]%8) * tensor.Align, Length: uint32(op[4]%8) * tensor.Align,
	}
	if op[4]&64 != 0 && h.Length > 0 { // to the end of b, which fills no block
		h.Length -= tensor.Align - 600%tensor.Align
	}
	if op[4]&128 != 0 {
		h.Length = uint32(op[4] % 32)
	}
	binary.LittleEndian.PutUint32(raw[tensor.HeaderBytes:], uint32(op[5]%4)) // a list, if it is the end
	if h.Flags&tensor.FlagNoCRC == 0 {
		h.DataCRC = tensor.CRC(raw[tensor.HeaderBytes:][:h.Length])
	}
	h.Put(raw)
	if op[6] < headerXorAway {
		raw[op[6]] ^= op[7]
	}
	return raw
}

func (c *chunkTalk) talk(pool *drainer.Pool, ops []byte) {
	t := c.t
	layout := must(steps.Spec(chunkBytes))
	var err error
	c.table, err = engine.New(engine.Config{
		Name: chunkTable, Spec: layout, BatchSize: 1, Batches: 3, Drainers: pool, Steps: &steps.Config{ChunkBytes: chunkBytes, MaxLag: chunkLag},
	})
	if err != nil {
		t.Fatal(err)
	}
	server, err := tcpingest.New(tcpingest.Config{Tables: ingesttest.Tables{chunkTable: c.table}})
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := socketPair(t)
	c.peer = theirs
	_ = theirs.SetDeadline(time.Now().Add(time.Minute)) // so that a server that forgets its peer fails and does not hang
	l := &oneConnection{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
	l.conn <- ours
	ctx, stop := context.WithCancel(context.Background())
	var serving, herald, listening, training sync.WaitGroup
	herald.Go(func() { _ = c.table.Run(ctx) })
	serving.Go(func() {
		if err := server.Serve(context.Background(), l); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	for len(l.conn) > 0 { // until it is accepted
		runtime.Gosched()
	}
	training.Go(c.train)
	hello := &wire.Hello{Role: wire.RolePush, Table: chunkTable, Session: chunkSession, Manifest: c.m.JSON(), Notes: true, Ack: wire.AckCommitted}
	if err := wire.WriteHello(theirs, hello); err != nil {
		t.Fatal(err)
	}
	var accepted wire.AcceptedPush
	if err := wire.ReadReply(theirs, &accepted); err != nil {
		t.Fatal(err)
	}
	c.stream = accepted.Stream
	listening.Go(func() {
		c.heard, err = io.ReadAll(theirs)
		if err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("hearing: %v", err)
		}
	})
	for ; len(ops) >= chunkOpBytes && len(c.sent) < chunksMost; ops = ops[chunkOpBytes:] {
		raw := c.chunk(ops)
		c.sent = append(c.sent, raw)
		c.judge(raw)
		if _, err := theirs.Write(raw); err != nil {
			break // it has had enough, which check judges
		}
	}
	_ = theirs.CloseWrite()
	listening.Wait()
	if err := server.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	serving.Wait()
	if err := c.table.Close(context.Background()); err != nil {
		t.Error(err)
	}
	training.Wait()
	stop()
	herald.Wait()
	_ = theirs.Close()
}

func (c *chunkTalk) train() {
	trainer := c.table.NewTrainer()
	for {
		b, err := trainer.Next(context.Background())
		if err != nil {
			if err != io.EOF {
				c.t.Errorf("Next: %v", err)
			}
			return
		}
		c.delivered = append(c.delivered, bytes.Clone(b.Column(0)))
		c.beside = append(c.beside, b.Streams()[0])
		trainer.Release(b)
	}
}

// judge is the model: what the daemon must make of the next chunk.
func (c *chunkTalk) judge(raw []byte) {
	if c.bad {
		return
	}
	h, err := tensor.ParseHeader(raw)
	if err != nil || h.Check(c.m, chunkBytes) != nil || h.Stream != c.stream || h.Producer != tensor.ProducerID(chunkSession) ||
		h.Flags&(tensor.FlagOpened|tensor.FlagClosed) != 0 {
		c.bad = true
		return
	}
	if int64(h.Step) < c.done || c.begun > h.Step+chunkLag {
		if c.state != "refused" || c.step != h.Step {
			c.noted = append(c.noted, h.Step)
		}
		c.state, c.step = "refused", h.Step
		c.good++
		c.refused = append(c.refused, true)
		return
	}
	if !c.take(&h, raw[tensor.HeaderBytes:]) {
		c.bad = true
		return
	}
	c.good++
	c.refused = append(c.refused, false)
}

func (c *chunkTalk) take(h *tensor.Header, data []byte) bool {
	if c.state == "complete" && c.step == h.Step {
		return true
	}
	if c.state == "" || c.step != h.Step || h.Flags&tensor.FlagBegin != 0 {
		c.state, c.step, c.blocks, c.subset = "open", h.Step, map[int64]piece{}, nil
		c.begun = max(c.begun, h.Step)
	}
	switch {
	case c.state != "open":
		return true
	case h.Flags&tensor.FlagAbort != 0:
		c.state = "aborted"
		return true
	case h.Flags&tensor.FlagEnd != 0:
		list, err := tensor.ParseEnd(c.m, data[:h.Length])
		if err != nil {
			return false
		}
		c.subset = list
	case h.Length > 0:
		this := piece{h.Flat(c.m), h.Length, h.DataCRC}
		if c.blocks[this.flat] == this {
			break
		}
		for at := this.flat; at < this.flat+int64(h.Length); at += tensor.Align {
			if c.blocks[at] != (piece{}) {
				return false
			}
		}
		for at := this.flat; at < this.flat+int64(h.Length); at += tensor.Align {
			c.blocks[at] = this
		}
	}
	if c.complete() {
		c.state, c.done = "complete", int64(h.Step)
	}
	return true
}

// complete tells whether exactly the tensors of the step have come.
func (c *chunkTalk) complete() bool {
	listed, want := c.subset, 0
	if listed == nil {
		listed = []uint32{0, 1, 2}
	}
	for _, i := range listed {
		for at := int64(0); at < c.m.EncodedBytes(int(i)); at += tensor.Align {
			if c.blocks[c.m.Offset(int(i))+at] == (piece{}) {
				return false
			}
			want++
		}
	}
	return want == len(c.blocks)
}

func (c *chunkTalk) check() {
	t := c.t
	acks, noted, notice := c.understand()
	if acks != c.good || len(noted) != len(c.noted) || (notice != nil) != c.bad || c.bad && notice.Code != wire.CodeBadChunk {
		t.Fatalf("%d chunks acked, steps %v refused, ended with %v; want %d, %v, bad: %v", acks, noted, notice, c.good, c.noted, c.bad)
	}
	for i := range noted {
		if noted[i] != c.noted[i] {
			t.Fatalf("steps %v refused, want %v", noted, c.noted)
		}
	}
	if len(c.delivered) != c.good+2 {
		t.Fatalf("%d chunks were delivered, of %d and two of the daemon", len(c.delivered), c.good)
	}
	for i, header := range c.delivered {
		h, err := tensor.ParseHeader(header)
		if err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		if own := c.beside[i] != c.stream; own {
			want := uint16(tensor.FlagOpened)
			if i > 0 {
				want = tensor.FlagClosed
			}
			if i != 0 && i != c.good+1 || h.Flags != want || h.Stream != c.stream {
				t.Fatalf("the daemon's chunk %d is %+v", i, h)
			}
			continue
		}
		sent := bytes.Clone(c.sent[i-1][:tensor.HeaderBytes])
		sent[6] &^= tensor.FlagRefused
		if c.refused[i-1] {
			tensor.MarkRefused(sent)
		}
		if !bytes.Equal(header, sent) {
			t.Fatalf("chunk %d is %x, want %x", i, header, sent)
		}
	}
	// Batches whose only slot was given back stay open, with nothing in them.
	st := c.table.Stats()
	if st.Pushed != uint64(c.good) || st.Places["free"]+st.Places["open"] != st.Batches {
		t.Fatalf("%d chunks are good, the table counts %+v", c.good, st)
	}
}

// understand takes apart what the daemon said.
func (c *chunkTalk) understand() (acks int, noted []uint64, notice *wire.Notice) {
	for r := bytes.NewReader(c.heard); ; {
		b, err := r.ReadByte()
		if err == io.EOF {
			return acks, noted, nil
		}
		switch b {
		case wire.Ack:
			acks++
		case wire.NoteMark:
			note, err := wire.ReadNote(r)
			if err != nil {
				c.t.Fatal(err)
			}
			if note.Code != wire.NoteStepRefused {
				continue // the ring was full for a while
			}
			noted = append(noted, note.Step)
			first := 0 // chunk of that step that is refused: none was acked yet
			for i, is := range c.refused {
				if h, _ := tensor.ParseHeader(c.sent[i]); is && h.Step == note.Step && i >= acks {
					first = i + 1
					break
				}
			}
			if first == 0 {
				c.t.Fatalf("step %d is said to be refused after %d acks, which are all of its chunks", note.Step, acks)
			}
		case wire.NoticeMark:
			if notice, err = wire.ReadNotice(r); err != nil || r.Len() > 0 {
				c.t.Fatalf("the notice: %v, and %d bytes after it", err, r.Len())
			}
			return acks, noted, notice
		default:
			c.t.Fatalf("byte %#x among the acks", b)
		}
	}
}
