//go:build linux

package remote

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/wire"
)

// TestLeaving: a trainer that says how many batches it has begun has the others offered again, also by a group that drops what a dead trainer held. One whose connection just ends cannot
// say so: all that it was sent whole may have been begun.
func TestLeaving(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix", "pipe"} {
		for _, c := range []struct {
			name            string
			say             []uint64
			died            uint64
			dropped, unread int
		}{
			{"begun none", []uint64{wire.AnswerLeaves}, 0, 0, 3},
			{"begun one", []uint64{wire.AnswerLeaves | 1}, 1, 1, 2},
			{"begun and given back", []uint64{0, wire.AnswerLeaves | 1}, 0, 0, 2},
			{"begun all", []uint64{wire.AnswerLeaves | 3}, 1, 3, 0},
			{"all but the first given back", []uint64{1, 2, wire.AnswerLeaves | 3}, 1, 1, 0},
			{"no word", nil, 1, 3, 0},
			{"no word, all given back", []uint64{2, 1, 0}, 0, 0, 0},
		} {
			d := setup{network: network, text: "a:U8[9]", group: sampler.GroupConfig{OnDeath: sampler.Drop}}.start(t)
			p := d.attach(wire.Hello{Prefetch: 3})
			d.push(3)
			for range 3 {
				p.take()
			}
			p.answer(c.say...)
			p.Close()
			check(t, <-d.served)
			st, g := d.seats.Stats(), d.group()
			if st.Died != c.died || st.Detached != 1-c.died || g.Dropped != uint64(c.dropped) || g.Unread != c.unread || g.Leased != 0 {
				t.Errorf("%s, %s: died %d, detached %d; %+v", network, c.name, st.Died, st.Detached, g)
			}
		}
	}
}

// TestLeavingInsideABatch: one that was not sent whole cannot have been begun.
func TestLeavingInsideABatch(t *testing.T) {
	for _, say := range [][]uint64{{wire.AnswerLeaves | 2}, nil} {
		d := setup{network: "pipe", text: "a:U8[100000]", group: sampler.GroupConfig{OnDeath: sampler.Drop}}.start(t)
		p := d.attach(wire.Hello{Prefetch: 2})
		d.push(2)
		p.take()
		var h wire.BatchHeader
		check(t, p.headers.Next(&h))
		p.answer(say...)
		p.Close()
		check(t, <-d.served)
		if g := d.group(); g.Dropped != 1 || g.Unread != 1 {
			t.Errorf("%v: %+v", say, g)
		}
	}
}

// breaking is the daemon's end of a connection over which answers come only once it has broken inside a batch.
type breaking struct {
	net.Conn
	answers  []byte
	replied  bool           // the first write is the reply
	whole    int            // bytes that are written after that before it breaks
	broken   chan struct{}  // closed when a write has failed
	deadline chan time.Time // of reads, when that was set after
}

func (b *breaking) Write(p []byte) (int, error) {
	select {
	case <-b.broken:
		return 0, unix.EPIPE
	default:
	}
	if !b.replied {
		b.replied = true
		return len(p), nil
	}
	if b.whole -= len(p); b.whole >= 0 {
		return len(p), nil
	}
	close(b.broken)
	return 0, unix.ECONNRESET
}

func (b *breaking) SetReadDeadline(t time.Time) error {
	select {
	case <-b.broken:
		select {
		case b.deadline <- t:
		default:
		}
	default:
	}
	return nil
}

func (b *breaking) SetDeadline(t time.Time) error { return b.SetReadDeadline(t) }

func (b *breaking) SetWriteDeadline(time.Time) error { return nil }

// Read is that of a socket: a deadline that has passed comes before what was received.
func (b *breaking) Read(p []byte) (int, error) {
	if t := <-b.deadline; time.Now().After(t) {
		b.deadline <- t
		return 0, os.ErrDeadlineExceeded
	}
	if len(b.answers) == 0 {
		return 0, unix.ECONNRESET
	}
	n := copy(p, b.answers)
	b.answers = b.answers[n:]
	b.deadline <- time.Now().Add(time.Hour)
	return n, nil
}

// TestLastAnswers: answers that came before the connection broke count, although it broke where the daemon writes.
func TestLastAnswers(t *testing.T) {
	d := setup{network: "pipe", text: "a:U8[50000]", group: sampler.GroupConfig{OnDeath: sampler.Drop}}.start(t)
	hello := wire.Hello{Role: wire.RoleTrain, Table: "t", Prefetch: 3}
	batch := wire.BatchHeaderBytes + rows*(50000+24)
	ours, theirs := net.Pipe()
	defer theirs.Close()
	conn := &breaking{
		Conn: ours, whole: 2 * batch, broken: make(chan struct{}), deadline: make(chan time.Time, 1),
		answers: binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, 1), 0),
	}
	d.push(3)
	check(t, d.server.Serve(t.Context(), conn, &hello))
	if st, g := d.seats.Stats(), d.group(); st.GivenBack != 2 || st.Died != 1 || g.Dropped != 0 || g.Unread != 1 {
		t.Errorf("given back %d, died %d; %+v", st.GivenBack, st.Died, g)
	}
}

// TestStopTakesAnswers: answers of a trainer that is told of the stop count until it closes.
func TestStopTakesAnswers(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix"} {
		d := start(t, network, "a:U8[9]", false, Config{LingerTimeout: time.Hour})
		d.server.lastWords = time.Hour
		p := d.attach(wire.Hello{Prefetch: 2})
		d.push(2)
		p.take()
		p.take()
		d.stop()
		var h wire.BatchHeader
		if n := (*wire.Notice)(nil); !errors.As(p.headers.Next(&h), &n) || n.Code != wire.CodeShuttingDown {
			t.Errorf("%s: cut off: %v", network, n)
		}
		p.answer(0)
		p.Close()
		<-d.served
		if st := d.seats.Stats(); st.GivenBack != 1 || st.CutOff != 1 || d.group().Unread != 1 {
			t.Errorf("%s: %+v", network, st)
		}
	}
}

// TestVanished: a trainer whose machine is gone loses its leases and its share once the kernel has heard nothing for StallTimeout, although its socket took whole batches.
func TestVanished(t *testing.T) {
	for _, network := range []string{"tcp", "tls"} {
		d := start(t, network, "a:U8[9]", false, Config{StallTimeout: 300 * time.Millisecond})
		p := d.attach(wire.Hello{Prefetch: 2})
		p.vanish()
		d.push(2)
		select {
		case err := <-d.served:
			check(t, err)
		case <-time.After(time.Minute):
			t.Fatalf("%s: after a minute: %+v", network, d.seats.Stats().Trainers)
		}
		if st := d.seats.Stats(); st.Died != 1 || st.Returned != 2 || len(st.Trainers) != 0 || d.group().Unread != 2 {
			t.Errorf("%s: %+v, %+v", network, st, d.group())
		}
	}
}

// vanish has the peer's socket drop all that it is sent, as if its machine were gone.
func (p *peer) vanish() {
	p.t.Helper()
	raw, err := p.socket.(*net.TCPConn).SyscallConn()
	check(p.t, err)
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	check(p.t, raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
	}))
	check(p.t, err)
}

// TestRefusedThatStay: only so many are told why they are refused at a time; the others are closed without a word, and counted like them.
func TestRefusedThatStay(t *testing.T) {
	const all, most = 90, 64
	d := start(t, "tcp", "a:U8[9]", false, Config{LingerTimeout: time.Hour})
	d.server.lastWords = time.Millisecond
	told := 0
	for range all {
		_, err := d.dial(wire.Hello{Table: "u"})
		switch {
		case refused(err) == wire.CodeUnknownTable:
			told++
		case refused(err) != "":
			t.Fatal(err)
		default:
			<-d.served // it is gone
		}
	}
	if st := d.seats.Stats(); told != most || st.Refused[wire.CodeUnknownTable] != all {
		t.Errorf("%d of %d were told; %+v", told, all, st.Refused)
	}
	d.stop() // which waits for none of them for long
	for range most {
		<-d.served
	}
}

// TestStopWaitsForNobody: a trainer that is told of the stop and does not close is ended.
func TestStopWaitsForNobody(t *testing.T) {
	d := start(t, "tcp", "a:U8[9]", false, Config{LingerTimeout: time.Hour})
	d.server.lastWords = time.Millisecond
	d.attach(wire.Hello{})
	d.stop()
	if n := (*wire.Notice)(nil); !errors.As(<-d.served, &n) || n.Code != wire.CodeShuttingDown {
		t.Errorf("Serve returned %v", n)
	}
}

// TestRefusedHere: what this side refuses by itself is counted, too.
func TestRefusedHere(t *testing.T) {
	d := start(t, "tcp", "a:U8[9]", false, Config{})
	ours, theirs := net.Pipe()
	go func() {
		_, _ = io.Copy(io.Discard, theirs)
		theirs.Close()
	}()
	if err := d.server.Serve(t.Context(), ours, &wire.Hello{Role: wire.RolePush, Table: "t"}); refused(err) != wire.CodeWrongRole {
		t.Errorf("a producer: %v", err)
	}
	d.stop()
	p, err := d.dial(wire.Hello{})
	if refused(err) != wire.CodeShuttingDown {
		t.Errorf("at the end: %v", err)
	}
	p.Close()
	<-d.served
	if st := d.seats.Stats(); st.Refused[wire.CodeShuttingDown] != 1 || st.Refused[wire.CodeWrongRole] != 1 {
		t.Errorf("%+v", st.Refused)
	}
}

// TestOwnTrouble: a segment that cannot be read is the daemon's trouble, and no death of the trainer.
func TestOwnTrouble(t *testing.T) {
	path := filepath.Join(t.TempDir(), "segment")
	d := setup{network: "tcp", text: "a:U8[100000]", path: path, group: sampler.GroupConfig{OnDeath: sampler.Drop}}.start(t)
	d.push(1)
	column := bytes.Index(d.memory.Bytes(), []byte{0, 7, 14, 21, 28, 35, 42, 49})
	check(t, os.Truncate(path, int64(column+50000)))
	p := d.attach(wire.Hello{Prefetch: 1})
	_, _ = io.Copy(io.Discard, p)
	if err := <-d.served; !errors.Is(err, unix.EIO) {
		t.Errorf("Serve returned %v", err)
	}
	if st, g := d.seats.Stats(), d.group(); st.Failed != 1 || st.Died != 0 || g.Dropped != 0 || g.Unread != 1 {
		t.Errorf("%+v; %+v", st, g)
	}
}
