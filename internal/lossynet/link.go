package lossynet

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
)

// Conditions are what happens to packets, in each direction alike. The zero Conditions carry all of them at once and in order.
type Conditions struct {
	Loss  float64       `json:"loss,omitempty"`     // share of the packets that are lost, 0 to 1
	Delay time.Duration `json:"delay_ns,omitempty"` // of every packet

	// This share of the packets is held back for a further time, up to LateBy, so that later ones overtake them.
	Late   float64       `json:"late,omitempty"`
	LateBy time.Duration `json:"late_by_ns,omitempty"`

	// Bytes per second, headers of IP included; 0: as many as there are. What has to wait for longer than QueueTime is dropped.
	Rate      int64         `json:"rate,omitempty"`
	QueueTime time.Duration `json:"queue_time_ns,omitempty"` // default 50 ms; only with Rate

	Seed uint64 `json:"seed"` // of all that is random
}

func (c *Conditions) withDefaults() (Conditions, error) {
	out := *c
	switch {
	case !(out.Loss >= 0 && out.Loss <= 1 && out.Late >= 0 && out.Late <= 1):
		return out, fmt.Errorf("lossynet: Loss is %v, Late %v: both are shares, 0 to 1", out.Loss, out.Late)
	case out.Delay < 0 || out.LateBy < 0 || out.QueueTime < 0 || out.Rate < 0:
		return out, fmt.Errorf("lossynet: Delay is %v, LateBy %v, QueueTime %v, Rate %d: none may be negative", out.Delay, out.LateBy, out.QueueTime, out.Rate)
	case (out.Late > 0) != (out.LateBy > 0):
		return out, fmt.Errorf("lossynet: Late is %v and LateBy %v: one needs the other", out.Late, out.LateBy)
	}
	if out.QueueTime == 0 {
		out.QueueTime = 50 * time.Millisecond
	}
	return out, nil
}

// Stats are counts of packets in one direction.
type Stats struct {
	Packets   uint64 `json:"packets"`   // that were sent
	Lost      uint64 `json:"lost"`      // by Conditions.Loss
	Dropped   uint64 `json:"dropped"`   // because the link's queue was full (Rate), or the sender's own
	Delivered uint64 `json:"delivered"` // what is left is on its way
	Overtaken uint64 `json:"overtaken"` // delivered after one that was sent later
}

// Link is two hosts and what is between them. Its methods may be called from any goroutine.
type Link struct {
	A, B   *Side
	ab, ba *way
}

// Addresses of the two sides, in namespaces of their own.
var (
	addrA = netip.AddrFrom4([4]byte{10, 0, 0, 1})
	addrB = netip.AddrFrom4([4]byte{10, 0, 0, 2})
)

// Start makes both namespaces and carries packets between them until Close. Where this process may not do that, the error is ErrUnavailable, and says why.
func Start(c Conditions) (*Link, error) {
	full, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	a, err := startSide(addrA)
	if err != nil {
		return nil, err
	}
	b, err := startSide(addrB)
	if err != nil {
		return nil, errors.Join(err, a.close())
	}
	l := &Link{A: a, B: b, ab: newWay(a, b, &full, rand.NewPCG(full.Seed, 0)), ba: newWay(b, a, &full, rand.NewPCG(full.Seed, 1))}
	l.ab.start()
	l.ba.start()
	return l, nil
}

// Stats returns what was sent from A to B, and from B to A.
func (l *Link) Stats() (ab, ba Stats, err error) {
	ab, ba = l.ab.snapshot(), l.ba.snapshot()
	for _, s := range []struct {
		side *Side
		way  *Stats
	}{{l.A, &ab}, {l.B, &ba}} {
		refused, failed := s.side.refused()
		s.way.Packets += refused
		s.way.Dropped += refused
		err = errors.Join(err, failed)
	}
	return ab, ba, err
}

// Close ends the link: what is on its way is lost. The namespaces end when the sockets and processes in them have.
func (l *Link) Close() error {
	err := errors.Join(l.A.close(), l.B.close())
	return errors.Join(err, l.ab.wait(), l.ba.wait())
}
