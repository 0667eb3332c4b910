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
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

const (
	channelTable   = "fuzz"
	channelBatches = 4
)

// channelHost is the daemon's side: a ring of one-sample batches, its sampler and the attach server.
type channelHost struct {
	spec   *spec.Spec
	ring   *ring.Ring
	memory *shm.Memory
	fifo   *sampler.FIFO
	server *shm.Server
}

func (h *channelHost) Table(name string) (shm.Table, bool) {
	return shm.Table{Name: channelTable, Spec: h.spec, View: &h.ring.View, Memory: h.memory, Source: h.fifo, Prefetch: channelBatches - 1}, name == channelTable
}

func (h *channelHost) Names() []string { return []string{channelTable} }

func need[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func newChannelHost(t *testing.T) *channelHost {
	t.Helper()
	h := &channelHost{}
	var err error
	h.spec, err = spec.ParseText("x:U8[8]")
	need(t, h.spec, err)
	l := ring.Layout{
		BatchSize: 1, Batches: channelBatches, Columns: h.spec.LeafBytes(), Spec: h.spec.JSON(), Fingerprint: h.spec.Fingerprint(),
		Table: channelTable, Created: time.Unix(1, 0),
	}
	size, err := l.Bytes()
	need(t, size, err)
	h.memory, err = shm.NewMemory(shm.MemoryConfig{Name: "ingestd fuzz", Size: size})
	need(t, h.memory, err)
	h.ring, err = ring.Format(h.memory.Bytes(), l)
	need(t, h.ring, err)
	h.fifo, err = sampler.New(h.ring, sampler.Config{}, nil)
	need(t, h.fifo, err)
	h.server, err = shm.NewServer(shm.ServerConfig{Tables: h, Log: slog.New(slog.DiscardHandler)})
	need(t, h.server, err)
	return h
}

// publish fills one batch if there is a free place.
func (h *channelHost) publish() bool {
	run, ok := h.ring.TryReserve(1)
	if ok {
		h.ring.Commit(run, 1, run.Position, 1, ring.Mark{})
	}
	return ok
}

// hostile is the peer: the raw channel, without any of the library's manners.
type hostile struct {
	conn     *net.UnixConn
	channel  []byte
	deliver  *spsc.Consumer
	giveback *spsc.Producer
	prefetch int
	wake     int // eventfd that wakes the daemon
	files    []int
	taken    []spsc.Desc

	// What the daemon must think of it.
	index     map[uint64]uint64 // of the batches taken, by number
	given     map[uint64]bool   // numbers of those that were given back as they should be
	guesses   []spsc.Desc       // given back without having been taken: may be lent by now
	bad       bool              // something was given back that cannot be lent, or said that must not be
	scribbled bool              // anything may follow
}

// attachHostile speaks the handshake by hand and maps the channel as docs/segment-format.md describes it.
func attachHostile(t *testing.T, conn *net.UnixConn) *hostile {
	t.Helper()
	hello := &wire.Hello{VersionMin: wire.Version, VersionMax: wire.Version, Role: wire.RoleTrain, Table: channelTable}
	if err := wire.WriteHello(conn, hello); err != nil {
		t.Fatal(err)
	}
	r := &rightsReader{conn: conn}
	var a wire.AcceptedTrain
	if err := wire.ReadReply(r, &a); err != nil || len(r.fds) != 4 {
		t.Fatalf("attach: %v, %d descriptors", err, len(r.fds))
	}
	p := &hostile{conn: conn, files: r.fds, prefetch: int(a.Prefetch), wake: r.fds[3], index: map[uint64]uint64{}, given: map[uint64]bool{}}
	channel, err := unix.Mmap(r.fds[1], 0, int(a.ChannelBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.channel = need(t, channel, err)
	capacity := int(binary.LittleEndian.Uint32(channel[12:]))
	p.deliver, err = spsc.NewConsumer(channel[binary.LittleEndian.Uint64(channel[16:]):], capacity)
	need(t, p.deliver, err)
	p.giveback, err = spsc.NewProducer(channel[binary.LittleEndian.Uint64(channel[24:]):], capacity)
	need(t, p.giveback, err)
	return p
}

// rightsReader keeps the descriptors that come with the reply.
type rightsReader struct {
	conn *net.UnixConn
	fds  []int
}

func (r *rightsReader) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(8*4))
	n, oobn, _, _, err := r.conn.ReadMsgUnix(b, oob)
	if messages, parseErr := unix.ParseSocketControlMessage(oob[:oobn]); parseErr == nil {
		for i := range messages {
			if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
				r.fds = append(r.fds, fds...)
			}
		}
	}
	return n, err
}

// act does one operation. Errors are expected: the daemon may have thrown the peer out already.
func (p *hostile) act(t *testing.T, published uint64, what, at byte, word uint64) {
	switch what % 6 {
	case 0: // take what was delivered
		until := time.Now().Add(time.Minute)
		for !p.take() && p.due(published) {
			if runtime.Gosched(); time.Now().After(until) {
				t.Fatalf("%d batches are published, %d were taken, and none comes", published, len(p.index))
			}
		}
	case 1: // give one back, as it should be
		if d, ok := take(&p.taken, int(at)); ok {
			p.give(spsc.Desc{A: d.A, B: d.B & (1<<32 - 1)})
		}
	case 2: // give junk, or the same one twice
		d := spsc.Desc{A: word, B: uint64(at)}
		if len(p.taken) > 0 && at%2 == 0 {
			d = p.taken[int(at)%len(p.taken)]
		}
		p.give(d)
	case 3: // overwrite a word of the channel
		p.scribbled = true
		offset := (int(at) + int(word>>56)<<8) * 8 % len(p.channel)
		binary.LittleEndian.PutUint64(p.channel[offset:], word&(1<<56-1)|word>>63<<63)
	case 4: // say something on a socket that has nothing to say
		if at == 255 {
			_, _ = p.conn.Write([]byte{byte(word)})
			p.bad = true
		}
	}
	var one [8]byte
	one[0] = 1
	_, _ = unix.Write(p.wake, one[:])
}

func (p *hostile) take() bool {
	var one [1]spsc.Desc
	n, err := p.deliver.TryPop(one[:])
	if n == 0 || err != nil {
		return false
	}
	p.taken = append(p.taken, one[0])
	p.index[one[0].A] = one[0].B & (1<<32 - 1)
	return true
}

// due tells whether the daemon owes a batch: there is one, and the peer, which kept the rules so far, may hold one more.
func (p *hostile) due(published uint64) bool {
	return !p.scribbled && !p.bad && len(p.guesses) == 0 && uint64(len(p.index)) < published && len(p.index)-len(p.given) < p.prefetch
}

// give gives a descriptor back, and judges it as the daemon must.
func (p *hostile) give(d spsc.Desc) {
	if n, err := p.giveback.TryPush([]spsc.Desc{d}); n != 1 || err != nil {
		return
	}
	index, taken := p.index[d.A]
	switch {
	case !taken && d.B < channelBatches:
		p.guesses = append(p.guesses, d)
	case !taken, index != d.B, p.given[d.A]:
		p.bad = true
	default:
		p.given[d.A] = true
	}
}

// leave closes everything. A peer that surely broke the rules first waits to be cut off and told why.
func (p *hostile) leave(t *testing.T, published uint64) {
	t.Helper()
	for _, d := range p.guesses {
		p.bad = p.bad || d.A >= published
	}
	if p.bad && !p.scribbled {
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

// FuzzTrainerChannel lets a hostile trainer do what the input says, on a real socket and a real channel, while batches are published. However it ends, the
// daemon must get every batch back exactly once: a second time panics in the ring, a lost one leaves a place that is never free again.
func FuzzTrainerChannel(f *testing.F) {
	op := func(what, at byte, word uint64) []byte {
		return binary.LittleEndian.AppendUint64([]byte{what, at}, word)
	}
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	publish := op(5, 0, 0)
	f.Add(join(publish, publish, op(0, 0, 0), op(1, 0, 0), op(0, 0, 0), op(1, 0, 0)))
	f.Add(join(publish, op(0, 0, 0), op(1, 0, 0), op(2, 0, 0), op(2, 1, 7)))
	f.Add(join(publish, op(0, 0, 0), op(2, 0, 0), op(2, 0, 0)))
	f.Add(join(publish, publish, op(2, 1, 0), op(2, 1, 1)))
	f.Add(join(publish, publish, op(0, 0, 0), op(0, 0, 0), op(2, 1, 0))) // the number of one, the place of the other
	f.Add(join(publish, op(0, 0, 0), op(2, 1, 0)))
	f.Add(join(publish, op(0, 0, 0), op(2, 1, 1<<61)))
	f.Add(join(publish, publish, op(0, 0, 0), op(1, 0, 0), op(0, 0, 0), op(0, 0, 0))) // leaves with a batch in its hands
	f.Add(join(publish, op(4, 255, 1), publish, op(4, 255, 2), op(4, 255, 3)))
	for offset := byte(0); offset < 120; offset += 8 { // the channel's header and the words of both queues
		f.Add(join(publish, op(0, 0, 0), op(3, offset, 1<<40), publish, op(1, 0, 0), publish))
		f.Add(join(publish, op(3, offset, 1), op(0, 0, 0), op(1, 0, 0), publish))
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		h := newChannelHost(t)
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
		p := attachHostile(t, theirs)
		for ; len(ops) >= 10; ops = ops[10:] {
			if ops[0]%6 == 5 {
				h.publish()
				continue
			}
			p.act(t, h.ring.Published(), ops[0], ops[1], binary.LittleEndian.Uint64(ops[2:]))
		}
		p.leave(t, h.ring.Published())
		p.checkServed(t, <-served)
		h.checkAllFree(t)
	})
}

// checkServed: a peer that kept the rules ends quietly, one that broke them is blamed. For others either will do.
func (p *hostile) checkServed(t *testing.T, err error) {
	t.Helper()
	var notice *wire.Notice
	blamed := errors.As(err, &notice) && notice.Code == wire.CodeBadPeer && notice.Reason != ""
	if err != nil && !blamed {
		t.Fatalf("the attachment ended with %v (%T)", err, err)
	}
	if unsure := p.scribbled || len(p.guesses) > 0 && !p.bad; !unsure && p.bad != blamed {
		t.Fatalf("it broke the rules: %v; it was blamed: %v", p.bad, err)
	}
}

// checkAllFree sees that what the peer had is offered again, and that every place can be filled afterwards.
func (h *channelHost) checkAllFree(t *testing.T) {
	t.Helper()
	if n := len(h.server.Stats().Trainers); n != 0 {
		t.Fatalf("%d trainers are left", n)
	}
	m, err := h.fifo.Join(wire.GroupDefault, sampler.Who{})
	need(t, m, err)
	defer m.Leave()
	next := func() (ring.Batch, bool) {
		b, ok, err := m.TryNext()
		if err != nil {
			t.Fatal(err)
		}
		return b, ok
	}
	left := int(h.ring.Published() - h.server.Stats().GivenBack) // what is left is offered again
	for round := range 2 {
		seen := map[uint64]bool{}
		for b, ok := next(); ok; b, ok = next() {
			if seen[b.Number] {
				t.Fatalf("batch %d was offered twice", b.Number)
			}
			seen[b.Number] = true
			m.Release(b)
		}
		if round == 0 && len(seen) != left {
			t.Fatalf("%d batches are offered again, %d were published and not given back", len(seen), left)
		}
		if round == 1 && len(seen) != channelBatches {
			t.Fatalf("only %d of %d places came back", len(seen), channelBatches)
		}
		for h.publish() {
			continue
		}
	}
	h.ring.Close()
	for {
		b, ok := next()
		if !ok {
			break
		}
		m.Release(b)
	}
	if s := h.fifo.Stats(); s.Leased != 0 {
		t.Fatalf("%d batches are still leased: %+v", s.Leased, s)
	}
}
