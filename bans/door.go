package bans

import (
	"net"
	"net/netip"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// Door is a Table and a HalfOpen before all of a daemon's listeners. Its methods may be called from any goroutine; a nil Door is open to everybody.
type Door struct {
	Table    *Table
	HalfOpen *HalfOpen
}

// Visit is one connection's handshake. Each of its ends counts once; the methods are those of one goroutine, and may be called on a nil Visit.
type Visit struct {
	// Wait is how long the peer waits before anything of it is read.
	Wait time.Duration

	door  *Door
	from  netip.Addr
	leave func()
}

// Enter is called for each connection that has come. If code is not empty it is closed without a word, and code counted: CodeBanned, or CodeTooManyConnections if too many
// handshakes are under way. Peers on unix sockets, and exempt ones, get a nil Visit: nothing of theirs is counted.
func (d *Door) Enter(peer net.Addr) (visit *Visit, code wire.Code) {
	if d == nil {
		return nil, ""
	}
	from := Address(peer)
	if _, counted := d.Table.key(from); !counted {
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

// Banned says whether a peer is turned away before anything else is done for it. For transports whose peers' addresses are not verified yet: nothing is counted against them.
func (d *Door) Banned(peer net.Addr) bool { return d != nil && d.Table.Check(Address(peer)).Banned }

// Failed notes that a handshake failed whose peer has shown to be at its address only then, so that it did not Enter.
func (d *Door) Failed(peer net.Addr) {
	if d != nil {
		d.Table.Failed(Address(peer))
	}
}

// end says that the handshake is over, and whether it was before.
func (v *Visit) end() bool {
	if v == nil || v.leave == nil {
		return false
	}
	v.leave()
	v.leave = nil
	return true
}

// Leave ends a visit of which nothing is to be remembered.
func (v *Visit) Leave() { v.end() }

// Failed ends a visit whose handshake failed.
func (v *Visit) Failed() {
	if v.end() {
		v.door.Table.Failed(v.from)
	}
}

// Refused ends a visit that was refused with a code; it is a failure if Failure says so.
func (v *Visit) Refused(code wire.Code) {
	if Failure(code) {
		v.Failed()
	} else {
		v.Leave()
	}
}

// Succeeded ends the visit of a peer that was let in.
func (v *Visit) Succeeded() {
	if v.end() {
		v.door.Table.Succeeded(v.from)
	}
}
