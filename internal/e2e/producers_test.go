//go:build linux && !race

package e2e

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/wire"
)

// A small sample is taken when it is whole; a large one is received in place.
var (
	small = table{"small", "image:F32[8,4],label:I32", 16, 32}
	large = table{"large", "grad:F32[512,512],step:U64", 2, 6}
)

// TestRefusedProducers: who speaks another protocol or version, or has another table or spec, is told so.
func TestRefusedProducers(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	refused := func(code wire.Code) uint64 { return d.status().Producers.Refused[string(code)] }
	for name, tc := range map[string]struct {
		change func([]byte) []byte
		code   wire.Code
		words  []string
	}{
		"wrong magic":   {func([]byte) []byte { return []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") }, wire.CodeBadMagic, []string{"HTTP"}},
		"wrong version": {func(b []byte) []byte { b[8], b[10] = 9, 9; return b }, wire.CodeBadVersion, []string{"9", "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := d.in(t)
			before := refused(tc.code)
			c := d.in(t).connect()
			c.write(tc.change(d.helloBytes(small)))
			says(t, c.refusal(tc.code).Reason, tc.words...)
			if n, err := io.Copy(io.Discard, c); n != 0 || err != nil {
				t.Errorf("after the refusal: %d bytes, %v; want a clean close", n, err)
			}
			if n := refused(tc.code) - before; n != 1 {
				t.Errorf("counted %d times", n)
			}
		})
	}
	for name, tc := range map[string]struct {
		table, spec string
		code        wire.Code
		words       []string
	}{
		"wrong table":   {"smal", small.spec, wire.CodeUnknownTable, []string{"smal", "the tables here are: small"}},
		"dtype differs": {small.name, "image:F32[8,4],label:F32", wire.CodeSpecMismatch, []string{"label", "F32", "I32", "the table's spec is " + small.spec}},
		"leaf renamed":  {small.name, "image:F32[8,4],target:I32", wire.CodeSpecMismatch, []string{"target", "label", small.spec}},
		"transposed":    {small.name, "image:F32[4,8],label:I32", wire.CodeSpecMismatch, []string{"image", "F32[4,8]", "F32[8,4]", small.spec}},
	} {
		t.Run(name, func(t *testing.T) {
			d := d.in(t)
			before := refused(tc.code)
			for _, addr := range []string{d.TCP, d.Unix} {
				said := run(t, exitRefused, "push", "--addr", addr, "--table", tc.table, "--spec", tc.spec, "--generate", "10")
				says(t, said, append(tc.words, string(tc.code))...)
			}
			if n := refused(tc.code) - before; n != 2 {
				t.Errorf("counted %d times, want 2", n)
			}
		})
	}
	d.finish(nil, beside)
}

// TestBadHandshakes: a hello that dribbles, is 1 GiB long, or stops half-way is refused with the reason, at the cost of nothing.
func TestBadHandshakes(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small}, "--handshake-timeout", "1s")
	beside := d.pair(small.name, 2000)
	whole := d.helloBytes(small)
	counted := map[wire.Code]uint64{}
	expect := func(c *producer, code wire.Code, words ...string) {
		c.t.Helper()
		says(c.t, c.refusal(code).Reason, words...)
		if counted[code]++; d.status().Producers.Refused[string(code)] != counted[code] {
			c.t.Errorf("counted %v, want %v", d.status().Producers.Refused, counted)
		}
	}
	t.Run("dribbles", func(t *testing.T) {
		c := d.in(t).connect()
		c.dribble(whole...)
		expect(c, wire.CodeHandshakeTimeout, "in time")
	})
	t.Run("goes silent half-way", func(t *testing.T) {
		c := d.in(t).connect()
		c.write(whole[:len(whole)/2])
		expect(c, wire.CodeHandshakeTimeout, "in time")
	})
	t.Run("ends half-way", func(t *testing.T) {
		c := d.in(t).connect()
		c.write(whole[:len(whole)/2])
		c.shut()
		expect(c, wire.CodeBadHandshake, "ended")
	})
	t.Run("dies half-way", func(t *testing.T) {
		d := d.in(t)
		d.await("the others are gone", func(s *status) bool { return s.Producers.Open == 1 })
		before := d.status().Producers.Ended["reset"]
		c := d.connect()
		c.write(whole[:len(whole)/2])
		d.await("the daemon has it", func(s *status) bool { return s.Producers.Open == 2 })
		c.die()
		d.await("its end is counted", func(s *status) bool { return s.Producers.Ended["reset"] == before+1 && s.Producers.Open == 1 })
	})
	t.Run("1 GiB long", func(t *testing.T) {
		c := d.in(t).connect()
		binary.LittleEndian.PutUint32(whole[12:], 1<<30)
		c.write(whole)
		go func() { // all of it, if the daemon would take it
			for block, left := make([]byte, 1<<20), 1<<30; left > 0; left -= len(block) {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}()
		expect(c, wire.CodeBadHandshake, "1073741824", "2097152")
		if peak := d.memory("VmHWM") - d.memory("RssShmem"); peak > 64<<20 {
			t.Errorf("the daemon took %d MiB", peak>>20)
		}
	})
	d.finish(nil, beside)
}

// TestAcksNeverRead: a producer that never reads its acks is cut off, and only that one.
func TestAcksNeverRead(t *testing.T) {
	t.Parallel()
	tb := table{"tiny", "n:U64", 1024, 16}
	d := serve(t, []table{tb}, "--ack-timeout", "1s")
	beside := d.pair(tb.name, 20000)
	c := d.join(tb)
	// Its receive buffer stays as it is: one that is shrunk makes TCP itself drop the segments of both sides, and the daemon would see only silence.
	for block := c.samples(1 << 14); ; block = c.samples(1 << 14) {
		if _, err := c.Write(block); err != nil {
			break // cut off
		}
	}
	d.await("it is counted", func(s *status) bool { return s.Producers.Ended["ack_timeout"] == 1 })
	d.logs("reason=ack_timeout")
	d.finish(nil, beside)
}

// TestHalfASample: a producer that stops inside a sample loses that sample, is told so where it can be, and holds up nobody: neither another stream of the same
// table nor the samples after its own.
func TestHalfASample(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small, large}, "--stall-timeout", "1s")
	pairs := []*pair{d.pair(small.name, 2000), d.pair(large.name, 50)}
	acked := map[string]uint64{}
	for _, tb := range []table{small, large} {
		begin := func(t *testing.T) *producer { // three samples and a half, of which the daemon has as much as it takes
			c := d.in(t).join(tb)
			b := c.samples(4)
			c.write(b[:len(b)*7/8])
			one := make([]byte, 3)
			_, err := io.ReadFull(c, one)
			check(t, err)
			acked[tb.name] += 3
			return c
		}
		for name, tc := range map[string]struct {
			reason string
			f      func(*producer)
		}{
			"goes silent": {"stalled", func(c *producer) { c.told(wire.CodeStalled, "half-way", "send it again") }},
			"dribbles":    {"stalled", func(c *producer) { c.dribble(); c.told(wire.CodeStalled, "half-way", "send it again") }},
			"closes":      {"cut_short", func(c *producer) { c.shut(); c.told(wire.CodeCutShort, "inside a sample") }},
			"dies":        {"reset", func(c *producer) { c.die() }},
		} {
			if name == "dribbles" && tb == small {
				continue // it holds nothing up while it is not whole, however long that takes
			}
			t.Run(tb.name+" sample, "+name, func(t *testing.T) {
				d := d.in(t)
				before := d.status()
				tc.f(begin(t))
				d.await("it is counted", func(s *status) bool {
					return s.Producers.CutShort == before.Producers.CutShort+1 && s.Producers.Ended[tc.reason] == before.Producers.Ended[tc.reason]+1
				})
				d.moves(tb.name, 8) // past the batch in which the sample was missing
			})
		}
		t.Run(tb.name+" samples, process is killed", func(t *testing.T) {
			d := d.in(t)
			p := d.push(tb.name, endless, 0)
			d.await("it is in full flow", func(s *status) bool {
				return slices.ContainsFunc(s.Producers.Connections, func(c daemon.ConnectionStatus) bool { return c.Stream == last(s, tb.name) && c.Samples > 32 })
			})
			p.signal(syscall.SIGKILL)
			<-p.done
			d.await("the daemon noticed", func(s *status) bool { return s.Producers.Open == 2 })
			d.moves(tb.name, 8)
		})
	}
	d.finish(acked, pairs...)
}

// last is the number of the stream of a table that was opened last.
func last(s *status, table string) uint64 { return tableOf(s, table).Opened }

// TestConnectionLimit: one producer more than there may be is told so; those that are there go on.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small}, "--max-connections", "2")
	beside := d.pair(small.name, 2000)
	c := d.join(small)
	says(t, run(t, exitRefused, "push", "--addr", d.TCP, "--table", small.name, "--generate", "1"), "too_many_connections", "at most 2")
	check(t, c.Close())
	d.await("there is room again", func(s *status) bool { return s.Producers.Open == 1 })
	run(t, exitOK, "push", "--addr", d.TCP, "--table", small.name, "--generate", "5", "--spec", small.spec)
	if n := d.status().Producers.Refused["too_many_connections"]; n != 1 {
		t.Errorf("counted %d times, want 1", n)
	}
	d.finish(map[string]uint64{small.name: 5}, beside)
}

// TestBadInputOfPush: what push itself refuses, before a byte of it reaches the daemon.
func TestBadInputOfPush(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	junk := t.TempDir() + "/junk.npy"
	check(t, os.WriteFile(junk, []byte(strings.Repeat("junk", 100)), 0o600))
	says(t, run(t, exitData, "push", "--addr", d.TCP, "--table", small.name, junk), junk, "npy")
	nobody := freeAddress(t)
	says(t, run(t, exitUnreachable, "push", "--addr", "tcp://"+nobody, "--table", small.name, "--generate", "1"), nobody, "refused")
	d.finish(nil, beside)
}

// freeAddress is one where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	check(t, err)
	check(t, l.Close())
	return l.Addr().String()
}
