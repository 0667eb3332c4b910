package bans

import (
	"net/netip"
	"testing"
)

func TestHalfOpen(t *testing.T) {
	h := NewHalfOpen(HalfOpenConfig{Max: 5, MaxPerAddress: 2})
	loopback := netip.MustParseAddr("127.0.0.1")
	enter := func(a netip.Addr, want bool) func() {
		t.Helper()
		leave, ok := h.Enter(a)
		if ok != want || (leave != nil) != want {
			t.Errorf("%v entered: %v, want %v", a, ok, want)
		}
		return leave
	}
	first := enter(stranger, true)
	enter(stranger, true)
	enter(stranger, false)
	first()
	first() // twice is once
	second := enter(stranger, true)
	enter(stranger, false)
	third := enter(v4(2), true)
	enter(v4(2), true)
	enter(v4(3), true)
	if open, addresses, refused := h.Stats(); open != 5 || addresses != 3 || refused != 2 {
		t.Errorf("%d open from %d addresses, %d refused", open, addresses, refused)
	}
	enter(v4(1), false)
	enter(loopback, true)() // which is exempt, like unix sockets
	enter(netip.Addr{}, true)()
	second()
	third()
	enter(v4(1), true)
	if open, addresses, refused := h.Stats(); open != 4 || addresses != 4 || refused != 3 {
		t.Errorf("%d open from %d addresses, %d refused", open, addresses, refused)
	}
	counted := NewHalfOpen(HalfOpenConfig{MaxPerAddress: 1, Loopback: true})
	if _, ok := counted.Enter(loopback); !ok {
		t.Error("the first of loopback")
	}
	if _, ok := counted.Enter(loopback); ok {
		t.Error("the second of loopback")
	}
}

func TestHalfOpenDefaults(t *testing.T) {
	h := NewHalfOpen(HalfOpenConfig{})
	for i := range DefaultHalfOpenPerAddress + 1 {
		if _, ok := h.Enter(stranger); ok != (i < DefaultHalfOpenPerAddress) {
			t.Errorf("connection %d of one address: %v", i+1, ok)
		}
	}
	for i := range DefaultHalfOpen - DefaultHalfOpenPerAddress + 1 {
		if _, ok := h.Enter(v4(uint32(i))); ok != (i < DefaultHalfOpen-DefaultHalfOpenPerAddress) {
			t.Errorf("connection %d of others: %v", i+1, ok)
		}
	}
	// An address that has left is not kept.
	h = NewHalfOpen(HalfOpenConfig{})
	for n := range uint32(1000) {
		leave, ok := h.Enter(v4(n))
		if !ok {
			t.Fatal("full")
		}
		leave()
	}
	if len(h.from) != 0 || h.all != 0 {
		t.Errorf("%d addresses, %d in all are left", len(h.from), h.all)
	}
}
