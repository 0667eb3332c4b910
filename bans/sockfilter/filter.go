package sockfilter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/bans"
)

const (
	interval = 100 * time.Millisecond // between two programs, at least
	share    = 20                     // and as long as that many would take: nobody keeps the daemon busy with new bans
	roomMin  = 64                     // instructions: with less memory there is no filter
)

// Config says what a Filter works from.
type Config struct {
	Table *bans.Table  // required
	Log   *slog.Logger // default: none
}

// Filter has the kernel drop what banned addresses send to the sockets that it guards.
type Filter struct {
	table *bans.Table
	log   *slog.Logger
	at    frame

	mu      sync.Mutex
	sockets []*guarded
	room    int // instructions of a program, without begins
	stats   Stats
}

// guarded is one socket.
type guarded struct {
	socket
	kind    kind
	used    atomic.Bool // it has, or had, a program, which sockets that it accepts may have, too
	code    []bpf.RawInstruction
	counted uint32 // drops, at the last look
}

// Stats counts.
type Stats struct {
	Addresses int    // banned ones whose packets the kernel drops: the newest, as many as there is room for
	Failures  uint64 // programs that the kernel would not take
	// Dropped counts what the kernel dropped at the sockets: what banned addresses sent, and what found the socket's queue full or belonged to no connection any more.
	DroppedTCP, DroppedQUIC uint64
}

// New returns a filter; Guard gives it sockets, Run attaches programs.
func New(cfg Config) *Filter {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Filter{table: cfg.Table, log: cfg.Log, at: inKernel, room: instructionsMax - beginsMax}
}

// Guard filters for a listener of TCP, and returns what to accept from instead. It comes before Run. Listeners of multipath TCP are an error: the kernel takes programs for
// them, and never asks these.
func (f *Filter) Guard(l *net.TCPListener) (net.Listener, error) {
	s, err := newRawSocket(l)
	if err != nil {
		return nil, err
	}
	if p, err := s.protocol(); err != nil || p != unix.IPPROTO_TCP {
		return nil, fmt.Errorf("sockfilter: %v is no listener of TCP alone: protocol %d, %w", l.Addr(), p, errors.Join(err, errors.ErrUnsupported))
	}
	return &listener{l, f.add(s, kindTCP)}, nil
}

// GuardQUIC filters for a socket on which connections of QUIC begin. It comes before Run.
func (f *Filter) GuardQUIC(c syscall.Conn) error {
	s, err := newRawSocket(c)
	if err == nil {
		f.add(s, kindQUIC)
	}
	return err
}

func (f *Filter) add(s socket, k kind) *guarded {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := &guarded{socket: s, kind: k}
	f.sockets = append(f.sockets, g)
	return g
}

// listener accepts from one that is guarded.
type listener struct {
	net.Listener
	*guarded
}

// Accept implements net.Listener. What it returns has no program.
func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil && l.used.Load() {
		release(c)
	}
	return c, err
}

// Run renews the programs until ctx ends, and takes them away then. It returns nil.
func (f *Filter) Run(ctx context.Context) error {
	defer f.clear()
	over := time.NewTimer(0) // the first look is at once
	defer over.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.table.Changed():
		case <-over.C:
		}
		began := time.Now()
		over.Stop()
		if end := f.renew(); !end.IsZero() {
			over.Reset(time.Until(end))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(interval, share*time.Since(began))):
		}
	}
}

// renew attaches programs of who is banned now, and returns when the first of these bans ends; the zero time if nobody is banned.
func (f *Filter) renew() (end time.Time) {
	banned := f.table.Banned(instructionsMax)
	prefixes := make([]netip.Prefix, len(banned))
	for i, b := range banned {
		prefixes[i] = b.Prefix
		if end.IsZero() || b.Until.Before(end) {
			end = b.Until
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for !f.attach(prefixes) {
		f.room /= 2
		f.log.Warn("the kernel has no memory for so large a filter of banned addresses; it gets half as many: raise net.core.optmem_max",
			"component", "sockfilter", "instructions", f.room)
	}
	return end
}

// attach says false if the kernel has no memory for programs so large. It wants mu.
func (f *Filter) attach(prefixes []netip.Prefix) bool {
	code, n := judge(prefixes, f.room, f.at)
	var programs [kinds][]bpf.RawInstruction
	if n > 0 {
		for k := range kinds {
			raw, err := bpf.Assemble(slices.Concat(begins(k, f.at), code))
			if err != nil {
				panic("sockfilter: what was made is no program: " + err.Error())
			}
			programs[k] = raw
		}
	}
	taken := false
	for _, g := range f.sockets {
		switch err := g.put(programs[g.kind]); {
		case err == nil:
			taken = true
		case errors.Is(err, net.ErrClosed):
		case errors.Is(err, unix.ENOMEM) && f.room >= 2*roomMin:
			return false
		default:
			f.fail(err)
		}
	}
	if !taken {
		n = 0
	}
	f.stats.Addresses = n
	return true
}

// fail wants mu.
func (f *Filter) fail(err error) {
	if f.stats.Failures == 0 {
		f.log.Warn("the kernel takes no filter of banned addresses; the daemon turns them away itself", "component", "sockfilter", "err", err)
	}
	f.stats.Failures++
}

// put makes code the program of a socket; nil is none. After an error there is none either.
func (g *guarded) put(code []bpf.RawInstruction) error {
	if slices.Equal(code, g.code) {
		return nil
	}
	g.code = nil
	if code == nil {
		return g.detach()
	}
	g.used.Store(true)
	err := g.attach(code)
	if errors.Is(err, unix.ENOMEM) { // what is there counts until the new one is in its place
		if err = g.detach(); err == nil {
			err = g.attach(code)
		}
	}
	if err != nil {
		return errors.Join(err, g.detach())
	}
	g.code = code
	return nil
}

// clear takes all programs away.
func (f *Filter) clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, g := range f.sockets {
		_ = g.put(nil) // of a socket that is closed, most likely
	}
	f.stats.Addresses = 0
}

// Stats returns the counts so far.
func (f *Filter) Stats() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, g := range f.sockets {
		if n, err := g.drops(); err == nil {
			*f.dropped(g.kind) += uint64(n - g.counted) // which wraps, as both do
			g.counted = n
		}
	}
	return f.stats
}

func (f *Filter) dropped(k kind) *uint64 {
	if k == kindTCP {
		return &f.stats.DroppedTCP
	}
	return &f.stats.DroppedQUIC
}
