package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/bans/sockfilter"
	"github.com/ingestd/ingestd/wire"
)

// Access is where the counts of tokens, bans and handshakes come from. Gate and Tokens are nil where the daemon has no tokens, Bans where bans are off.
type Access struct {
	Gate     func() auth.GateStats
	Tokens   func() auth.Stats
	Bans     func() bans.Stats
	HalfOpen func() (open, addresses int, refused uint64)
	Kernel   func() sockfilter.Stats  // nil where it drops nothing
	Expires  func() time.Time         // of the certificate; nil without TLS
	Admin    func() map[string]uint64 // whom the admin endpoint refused, by reason
}

var (
	tokens        = desc("tokens", "Tokens of the daemon.")
	tokensReloads = desc("tokens_reloads_total", "Times the file of tokens was read and taken up.")
	tokensFailed  = desc("tokens_reload_failures_total", "Times the file of tokens was read and could not be used.")
	tokensStale   = desc("tokens_stale", "1 while the file of tokens is not what is in force.")
	handshakes    = desc("authentications_total", "Handshakes of a daemon with tokens, by what became of them.", "result")

	expires = desc("tls_certificate_expires_seconds", "Until when the certificate is good that the daemon shows, in seconds since 1970.")

	banned        = desc("banned_addresses", "Addresses that are banned.")
	remembered    = desc("failed_addresses", "Addresses from which handshakes failed of late, the banned ones too.")
	failures      = desc("handshake_failures_total", "Handshakes that failed, of addresses that are not exempt.")
	bansTotal     = desc("bans_total", "Times an address was banned.")
	bansRefused   = desc("bans_refused_total", "Connections of banned addresses, closed without a word.")
	bansSlowed    = desc("bans_slowed_total", "Connections that had to wait because handshakes of their address had failed.")
	bansForgotten = desc("bans_forgotten_total", "Addresses that were forgotten early to make room.")
	bansCleared   = desc("bans_cleared_total", "Addresses cleared by a success, or by hand.")
	halfOpen      = desc("half_open_handshakes", "Handshakes under way, of addresses that are not exempt.")
	kernelBanned  = desc("kernel_banned_addresses", "Banned addresses whose packets the kernel drops.")
	kernelFailed  = desc("kernel_filter_failures_total", "Times that the kernel took no filter of banned addresses.")
	kernelDropped = desc("kernel_dropped_total", "SYNs and datagrams that the kernel dropped at listening sockets: of banned addresses, and what found the queue full.", "transport")
	halfRefused   = desc("half_open_refused_total", "Connections closed because too many handshakes were under way.")
)

// adminCodes are what the admin endpoint refuses for.
var adminCodes = []wire.Code{
	wire.CodeBanned, wire.CodeTooManyConnections, wire.CodeBadHandshake, wire.CodeHandshakeTimeout, wire.CodeNotAuthenticated, wire.CodeNotPermitted,
}

func describeAccess() []*prometheus.Desc {
	return []*prometheus.Desc{
		tokens, tokensReloads, tokensFailed, tokensStale, handshakes, expires,
		banned, remembered, failures, bansTotal, bansRefused, bansSlowed, bansForgotten, bansCleared, kernelBanned, kernelFailed, kernelDropped, halfOpen, halfRefused,
	}
}

func (a *Access) collect(ch out) {
	if a.Tokens != nil {
		t, g := a.Tokens(), a.Gate()
		ch.gauge(tokens, float64(len(t.Tokens)))
		ch.counter(tokensReloads, t.Reloads)
		ch.counter(tokensFailed, t.Failures)
		ch.gauge(tokensStale, number(t.Broken != nil))
		for _, r := range []struct {
			result string
			n      uint64
		}{
			{"token", g.ByToken}, {"user", g.ByUser}, {"not_authenticated", g.NotAuthenticated}, {"not_permitted", g.NotPermitted}, {"timed_out", g.TimedOut},
		} {
			ch.counter(handshakes, r.n, r.result)
		}
	}
	if a.Expires != nil {
		ch.gauge(expires, float64(a.Expires().Unix()))
	}
	open, _, turned := a.HalfOpen()
	ch.gauge(halfOpen, float64(open))
	ch.counter(halfRefused, turned)
	untold := a.Admin()
	for _, code := range adminCodes {
		ch.counter(refused, untold[string(code)], "admin", string(code))
	}
	if a.Bans == nil {
		return
	}
	b := a.Bans()
	ch.gauge(banned, float64(b.Banned))
	ch.gauge(remembered, float64(b.Addresses))
	for d, n := range map[*prometheus.Desc]uint64{
		failures: b.Failures, bansTotal: b.Bans, bansRefused: b.Refused, bansSlowed: b.Slowed, bansForgotten: b.Forgotten, bansCleared: b.Cleared,
	} {
		ch.counter(d, n)
	}
	if a.Kernel != nil {
		k := a.Kernel()
		ch.gauge(kernelBanned, float64(k.Addresses))
		ch.counter(kernelFailed, k.Failures)
		ch.counter(kernelDropped, k.DroppedTCP, "tcp")
		ch.counter(kernelDropped, k.DroppedQUIC, "quic")
	}
}
