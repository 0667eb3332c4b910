//go:build linux && !race

package cheader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

const (
	fakeBatches   = 4
	fakeBatchSize = 8
	fakeSpec      = "x:F32[4],y:U8"
	fakeCapacity  = 4
	fakeStream    = 1
)

// blanks follow the spec, so that there is room for longer ones.
var blanks = bytes.Repeat([]byte(" "), 256)

// fake is one attachment as a fake daemon sees it: honest, until a test changes what it is about to send.
type fake struct {
	t       *testing.T
	conn    *net.UnixConn
	hello   *wire.Hello
	spec    *spec.Spec
	ring    *ring.Ring
	segment *shm.Memory
	channel *shm.Memory

	deliver  *spsc.Producer
	giveback *spsc.Consumer
	toPeer   int // eventfds
	toUs     int

	version, status uint16
	train           wire.AcceptedTrain
	fill            wire.AcceptedFill
	body            []byte // sent in place of train and fill
	raw             []byte // sent in place of all of the reply
	fds             []int
}

// listener accepts on a socket of its own and calls serve with each connection whose hello was read. It ends with the test.
func listener(t *testing.T, serve func(conn *net.UnixConn, hello *wire.Hello)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fake.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				hello, err := wire.ReadHello(conn)
				if err != nil {
					if !errors.Is(err, io.ErrUnexpectedEOF) {
						t.Errorf("the hello: %v", err)
					}
					return
				}
				serve(conn, hello)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return path
}

// serveFake makes a segment and a channel for each connection, lets change do with them what it likes, replies, and lets live go on. When live
// returns, the connection is closed; nil waits for the peer to close its side.
func serveFake(t *testing.T, change func(*fake), live func(*fake)) string {
	t.Helper()
	return listener(t, func(conn *net.UnixConn, hello *wire.Hello) {
		f := newFake(t, conn, hello)
		defer f.free()
		if change != nil {
			change(f)
		}
		f.reply()
		if live != nil {
			live(f)
		} else {
			f.awaitEnd()
		}
	})
}

func check(t *testing.T, err error) {
	if err != nil {
		t.Helper()
		t.Error(err)
	}
}

func newFake(t *testing.T, conn *net.UnixConn, hello *wire.Hello) *fake {
	f := &fake{t: t, conn: conn, hello: hello, version: wire.Version}
	var err error
	f.spec, err = spec.ParseText(fakeSpec)
	check(t, err)
	layout := ring.Layout{
		BatchSize: fakeBatchSize, Batches: fakeBatches, Columns: f.spec.LeafBytes(), Spec: append(f.spec.JSON(), blanks...),
		Fingerprint: f.spec.Fingerprint(), Table: testTable, Created: time.Now(), Sessions: 2,
	}
	size, err := layout.Bytes()
	check(t, err)
	f.segment, err = shm.NewMemory(shm.MemoryConfig{Name: "fake segment", Size: size, PeersWrite: hello.Role == wire.RoleFill})
	check(t, err)
	f.ring, err = ring.Format(f.segment.Bytes(), layout)
	check(t, err)
	f.newChannel(fakeCapacity)
	f.train = wire.AcceptedTrain{
		Table: testTable, Spec: f.spec, Fingerprint: f.spec.Fingerprint(), Trainer: 1, Group: "default", BatchSize: fakeBatchSize, Batches: fakeBatches,
		SegmentBytes: f.ring.SegmentBytes(), ChannelBytes: f.channelBytes(), Prefetch: 3,
	}
	f.fill = wire.AcceptedFill{
		Table: testTable, Spec: f.spec, Fingerprint: f.spec.Fingerprint(), Stream: fakeStream, Held: 100, BatchSize: fakeBatchSize, Batches: fakeBatches,
		SegmentBytes: f.ring.SegmentBytes(), ChannelBytes: f.channelBytes(), Prefetch: 2,
	}
	for _, fd := range []*int{&f.toPeer, &f.toUs} {
		*fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		check(t, err)
	}
	f.fds = []int{f.segment.Descriptor(), f.channel.Descriptor(), f.toPeer, f.toUs}
	return f
}

// newChannel lays a channel out as docs/segment-format.md says.
func (f *fake) newChannel(capacity int) {
	queue := (spsc.SharedBytes(capacity) + 63) / 64 * 64
	var err error
	f.channel, err = shm.NewMemory(shm.MemoryConfig{Name: "fake channel", Size: int64(64 + 2*queue), PeersWrite: true})
	check(f.t, err)
	mem := f.channel.Bytes()
	copy(mem, "INGDCHN1")
	binary.LittleEndian.PutUint32(mem[8:], 1)
	binary.LittleEndian.PutUint32(mem[12:], uint32(capacity))
	binary.LittleEndian.PutUint64(mem[16:], 64)
	binary.LittleEndian.PutUint64(mem[24:], uint64(64+queue))
	binary.LittleEndian.PutUint64(mem[32:], uint64(64+2*queue))
	f.deliver, err = spsc.NewProducer(mem[64:64+queue], capacity)
	check(f.t, err)
	f.giveback, err = spsc.NewConsumer(mem[64+queue:64+2*queue], capacity)
	check(f.t, err)
}

func (f *fake) channelBytes() int64 { return int64(binary.LittleEndian.Uint64(f.channel.Bytes()[32:])) }

// deliverQueue and givebackQueue return the bytes of a queue, to be spoiled.
func (f *fake) deliverQueue() []byte { return f.channel.Bytes()[64:] }
func (f *fake) givebackQueue() []byte {
	return f.channel.Bytes()[binary.LittleEndian.Uint64(f.channel.Bytes()[24:]):]
}

func (f *fake) free() {
	check(f.t, f.segment.Close())
	check(f.t, f.channel.Close())
	check(f.t, unix.Close(f.toPeer))
	check(f.t, unix.Close(f.toUs))
}

func (f *fake) reply() {
	b := f.raw
	if b == nil && f.body == nil {
		var err error
		if f.hello.Role == wire.RoleFill {
			b, err = wire.AppendAccepted(nil, &f.fill)
		} else {
			b, err = wire.AppendAccepted(nil, &f.train)
		}
		check(f.t, err)
	}
	if b == nil {
		b = frame(f.version, f.status, f.body)
	}
	var oob []byte
	if len(f.fds) > 0 {
		oob = unix.UnixRights(f.fds...)
	}
	if n, _, err := f.conn.WriteMsgUnix(b, oob, nil); err == nil {
		_, _ = f.conn.Write(b[n:]) // a peer that has had enough may be gone
	}
}

func frame(version, status uint16, body []byte) []byte {
	b := []byte(wire.Magic)
	b = binary.LittleEndian.AppendUint16(b, version)
	b = binary.LittleEndian.AppendUint16(b, status)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	return append(b, body...)
}

// awaitEnd waits until the peer has closed its side.
func (f *fake) awaitEnd() {
	if n, err := f.conn.Read(make([]byte, 1)); n != 0 {
		f.t.Errorf("the peer said something after its hello: %v", err)
	}
}

func (f *fake) say(b []byte) {
	_, err := f.conn.Write(b)
	check(f.t, err)
}

// push puts a descriptor into the deliver queue and wakes the peer, whether or not it sleeps.
func (f *fake) push(a, b uint64) {
	n, err := f.deliver.TryPush([]spsc.Desc{{A: a, B: b}})
	check(f.t, err)
	if n != 1 {
		f.t.Error("the deliver queue is full")
	}
	f.ringPeer()
}

func (f *fake) ringPeer() {
	_, err := unix.Write(f.toPeer, binary.NativeEndian.AppendUint64(nil, 1))
	check(f.t, err)
}

// take waits for a descriptor in the giveback queue; false when the peer closed it, or ended, first.
func (f *fake) take() (spsc.Desc, bool) {
	var one [1]spsc.Desc
	for {
		ended := f.giveback.Closed() || !f.alive()
		n, err := f.giveback.TryPop(one[:])
		check(f.t, err)
		switch {
		case n == 1:
			if f.deliver.ConsumerWaiting() {
				f.ringPeer()
			}
			return one[0], true
		case err != nil || ended:
			return one[0], false
		}
		f.giveback.SetWaiting(true)
		fds := []unix.PollFd{{Fd: int32(f.toUs), Events: unix.POLLIN}, {Fd: int32(socketOf(f)), Events: unix.POLLIN}}
		_, _ = unix.Poll(fds, 10) // looks again after that: this is no test of the eventfd's edge
		f.giveback.SetWaiting(false)
		_, _ = unix.Read(f.toUs, make([]byte, 8))
	}
}

// publish makes the next batch of n samples of stream 7, leases it, and delivers it. It returns the batch.
func (f *fake) publish(n int) ring.Batch {
	b := f.lease(n)
	f.push(b.Number, uint64(b.Index)|uint64(b.Count)<<32)
	return b
}

// lease publishes the next batch with n samples of stream 7 and leases it.
func (f *fake) lease(n int) ring.Batch {
	for row := range n {
		run, ok := f.ring.TryReserve(1)
		if !ok {
			f.t.Error("the fake's ring is full")
			return ring.Batch{}
		}
		number := f.ring.Reserved() - 1
		for leaf := range f.spec.NumLeaves() {
			proof.Leaf(f.ring.RunColumn(run, leaf), f.spec.Leaf(leaf).DType, 7, number, leaf)
		}
		f.ring.Commit(run, 7, number, uint64(1000+row), ring.Mark{})
	}
	if n < fakeBatchSize {
		f.ring.Flush()
	}
	b, ok := f.ring.TryLease()
	if !ok {
		f.t.Error("the fake's ring has no batch")
	}
	return b
}
