package auth

import (
	"errors"
	"io"
	"os"
	"slices"
	"sync/atomic"

	"github.com/ingestd/ingestd/wire"
)

// GateConfig says whom a Gate lets in.
type GateConfig struct {
	// Tokens are those of the daemon. Nil: it has none, and everybody is let in.
	Tokens *Tokens

	// Users are the numbers of users who need no token on a unix socket, beside the daemon's own user.
	Users []int
}

// Gate stands between a hello and what it asks for. Its methods may be called from any goroutine; a nil Gate is one without tokens.
type Gate struct {
	cfg   GateConfig
	own   int
	stats [reasons]atomic.Uint64
}

// What became of hellos.
const (
	byToken = iota
	byUser
	notAuthenticated
	notPermitted
	timedOut
	reasons
)

// GateStats counts what became of hellos.
type GateStats struct {
	ByToken          uint64 // let in with a token
	ByUser           uint64 // let in on a unix socket without one
	NotAuthenticated uint64 // no token, an unknown one, or no right proof
	NotPermitted     uint64 // the token has not the right, or not for the table
	TimedOut         uint64 // the proof did not come in time
}

// NewGate returns a gate.
func NewGate(cfg GateConfig) *Gate { return &Gate{cfg: cfg, own: os.Geteuid()} }

// Peer is what a transport knows of a peer beside its bytes.
type Peer struct {
	Exporter []byte // what TLS exports under wire.ExporterLabel, wire.ExporterBytes of them; nil without TLS
	Local    bool   // it is on a unix socket
	User     int    // on a unix socket, the number of its user; negative: the kernel did not say
}

// notAuthenticatedReason is the same whatever it was, so that nobody can ask which names there are.
const notAuthenticatedReason = "this daemon serves who proves to have one of its tokens: give name and secret (--token-file or INGESTD_TOKEN), as they are in its file of tokens"

// Admit lets a peer in, or returns the refusal to send it. It is called when the hello was read, before anything is told of tables: hello, and the frame as
// wire.ReadHelloFrame gave both. If the hello names a token it writes a challenge to conn and reads the proof from it, not a byte beyond it, both within
// the deadline that the caller has set on the connection, which is the one of the whole handshake. It looks at the identity's right for the hello's role and table too.
//
// Of the refusals, CodeNotAuthenticated and CodeHandshakeTimeout are failures of the address they come from (package bans); CodeNotPermitted and CodeBadOption are not.
func (g *Gate) Admit(conn io.ReadWriter, hello *wire.Hello, frame []byte, peer Peer) (*Identity, *wire.Refusal) {
	if g == nil {
		g = new(Gate)
	}
	switch tokens := g.cfg.Tokens; {
	case tokens == nil && hello.Token != "":
		// It must not be let in, since it would take that for somebody's trick.
		return nil, wire.Refuse(wire.CodeBadOption, "this daemon has no tokens; take the token out (--token-file or INGESTD_TOKEN)")
	case tokens == nil:
		return Everybody(), nil
	case hello.Token == "" && peer.Local && peer.User >= 0 && (peer.User == g.own || slices.Contains(g.cfg.Users, peer.User)):
		g.stats[byUser].Add(1)
		return Everybody(), nil
	case hello.Token == "":
		return nil, g.refuse(notAuthenticated, wire.Refuse(wire.CodeNotAuthenticated, notAuthenticatedReason))
	}
	challenge := g.cfg.Tokens.Challenge(hello.Token, frame, peer.Exporter)
	id, refusal := g.exchange(conn, challenge)
	if refusal != nil {
		return nil, refusal
	}
	if refusal := id.Check(hello); refusal != nil {
		return nil, g.refuse(notPermitted, refusal)
	}
	g.stats[byToken].Add(1)
	return id, nil
}

// exchange asks and hears the answer.
func (g *Gate) exchange(conn io.ReadWriter, c *Challenge) (*Identity, *wire.Refusal) {
	err := wire.WriteChallenge(conn, c.Message())
	var proof wire.Proof
	if err == nil {
		proof, err = wire.ReadProof(conn)
	}
	if late(err) {
		return nil, g.refuse(timedOut, wire.Refuse(wire.CodeHandshakeTimeout, "the proof of the token did not come in time; send it at once after the challenge"))
	}
	id, ok := c.Verify(proof)
	if err != nil || !ok {
		return nil, g.refuse(notAuthenticated, wire.Refuse(wire.CodeNotAuthenticated, notAuthenticatedReason))
	}
	return id, nil
}

func late(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

func (g *Gate) refuse(why int, r *wire.Refusal) *wire.Refusal {
	g.stats[why].Add(1)
	return r
}

// Tokens returns the daemon's tokens, nil where it has none.
func (g *Gate) Tokens() *Tokens {
	if g == nil {
		return nil
	}
	return g.cfg.Tokens
}

// Stats returns the counts so far.
func (g *Gate) Stats() GateStats {
	if g == nil {
		return GateStats{}
	}
	n := func(why int) uint64 { return g.stats[why].Load() }
	return GateStats{n(byToken), n(byUser), n(notAuthenticated), n(notPermitted), n(timedOut)}
}
