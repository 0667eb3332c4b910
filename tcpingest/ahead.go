package tcpingest

import (
	"errors"
	"net"
	"os"
	"time"
)

// Stream is a connection that is no socket of the kernel's: TLS, a stream of QUIC. Reads and writes end at deadlines with os.ErrDeadlineExceeded, and a Read that
// did may be tried again. Close without CloseWrite before may tell the peer that something is wrong.
type Stream interface {
	net.Conn
	CloseWrite() error
	// Ready tells whether bytes have come, so that a Read will return soon. It may be false though there are some: then they are read when nothing else is to be
	// done.
	Ready() bool
	// HungUp tells whether nothing that is written will arrive any more.
	HungUp() bool
	// Offer writes what goes without waiting for the peer, and returns how much that was. It may change the write deadline.
	Offer(b []byte) int
}

const (
	// aheadBytes is what is read ahead of a Stream. A sample of heldMin or less fits, so that its slot is reserved only when it is there.
	aheadBytes = 64 << 10
	// straightMin is the least place in a column that is read into without a detour.
	straightMin = 16 << 10
	// straightLeafMin: samples whose leaves have so many bytes on average are received in place, and no more of them is read ahead than one record of TLS has.
	straightLeafMin = 32 << 10
)

// ahead is the source of a Stream: since nobody says how many bytes wait in one, some are read ahead. Its buffer is made at the first read. What large
// samples need beyond it is read straight to where it belongs.
type ahead struct {
	stream Stream
	conn   *conn
	most   int    // of the buffer
	buf    []byte // what was read and not taken
	room   []byte // all of the buffer
	err    error  // why there is no more after that
}

func newAhead(s Stream, c *conn) *ahead { return &ahead{stream: s, conn: c, most: aheadBytes} }

// fit is told what the samples will be like, before the first of them. Large leaves would take a detour over the buffer that costs as much as a tenth of decrypting them.
func (a *ahead) fit(p *plan) {
	if p.sample/int64(len(p.leaves)) >= straightLeafMin {
		p.held, a.most = true, straightMin
	}
}

// fill reads once, as much as there is room for. The buffer must not be full.
func (a *ahead) fill() error {
	if a.room == nil {
		a.room = make([]byte, a.most)
	}
	n := copy(a.room, a.buf)
	got, err := a.read(a.room[n:])
	a.buf = a.room[:n+got]
	return err
}

// read reads once, until the read deadline. What ended the stream stays known.
func (a *ahead) read(b []byte) (int, error) {
	if a.err != nil {
		return 0, a.err
	}
	n, err := a.stream.Read(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		a.err = err
	}
	if n > 0 {
		err = nil
	}
	return n, err
}

// atHand implements source. It takes in what has come, so that many samples are acked at once. A record of TLS of which only a part has come is waited for, since its
// sender is about to send the rest; if it does not, or what came holds nothing of ours, that is no sample that stands still: 0, and whoever asked waits as for the next one.
func (a *ahead) atHand() (int, error) {
	for a.err == nil && len(a.buf) < a.most && a.stream.Ready() {
		a.conn.allowRead(a.conn.server.cfg.StallTimeout)
		if err := a.fill(); errors.Is(err, os.ErrDeadlineExceeded) {
			if len(a.buf) == 0 && (a.conn.stopping.Load() || a.conn.taken.Load()) {
				return 0, err
			}
			return len(a.buf), nil
		}
	}
	if len(a.buf) == 0 {
		return 0, a.err
	}
	return len(a.buf), nil
}

func (a *ahead) wait() (int, error) {
	for len(a.buf) == 0 {
		if err := a.fill(); err != nil {
			return 0, err
		}
	}
	return len(a.buf), nil
}

func (a *ahead) readNow(v *vector) (int, error) {
	if len(a.buf) == 0 {
		return 0, a.err
	}
	n := v.copy(a.buf)
	a.buf = a.buf[n:]
	return n, nil
}

func (a *ahead) readWait(v *vector) (int, error) {
	if len(a.buf) == 0 {
		if first := v.part(0); len(first) >= straightMin {
			return a.read(first)
		}
		if _, err := a.wait(); err != nil {
			return 0, err
		}
	}
	return a.readNow(v)
}

func (a *ahead) more() bool { return a.err == nil && a.stream.Ready() }

func (a *ahead) hungUp() bool { return a.stream.HungUp() }

func (a *ahead) offer(b []byte) int {
	n := a.stream.Offer(b)
	a.conn.writeUntil = time.Time{} // whatever it is now
	return n
}
