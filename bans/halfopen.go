package bans

import (
	"net/netip"
	"sync"
)

// Defaults of HalfOpenConfig.
const (
	DefaultHalfOpen           = 256
	DefaultHalfOpenPerAddress = 32
)

// HalfOpenConfig bounds the connections whose handshake is under way. Zero fields take the default.
type HalfOpenConfig struct {
	Max           int // in all; default DefaultHalfOpen
	MaxPerAddress int // from one address, or one /64 of IPv6; default DefaultHalfOpenPerAddress
	Loopback      bool
}

// HalfOpen counts connections whose handshake is under way. Its methods may be called from any goroutine.
type HalfOpen struct {
	cfg  HalfOpenConfig
	keys Table // of which only the keys are used

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
	return &HalfOpen{cfg: cfg, keys: Table{loopback: cfg.Loopback}, from: map[netip.Prefix]int{}}
}

// Enter counts a connection that has just come; false if there are too many, in which case it is closed, and nothing is to be left. Whoever entered calls leave once,
// when its handshake has ended in whichever way. Addresses that are exempt, and those of unix sockets, count in all only.
func (h *HalfOpen) Enter(a netip.Addr) (leave func(), ok bool) {
	key, counted := h.keys.key(a)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.all >= h.cfg.Max || counted && h.from[key] >= h.cfg.MaxPerAddress {
		h.refused++
		return nil, false
	}
	h.all++
	if counted {
		h.from[key]++
	}
	return sync.OnceFunc(func() { h.leave(key, counted) }), true
}

func (h *HalfOpen) leave(key netip.Prefix, counted bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all--
	if !counted {
		return
	}
	if h.from[key]--; h.from[key] == 0 {
		delete(h.from, key)
	}
}

// Stats returns how many handshakes are under way, from how many addresses that are counted, and how many connections were turned away.
func (h *HalfOpen) Stats() (open, addresses int, refused uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.all, len(h.from), h.refused
}
