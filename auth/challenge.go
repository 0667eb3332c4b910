package auth

import (
	"github.com/ingestd/ingestd/wire"
)

// Challenge is one question to a client, and what its answer must be. It serves one handshake.
type Challenge struct {
	message    wire.Challenge
	transcript wire.Transcript // the awaited proofs are made when one has come: until then nothing here is worth having
	entry      *entry
	known      bool
}

// Challenge asks for the proof of a token, whether there is one of that name or not: both take the same time, and look the same. hello is the frame of the client's hello
// as it came, exporter what TLS exports under wire.ExporterLabel, or nil.
func (t *Tokens) Challenge(name string, hello []byte, exporter []byte) *Challenge {
	c := &Challenge{message: wire.Challenge{Nonce: wire.NewNonce(), Proofs: make([]wire.Proof, len(t.decoy.secrets))}}
	c.entry, c.known = t.find(name)
	c.transcript = wire.NewTranscript(hello, c.message.Nonce, exporter)
	for i, s := range c.entry.secrets {
		c.message.Proofs[i] = c.transcript.DaemonProof(s)
	}
	return c
}

// Message is what to send.
func (c *Challenge) Message() *wire.Challenge { return &c.message }

// Verify says who has given the proof, false for nobody.
func (c *Challenge) Verify(p wire.Proof) (*Identity, bool) {
	which := -1
	for i, s := range c.entry.secrets {
		if p.Equal(c.transcript.ClientProof(s)) {
			which = i
		}
	}
	if !c.known || which < 0 || which > 0 && !c.entry.rotating {
		return nil, false
	}
	return c.entry.proved(which), true
}
