package bans

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/wire"
)

func peerAt(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }

// TestDoor: each end of a visit counts once and gives its place back, and who fails five times stays outside.
func TestDoor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &Door{New(Config{}), NewHalfOpen(HalfOpenConfig{Max: 3, MaxPerAddress: 2})}
		enter := func(want wire.Code, peer net.Addr) *Visit {
			t.Helper()
			v, code := d.Enter(peer)
			if code != want {
				t.Fatalf("%v: %q, want %q", peer, code, want)
			}
			return v
		}
		first, second := enter("", peerAt("192.0.2.1")), enter("", peerAt("192.0.2.1"))
		enter(wire.CodeTooManyConnections, peerAt("192.0.2.1"))
		third := enter("", peerAt("192.0.2.2"))
		enter(wire.CodeTooManyConnections, peerAt("192.0.2.3"))
		for _, exempt := range []net.Addr{peerAt("127.0.0.1"), &net.UnixAddr{Name: "x", Net: "unix"}} {
			v := enter("", exempt)
			if v != nil {
				t.Errorf("%v is counted", exempt)
			}
			v.Failed()
			v.Succeeded()
			v.Leave()
			v.Refused(wire.CodeBadMagic)
		}
		third.Leave()
		third.Failed() // after its end
		second.Refused(wire.CodeUnknownTable)
		if s := d.Table.Stats(); s.Addresses != 0 {
			t.Fatalf("nobody failed: %+v", s)
		}
		// Who is refused keeps its place as long as its connection is there.
		enter(wire.CodeTooManyConnections, peerAt("192.0.2.1"))
		second.Leave()
		second.Leave()
		first.Failed()
		first.Refused(wire.CodeBadMagic) // the same handshake
		first.Leave()
		for n := 1; n < FailuresMax; n++ {
			v := enter("", peerAt("192.0.2.1"))
			if want := slowed(n); v.Wait != want {
				t.Errorf("after %d failures it waits %v, want %v", n, v.Wait, want)
			}
			v.Refused(wire.CodeNotAuthenticated)
			v.Leave()
		}
		enter(wire.CodeBanned, peerAt("192.0.2.1"))
		if open, addresses, refused := d.HalfOpen.Stats(); open != 0 || addresses != 0 || refused != 3 {
			t.Errorf("%d open from %d addresses, %d refused", open, addresses, refused)
		}
		<-time.After(BanFor)
		v := enter("", peerAt("192.0.2.1"))
		v.Succeeded()
		v.Failed() // of something after that
		if s := d.Table.Stats(); s.Addresses != 0 || s.Failures != FailuresMax || s.Bans != 1 || s.Refused != 1 {
			t.Errorf("%+v", s)
		}
	})
	var none *Door
	if v, code := none.Enter(peerAt("192.0.2.1")); v != nil || code != "" {
		t.Error("no door, and yet it is closed")
	}
	none.Failed(peerAt("192.0.2.1"))
	if none.Banned(peerAt("192.0.2.1")) {
		t.Error("no door, and yet somebody is banned")
	}
}

// TestDoorWithoutBans: with bans switched off the number of handshakes is bounded all the same.
func TestDoorWithoutBans(t *testing.T) {
	d := &Door{HalfOpen: NewHalfOpen(HalfOpenConfig{MaxPerAddress: 1})}
	for range FailuresMax + 1 {
		v, code := d.Enter(peerAt("192.0.2.1"))
		if v == nil || code != "" || v.Wait != 0 {
			t.Fatalf("%+v, %q", v, code)
		}
		if _, code := d.Enter(peerAt("192.0.2.1")); code != wire.CodeTooManyConnections {
			t.Errorf("a second one: %q", code)
		}
		v.Failed()
		v.Leave()
	}
	v, _ := d.Enter(peerAt("192.0.2.1"))
	v.Succeeded()
	if d.Failed(peerAt("192.0.2.1")); d.Banned(peerAt("192.0.2.1")) {
		t.Error("banned")
	}
}

// TestBeside: two doors have one table, and do not take each other's places.
func TestBeside(t *testing.T) {
	d := &Door{New(Config{}), NewHalfOpen(HalfOpenConfig{Max: 3, MaxPerAddress: 1})}
	other, peer := d.Beside(), peerAt("192.0.2.1")
	for _, one := range []*Door{d, other} {
		if _, code := one.Enter(peer); code != "" {
			t.Fatalf("the first is turned away: %s", code)
		}
		if _, code := one.Enter(peer); code != wire.CodeTooManyConnections {
			t.Errorf("the second: %q", code)
		}
	}
	for range FailuresMax {
		d.Failed(peer)
	}
	if !other.Banned(peer) {
		t.Error("failures at one door are none at the other")
	}
	var none *Door
	none.Failed(peer)
	if none.Beside() != nil {
		t.Error("a door beside none")
	}
}
