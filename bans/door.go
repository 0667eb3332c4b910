package bans

import (
	"net"
	"net/netip"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// Door is a Table and a HalfOpen before all of a daemon's listeners. Its methods may be called from any goroutine; a nil Door is open to everybody.
type Door struct {
	Table    *Table // nil: nobody is slowed or banned
	HalfOpen *HalfOpen
}

// Visit is one connection's handshake. Its methods are those of one goroutine, and may be called on a nil Visit. Whoever entered calls Leave when the connection is over, however that
// came: until then, or until Succeeded, it takes the place of a handshake that is under way, also while the peer is only told why it is refused.
type Visit struct {
	// Wait is how long the peer waits before anything of it is read.
	Wait time.Duration

	door  *Door
	from  netip.Addr
	leave func()
	blame bool // it was counted as a failure
}

// Enter is called for each connection that has come. If code is not empty it is closed without a word, and code counted: CodeBanned, or CodeTooManyConnections if too many
// handshakes are under way. Peers on unix sockets, and exempt ones, get a nil Visit: nothing of theirs is counted.
func (d *Door) Enter(peer net.Addr) (visit *Visit, code wire.Code) {
	if d == nil {
		return nil, ""
	}
	from := Address(peer)
	if !d.HalfOpen.counts(from) || !d.Table.counts(from) {
		return nil, ""
	}
	verdict := d.Table.Check(from)
	if verdict.Banned {
		return nil, wire.CodeBanned
	}
	leave, ok := d.HalfOpen.Enter(from)
	if !ok {
		return nil, wire.CodeTooManyConnections
	}
	return &Visit{Wait: verdict.Wait, door: d, from: from, leave: leave}, ""
}

// Banned says whether a peer is turned away before anything else is done for it, and counts that it was. It is for transports whose peers' addresses are not verified yet.
func (d *Door) Banned(peer net.Addr) bool { return d != nil && d.Table.Check(Address(peer)).Banned }

// Failed notes that a handshake failed for which nobody entered.
func (d *Door) Failed(peer net.Addr) {
	if d != nil {
		d.Table.Failed(Address(peer))
	}
}

// Leave gives the place back. It may be called more than once.
func (v *Visit) Leave() {
	if v != nil && v.leave != nil {
		v.leave()
		v.leave = nil
	}
}

// Failed notes, once, that the handshake failed. The place is kept until Leave.
func (v *Visit) Failed() {
	if v != nil && v.leave != nil && !v.blame {
		v.blame = true
		v.door.Table.Failed(v.from)
	}
}

// Refused notes that the peer was refused with a code: Failed, if Failure says so.
func (v *Visit) Refused(code wire.Code) {
	if Failure(code) {
		v.Failed()
	}
}

// Succeeded ends the visit of a peer that was let in.
func (v *Visit) Succeeded() {
	if v != nil && v.leave != nil {
		v.Leave()
		v.door.Table.Succeeded(v.from)
	}
}

// Beside returns a door with the same table, and bounds of its own that are as large.
func (d *Door) Beside() *Door {
	if d == nil {
		return nil
	}
	return &Door{Table: d.Table, HalfOpen: NewHalfOpen(d.HalfOpen.cfg)}
}
