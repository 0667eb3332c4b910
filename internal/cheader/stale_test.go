//go:build linux && !race

package cheader

import (
	"encoding/binary"
	"testing"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/wire"
)

// setState stores the state word of a place, as a daemon that has taken the segment up would.
func (f *fake) setState(index uint32, number uint64, state ring.State) {
	mem := f.segment.Bytes()
	binary.LittleEndian.PutUint64(mem[binary.LittleEndian.Uint64(mem[80:])+64*uint64(index):], number<<3|uint64(state))
}

// awaitTaken waits until the peer has taken its first descriptor.
func (f *fake) awaitTaken() {
	for binary.LittleEndian.Uint64(f.deliverQueue()[64:]) == 0 && f.alive() { // in another process
	}
}

// TestStaleDescriptors: what a daemon delivered before it died, and its successor has passed on, is the daemon's end and no damage, also where
// the end is seen after the descriptor.
func TestStaleDescriptors(t *testing.T) {
	notice := wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeShuttingDown, Reason: "come back later"})
	open := func(f *fake, b ring.Batch) { f.setState(b.Index, b.Number+fakeBatches, ring.Open) }
	for what, test := range map[string]struct {
		rows        uint64 // as delivered
		pass        func(f *fake, b ring.Batch)
		say         []byte
		code, words string
	}{
		"filled anew":       {fakeBatchSize, open, nil, "peer_closed", "gone without having ended the stream: start it again"},
		"leased to another": {fakeBatchSize, func(f *fake, b ring.Batch) { f.setState(b.Index, b.Number+fakeBatches, ring.Leased) }, nil, "peer_closed", "is gone"},
		"of other rows":     {fakeBatchSize - 1, func(*fake, ring.Batch) {}, nil, "peer_closed", "is gone"},
		"with a notice":     {fakeBatchSize, open, notice, "shutting_down", "come back later"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				path := serveFake(t, nil, func(f *fake) {
					batch := f.lease(fakeBatchSize)
					test.pass(f, batch)
					f.push(batch.Number, uint64(batch.Index)|test.rows<<32)
					f.awaitTaken()
					f.say(test.say)
				})
				p := start(t, b)
				p.ok("stale-ms %d", patience)
				p.ok("%s", fakeOptions(path).attach())
				p.fails(test.code, test.words, "next %d", patience)
				p.fails(test.code, test.words, "next 0")
				p.ok("detach")
			})
		})
	}
}

// TestStaleLeases is TestStaleDescriptors for a place that was lent to a producer.
func TestStaleLeases(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			another, _ := f.ring.TryLend(fakeStream + 1)
			f.push(1, uint64(another.Index))
			f.awaitTaken()
			f.say(wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "its last words, which end nothing"}))
		})
		p := start(t, b)
		p.ok("stale-ms %d", patience)
		p.ok("%s", fakeOptions(path).open())
		p.fails("peer_closed", "is gone", "reserve 1 %d", patience)
		p.fails("peer_closed", "is gone", "settle 0")
		p.ok("close")
	})
}

// TestIntact: a batch stays whole when its daemon dies, and until its place is used again.
func TestIntact(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		die, pass, passed := make(chan struct{}), make(chan struct{}), make(chan struct{})
		path := serveFake(t, nil, func(f *fake) {
			batch, kept := f.publish(fakeBatchSize), f.publish(fakeBatchSize)
			<-die
			check(f.t, f.conn.CloseWrite())
			<-pass
			f.setState(batch.Index, batch.Number+fakeBatches, ring.Leased)
			f.setState(kept.Index, kept.Number, ring.Leased) // as a successor finds it
			close(passed)
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).attach())
		p.ok("next %d", patience)
		p.ok("next %d", patience)
		p.want("1", "intact 0")
		close(die)
		p.fails("peer_closed", "is gone", "next %d", patience)
		p.want("1", "intact 0")
		close(pass)
		<-passed
		p.want("0", "intact 0")
		p.want("1", "intact 1")
		p.fails("peer_closed", "is gone", "release 1")
		p.fails("misuse", "released before", "intact-stale")
		p.ok("detach")
	})
}
