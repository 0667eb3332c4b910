package bans

import (
	"container/list"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// Limits.
const (
	FailuresMax    = 5               // at this failure an address is banned
	BanFor         = 5 * time.Minute // from its last failure on; after so long without one, failures are forgotten too
	AddressesMax   = 65536           // more are not remembered: the one whose last failure is oldest is forgotten for the next
	IPv6PrefixBits = 64              // what one customer has at the least
)

// slowedFirst is how long the handshake after the first failure waits; each failure doubles it.
const slowedFirst = 500 * time.Millisecond

// Config says whom a Table looks at.
type Config struct {
	// Loopback has addresses of this machine counted like others. By default they are exempt: all of its users share them.
	Loopback bool
}

// Verdict is what to do with a peer.
type Verdict struct {
	Banned bool          // close without a word, or with wire.CodeBanned
	Until  time.Time     // Banned: when it ends, unless it fails again
	Wait   time.Duration // not banned: how long to wait before its hello is read
}

// Table remembers from which addresses handshakes failed. Its methods may be called from any goroutine; a nil Table remembers nothing.
type Table struct {
	loopback bool
	size     atomic.Int64 // of entries: with none, Check takes no lock

	mu      sync.Mutex
	entries map[netip.Prefix]*list.Element
	order   list.List // of *entry, the oldest last failure first
	banned  list.List // of those, the ones that are banned, in the same order
	stats   Stats
	changed chan struct{} // see Changed
}

type entry struct {
	prefix   netip.Prefix
	failures int
	last     time.Time
	refused  uint64
	ban      *list.Element // in banned; nil: it is slowed only
}

// Stats counts.
type Stats struct {
	Addresses int    // that are remembered
	Banned    int    // of those, banned now
	Failures  uint64 // handshakes that failed
	Bans      uint64 // times an address was banned
	Refused   uint64 // connections that were turned away
	Slowed    uint64 // connections that had to wait
	Forgotten uint64 // addresses that made room for others before their time
	Cleared   uint64 // addresses that were cleared by a success, or by hand
}

// New returns an empty table.
func New(cfg Config) *Table {
	return &Table{loopback: cfg.Loopback, entries: map[netip.Prefix]*list.Element{}, changed: make(chan struct{}, 1)}
}

// Failure says whether a refusal is a failure of the address it goes to: what is no handshake of ours, is not completed, or does not prove what it should. A spec that differs, a
// right that a token lacks, a daemon that is full are none: who meets them is no stranger, or not to blame. A version that is not spoken is one: whoever says so is known by nothing.
func Failure(code wire.Code) bool {
	switch code {
	case wire.CodeBadMagic, wire.CodeBadVersion, wire.CodeBadHandshake, wire.CodeHandshakeTimeout, wire.CodeNotAuthenticated:
		return true
	}
	return false
}

// Address returns the address of a TCP or UDP peer; the zero Addr, which is never banned, of any other.
func Address(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.AddrPort().Addr()
	case *net.UDPAddr:
		return a.AddrPort().Addr()
	}
	return netip.Addr{}
}

// keyOf is what an address is remembered as: itself, or of IPv6 its /64. ok is false if it is exempt.
func keyOf(a netip.Addr, loopback bool) (key netip.Prefix, ok bool) {
	a = a.Unmap().WithZone("")
	if !a.IsValid() || a.IsLoopback() && !loopback {
		return key, false
	}
	key, err := a.Prefix(keyBits(a))
	return key, err == nil
}

// counts says whether an address is not exempt; a nil Table exempts none.
func (t *Table) counts(a netip.Addr) bool {
	if t == nil {
		return true
	}
	_, ok := keyOf(a, t.loopback)
	return ok
}

func keyBits(a netip.Addr) int {
	if a.Is6() {
		return IPv6PrefixBits
	}
	return a.BitLen()
}

// slowed is how long the next handshake waits after so many failures.
func slowed(failures int) time.Duration {
	if failures < 1 {
		return 0
	}
	return slowedFirst << (min(failures, FailuresMax-1) - 1)
}

// Check says what to do with a connection that has just come from an address. One that is banned costs a lookup.
func (t *Table) Check(a netip.Addr) Verdict {
	if t == nil || t.size.Load() == 0 {
		return Verdict{}
	}
	key, ok := keyOf(a, t.loopback)
	if !ok {
		return Verdict{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	el := t.entries[key]
	if el == nil {
		return Verdict{}
	}
	e, now := el.Value.(*entry), time.Now()
	if now.Sub(e.last) >= BanFor {
		t.remove(el)
		return Verdict{}
	}
	if e.ban != nil {
		e.refused++
		t.stats.Refused++
		return Verdict{Banned: true, Until: e.last.Add(BanFor)}
	}
	wait := max(0, e.last.Add(slowed(e.failures)).Sub(now))
	if wait > 0 {
		t.stats.Slowed++
	}
	return Verdict{Wait: wait}
}

// Failed notes that a handshake from an address failed, and returns what that means for the next.
func (t *Table) Failed(a netip.Addr) Verdict {
	if t == nil {
		return Verdict{}
	}
	key, ok := keyOf(a, t.loopback)
	if !ok {
		return Verdict{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.expire(now)
	el := t.entries[key]
	if el == nil {
		if len(t.entries) >= AddressesMax {
			t.forget(t.order.Front())
			t.stats.Forgotten++
		}
		el = t.order.PushBack(&entry{prefix: key})
		t.entries[key] = el
		t.size.Add(1)
	}
	t.order.MoveToBack(el)
	e := el.Value.(*entry)
	e.failures, e.last = e.failures+1, now
	t.stats.Failures++
	switch {
	case e.ban != nil:
		t.banned.MoveToBack(e.ban)
	case e.failures >= FailuresMax:
		e.ban = t.banned.PushBack(e)
		t.stats.Bans++
		t.tell()
	default:
		return Verdict{Wait: slowed(e.failures)}
	}
	return Verdict{Banned: true, Until: now.Add(BanFor)}
}

// Succeeded forgets what an address did before. A ban that began while its handshake was under way ends too.
func (t *Table) Succeeded(a netip.Addr) {
	if t == nil || t.size.Load() == 0 {
		return
	}
	if key, ok := keyOf(a, t.loopback); ok {
		t.clear(key)
	}
}

func (t *Table) clear(key netip.Prefix) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	el := t.entries[key]
	if el != nil {
		t.forget(el)
		t.stats.Cleared++
	}
	return el != nil
}

// expire forgets what is older than BanFor. It wants mu.
func (t *Table) expire(now time.Time) {
	for el := t.order.Front(); el != nil && now.Sub(el.Value.(*entry).last) >= BanFor; el = t.order.Front() {
		t.remove(el)
	}
}

// remove wants mu.
func (t *Table) remove(el *list.Element) {
	e := t.order.Remove(el).(*entry)
	delete(t.entries, e.prefix)
	t.size.Add(-1)
	if e.ban != nil {
		t.banned.Remove(e.ban)
	}
}

// forget is remove before the time is over. It wants mu.
func (t *Table) forget(el *list.Element) {
	t.remove(el)
	if el.Value.(*entry).ban != nil {
		t.tell()
	}
}

// Ban is an address that is banned.
type Ban struct {
	Prefix netip.Prefix // one address, or of IPv6 a /64
	Until  time.Time    // unless it fails again
}

// Banned returns who is banned, the latest failure first, at most so many.
func (t *Table) Banned(most int) []Ban {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire(time.Now())
	list := make([]Ban, 0, min(most, t.banned.Len()))
	for el := t.banned.Back(); el != nil && len(list) < most; el = el.Prev() {
		e := el.Value.(*entry)
		list = append(list, Ban{e.prefix, e.last.Add(BanFor)})
	}
	return list
}

// Changed is sent to when somebody is banned, or no longer before its time is over, which Ban.Until says; many changes may be one message. There is one channel, for one reader.
func (t *Table) Changed() <-chan struct{} { return t.changed }

// tell never waits.
func (t *Table) tell() {
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

// Entry is an address from which handshakes failed.
type Entry struct {
	Address  string    `json:"address"` // of IPv6 a /64
	Failures int       `json:"failures"`
	Last     time.Time `json:"last"`              // failure
	Banned   bool      `json:"banned"`            // else it is slowed only
	Until    time.Time `json:"until"`             // when all of this is forgotten
	Refused  uint64    `json:"refused,omitempty"` // connections turned away
}

// Ls lists what is remembered, the latest failure first.
func (t *Table) Ls() []Entry {
	found := t.copied()
	list := make([]Entry, 0, len(found))
	for _, e := range found {
		list = append(list, Entry{text(e.prefix), e.failures, e.last, e.ban != nil, e.last.Add(BanFor), e.refused})
	}
	return list
}

// copied is what is remembered, the latest failure first; text is made of it when those who come wait for it no longer.
func (t *Table) copied() []entry {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire(time.Now())
	found := make([]entry, 0, len(t.entries))
	for el := t.order.Back(); el != nil; el = el.Prev() {
		found = append(found, *el.Value.(*entry))
	}
	return found
}

func text(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// Clear forgets an address, given as Ls writes it or as any address in a /64 of IPv6, and says whether it was remembered.
func (t *Table) Clear(address string) (bool, error) {
	a, err := netip.ParseAddr(address)
	if err != nil {
		p, failed := netip.ParsePrefix(address)
		if failed != nil {
			return false, fmt.Errorf("bans: %q is no address, such as 192.0.2.7 or 2001:db8:1:2::/64", address)
		}
		a = p.Addr()
		if single := a.Unmap().Is4(); single && !p.IsSingleIP() || !single && p.Bits() < IPv6PrefixBits {
			return false, fmt.Errorf("bans: %q is more than one address is remembered as; clear them one by one, or all", address)
		}
	}
	key, err := a.Unmap().WithZone("").Prefix(keyBits(a.Unmap()))
	if err != nil {
		return false, fmt.Errorf("bans: %w", err)
	}
	return t.clear(key), nil
}

// ClearAll forgets everything and returns how many addresses that were.
func (t *Table) ClearAll() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.entries)
	clear(t.entries)
	t.order.Init()
	t.banned.Init()
	t.size.Store(0)
	t.tell()
	t.stats.Cleared += uint64(n)
	return n
}

// Stats returns the counts so far.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire(time.Now())
	s := t.stats
	s.Addresses, s.Banned = len(t.entries), t.banned.Len()
	return s
}
