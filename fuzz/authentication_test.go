package fuzz

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/wire"
)

const fuzzSecret = "a-secret-of-this-test-0123456789"

func fuzzToken() wire.Token {
	return wire.Token{Name: "worker", Secret: must(wire.NewSecret(fuzzSecret))}
}

// heard is a connection whose peer says what it would say anyway; what it is told is kept.
type heard struct {
	dribble
	told bytes.Buffer
}

func (h *heard) Write(b []byte) (int, error) { return h.told.Write(b) }

// FuzzChallenge: whatever a daemon that does not know the secret answers to a client with a token, the client ends with an error, has sent no proof, and does not say that it
// was accepted. The challenges among it say the same when they are said again.
func FuzzChallenge(f *testing.F) {
	accepted := must(wire.AppendAccepted(nil, &wire.AcceptedManifest{Table: "t", Manifest: json.RawMessage("{}")}))
	one := wire.AppendChallenge(nil, &wire.Challenge{Nonce: wire.Nonce{1}, Proofs: []wire.Proof{{2}}})
	two := wire.AppendChallenge(nil, &wire.Challenge{Nonce: wire.Nonce{1}, Proofs: []wire.Proof{{2}, {3}}})
	for _, b := range [][]byte{
		one, two, accepted, append(bytes.Clone(two), accepted...), append(bytes.Clone(one), one...), one[:len(one)-1], {},
		wire.AppendRefusal(nil, wire.Refuse(wire.CodeNotAuthenticated, "no")), frame(1, 2, 2, "{}"), frame(1, 2, wire.ChallengeBytesMax+1, "{"), frame(1, 3, 2, "{}"),
		frame(1, 2, 30, `{"nonce":null,"proofs":[null]}`), frame(1, 2, 30, `{"nonce":"\u0000","proofs":[]}`),
	} {
		f.Add(b, byte(0))
		f.Add(b, byte(255))
	}
	f.Fuzz(func(t *testing.T, in []byte, piece byte) {
		in = in[:min(len(in), messageMax)]
		conn := &heard{dribble: dribble{left: in, piece: 1 + int(piece)}}
		hello := &wire.Hello{Role: wire.RoleManifest, Table: "t", ManifestID: "0123456789abcdef"}
		hello.SetToken(fuzzToken())
		err := wire.Greet(conn, conn, hello, nil, new(wire.AcceptedManifest))
		if err == nil {
			t.Fatal("the client was let in by a daemon that proved nothing")
		}
		r := bytes.NewReader(conn.told.Bytes())
		if _, err := wire.ReadHello(r); err != nil || r.Len() != 0 {
			t.Fatalf("%d bytes after the hello (%v)", r.Len(), err)
		}
		if strings.Contains(err.Error(), fuzzSecret) || bytes.Contains(conn.told.Bytes(), []byte(fuzzSecret)) {
			t.Fatal("the secret was shown")
		}
		if refusal := (*wire.Refusal)(nil); !errors.As(err, &refusal) && !errors.Is(err, wire.ErrProtocol) && !errors.Is(err, io.ErrUnexpectedEOF) &&
			!errors.Is(err, wire.ErrNotChallenged) && !errors.Is(err, wire.ErrDaemonUnproven) {
			t.Fatalf("an error of no known kind: %v", err)
		}
		var asked, again *wire.Challenge
		if !errors.As(wire.ReadReply(bytes.NewReader(in), new(wire.AcceptedManifest)), &asked) {
			return
		}
		if err := wire.ReadReply(bytes.NewReader(wire.AppendChallenge(nil, asked)), new(wire.AcceptedManifest)); !errors.As(err, &again) || !reflect.DeepEqual(asked, again) {
			t.Fatalf("said again it is another challenge (%v):\n%+v\n%+v", err, asked, again)
		}
	})
}

// FuzzProof: whatever follows a challenge, who does not know the secret is refused in one and the same way, and no byte is taken beyond the proof. A proof that is read is
// the same when it is said again.
func FuzzProof(f *testing.F) {
	tokens := must(auth.Parse([]byte(`tokens: [{name: worker, secret: ` + fuzzSecret + `, rights: [read], tables: ["*"]}]`)))
	good := wire.AppendProof(nil, wire.Proof{1, 2, 3})
	for _, b := range [][]byte{
		good, append(bytes.Clone(good), "samples"...), good[:len(good)-1], {}, frame(1, 0, wire.ProofBytesMax+1, "{"), frame(1, 0, 2, "{}"), frame(1, 0, 4, "null"),
		frame(1, 0, 14, `{"proof":null}`), frame(2, 0, 2, "{}"), frame(1, 2, 2, "{}"), []byte("GET / HTTP/1.1\r\n"), frame(1, 0, 1<<31, "{"),
	} {
		f.Add(b, byte(0))
		f.Add(b, byte(255))
	}
	hello := &wire.Hello{Role: wire.RoleManifest, Table: "t", ManifestID: "0123456789abcdef", Token: "worker", Nonce: wire.NewNonce()}
	said := must(wire.AppendHello(nil, hello))
	f.Fuzz(func(t *testing.T, in []byte, piece byte) {
		in = in[:min(len(in), messageMax)]
		conn := &heard{dribble: dribble{left: in, piece: 1 + int(piece)}}
		id, refusal := auth.NewGate(auth.GateConfig{Tokens: tokens}).Admit(conn, hello, said, auth.Peer{})
		if id != nil || refusal == nil || refusal.Code != wire.CodeNotAuthenticated {
			t.Fatalf("let in as %v; %v", id, refusal)
		}
		proof, err := wire.ReadProof(bytes.NewReader(in))
		if err != nil {
			if !errors.Is(err, wire.ErrProtocol) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("an error of no known kind: %v", err)
			}
			return
		}
		if want := 16 + int(binary.LittleEndian.Uint32(in[12:])); len(in)-len(conn.left) != want {
			t.Fatalf("took %d bytes of a proof of %d", len(in)-len(conn.left), want)
		}
		if again, err := wire.ReadProof(bytes.NewReader(wire.AppendProof(nil, proof))); err != nil || again != proof {
			t.Fatalf("said again it is another proof: %v", err)
		}
	})
}

// FuzzTokens: whatever lies in the file of tokens, it is read or refused with a reason that shows nothing of what might be a secret, and what is read is told apart from a
// stranger's.
func FuzzTokens(f *testing.F) {
	f.Add([]byte(`tokens: [{name: worker, secret: ` + fuzzSecret + `, previous: x` + fuzzSecret + `, rights: [read, admin], tables: ["*"]}]`))
	f.Add([]byte("tokens:\n- name: a\n  secret: '" + fuzzSecret + "'\n  rights: [push]\n  tables: [x]\n"))
	f.Add([]byte("tokens: []"))
	f.Add([]byte("tokens: &x [*x]"))
	f.Add([]byte("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]"))
	f.Add([]byte("tokens: [{name: [" + strings.Repeat("[", 1000)))
	path := filepath.Join(f.TempDir(), "tokens.yaml")
	f.Fuzz(func(t *testing.T, in []byte) {
		in = in[:min(len(in), messageMax)]
		tokens, err := auth.Parse(in)
		if err != nil {
			if bad := (*auth.FormatError)(nil); !errors.As(err, &bad) || len(err.Error()) > 600 {
				t.Fatalf("an error of no known kind, or a long one: %.700v", err)
			}
			if strings.Contains(err.Error(), fuzzSecret) {
				t.Fatalf("the error shows a secret: %v", err)
			}
			return
		}
		if err := os.WriteFile(path, in, 0o600); err != nil {
			t.Fatal(err)
		}
		loaded, err := auth.Load(path, nil)
		if err != nil || loaded.Len() != tokens.Len() {
			t.Fatalf("%d tokens in a file of %d: %v", loaded.Len(), tokens.Len(), err)
		}
		for _, s := range tokens.Stats().Tokens {
			if _, ok := tokens.Bearer("Bearer " + s.Name + ":" + strings.Repeat("~", 40)); ok && !bytes.Contains(in, []byte("~~~")) {
				t.Fatalf("%q was let in with any secret", s.Name)
			}
		}
	})
}
