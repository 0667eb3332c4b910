//go:build linux && !race

package cheader

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/wire"
)

// What a giveback descriptor of a producer says, in the high half of its second word.
const (
	saysRows    = 1
	saysSettle  = 2
	saysResumed = 3
)

// lender is a fake daemon's side of a producer that fills in place.
type lender struct {
	*fake
	lease  uint64
	lent   []ring.Place // oldest first
	rows   int          // of the oldest
	number uint64       // of the next sample
	said   []uint64     // rows, settles (1<<32) and resumes (2<<32) as they came
}

func lend(f *fake) *lender { return &lender{fake: f, number: f.fill.Held} }

// place lends one more place.
func (l *lender) place() {
	p, ok := l.ring.TryLend(fakeStream)
	if !ok {
		l.t.Error("the fake's ring has no place to lend")
		return
	}
	l.lease++
	l.lent = append(l.lent, p)
	l.push(l.lease, uint64(p.Index))
}

// serve does what the peer says, lending as many places as were granted, until the peer closes its side.
func (l *lender) serve() {
	for range l.fill.Prefetch {
		l.place()
	}
	for l.next() {
		if len(l.lent) < int(l.fill.Prefetch) {
			l.place()
		}
	}
}

// next takes one descriptor and does what it says; false when the peer has closed its side.
func (l *lender) next() bool {
	d, ok := l.take()
	if !ok {
		return false
	}
	rows := int(uint32(d.B))
	switch current := l.lease - uint64(len(l.lent)) + 1; {
	case d.B>>32 == saysResumed && d.A == 0 && rows == 0:
		l.said = append(l.said, 2<<32)
	case d.B>>32 == saysSettle && d.A == current && rows == 0 && l.rows > 0:
		l.said = append(l.said, 1<<32)
	case d.B>>32 == saysRows && d.A == current && rows >= 1 && rows <= fakeBatchSize-l.rows:
		l.said = append(l.said, uint64(rows))
		l.ring.CommitPlace(l.lent[0], l.rows, rows, fakeStream, l.number, 1, ring.Mark{})
		l.number += uint64(rows)
		if l.rows += rows; l.rows == fakeBatchSize {
			l.publishPlace()
		}
	default:
		l.t.Errorf("descriptor %#x %#x, while lease %d has %d rows", d.A, d.B, current, l.rows)
	}
	return true
}

// publishPlace publishes the oldest place and checks its content.
func (l *lender) publishPlace() {
	l.ring.PublishPlace(l.lent[0], l.rows)
	l.lent, l.rows = l.lent[1:], 0
	b, ok := l.ring.TryLease()
	if !ok {
		l.t.Error("no batch was published")
		return
	}
	for leaf := range l.spec.NumLeaves() {
		if row, at := proof.CheckColumn(b.Column(leaf), l.spec.Leaf(leaf), leaf, b.Streams(), b.Numbers()); row >= 0 {
			l.t.Errorf("batch %d, leaf %d, row %d: byte %d is wrong", b.Number, leaf, row, at)
		}
	}
	l.ring.Release(b)
}

// checkSaid compares what the peer said.
func (l *lender) checkSaid(want ...uint64) {
	if fmt.Sprint(l.said) != fmt.Sprint(want) {
		l.t.Errorf("the peer said %x, want %x", l.said, want)
	}
}

// TestProducerFillsInPlace: every way to hand rows over, in places that are then published as they are.
func TestProducerFillsInPlace(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			if !f.hello.Notes || f.hello.Session != "s 1" || f.hello.Role != wire.RoleFill || f.hello.Prefetch != 2 || f.hello.Client != "ingestd-c" {
				f.t.Errorf("hello %+v", f.hello)
			}
			l := lend(f)
			l.serve()
			l.checkSaid(2<<32, 3, 1, 1, 1<<32, 1, 2, 8, 1)
			f.awaitEnd()
		})
		p := start(t, b)
		before := p.fds()
		o := fakeOptions(path)
		o.session, o.prefetch = "s 1", 2
		p.want("numbers batch_size=8 batches=4 prefetch=2 sample_bytes=17 x:F32[4]=16@0 y:U8[]=1@1", "%s", o.open())
		p.want("1", "stream")
		p.want("100", "held")
		reserve := func(n int, want string) {
			t.Helper()
			got := p.ok("reserve %d %d", n, patience)
			if words := strings.Fields(got); strings.Join(words[:3], " ") != want {
				t.Fatalf("reserve %d: %s, want %s", n, got, want)
			}
		}
		reserve(5, "5 100 0")
		p.fails("misuse", "a reservation is open", "reserve 1 0")
		p.fails("misuse", "from 1 to slots->n", "commit 6")
		p.fails("misuse", "from 1 to slots->n", "commit 0")
		p.fails("misuse", "no such leaf", "slot 2")
		p.fails("misuse", "no such leaf", "slot -1")
		p.ok("fill")
		p.ok("commit 3")                  // two rows are free again
		p.fails("misuse", "", "commit 1") // empty slots are nobody's
		reserve(1, "1 103 3")
		p.ok("abandon")
		reserve(1, "1 103 3")
		p.ok("fill")
		p.ok("commit 1")
		p.ok("push 104 %d", patience)
		p.ok("settle %d", patience)
		p.ok("settle %d", patience) // nothing more waits
		p.fails("misuse", "a leaf is NULL", "push-nothing")
		p.ok("push 105 %d", patience)
		reserve(100, "2 106 6") // what is left of the place
		p.ok("fill")
		p.ok("commit 2")
		reserve(100, "8 108 0")
		p.ok("fill")
		p.ok("commit 8")
		p.ok("flush %d", patience)
		p.want("116", "held")
		p.ok("settle %d", patience) // no row waits
		p.ok("push 116 %d", patience)
		p.ok("flush %d", patience)
		p.want("117", "held")
		p.fails("misuse", "deadline_ms is negative", "reserve 1 -1")
		p.fails("misuse", "deadline_ms is negative", "flush -1")
		p.fails("misuse", "deadline_ms is negative", "settle -1")
		p.fails("misuse", "n is 0", "reserve 0 0")
		p.ok("close")
		if after := p.fds(); after != before {
			t.Errorf("%d descriptors are open after closing, %d before", after, before)
		}
	})
}

// TestProducerProducesMuch: many times round the ring, in runs of every length; the queue to the daemon is far shorter than what is committed.
func TestProducerProducesMuch(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			lend(f).serve()
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).open())
		total := 100
		for _, step := range []int{1, 2, 3, 7, 8, 9, 100} {
			p.ok("produce 2000 %d %d", step, patience)
			total += 2000
			p.want(strconv.Itoa(total), "held")
		}
		p.ok("close")
	})
}

// TestProducerExample runs the example program to its end: 117 samples of a session of which 100 are held.
func TestProducerExample(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		got := make(chan []uint64, 1)
		path := serveFake(t, nil, func(f *fake) {
			l := &exampleLender{lender: lend(f)}
			got <- l.serve()
			f.awaitEnd()
		})
		out, err := example(t, b, "producer", path, testTable, "117", "s").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "the daemon holds 117 samples of stream 1") {
			t.Fatalf("%v\n%s", err, out)
		}
		if said := <-got; fmt.Sprint(said) != fmt.Sprint([]uint64{2 << 32, 8, 8, 1, 1 << 32}) {
			t.Errorf("it said %x", said)
		}
	})
}

// exampleLender is a lender that checks the content the example makes.
type exampleLender struct{ *lender }

func (l *exampleLender) serve() []uint64 {
	l.place()
	l.place()
	for {
		d, ok := l.take()
		if !ok {
			return l.said
		}
		rows := int(uint32(d.B))
		l.said = append(l.said, (d.B>>32-1)<<32|uint64(rows))
		if d.B>>32 != saysRows {
			continue
		}
		for row := range rows {
			want := byte(l.number + uint64(row))
			if x, y := l.ring.PlaceColumn(l.lent[0], 0)[16*(l.rows+row)], l.ring.PlaceColumn(l.lent[0], 1)[l.rows+row]; x != want || y != want {
				l.t.Errorf("sample %d holds %d and %d", l.number+uint64(row), x, y)
			}
		}
		l.ring.CommitPlace(l.lent[0], l.rows, rows, fakeStream, l.number, 1, ring.Mark{})
		l.number += uint64(rows)
		if l.rows += rows; l.rows == fakeBatchSize {
			l.ring.PublishPlace(l.lent[0], l.rows)
			l.lent, l.rows = l.lent[1:], 0
			l.place()
		}
	}
}

// TestFull: a note tells whom a producer waits for, until a place comes.
func TestFull(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		step := make(chan struct{})
		path := serveFake(t, nil, func(f *fake) {
			l := lend(f)
			<-step
			note := wire.Note{
				Code: wire.NoteRingFull, Reason: `trainer 3 ("slow") holds batch 9`, Trainer: 3, Group: "g", Client: "slow", PID: 77, Batch: 9, Since: 1234567890,
			}
			f.say(wire.AppendNote(nil, &note))
			note.Trainer, note.Batch = 4, 10
			f.say(wire.AppendNote(nil, &note))
			step <- struct{}{}
			<-step
			l.place()
			for l.next() {
			}
			l.checkSaid(1)
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).open())
		p.fails("timeout", "nothing from the daemon in 0 ms", "reserve 1 0")
		p.fails("timeout", "nothing from the daemon in 30 ms", "reserve 1 30")
		p.fails("timeout", "", "push 100 30")
		step <- struct{}{}
		<-step
		for range 2 {
			p.fails("full", `the ring is full: trainer 3 ("slow") holds batch 9|daemon=ring_full|`+
				`trainer=4|batch=10|since=1234567890|pid=77|group=g|client=slow`, "reserve 1 30")
		}
		p.fails("full", "", "push 100 0")
		p.ok("flush 0") // nothing is committed
		step <- struct{}{}
		p.ok("reserve 1 %d", patience)
		p.ok("fill")
		p.ok("commit 1")
		p.ok("flush %d", patience)
		p.ok("reserve 7 %d", patience)
		p.ok("abandon")
		p.ok("close")
	})
}

// TestSlowDaemon: nothing is taken. What is committed is not held, and a queue that is full makes the next reservation wait, though there is a place.
func TestSlowDaemon(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		step := make(chan struct{})
		path := serveFake(t, nil, func(f *fake) {
			l := lend(f)
			l.place()
			<-step
			for l.next() {
			}
			l.checkSaid(1, 1, 1, 1, 1<<32, 1)
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).open())
		for n := range fakeCapacity {
			p.ok("push %d %d", 100+n, patience)
		}
		p.fails("timeout", "", "reserve 1 30")
		p.fails("timeout", "", "settle 30")
		p.fails("timeout", "", "flush 30")
		p.want("100", "held")
		p.send("settle %d", patience)
		close(step)
		p.isOK("settle")
		p.ok("push 104 %d", patience)
		p.ok("flush %d", patience)
		p.want("105", "held")
		p.ok("close")
	})
}

// TestSettleLeavesRoom: while a reservation is open, a settle leaves room in the queue for its commit, which never waits.
func TestSettleLeavesRoom(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			lend(f).place()
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).open())
		for n := range fakeCapacity - 1 {
			p.ok("push %d %d", 100+n, patience)
		}
		p.ok("reserve 1 %d", patience)
		p.fails("timeout", "", "settle 10")
		p.ok("fill")
		p.ok("commit 1")
		p.ok("close")
	})
}

// TestProducerEnds: every end of an attachment is its own error, and what was taken before counts as held.
func TestProducerEnds(t *testing.T) {
	for what, test := range map[string]struct {
		end         func(f *fake)
		code, words string
	}{
		"stopping": {func(f *fake) {
			f.say(wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeShuttingDown, Reason: "later"}))
		}, "shutting_down", "later"},
		"session taken": {func(f *fake) {
			f.say(wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeSessionTaken, Reason: "by another"}))
		}, "cut_off", "daemon=session_taken|by another"},
		"note, notice": {func(f *fake) {
			note := wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "full"})
			f.say(wire.AppendNotice(note, &wire.Notice{Code: wire.CodeBadPeer, Reason: "x"}))
		}, "cut_off", "daemon=bad_peer"},
		"death":           {func(f *fake) { check(f.t, f.conn.CloseWrite()) }, "peer_closed", "attach anew"},
		"an ack":          {func(f *fake) { f.say([]byte{wire.Ack}) }, "bad_reply", "where only a notice may come"},
		"a bad note":      {func(f *fake) { f.say([]byte("\x02\x02\x00\x00\x00{}")) }, "bad_reply", "no code"},
		"end":             {func(f *fake) { f.deliver.Close(); f.ringPeer() }, "end", "takes no more samples"},
		"taken goes back": {func(f *fake) { binary.LittleEndian.PutUint64(f.givebackQueue()[64:], 0); f.ringPeer() }, "bad_segment", "taken that cannot be"},
		"taken too much":  {func(f *fake) { binary.LittleEndian.PutUint64(f.givebackQueue()[64:], 9); f.ringPeer() }, "bad_segment", "taken that cannot be"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				step := make(chan struct{})
				path := serveFake(t, nil, func(f *fake) {
					l := lend(f)
					l.place()
					l.next()
					<-step
					test.end(f)
					f.awaitEnd()
				})
				p := start(t, b)
				p.ok("%s", fakeOptions(path).open())
				p.ok("reserve 8 %d", patience)
				p.ok("fill")
				p.ok("commit 8")
				p.ok("flush %d", patience)
				close(step)
				p.fails(test.code, test.words, "reserve 1 %d", patience)
				p.fails(test.code, test.words, "push 108 0")
				if test.code != "end" { // after which there is nothing to settle
					p.fails(test.code, test.words, "settle 0")
				}
				p.want("108", "held")
				if test.code != "bad_segment" {
					p.ok("flush 0") // all is held
				} else {
					p.fails(test.code, test.words, "flush 0")
				}
				p.ok("close")
			})
		})
	}
}

// TestDamagedLeases: a place that is lent is compared with the segment.
func TestDamagedLeases(t *testing.T) {
	for what, test := range map[string]struct {
		spoil func(f *fake, good ring.Place)
		words string
	}{
		"out of turn":       {func(f *fake, p ring.Place) { f.push(2, uint64(p.Index)) }, "lease out of turn"},
		"lease 0":           {func(f *fake, p ring.Place) { f.push(0, uint64(p.Index)) }, "lease out of turn"},
		"no such place":     {func(f *fake, _ ring.Place) { f.push(1, fakeBatches) }, "place that cannot be"},
		"a place far off":   {func(f *fake, p ring.Place) { f.push(1, 1<<32|uint64(p.Index)) }, "place that cannot be"},
		"the last place":    {func(f *fake, _ ring.Place) { f.push(1, ^uint64(0)) }, "place that cannot be"},
		"a free place":      {func(f *fake, p ring.Place) { f.push(1, uint64(p.Index+1)%fakeBatches) }, "not lent to this stream"},
		"another's place":   {func(f *fake, _ ring.Place) { q, _ := f.ring.TryLend(fakeStream + 1); f.push(1, uint64(q.Index)) }, "not lent to this stream"},
		"twice":             {func(f *fake, p ring.Place) { f.push(1, uint64(p.Index)); f.push(2, uint64(p.Index)) }, "lent already"},
		"more than granted": {func(f *fake, p ring.Place) { l := lend(f); l.place(); l.place(); l.place() }, "more places than were granted"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				path := serveFake(t, func(f *fake) {
					good, _ := f.ring.TryLend(fakeStream)
					test.spoil(f, good)
				}, nil)
				p := start(t, b)
				p.ok("stale-ms 5")
				p.ok("%s", fakeOptions(path).open())
				p.fails("bad_segment", test.words, "reserve 1 0")
				p.fails("bad_segment", test.words, "settle 0")
				p.ok("close")
			})
		})
	}
}
