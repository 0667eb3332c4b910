//go:build linux && !race

// The channel is mapped memory, on which the race detector misses races and flags correct code.

package fuzz

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

const (
	fillBatches = 6
	fillRows    = 4
)

// fillHost is the daemon's side: a ring and the attach server.
type fillHost struct {
	spec   *spec.Spec
	ring   *ring.Ring
	memory *shm.Memory
	server *shm.Server
	lender *drainer.Lender
	read   uint64 // samples
}

func (h *fillHost) Table(name string) (shm.Table, bool) {
	fill := func(context.Context, *wire.Hello, func()) (*drainer.Lender, error) {
		h.lender = drainer.NewLender(h.ring, drainer.LenderID{Stream: h.ring.NextStream()})
		return h.lender, nil
	}
	return shm.Table{Name: channelTable, Spec: h.spec, View: &h.ring.View, Memory: h.memory, Fill: fill}, name == channelTable
}

func (h *fillHost) Names() []string { return []string{channelTable} }

func newFillHost(t *testing.T) *fillHost {
	t.Helper()
	h := &fillHost{}
	var err error
	h.spec, err = spec.ParseText("x:U8[8]")
	need(t, h.spec, err)
	l := ring.Layout{
		BatchSize: fillRows, Batches: fillBatches, Columns: h.spec.LeafBytes(), Spec: h.spec.JSON(), Fingerprint: h.spec.Fingerprint(), Table: channelTable,
		Created: time.Unix(1, 0), Sessions: 1,
	}
	size, err := l.Bytes()
	need(t, size, err)
	h.memory, err = shm.NewMemory(shm.MemoryConfig{Name: "ingestd fuzz", Size: size, Fillable: true})
	need(t, h.memory, err)
	h.ring, err = ring.Format(h.memory.Bytes(), l)
	need(t, h.ring, err)
	cfg := shm.ServerConfig{Tables: h, Log: slog.New(slog.DiscardHandler), Fill: shm.FillConfig{SettleAfter: time.Hour}}
	h.server, err = shm.NewServer(cfg)
	need(t, h.server, err)
	return h
}

// fillPeer is a producer without any of the library's manners, and what the daemon must think of it.
type fillPeer struct {
	*hostile
	leases   uint64 // places that were taken from the queue
	filling  uint64 // the lease whose rows are due
	row      int
	complete uint64 // rows that were called complete as they should be
	unsure   bool   // anything may follow
	bad      bool
}

// attachFillPeer speaks the handshake by hand and maps the channel as docs/segment-format.md describes it.
func attachFillPeer(t *testing.T, conn *net.UnixConn) *fillPeer {
	t.Helper()
	hello := &wire.Hello{VersionMin: wire.Version, VersionMax: wire.Version, Role: wire.RoleFill, Table: channelTable, Prefetch: 2}
	if err := wire.WriteHello(conn, hello); err != nil {
		t.Fatal(err)
	}
	r := &rightsReader{conn: conn}
	var a wire.AcceptedFill
	if err := wire.ReadReply(r, &a); err != nil || len(r.fds) != 4 {
		t.Fatalf("attach: %v, %d descriptors", err, len(r.fds))
	}
	p := &fillPeer{hostile: &hostile{conn: conn, files: r.fds, wake: r.fds[3]}, filling: 1}
	channel, err := unix.Mmap(r.fds[1], 0, int(a.ChannelBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.channel = need(t, channel, err)
	capacity := int(binary.LittleEndian.Uint32(channel[12:]))
	p.deliver, err = spsc.NewConsumer(channel[binary.LittleEndian.Uint64(channel[16:]):], capacity)
	need(t, p.deliver, err)
	p.giveback, err = spsc.NewProducer(channel[binary.LittleEndian.Uint64(channel[24:]):], capacity)
	need(t, p.giveback, err)
	return p
}

// act does one operation. Errors are expected: the daemon may have thrown the peer out already.
func (p *fillPeer) act(what, at byte, word uint64) {
	switch what % 6 {
	case 0: // take a place, if one is there
		var one [1]spsc.Desc
		if n, err := p.deliver.TryPop(one[:]); n == 1 && err == nil {
			p.leases++
		}
	case 1: // complete rows, as it should be
		if p.filling <= p.leases {
			p.say(p.filling, 1<<32|uint64(1+int(at)%(fillRows-p.row)))
		}
	case 2: // say anything
		p.say(word>>32%8, uint64(at)%5<<32|word%7)
	case 3: // overwrite a word of the channel
		p.unsure = true
		offset := (int(at) + int(word>>56)<<8) * 8 % len(p.channel)
		binary.LittleEndian.PutUint64(p.channel[offset:], word&(1<<56-1)|word>>63<<63)
	case 4: // say something on a socket that has nothing to say
		if at == 255 {
			_, _ = p.conn.Write([]byte{byte(word)})
			p.bad = true
		}
	case 5: // settle, as it should be
		if p.filling <= p.leases {
			p.say(p.filling, 2<<32)
		}
	}
	_, _ = unix.Write(p.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// say hands a descriptor over, and judges it as the daemon must. Of a place that was not taken from the queue it cannot know whether it was lent.
func (p *fillPeer) say(lease, word uint64) {
	if n, err := p.giveback.TryPush([]spsc.Desc{{A: lease, B: word}}); n != 1 || err != nil || p.bad || p.unsure {
		return
	}
	rows := word & (1<<32 - 1)
	switch {
	case lease == p.filling && lease > p.leases:
		p.unsure = true
	case word>>32 == 1 && rows > 0 && lease == p.filling && rows <= uint64(fillRows-p.row):
		p.complete += rows
		if p.row += int(rows); p.row == fillRows {
			p.filling, p.row = p.filling+1, 0
		}
	case word == 2<<32 && lease >= 1 && lease <= p.filling, word == 3<<32 && lease == 0:
	default:
		p.bad = true
	}
}

// FuzzFillChannel lets a hostile producer do what the input says, on a real socket and a real channel. However it ends, the daemon must have taken what was called
// complete as it should be, once, and every place must be free again.
func FuzzFillChannel(f *testing.F) {
	op := func(what, at byte, word uint64) []byte {
		return binary.LittleEndian.AppendUint64([]byte{what, at}, word)
	}
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	take, one, all, settle := op(0, 0, 0), op(1, 0, 0), op(1, 3, 0), op(5, 0, 0)
	f.Add(join(take, one, one, one, one, take, all))
	f.Add(join(take, one, settle, one, settle, one, take, one, settle))
	f.Add(join(take, op(2, 1, 1<<32|1), op(2, 1, 1<<32|6)))
	f.Add(join(take, one, op(2, 2, 1<<32)))
	f.Add(join(take, op(2, 3, 0), op(2, 3, 1)))
	f.Add(join(take, all, op(2, 1, 1<<32|1)))
	f.Add(join(take, take, op(2, 1, 2<<32|1)))
	f.Add(join(take, op(2, 0, 1<<32|1)))
	f.Add(join(take, op(2, 4, 1<<32|1)))
	f.Add(join(take, one, op(4, 255, 1), one))
	for offset := byte(0); offset < 120; offset += 8 { // the channel's header and the words of both queues
		f.Add(join(take, one, op(3, offset, 1<<40), one, settle))
		f.Add(join(op(3, offset, 1), take, one, one))
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		h := newFillHost(t)
		defer h.memory.Close()
		ours, theirs := socketPair(t)
		served := make(chan error, 1)
		go func() {
			hello, err := wire.ReadHello(ours)
			if err == nil {
				err = h.server.Serve(context.Background(), ours, hello)
			}
			served <- err
		}()
		p := attachFillPeer(t, theirs)
		for ; len(ops) >= 10; ops = ops[10:] {
			p.act(ops[0], ops[1], binary.LittleEndian.Uint64(ops[2:]))
		}
		p.leave(t)
		p.check(t, h, h.serve(t, served))
	})
}

// serve reads what is published until the attachment has ended, and what it ended with; the samples must be one stream without a gap.
func (h *fillHost) serve(t *testing.T, served <-chan error) error {
	t.Helper()
	ended := make(chan error, 1)
	go func() {
		err := <-served
		h.ring.Flush()
		h.ring.Close()
		ended <- err
	}()
	for seat := park.NewWaiter(); ; {
		b, err := h.ring.Lease(context.Background(), seat)
		if err != nil {
			return <-ended
		}
		for _, number := range b.Numbers() {
			if number != h.read {
				t.Fatalf("sample %d comes after %d", number, h.read)
			}
			h.read++
		}
		h.ring.Release(b)
	}
}

// leave closes everything. A peer that surely broke the rules first waits to be cut off and told why.
func (p *fillPeer) leave(t *testing.T) {
	t.Helper()
	if p.bad && !p.unsure {
		_ = p.conn.SetReadDeadline(time.Now().Add(time.Minute))
		said, err := io.ReadAll(p.conn)
		if errors.Is(err, unix.ECONNRESET) { // after the notice: it had said more than the daemon read
			err = nil
		}
		if err != nil || len(said) == 0 || said[0] != wire.NoticeMark {
			t.Fatalf("it broke the rules and heard %q, %v", said, err)
		}
		if notice, err := wire.ReadNotice(bytes.NewReader(said[1:])); err != nil || notice.Code != wire.CodeBadPeer {
			t.Fatalf("it broke the rules and heard %v, %v", notice, err)
		}
	}
	p.conn.Close()
	_ = unix.Munmap(p.channel)
	for _, fd := range p.files {
		_ = unix.Close(fd)
	}
}

// check: a peer that kept the rules ends quietly, one that broke them is blamed; what is in the ring is one stream without a gap.
func (p *fillPeer) check(t *testing.T, h *fillHost, err error) {
	t.Helper()
	var notice *wire.Notice
	blamed := errors.As(err, &notice) && notice.Code == wire.CodeBadPeer && notice.Reason != ""
	if err != nil && !blamed || !p.unsure && blamed != p.bad {
		t.Fatalf("it broke the rules: %v; the attachment ended with %v (%T)", p.bad, err, err)
	}
	if st := h.lender.Stats(); h.read != st.Committed || !p.unsure && !p.bad && h.read != p.complete || st.Lent != 0 {
		t.Fatalf("%d samples were read, %d were called complete: %+v", h.read, p.complete, st)
	}
	for i := range fillBatches {
		if st := h.ring.BatchState(i); st.State != ring.Free {
			t.Fatalf("place %d is %v", i, st.State)
		}
	}
}
