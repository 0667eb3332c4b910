//go:build linux && !race

package e2e

import (
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
)

// echo connects as a client of echo 0.1, and reads what the daemon says first.
func (d *server) echo() *producer {
	d.t.Helper()
	addr, _, _ := strings.Cut(strings.TrimPrefix(d.Echo, "echo://"), "/")
	conn, err := new(net.Dialer).DialContext(d.t.Context(), "tcp", addr)
	check(d.t, err)
	d.t.Cleanup(func() { _ = conn.Close() })
	check(d.t, conn.SetDeadline(time.Now().Add(patience)))
	c := &producer{Conn: conn, t: d.t, layout: small.layout(d.t)}
	hello := make([]byte, 9+2*8+4*2) // ECHO, version, 2 arrays: 8x4 and a scalar
	_, err = io.ReadFull(c, hello)
	check(d.t, err)
	says(d.t, string(hello[:4]), "ECHO")
	d.await("it has a stream", func(s *status) bool {
		for _, other := range s.Producers.Connections {
			if other.Client == "echo" && other.Peer == conn.LocalAddr().String() {
				c.accepted.Stream = other.Stream
				return true
			}
		}
		return false
	})
	return c
}

// acks reads n acks.
func (c *producer) acks(n int) {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	check(c.t, err)
	if string(b) != strings.Repeat("\x01", n) {
		c.t.Fatalf("acks % x", b)
	}
}

// TestEchoHalfASample: a client of echo that stops inside a sample loses that sample only, however it stops; the daemon can only close, and its log says why. A
// daemon that is told to stop meanwhile takes what is whole and does not wait for the rest.
func TestEchoHalfASample(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small}, "--listen", "echo://127.0.0.1:0/"+small.name, "--stall-timeout", "1s")
	beside := d.pair(small.name, 2000)
	begin := func(t *testing.T) *producer {
		c := d.in(t).echo()
		b := c.samples(4)
		c.write(b[:len(b)*7/8])
		c.acks(3)
		return c
	}
	acked := uint64(0)
	for name, tc := range map[string]struct {
		reason string
		stop   func(*producer)
	}{
		"goes silent": {"stalled", func(*producer) {}},
		"closes":      {"cut_short", func(c *producer) { c.shut() }},
		"dies":        {"reset", func(c *producer) { c.die() }},
	} {
		t.Run(name, func(t *testing.T) {
			d := d.in(t)
			before := d.status()
			c := begin(t)
			acked += 3
			tc.stop(c)
			d.await("it is counted", func(s *status) bool {
				return s.Producers.CutShort == before.Producers.CutShort+1 && s.Producers.Ended[tc.reason] == before.Producers.Ended[tc.reason]+1
			})
			d.logs("reason=" + tc.reason)
			if tc.reason != "reset" {
				if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
					t.Errorf("after its acks it got % x, %v, want the end", rest, err)
				}
			}
			d.moves(small.name, 2)
		})
	}
	stopped := begin(t)
	acked += 3
	d.await("the daemon has the part", func(s *status) bool { return waitsForData(s, stopped.accepted.Stream) })
	d.signal(syscall.SIGTERM)
	if rest, err := io.ReadAll(stopped); err != nil || len(rest) > 0 {
		t.Errorf("after its acks it got % x, %v, want the end", rest, err)
	}
	d.ends(exitOK)
	beside.push.ends(exitRefused)
	beside.pull.ends(exitOK)
	in, out := result[pushed](beside.push), result[pulled](beside.pull)
	if out.Samples < in.Acked+acked || out.Wrong+out.Gaps+out.Disorder > 0 {
		t.Errorf("%d and %d acked, read %+v", in.Acked, acked, out)
	}
}

func waitsForData(s *daemon.Status, stream uint64) bool {
	for _, c := range s.Producers.Connections {
		if c.Stream == stream {
			return c.State == "waiting-for-data"
		}
	}
	return false
}
