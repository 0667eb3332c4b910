//go:build linux

package shm

import (
	"errors"
	"fmt"
	"math/bits"
	"net"

	"github.com/ingestd/ingestd/spsc"
)

// linkCapacity is the least capacity of a filler's channel. Its giveback queue takes one descriptor per commit of the producer, which so seldom waits for
// the daemon to look.
const linkCapacity = 1024

// link is the daemon's side of a channel: its memory, both queues and both bells.
type link struct {
	memory   *Memory
	toPeer   *bell
	toUs     *bell
	deliver  *spsc.Producer
	giveback *spsc.Consumer
	bytes    int64 // length of the channel, as the peer is told it
}

// openLink makes a channel whose queues have room for at least so many descriptors.
func openLink(name string, least int) (_ *link, err error) {
	capacity := max(linkCapacity, 1<<bits.Len(uint(least-1)))
	l := &link{bytes: channelBytes(capacity)}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.memory, err = NewMemory(MemoryConfig{Name: name, Size: l.bytes, PeersWrite: true}); err != nil {
		return nil, err
	}
	deliver, giveback, err := formatChannel(l.memory.Bytes(), capacity)
	if err != nil {
		return nil, err
	}
	if l.deliver, err = spsc.NewProducer(deliver, capacity); err != nil {
		return nil, err
	}
	if l.giveback, err = spsc.NewConsumer(giveback, capacity); err != nil {
		return nil, err
	}
	if l.toPeer, err = newBell(); err != nil {
		return nil, err
	}
	l.toUs, err = newBell()
	return l, err
}

// send writes a reply with the segment's descriptor and the channel's three.
func (l *link) send(conn *net.UnixConn, reply []byte, segment int) error {
	fds := [...]int{segment, l.memory.Descriptor(), -1, -1}
	var sent error
	err := l.toPeer.descriptor(func(fd int) {
		fds[2] = fd
		err := l.toUs.descriptor(func(fd int) {
			fds[3] = fd
			sent = sendWithDescriptors(conn, reply, fds[:]...)
		})
		sent = errors.Join(sent, err)
	})
	return errors.Join(sent, err)
}

// ringPeer wakes the peer if it sleeps, or is about to.
func (l *link) ringPeer() {
	if l.deliver.ConsumerWaiting() {
		l.toPeer.signal()
	}
}

// close frees what openLink made. Nobody uses it any more.
func (l *link) close() error {
	var errs []error
	for _, b := range [...]*bell{l.toPeer, l.toUs} {
		if b != nil {
			errs = append(errs, b.close())
		}
	}
	if l.memory != nil {
		errs = append(errs, l.memory.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing a channel: %w", err)
	}
	return nil
}
