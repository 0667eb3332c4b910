package client

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// stepDaemon takes the steps of one producer over any number of connections, one after the other, looks at every byte, and ends connections as its faults say.
type stepDaemon struct {
	t      testing.TB
	rng    *rand.Rand
	m      *tensor.Manifest
	faults int               // connections left that end in the midst of something
	lossy  bool              // a connection may find that what was held is gone, and another stream
	refuse map[uint64]string // steps that are too old, and why
	window int64             // samples
	hold   chan struct{}     // nothing is read before it is closed, if it is there
	notice *wire.Notice      // said instead of the first ack, if there is one

	mu       sync.Mutex
	stream   uint64
	held     uint64
	conns    int
	tx       *stepSeen            // of the stream, that is coming in
	complete map[uint64]*stepSeen // ever, by step
	aborted  map[uint64]int
}

// stepSeen is a transaction as it came.
type stepSeen struct {
	step    uint64
	covered *tensor.Coverage
	flat    []byte
	subset  []uint32
}

func serveSteps(t testing.TB, d *stepDaemon, network string) string {
	ignore := goleak.IgnoreCurrent()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	d.t, d.stream, d.complete, d.aborted = t, 7, map[uint64]*stepSeen{}, map[uint64]int{}
	if d.rng == nil {
		d.rng = newRand()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			d.connection(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		goleak.VerifyNone(t, ignore)
	})
	return network + "://" + l.Addr().String()
}

func newRand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

const fakeStepChunk = tensor.ChunkBytesMin

// connection serves one connection.
func (d *stepDaemon) connection(conn net.Conn) {
	hello, err := wire.ReadHello(conn)
	if err != nil {
		return // the producer was closed while it connected
	}
	d.mu.Lock()
	d.conns++
	cut := -1 // samples, after which the connection ends
	if d.faults > 0 {
		d.faults--
		cut = d.rng.IntN(6)
		if d.lossy && d.conns > 1 && d.rng.IntN(3) == 0 {
			d.stream, d.held, d.tx = d.stream+1, 0, nil
		}
	}
	got, err := tensor.ParseManifest(hello.Manifest)
	if err != nil || !got.Equal(d.m) || hello.Session != "worker" || hello.Ack != wire.AckCommitted || !hello.Notes {
		d.t.Errorf("hello %+v: %v", hello, err)
	}
	s, _ := chunkSpec(fakeStepChunk)
	accepted := &wire.AcceptedPush{Table: hello.Table, Fingerprint: s.Fingerprint(), Stream: d.stream, Ack: wire.AckCommitted, WindowSamples: max(1, d.window),
		WindowBytes: 1 << 40, Held: d.held, ChunkBytes: fakeStepChunk}
	d.mu.Unlock()
	if wire.WriteAccepted(conn, accepted) != nil {
		return
	}
	d.samples(conn, cut)
}

// samples reads chunks, until so many came, and then half of the next.
func (d *stepDaemon) samples(conn net.Conn, cut int) {
	if d.hold != nil {
		<-d.hold
	}
	sample := make([]byte, tensor.HeaderBytes+fakeStepChunk)
	for n := 0; ; n++ {
		if n == cut {
			io.ReadFull(conn, sample[:1+d.rng.IntN(len(sample)-1)])
			return
		}
		if _, err := io.ReadFull(conn, sample); err != nil {
			return
		}
		d.mu.Lock()
		words := d.chunk(sample)
		if d.notice != nil {
			words = wire.AppendNotice(nil, d.notice)
		}
		d.mu.Unlock()
		if cut >= 0 && n == cut-1 && d.rng.IntN(2) == 0 {
			return // it is held, and not acked
		}
		if _, err := conn.Write(words); err != nil || d.notice != nil {
			return
		}
	}
}

// chunk takes one chunk and returns what to say.
func (d *stepDaemon) chunk(sample []byte) (words []byte) {
	d.held++
	words = []byte{wire.Ack}
	h, err := tensor.ParseHeader(sample)
	if err == nil {
		err = h.Check(d.m, fakeStepChunk)
	}
	data := sample[tensor.HeaderBytes:]
	if err == nil {
		err = h.CheckData(d.m, data[:h.Length])
	}
	if err == nil && (h.Stream != d.stream || h.Producer != tensor.ProducerID("worker")) {
		err = fmt.Errorf("stream %d, producer %x", h.Stream, h.Producer)
	}
	if err == nil && len(bytes.TrimLeft(data[h.Length:], "\x00")) > 0 {
		err = fmt.Errorf("the padding of %d bytes is not zero", len(data)-int(h.Length))
	}
	if err != nil {
		d.t.Errorf("chunk %d of stream %d: %v", d.held-1, d.stream, err)
		return words
	}
	if why := d.refuse[h.Step]; why != "" {
		d.tx = nil
		return append(wire.AppendNote(nil, &wire.Note{Code: wire.NoteStepRefused, Step: h.Step, Reason: why}), words...)
	}
	switch {
	case h.Flags&tensor.FlagAbort != 0:
		d.aborted[h.Step]++
		d.tx = nil
		return words
	case h.Flags&tensor.FlagBegin != 0:
		d.tx = &stepSeen{step: h.Step, covered: tensor.NewCoverage(d.m), flat: make([]byte, d.m.DataBytes())}
	case d.tx == nil || d.tx.step != h.Step:
		d.t.Errorf("step %d goes on without having begun", h.Step)
		return words
	}
	if h.Flags&tensor.FlagEnd != 0 {
		d.tx.subset, err = tensor.ParseEnd(d.m, data[:h.Length])
		if err != nil {
			d.t.Error(err)
		}
	} else if h.Length > 0 {
		if added := d.tx.covered.Add(h.Flat(d.m), h.Length, h.DataCRC); added != tensor.New {
			d.t.Errorf("a chunk of step %d is %v", h.Step, added)
		}
		copy(d.tx.flat[h.Flat(d.m):], data[:h.Length])
	}
	if d.tx.covered.Complete(d.tx.subset) {
		d.complete[h.Step] = d.tx
	}
	return words
}

// floatsOf are the values that a flat range has.
func floatsOf(b []byte) []uint32 {
	all := make([]uint32, len(b)/4)
	for i := range all {
		all[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return all
}
