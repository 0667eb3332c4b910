package daemon

import (
	"log/slog"
	"net"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/bans/sockfilter"
	"github.com/ingestd/ingestd/internal/metrics"
)

// Bans says whether addresses from which handshakes fail are slowed and banned.
type Bans struct {
	Enabled  bool `yaml:"enabled"`
	Loopback bool `yaml:"loopback"` // addresses of this machine, too, which all of its users share; bounds their half-open handshakes, too
	Kernel   bool `yaml:"kernel"`   // the kernel drops what banned addresses send to begin a connection; else it is closed here
}

// access is who may come in: tokens, bans, and how many handshakes may be under way.
type access struct {
	tokens *auth.Tokens       // nil: everybody may
	gate   *auth.Gate         // nil without tokens
	door   *bans.Door         // its Table is nil where the configuration has switched bans off
	filter *sockfilter.Filter // nil without bans, or where they are not the kernel's
}

// newAccess reads the tokens. What is wrong with their file is an error of the configuration.
func newAccess(p *plan, log *slog.Logger) (access, error) {
	a := access{door: &bans.Door{HalfOpen: p.halfOpen()}}
	if p.Bans.Enabled {
		a.door.Table = bans.New(bans.Config{Loopback: p.Bans.Loopback})
	}
	if p.Bans.Enabled && p.Bans.Kernel {
		a.filter = sockfilter.New(sockfilter.Config{Table: a.door.Table, Log: log})
	}
	if p.Tokens == "" {
		return a, nil
	}
	tokens, err := auth.Load(p.Tokens, log)
	if err != nil {
		return a, configErrorf("tokens", "%v", err)
	}
	var users []int
	for _, u := range p.users {
		users = append(users, int(u))
	}
	a.tokens, a.gate = tokens, auth.NewGate(auth.GateConfig{Tokens: tokens, Users: users})
	return a, nil
}

// guard has the kernel drop what banned addresses send to a listener, where it is asked to and can.
func (a *access) guard(l listener, log *slog.Logger) listener {
	if a.filter == nil {
		return l
	}
	var err error
	if socket, ok := l.socket.(*net.UDPConn); ok {
		err = a.filter.GuardQUIC(socket)
	} else if tcp, ok := l.Listener.(*net.TCPListener); ok {
		var guarded net.Listener
		if guarded, err = a.filter.Guard(tcp); err == nil {
			l.Listener = guarded
		}
	}
	if err != nil {
		log.Warn("the kernel cannot filter for this listener; the daemon turns banned addresses away itself", "component", "daemon", "listener", l.url(), "err", err)
	}
	return l
}

// halfOpen counts handshakes under way within the limits.
func (p *plan) halfOpen() *bans.HalfOpen {
	return bans.NewHalfOpen(bans.HalfOpenConfig{Max: p.Limits.HalfOpen, MaxPerAddress: p.Limits.HalfOpenPerAddress, Loopback: p.Bans.Loopback})
}

// AccessStatus is who was let in, and who was not.
type AccessStatus struct {
	Tokens   *TokensStatus  `json:"tokens,omitempty"` // none: the daemon has none, and everybody is let in
	Bans     *BansStatus    `json:"bans,omitempty"`   // none: switched off
	HalfOpen HalfOpenStatus `json:"half_open"`
	Admin    *AdminStatus   `json:"admin,omitempty"` // none: it is off
}

// TokensStatus is the file of tokens and what became of those who came.
type TokensStatus struct {
	Tokens           []auth.TokenStatus `json:"tokens"`
	Reloads          uint64             `json:"reloads"`
	Failures         uint64             `json:"failures"`         // times that the file could not be used
	Broken           string             `json:"broken,omitempty"` // why the file is not what is in force
	ByToken          uint64             `json:"by_token"`
	ByUser           uint64             `json:"by_user"` // on unix sockets, without a token
	NotAuthenticated uint64             `json:"not_authenticated"`
	NotPermitted     uint64             `json:"not_permitted"`
	TimedOut         uint64             `json:"timed_out"`
}

// BansStatus counts; `ingestd bans ls` has the addresses.
type BansStatus struct {
	Addresses int    `json:"addresses"` // that are remembered
	Banned    int    `json:"banned"`    // of those
	Failures  uint64 `json:"failures"`
	Bans      uint64 `json:"bans"`
	Refused   uint64 `json:"refused"` // connections turned away
	Slowed    uint64 `json:"slowed"`
	Forgotten uint64 `json:"forgotten"` // to make room for others
	Cleared   uint64 `json:"cleared"`

	Kernel *KernelStatus `json:"kernel,omitempty"` // none: it drops nothing
}

// KernelStatus is what the kernel drops at the daemon's listening sockets.
type KernelStatus struct {
	Addresses   int    `json:"addresses"` // banned ones, the newest; where fewer than are banned, the daemon turns the rest away
	Failures    uint64 `json:"failures"`  // times it took no filter
	DroppedTCP  uint64 `json:"dropped_tcp"`
	DroppedQUIC uint64 `json:"dropped_quic"` // both: of banned addresses, and what found the socket's queue full
}

// AdminStatus is the admin endpoint.
type AdminStatus struct {
	Open    int64             `json:"open"` // connections
	Refused map[string]uint64 `json:"refused"`
}

// HalfOpenStatus is how many handshakes are under way.
type HalfOpenStatus struct {
	Open      int    `json:"open"`
	Addresses int    `json:"addresses"`
	Refused   uint64 `json:"refused"`
}

func (a *access) status() AccessStatus {
	var s AccessStatus
	if a.tokens != nil {
		g, t := a.gate.Stats(), a.tokens.Stats()
		s.Tokens = &TokensStatus{
			Tokens: t.Tokens, Reloads: t.Reloads, Failures: t.Failures,
			ByToken: g.ByToken, ByUser: g.ByUser, NotAuthenticated: g.NotAuthenticated, NotPermitted: g.NotPermitted, TimedOut: g.TimedOut,
		}
		if t.Broken != nil {
			s.Tokens.Broken = t.Broken.Error()
		}
	}
	if a.door.Table != nil {
		b := a.door.Table.Stats()
		s.Bans = &BansStatus{b.Addresses, b.Banned, b.Failures, b.Bans, b.Refused, b.Slowed, b.Forgotten, b.Cleared, nil}
	}
	if a.filter != nil {
		k := KernelStatus(a.filter.Stats())
		s.Bans.Kernel = &k
	}
	open, addresses, refused := a.door.HalfOpen.Stats()
	s.HalfOpen = HalfOpenStatus{open, addresses, refused}
	return s
}

// sources is access as metrics shows it.
func (a *access) sources() metrics.Access {
	m := metrics.Access{HalfOpen: a.door.HalfOpen.Stats}
	if a.tokens != nil {
		m.Gate, m.Tokens = a.gate.Stats, a.tokens.Stats
	}
	if a.door.Table != nil {
		m.Bans = a.door.Table.Stats
	}
	if a.filter != nil {
		m.Kernel = a.filter.Stats
	}
	return m
}
