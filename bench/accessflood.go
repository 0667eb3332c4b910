package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Flood is what became of the connects of a banned address.
type Flood struct {
	Transport string  `json:"transport"`
	Against   string  `json:"against"`
	Seconds   float64 `json:"seconds"`
	Begun     uint64  `json:"begun"`      // SYNs, or over QUIC first packets, that were sent
	Failed    uint64  `json:"failed"`     // that could not be sent
	Arrived   uint64  `json:"arrived"`    // that the other side counts: dropped by its kernel, or turned away
	NoAnswer  uint64  `json:"unanswered"` // of those begun over TCP, when they were looked at, 100 ms later or at the end
	Closed    uint64  `json:"closed"`
	Open      uint64  `json:"open"`
}

// flood connects over and over, and waits for nothing: an attempt that is not answered holds up none.
type flood interface {
	// next begins a connection.
	next()
	// end closes all and returns the counts.
	end() Flood
}

// startFlood prepares a flood from one address to another.
func startFlood(transport string, from netip.Addr, to netip.AddrPort, rate int) (flood, error) {
	if transport == transportQUIC {
		return newDatagrams(from, to)
	}
	return newConnects(from, to, rate)
}

// keepPause is how long a flood that is ahead of its rate sleeps at least: waking up more often, it would take twice as much from the producer beside it.
const keepPause = 10 * time.Millisecond

// keep runs a flood at a rate, as fast as it goes if that is 0, until ctx ends.
func keep(ctx context.Context, f flood, rate int) Flood {
	began := time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		if ahead := time.Until(began.Add(time.Duration(float64(n) / float64(max(rate, 1)) * float64(time.Second)))); rate > 0 && ahead > 0 {
			if sleep(ctx, max(ahead, keepPause)) != nil {
				break
			}
		}
		f.next()
	}
	counts := f.end()
	counts.Seconds = time.Since(began).Seconds()
	return counts
}

// connects is a flood over TCP. Its sockets are used in turn: a new one for each attempt would cost twice as much, which the producer beside would pay for.
type connects struct {
	from, to unix.Sockaddr
	sockets  []int
	used     []bool
	at       int
	counts   Flood
}

// Of the sockets of connects.
const (
	connectStays = 100 * time.Millisecond // before it is looked at what became of an attempt
	connectsMin  = 16
	connectsMax  = 1024
)

func newConnects(from netip.Addr, to netip.AddrPort, rate int) (*connects, error) {
	c := &connects{from: &unix.SockaddrInet4{Addr: from.As4()}, to: &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}}
	many := connectsMax
	if rate > 0 {
		many = min(max(int(float64(rate)*connectStays.Seconds()), connectsMin), connectsMax)
	}
	for range many {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			c.sockets, c.used = append(c.sockets, fd), append(c.used, false)
			err = errors.Join(
				unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1), // each connect takes another port
				unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
				unix.Bind(fd, c.from))
		}
		if err != nil {
			c.end()
			return nil, fmt.Errorf("sockets of a banned address: %w", err)
		}
	}
	return c, nil
}

func (c *connects) next() {
	i := c.at
	c.at = (i + 1) % len(c.sockets)
	c.look(i)
	switch err := unix.Connect(c.sockets[i], c.to); err {
	case nil, unix.EINPROGRESS:
		c.counts.Begun++
		c.used[i] = true
	default:
		c.counts.Failed++
	}
}

// look notes what became of the attempt on a socket, and makes it ready for another.
func (c *connects) look(i int) {
	if !c.used[i] {
		return
	}
	c.used[i] = false
	state := []unix.PollFd{{Fd: int32(c.sockets[i]), Events: unix.POLLOUT}}
	_, _ = unix.Poll(state, 0)
	switch {
	case state[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0:
		c.counts.Closed++
	case state[0].Revents&unix.POLLOUT != 0:
		c.counts.Open++
	default:
		c.counts.NoAnswer++
	}
	_ = disconnect(c.sockets[i]) // else the next connect fails, and is counted
}

func (c *connects) end() Flood {
	for i, fd := range c.sockets {
		c.look(i)
		_ = unix.Close(fd)
	}
	c.sockets = nil
	return c.counts
}

// datagrams is a flood of packets that look as if they began connections of QUIC.
type datagrams struct {
	socket int
	packet []byte
	counts Flood
}

func newDatagrams(from netip.Addr, to netip.AddrPort) (*datagrams, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket of a banned address: %w", err)
	}
	err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}), unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket of a banned address: %w", err), unix.Close(fd))
	}
	// RFC 9000, 17.2.2: an Initial of version 1 with two IDs of 8 bytes, no token, and what is left of 1,200 bytes.
	initial := []byte{0xc3, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0x44, 0x96}
	return &datagrams{socket: fd, packet: append(initial, make([]byte, 0x496)...)}, nil
}

func (d *datagrams) next() {
	binary.BigEndian.PutUint64(d.packet[6:], d.counts.Begun+d.counts.Failed) // of another connection
	if _, err := unix.Write(d.socket, d.packet); err != nil {
		d.counts.Failed++
	} else {
		d.counts.Begun++
	}
}

func (d *datagrams) end() Flood {
	_ = unix.Close(d.socket)
	return d.counts
}
