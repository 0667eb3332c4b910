package fuzz

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/wire"
)

// handshake is one visit: what was said and what was answered.
type handshake struct {
	t         *testing.T
	hello     *wire.Hello
	challenge *wire.Challenge
	nothing   bool // was said
	right     bool // the proof that was given is that of the token
	accepted  bool
	refusal   *wire.Refusal
}

// FuzzHandshake: visitors of a daemon with tokens, over TCP, TLS and QUIC, each from an address of its own. Whatever is in a field of the hello and whatever follows the challenge: who does not prove
// a token hears what is wrong with its bytes, or one and the same refusal; who does is let in, or told why not; failures are held against the address and nothing else is; each
// visitor is counted once and leaves nothing behind.
func FuzzHandshake(f *testing.F) {
	d := newDoors(f)
	for transport := range byte(len(transports)) {
		for field := range byte(len(helloFields)) {
			for _, value := range []string{helloFields[field].value, `"\u0000"`, `null`, `-1`, `{"a":[1,2]}`} {
				f.Add(transport, field, []byte(value), byte(proofRight), []byte("8 bytes!8 bytes!"), byte(255))
			}
		}
		for how := range byte(proofs) {
			for _, value := range []string{`"worker"`, `"nobody"`} {
				f.Add(transport, byte(3), []byte(value), how, wire.AppendProof(nil, wire.Proof{1}), byte(how))
			}
		}
		for _, role := range []string{`"train"`, `"publish"`, `"subscribe"`, `"manifest"`, `"observe"`, `"fill"`} {
			f.Add(transport, byte(0), []byte(role), byte(proofRight), []byte{}, byte(9))
		}
		body, whole := byte(len(helloFields)), byte(len(helloFields)+1)
		f.Add(transport, body, []byte(`{"role":"train","table":"samples","byte_order":"little","token":"worker","nonce":"`+string(bytes.Repeat([]byte("a1"), 32))+`"}`), byte(0), []byte{}, byte(80))
		f.Add(transport, body, []byte(`{"role":"train","table":"other","byte_order":"little","token":"worker","nonce":"`+string(bytes.Repeat([]byte("a1"), 32))+`"}`), byte(0), []byte{}, byte(80))
		f.Add(transport, whole, []byte{}, byte(0), []byte{}, byte(0))
		f.Add(transport, whole, []byte("GET / HTTP/1.1\r\n\r\n"), byte(0), []byte{}, byte(1))
		f.Add(transport, whole, frame(1, 1, 1<<31, "{"), byte(0), []byte{}, byte(0))
		f.Add(transport, whole, frame(9, 9, 2, "{}"), byte(0), []byte{}, byte(0))
		f.Add(transport, whole, helloWith(0, []byte(`"push"`))[:50], byte(0), []byte{}, byte(7))
		f.Add(transport, byte(3), []byte(`"worker"`), byte(proofGiven), frame(1, 0, wire.ProofBytesMax+1, "{"), byte(90))
		f.Add(transport, byte(3), []byte(`"worker"`), byte(proofGiven), frame(1, 0, 14, `{"proof":null}`), byte(90))
		f.Add(transport, byte(3), []byte(`"worker"`), byte(proofGiven), []byte{}, byte(90))
	}
	var last wire.Proof // that was right
	visitors := uint64(0)
	f.Fuzz(func(t *testing.T, transport, field byte, value []byte, how byte, answer []byte, piece byte) {
		v := d.visit(t, transports[int(transport)%len(transports)])
		defer v.leave()
		visitors++
		said := helloWith(field, value[:min(len(value), 8<<10)])
		// What follows the hello is the answer's to say.
		hello, whole, err := wire.ReadHelloFrame(bytes.NewReader(said))
		if err == nil {
			said = whole
		}
		h := &handshake{t: t, hello: hello, nothing: len(said) == 0}
		v.say(said, 1+8*int(piece))
		if err == nil && hello.Token != "" {
			last = h.prove(v, said, int(how)%proofs, last, answer[:min(len(answer), 8<<10)], 1+8*int(piece))
		}
		_ = v.Conn.(interface{ CloseWrite() error }).CloseWrite()
		if h.refusal == nil {
			h.hear(v)
		}
		h.check(err)
		failed := err != nil || h.refusal != nil && bans.Failure(h.refusal.Code) // whatever the hello's fault is: nothing is known of its peer
		if wait := d.bans.Check(v.from).Wait; !h.nothing && (wait > 0) != failed {
			t.Fatalf("told %v, and its address waits %v next time", h.refusal, wait)
		}
		v.leave()
		d.settled(t, visitors)
	})
}

// prove answers the challenge that must come, whatever token was named. It returns the proof that would have been right.
func (h *handshake) prove(v *visitor, said []byte, how int, last wire.Proof, answer []byte, piece int) wire.Proof {
	t := h.t
	err := wire.ReadReply(v, new(wire.AcceptedPush))
	if !errors.As(err, &h.challenge) {
		t.Fatalf("no challenge to a hello with a token: %v", err)
	}
	secret := fuzzToken().Secret
	transcript := wire.NewTranscript(said, h.challenge.Nonce, v.exporter(t))
	if known := h.hello.Token == fuzzToken().Name; h.challenge.Proves(transcript, secret) != known || len(h.challenge.Proofs) != wire.ProofsMax {
		t.Fatalf("token %q: the daemon proves it: %v, with %d proofs", h.hello.Token, !known, len(h.challenge.Proofs))
	}
	right := transcript.ClientProof(secret)
	var proof []byte
	switch how {
	case proofRight:
		proof, h.right = append(wire.AppendProof(nil, right), answer...), h.hello.Token == fuzzToken().Name
	case proofReflected:
		proof = wire.AppendProof(nil, h.challenge.Proofs[0])
	case proofReplayed:
		proof = wire.AppendProof(nil, last)
	default:
		proof = answer
	}
	v.say(proof, piece)
	return right
}

// hear takes all that the daemon has still to say.
func (h *handshake) hear(v *visitor) {
	b, err := io.ReadAll(v)
	if h.nothing && err != nil { // a stream of QUIC on which nothing came is reset
		return
	}
	if err != nil {
		h.t.Fatalf("hearing, after %q: %v", b, err)
	}
	if len(b) == 0 {
		return
	}
	r := bytes.NewReader(b)
	accepted, asked := wire.Accepted(new(wire.AcceptedPush)), (*wire.Challenge)(nil)
	if h.hello != nil && h.hello.Role == wire.RoleManifest {
		accepted = new(wire.AcceptedManifest)
	}
	switch err := wire.ReadReply(r, accepted); {
	case err == nil:
		h.accepted = true // acks and a closing notice follow
		return
	case errors.As(err, &asked):
		h.t.Fatalf("asked twice, or unasked")
	case !errors.As(err, &h.refusal):
		h.t.Fatalf("the answer makes no sense: %v\n%q", err, b)
	}
	if r.Len() > 0 {
		h.t.Fatalf("%d bytes after the refusal %v", r.Len(), h.refusal)
	}
}

// check compares the outcome with what the hello, read alone, must lead to.
func (h *handshake) check(bad error) {
	t := h.t
	var refusal *wire.Refusal
	code := wire.Code("")
	if h.refusal != nil {
		code = h.refusal.Code
	}
	switch {
	case bad == io.EOF:
		if h.accepted || code != "" {
			t.Fatalf("to nothing it answered %v", h.refusal)
		}
	case errors.As(bad, &refusal):
		if h.accepted || code != refusal.Code {
			t.Fatalf("told %v, want %v", h.refusal, refusal)
		}
	case !h.right: // no token, an unknown one, a wrong proof
		if h.accepted || code != wire.CodeNotAuthenticated {
			t.Fatalf("a stranger was told %v, and let in: %v", h.refusal, h.accepted)
		}
		if oneReason == "" {
			oneReason = h.refusal.Reason
		}
		if h.refusal.Reason != oneReason {
			t.Fatalf("strangers are told %q and %q", oneReason, h.refusal.Reason)
		}
	case h.hello.Table != connectionTable || h.hello.Role == wire.RolePublish:
		if h.accepted || code != wire.CodeNotPermitted {
			t.Fatalf("role %s at table %q, for which the token is not: told %v, let in: %v", h.hello.Role, h.hello.Table, h.refusal, h.accepted)
		}
	case !h.accepted && (code == "" || bans.Failure(code) || code == wire.CodeNotPermitted):
		t.Fatalf("who proved its token was told %v", h.refusal)
	case h.accepted && h.hello.Role != wire.RolePush:
		t.Fatalf("role %s was let in as a producer", h.hello.Role)
	}
}

// oneReason is what strangers are told.
var oneReason string
