package bans

import (
	"net/netip"
	"sync"
)

// Defaults of HalfOpenConfig.
const (
	DefaultHalfOpen           = 128
	DefaultHalfOpenPerAddress = 16
)

// HalfOpenConfig bounds the connections whose handshake is under way. Zero fields take the default.
type HalfOpenConfig struct {
	Max           int  // in all; default DefaultHalfOpen
	MaxPerAddress int  // from one address, or one /64 of IPv6; default DefaultHalfOpenPerAddress
	Loopback      bool // addresses of this machine are counted like others; by default they are exempt
}

// HalfOpen counts connections whose handshake is under way, of addresses that are not exempt. Its methods may be called from any goroutine.
type HalfOpen struct {
	cfg HalfOpenConfig

	mu      sync.Mutex
	all     int
	from    map[netip.Prefix]int
	refused uint64
}

// NewHalfOpen returns a counter.
func NewHalfOpen(cfg HalfOpenConfig) *HalfOpen {
	if cfg.Max == 0 {
		cfg.Max = DefaultHalfOpen
	}
	if cfg.MaxPerAddress == 0 {
		cfg.MaxPerAddress = DefaultHalfOpenPerAddress
	}
	return &HalfOpen{cfg: cfg, from: map[netip.Prefix]int{}}
}

// counts says whether an address is not exempt.
func (h *HalfOpen) counts(a netip.Addr) bool {
	_, ok := keyOf(a, h.cfg.Loopback)
	return ok
}

// Enter counts a connection that has just come; false if there are too many, in which case it is closed, and nothing is to be left. Whoever entered calls leave once,
// when its handshake has ended in whichever way. Of an exempt address nothing is counted.
func (h *HalfOpen) Enter(a netip.Addr) (leave func(), ok bool) {
	key, counted := keyOf(a, h.cfg.Loopback)
	if !counted {
		return func() {}, true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.all >= h.cfg.Max || h.from[key] >= h.cfg.MaxPerAddress {
		h.refused++
		return nil, false
	}
	h.all++
	h.from[key]++
	return sync.OnceFunc(func() { h.leave(key) }), true
}

// of returns how many handshakes of an address are under way.
func (h *HalfOpen) of(a netip.Addr) int {
	key, _ := keyOf(a, h.cfg.Loopback)
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.from[key]
}

func (h *HalfOpen) leave(key netip.Prefix) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all--
	if h.from[key]--; h.from[key] == 0 {
		delete(h.from, key)
	}
}

// Stats returns how many handshakes are under way, from how many addresses, and how many connections were turned away.
func (h *HalfOpen) Stats() (open, addresses int, refused uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.all, len(h.from), h.refused
}
