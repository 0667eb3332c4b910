package auth

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/wire"
)

const (
	workerSecret = "the-secret-of-worker-0123456789ab"
	olderSecret  = "the-older-secret-of-worker-012345"
	readerSecret = "the-secret-of-reader-0123456789ab"
)

const testFile = `
tokens:
  - name: worker
    secret: ` + workerSecret + `
    previous: ` + olderSecret + `
    rights: [push]
    tables: [grads, "w*"]
  - {name: reader, secret: ` + readerSecret + `, rights: [read], tables: ["*"]}
`

func testTokens(t testing.TB) *Tokens {
	t.Helper()
	tokens, err := Parse([]byte(testFile))
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

func token(t testing.TB, name, secret string) wire.Token {
	t.Helper()
	s, err := wire.NewSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Token{Name: name, Secret: s}
}

// helloOf is a hello with a token, and its frame.
func helloOf(t testing.TB, role wire.Role, table string, by wire.Token) (*wire.Hello, []byte) {
	t.Helper()
	h := &wire.Hello{Role: role, Table: table}
	if role == wire.RoleManifest {
		h.ManifestID = strings.Repeat("0", 16)
	}
	if role == wire.RolePush || role == wire.RolePublish {
		h.Manifest = json.RawMessage("{}")
	}
	h.SetToken(by)
	if by.Name != "" {
		h.Nonce = wire.NewNonce()
	}
	frame, err := wire.AppendHello(nil, h)
	if err != nil {
		t.Fatal(err)
	}
	read, raw, err := wire.ReadHelloFrame(bytes.NewReader(frame))
	if err != nil || !bytes.Equal(raw, frame) {
		t.Fatal(err)
	}
	return read, frame
}

// tape is a connection whose answer is made of what was asked.
type tape struct {
	asked  bytes.Buffer
	answer func(asked []byte) []byte
	left   []byte
	over   bool
	end    error // after the answer; default io.EOF
}

func (c *tape) Write(b []byte) (int, error) { return c.asked.Write(b) }

func (c *tape) Read(b []byte) (int, error) {
	if !c.over {
		c.over, c.left = true, c.answer(c.asked.Bytes())
	}
	if len(c.left) == 0 {
		if c.end != nil {
			return 0, c.end
		}
		return 0, io.EOF
	}
	n := copy(b, c.left)
	c.left = c.left[n:]
	return n, nil
}

// challengeIn reads the challenge that a gate wrote.
func challengeIn(t testing.TB, asked []byte) *wire.Challenge {
	t.Helper()
	var c *wire.Challenge
	if err := wire.ReadReply(bytes.NewReader(asked), new(wire.AcceptedTrain)); !errors.As(err, &c) {
		t.Fatalf("no challenge: %v", err)
	}
	return c
}

// honest answers as a client does that was sent the frame by its owner.
func honest(t testing.TB, frame []byte, by wire.Token, exporter []byte) func([]byte) []byte {
	return func(asked []byte) []byte {
		return wire.AppendProof(nil, wire.NewTranscript(frame, challengeIn(t, asked).Nonce, exporter).ClientProof(by.Secret))
	}
}

func wantRefused(t testing.TB, id *Identity, r *wire.Refusal, code wire.Code) {
	t.Helper()
	if id != nil || r == nil || r.Code != code {
		t.Errorf("let in as %v, refused with %v; want %s", id, r, code)
	}
}

// TestOneReason: whatever was wrong, a prober is told the same.
func TestOneReason(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	worker := token(t, "worker", workerSecret)
	hello, frame := helloOf(t, wire.RolePush, "grads", worker)
	stranger, strangers := helloOf(t, wire.RolePush, "grads", token(t, "nobody", workerSecret))
	bare, bares := helloOf(t, wire.RolePush, "grads", wire.Token{})
	reader, readers := helloOf(t, wire.RolePush, "grads", token(t, "reader", workerSecret))
	said := map[string]bool{}
	for name, c := range map[string]struct {
		hello  *wire.Hello
		frame  []byte
		answer func([]byte) []byte
		end    error
	}{
		"no token":             {bare, bares, nil, nil},
		"unknown":              {stranger, strangers, honest(t, strangers, worker, nil), nil},
		"another's secret":     {reader, readers, honest(t, readers, worker, nil), nil},
		"wrong secret":         {hello, frame, honest(t, frame, token(t, "worker", "x"+workerSecret), nil), nil},
		"no proof":             {hello, frame, func([]byte) []byte { return nil }, nil},
		"reset":                {hello, frame, func([]byte) []byte { return nil }, errors.New("connection reset by peer")},
		"cut proof":            {hello, frame, func(b []byte) []byte { return honest(t, frame, worker, nil)(b)[:50] }, nil},
		"not a proof":          {hello, frame, func([]byte) []byte { return []byte("GET / HTTP/1.1\r\n\r\n") }, nil},
		"long proof":           {hello, frame, func([]byte) []byte { return append([]byte(wire.Magic), 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f) }, nil},
		"a hello once more":    {hello, frame, func([]byte) []byte { return frame }, nil},
		"the challenge itself": {hello, frame, func(asked []byte) []byte { return bytes.Clone(asked) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			id, refusal := gate.Admit(&tape{answer: c.answer, end: c.end}, c.hello, c.frame, Peer{})
			wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
			said[string(wire.AppendRefusal(nil, refusal))] = true
		})
	}
	if len(said) != 1 {
		t.Errorf("%d different refusals", len(said))
	}
	if s := gate.Stats(); s.NotAuthenticated != 11 || s.ByToken != 0 {
		t.Errorf("%+v", s)
	}
}

// TestChallengesLookAlike: of a known token, one that is being rotated and an unknown one, the challenges have the same form and length, never repeat, and leave the same amount of work.
func TestChallengesLookAlike(t *testing.T) {
	tokens := testTokens(t)
	seen := map[wire.Proof]bool{}
	lengths := map[int]bool{}
	for _, name := range []string{"worker", "reader", "nobody", "", strings.Repeat("x", 128)} {
		for range 2 {
			c := tokens.Challenge(name, []byte("hello"), nil)
			lengths[len(wire.AppendChallenge(nil, c.Message()))] = true
			for _, p := range c.Message().Proofs {
				if seen[p] {
					t.Errorf("%q: a proof came twice", name)
				}
				seen[p] = true
			}
		}
	}
	if len(lengths) != 1 || len(seen) != 20 {
		t.Errorf("lengths %v, %d proofs", lengths, len(seen))
	}
}

// TestReplay: what an honest client said once lets nobody in, neither on the same connection nor on another.
func TestReplay(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	worker := token(t, "worker", workerSecret)
	hello, frame := helloOf(t, wire.RolePush, "grads", worker)
	var recorded []byte
	id, refusal := gate.Admit(&tape{answer: func(asked []byte) []byte {
		recorded = honest(t, frame, worker, nil)(asked)
		return recorded
	}}, hello, frame, Peer{})
	if refusal != nil || id.Token != "worker" {
		t.Fatalf("%v, %v", id, refusal)
	}
	for range 3 {
		id, refusal := gate.Admit(&tape{answer: func([]byte) []byte { return recorded }}, hello, frame, Peer{})
		wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
	}
}

// TestReflection: the daemon's own proofs are worth nothing as a client's, nor are those that a second connection gets out of it.
func TestReflection(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	hello, frame := helloOf(t, wire.RolePush, "grads", token(t, "worker", workerSecret))
	for i := range wire.ProofsMax {
		id, refusal := gate.Admit(&tape{answer: func(asked []byte) []byte {
			return wire.AppendProof(nil, challengeIn(t, asked).Proofs[i])
		}}, hello, frame, Peer{})
		wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
	}
	// The attacker opens a second connection with the first one's hello, to have the daemon prove what it was asked.
	id, refusal := gate.Admit(&tape{answer: func([]byte) []byte {
		second := &tape{answer: func([]byte) []byte { return nil }}
		_, _ = gate.Admit(second, hello, frame, Peer{})
		return wire.AppendProof(nil, challengeIn(t, second.asked.Bytes()).Proofs[0])
	}}, hello, frame, Peer{})
	wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
}

// TestChangedHello: one in the middle changes what the client asked for; the daemon's proof is then wrong for the client, and the client's for the daemon.
func TestChangedHello(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	worker := token(t, "worker", workerSecret)
	_, sent := helloOf(t, wire.RolePush, "grads", worker)
	for name, change := range map[string]func(h *wire.Hello){
		"table":       func(h *wire.Hello) { h.Table = "weights" },
		"session":     func(h *wire.Hello) { h.Session = "another" },
		"compression": func(h *wire.Hello) { h.Compression = wire.CompressionS2 },
		"ack":         func(h *wire.Hello) { h.Ack = wire.AckCommitted },
		"manifest":    func(h *wire.Hello) { h.Manifest = json.RawMessage(`{"x":1}`) },
		"nonce":       func(h *wire.Hello) { h.Nonce[0] ^= 1 },
		"versions":    func(h *wire.Hello) { h.VersionMin, h.VersionMax = 1, 2 },
		"client":      func(h *wire.Hello) { h.Client = "x" },
	} {
		t.Run(name, func(t *testing.T) {
			h, _, err := wire.ReadHelloFrame(bytes.NewReader(sent))
			if err != nil {
				t.Fatal(err)
			}
			change(h)
			changed, err := wire.AppendHello(nil, h)
			if err != nil || bytes.Equal(changed, sent) {
				t.Fatalf("not changed: %v", err)
			}
			h, changed, err = wire.ReadHelloFrame(bytes.NewReader(changed))
			if err != nil {
				t.Fatal(err)
			}
			id, refusal := gate.Admit(&tape{answer: func(asked []byte) []byte {
				c := challengeIn(t, asked)
				transcript := wire.NewTranscript(sent, c.Nonce, nil)
				if c.Proves(transcript, worker.Secret) {
					t.Error("the client would take the daemon's proof")
				}
				return wire.AppendProof(nil, transcript.ClientProof(worker.Secret))
			}}, h, changed, Peer{})
			wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
		})
	}
	// The same fields in other bytes are another hello too.
	body := bytes.Replace(sent[16:], []byte(`{"role"`), []byte(`{ "role"`), 1)
	other := append(append([]byte{}, sent[:16]...), body...)
	other[12]++
	h, frame, err := wire.ReadHelloFrame(bytes.NewReader(other))
	if err != nil {
		t.Fatal(err)
	}
	id, refusal := gate.Admit(&tape{answer: honest(t, sent, worker, nil)}, h, frame, Peer{})
	wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
}

// TestStrippedToken: without its token the hello is refused, so who takes it out gains nothing.
func TestStrippedToken(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	hello, frame := helloOf(t, wire.RolePush, "grads", wire.Token{})
	conn := &tape{answer: func([]byte) []byte { return nil }}
	id, refusal := gate.Admit(conn, hello, frame, Peer{})
	wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
	if conn.asked.Len() != 0 {
		t.Error("it was challenged")
	}
}

// TestEachBitOfTheProof: none of the 256 may be another.
func TestEachBitOfTheProof(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	worker := token(t, "worker", workerSecret)
	hello, frame := helloOf(t, wire.RolePush, "grads", worker)
	for bit := range 256 {
		id, refusal := gate.Admit(&tape{answer: func(asked []byte) []byte {
			p := wire.NewTranscript(frame, challengeIn(t, asked).Nonce, nil).ClientProof(worker.Secret)
			p[bit/8] ^= 1 << (bit % 8)
			return wire.AppendProof(nil, p)
		}}, hello, frame, Peer{})
		wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
	}
	// Each byte of the frame but those of the digits' case, which is not free either.
	whole := len(wire.AppendProof(nil, wire.Proof{}))
	for i := range whole {
		id, refusal := gate.Admit(&tape{answer: func(asked []byte) []byte {
			b := honest(t, frame, worker, nil)(asked)
			b[i] ^= 0x20
			return b
		}}, hello, frame, Peer{})
		wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
	}
}

// TestRights: the right token for another table, or another role, is told so, since it is one's own; and only those.
func TestRights(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	worker, older, reader := token(t, "worker", workerSecret), token(t, "worker", olderSecret), token(t, "reader", readerSecret)
	for _, c := range []struct {
		by    wire.Token
		role  wire.Role
		table string
		ok    bool
	}{
		{worker, wire.RolePush, "grads", true}, {worker, wire.RoleFill, "weights", true}, {worker, wire.RolePush, "w", true}, {older, wire.RolePush, "grads", true},
		{worker, wire.RolePush, "grads2", false}, {worker, wire.RolePush, "Grads", false}, {worker, wire.RoleTrain, "grads", false}, {worker, wire.RoleManifest, "grads", false},
		{worker, wire.RolePublish, "weights", false}, {older, wire.RoleTrain, "grads", false},
		{reader, wire.RoleTrain, "any", true}, {reader, wire.RoleObserve, "any", true}, {reader, wire.RoleSubscribe, "any", true}, {reader, wire.RoleManifest, "any", true},
		{reader, wire.RolePush, "any", false}, {reader, wire.RoleFill, "any", false}, {reader, wire.RolePublish, "any", false},
	} {
		hello, frame := helloOf(t, c.role, c.table, c.by)
		id, refusal := gate.Admit(&tape{answer: honest(t, frame, c.by, nil)}, hello, frame, Peer{})
		if c.ok {
			if refusal != nil || id.Token != c.by.Name {
				t.Errorf("%s, %s, %s: %v", c.by.Name, c.role, c.table, refusal)
			}
			continue
		}
		wantRefused(t, id, refusal, wire.CodeNotPermitted)
		if refusal != nil && (!strings.Contains(refusal.Reason, c.by.Name) || strings.Contains(refusal.Reason, c.by.Secret.Reveal())) {
			t.Error(refusal.Reason)
		}
	}
	if s := gate.Stats(); s.ByToken != 8 || s.NotPermitted != 9 {
		t.Errorf("%+v", s)
	}
}

// TestExporter: a proof of one TLS connection is worth nothing on another, nor on clear TCP.
func TestExporter(t *testing.T) {
	gate := NewGate(GateConfig{Tokens: testTokens(t)})
	worker := token(t, "worker", workerSecret)
	hello, frame := helloOf(t, wire.RolePush, "grads", worker)
	ours, theirs := bytes.Repeat([]byte{1}, wire.ExporterBytes), bytes.Repeat([]byte{2}, wire.ExporterBytes)
	for _, c := range []struct {
		daemon, client []byte
		ok             bool
	}{{ours, ours, true}, {ours, theirs, false}, {ours, nil, false}, {nil, ours, false}, {nil, nil, true}} {
		id, refusal := gate.Admit(&tape{answer: honest(t, frame, worker, c.client)}, hello, frame, Peer{Exporter: c.daemon})
		if c.ok && refusal != nil {
			t.Error(refusal)
		} else if !c.ok {
			wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
		}
	}
}

// TestSilentPeer: a peer that never proves is ended by the deadline that the transport set, and one that drips too.
func TestSilentPeer(t *testing.T) {
	for name, drip := range map[string]bool{"silent": false, "drips": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gate := NewGate(GateConfig{Tokens: testTokens(t)})
				hello, frame := helloOf(t, wire.RolePush, "grads", token(t, "worker", workerSecret))
				client, daemon := net.Pipe()
				defer client.Close()
				go func() {
					var b [1]byte
					for range len(wire.AppendChallenge(nil, &wire.Challenge{Proofs: make([]wire.Proof, 2)})) {
						if _, err := io.ReadFull(client, b[:]); err != nil {
							return
						}
					}
					for drip {
						if _, err := client.Write([]byte(wire.Magic)[:1]); err != nil {
							return
						}
						drip = false
					}
				}()
				began := time.Now()
				_ = daemon.SetDeadline(began.Add(10 * time.Second))
				id, refusal := gate.Admit(daemon, hello, frame, Peer{})
				wantRefused(t, id, refusal, wire.CodeHandshakeTimeout)
				if time.Since(began) != 10*time.Second || gate.Stats().TimedOut != 1 {
					t.Errorf("after %v; %+v", time.Since(began), gate.Stats())
				}
				daemon.Close()
			})
		})
	}
	// One that does not even take the challenge.
	synctest.Test(t, func(t *testing.T) {
		gate := NewGate(GateConfig{Tokens: testTokens(t)})
		hello, frame := helloOf(t, wire.RolePush, "grads", token(t, "worker", workerSecret))
		client, daemon := net.Pipe()
		defer client.Close()
		defer daemon.Close()
		_ = daemon.SetDeadline(time.Now().Add(time.Second))
		id, refusal := gate.Admit(daemon, hello, frame, Peer{})
		wantRefused(t, id, refusal, wire.CodeHandshakeTimeout)
	})
}

// TestFlood: challenges that nobody answers leave nothing behind, and cost a bounded number of bytes each.
func TestFlood(t *testing.T) {
	tokens := testTokens(t)
	gate := NewGate(GateConfig{Tokens: tokens})
	for _, name := range []string{"worker", "nobody"} {
		hello, frame := helloOf(t, wire.RolePush, "grads", token(t, name, workerSecret))
		once := func() {
			_, _ = gate.Admit(&tape{answer: func([]byte) []byte { return nil }, end: os.ErrDeadlineExceeded}, hello, frame, Peer{})
		}
		// Mostly what crypto/hmac takes for its state; measured 96.
		if n := testing.AllocsPerRun(100, once); n > 150 {
			t.Errorf("%s: %v allocations for a challenge", name, n)
		}
	}
	if len(tokens.now.Load().byName) != 2 || tokens.decoy.uses.count[0].Load() != 0 || len(tokens.Stats().Tokens) != 2 {
		t.Error("something is left of strangers")
	}
	// What the daemon sends is bounded, and so is what it reads: a header and 256 bytes.
	hello, frame := helloOf(t, wire.RolePush, "grads", token(t, "nobody", workerSecret))
	endless := &endless{}
	id, refusal := gate.Admit(endless, hello, frame, Peer{})
	wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
	if endless.read > 16+wire.ProofBytesMax || endless.written > 16+wire.ChallengeBytesMax {
		t.Errorf("%d bytes were read, %d written", endless.read, endless.written)
	}
}

// endless gives a proof's header that announces as much as is allowed, and spaces for ever.
type endless struct{ read, written int }

func (e *endless) Write(b []byte) (int, error) { e.written += len(b); return len(b), nil }

func (e *endless) Read(b []byte) (int, error) {
	header := append([]byte(wire.Magic), 1, 0, 0, 0, 0, 1, 0, 0)
	for i := range b {
		b[i] = ' '
		if e.read < len(header) {
			b[i] = header[e.read]
		}
		e.read++
	}
	return len(b), nil
}

// TestPeerOfTLS: both ends of a TLS connection have the same exporter, two connections have different ones.
func TestPeerOfTLS(t *testing.T) {
	ca, err := devcert.NewAuthority("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := ca.NewServer([]string{"daemon.test"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	exporter := func() (client, daemon Peer) {
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		server := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{pair.TLS()}})
		caller := tls.Client(a, &tls.Config{RootCAs: ca.Pool(), ServerName: "daemon.test"})
		shaken := make(chan error, 1)
		go func() { shaken <- server.Handshake() }()
		if err := errors.Join(caller.Handshake(), <-shaken); err != nil {
			t.Fatal(err)
		}
		client, err := PeerOf(caller)
		if err != nil {
			t.Fatal(err)
		}
		if daemon, err = PeerOf(server); err != nil {
			t.Fatal(err)
		}
		return client, daemon
	}
	client, daemon := exporter()
	other, _ := exporter()
	if !reflect.DeepEqual(client, daemon) || len(client.Exporter) != wire.ExporterBytes || bytes.Equal(client.Exporter, other.Exporter) || client.Local {
		t.Errorf("%x, %x, %x", client.Exporter, daemon.Exporter, other.Exporter)
	}
	if _, err := PeerOf(tls.Client(nil, &tls.Config{ServerName: "x"})); err == nil {
		t.Error("before the TLS handshake there is no exporter")
	}
}
