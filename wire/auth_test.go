package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

const secretText = "0123456789abcdefghijklmnopqrstuv"

func secret(t testing.TB, text string) Secret {
	t.Helper()
	s, err := NewSecret(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestChallengeRoundTrip(t *testing.T) {
	for proofs := 1; proofs <= ProofsMax; proofs++ {
		want := &Challenge{Nonce: NewNonce(), Proofs: make([]Proof, proofs)}
		want.Proofs[proofs-1][0] = 7
		var b bytes.Buffer
		if err := WriteChallenge(&b, want); err != nil {
			t.Fatal(err)
		}
		whole := bytes.Clone(b.Bytes())
		b.WriteString("more")
		var got *Challenge
		if err := ReadReply(iotest.OneByteReader(&b), new(AcceptedPush)); !errors.As(err, &got) || !reflect.DeepEqual(got, want) {
			t.Errorf("read back %v", err)
		}
		if b.String() != "more" {
			t.Errorf("left over: %q", b.String())
		}
		for n := range whole {
			if err := ReadReply(bytes.NewReader(whole[:n]), new(AcceptedPush)); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("cut at %d: %v", n, err)
			}
		}
	}
}

func TestChallengeChecked(t *testing.T) {
	proof := `"` + strings.Repeat("ab", 32) + `"`
	with := func(nonce, proofs string) string { return `{"nonce":` + nonce + `,"proofs":[` + proofs + `],"new":1}` }
	challenge := func(body string) []byte { return appendFrame(nil, Version, statusChallenge, []byte(body)) }
	fits := with(proof, proof)
	fits = strings.Repeat(" ", ChallengeBytesMax-len(fits)) + fits
	var c *Challenge
	if err := ReadReply(bytes.NewReader(challenge(fits)), new(AcceptedPush)); !errors.As(err, &c) {
		t.Errorf("of the longest length: %v", err)
	}
	for says, b := range map[string][]byte{
		"4097 bytes":      challenge(" " + fits),
		"no nonce":        challenge(`{"proofs":[` + proof + `]}`),
		"or no proof":     challenge(with(proof, "")),
		"has 3 proofs":    challenge(with(proof, proof+","+proof+","+proof)),
		"64 hex digits":   challenge(with(proof, `"ab"`)),
		"a proof: it":     challenge(with(proof, "null")),
		"the challenge's": challenge(with(`"xy"`, proof)),
		"version 2":       appendFrame(nil, 2, statusChallenge, []byte(fits)),
	} {
		err := ReadReply(bytes.NewReader(b), new(AcceptedPush))
		if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
	for _, n := range []int{0, ProofsMax + 1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%d proofs were encoded", n)
				}
			}()
			AppendChallenge(nil, &Challenge{Proofs: make([]Proof, n)})
		}()
	}
}

func TestProofRoundTrip(t *testing.T) {
	want := Proof(NewNonce())
	var b bytes.Buffer
	if err := WriteProof(&b, want); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(b.Bytes())
	b.WriteString("samples")
	if got, err := ReadProof(iotest.OneByteReader(&b)); err != nil || got != want || b.String() != "samples" {
		t.Errorf("read back %v, %v; left over: %q", got, err, b.String())
	}
	for n := range whole {
		if _, err := ReadProof(bytes.NewReader(whole[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	if _, err := ReadProof(iotest.ErrReader(os.ErrDeadlineExceeded)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a deadline: %v", err)
	}
}

func TestProofChecked(t *testing.T) {
	digits := strings.Repeat("ab", 32)
	good := `{"proof":"` + digits + `"}`
	padded := good + strings.Repeat(" ", ProofBytesMax-len(good))
	if _, err := ReadProof(bytes.NewReader(appendFrame(nil, Version, 0, []byte(padded)))); err != nil {
		t.Errorf("of the longest length: %v", err)
	}
	long := appendFrame(nil, Version, 0, nil)
	binary.LittleEndian.PutUint32(long[12:], 1<<31)
	for says, b := range map[string][]byte{
		"starts with":      []byte("GET / HTTP/1.1\r\n"),
		"257 bytes":        appendFrame(nil, Version, 0, []byte(padded+" ")),
		"1 bytes":          appendFrame(nil, Version, 0, []byte("{")),
		"2147483648 bytes": long,
		"of version 2":     appendFrame(nil, 2, 0, []byte(good)),
		"with 1 beside":    appendFrame(nil, Version, 1, []byte(good)),
		"the proof's body": appendFrame(nil, Version, 0, []byte("[]")),
		"one field":        appendFrame(nil, Version, 0, []byte("{}")),
		", of 64":          appendFrame(nil, Version, 0, []byte(`{"proof":"`+strings.ToUpper(digits)+`"}`)),
		`, "proof", of 64`: appendFrame(nil, Version, 0, []byte(`{"proof":"`+digits+`","x":""}`)),
	} {
		if _, err := ReadProof(bytes.NewReader(b)); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
}

// TestTranscript: whatever differs between what the two sides saw, and whoever proves, the proof is another.
func TestTranscript(t *testing.T) {
	hello, nonce, exporter, s := []byte("hello"), NewNonce(), make([]byte, ExporterBytes), secret(t, secretText)
	if NewTranscript(hello, nonce, nil) != NewTranscript(hello, nonce, exporter) {
		t.Error("no exporter is not 32 zeros")
	}
	other := nonce
	other[31] ^= 1
	exporter[0] = 1
	seen := map[Proof]string{}
	for name, proof := range map[string]Proof{
		"daemon":   NewTranscript(hello, nonce, nil).DaemonProof(s),
		"client":   NewTranscript(hello, nonce, nil).ClientProof(s),
		"secret":   NewTranscript(hello, nonce, nil).DaemonProof(secret(t, secretText+"x")),
		"hello":    NewTranscript([]byte("hellp"), nonce, nil).DaemonProof(s),
		"longer":   NewTranscript(append(hello, nonce[0]), nonce, nil).DaemonProof(s),
		"nonce":    NewTranscript(hello, other, nil).DaemonProof(s),
		"exporter": NewTranscript(hello, nonce, exporter).DaemonProof(s),
	} {
		if same, ok := seen[proof]; ok {
			t.Errorf("%s and %s have the same proof", name, same)
		}
		seen[proof] = name
	}
	defer func() {
		if recover() == nil {
			t.Error("an exporter of 31 bytes was taken")
		}
	}()
	NewTranscript(hello, nonce, exporter[:31])
}

// script is a daemon that says what it was told to, and keeps what it is told.
type script struct {
	said  bytes.Buffer
	reply func(said []byte) []byte // of what was written by then
	left  []byte
	fail  error
}

func (s *script) Write(b []byte) (int, error) {
	if s.fail != nil {
		return 0, s.fail
	}
	s.said.Write(b)
	return len(b), nil
}

func (s *script) Read(b []byte) (int, error) {
	if len(s.left) == 0 {
		s.left = s.reply(s.said.Bytes())
	}
	if len(s.left) == 0 {
		return 0, io.EOF
	}
	n := copy(b, s.left)
	s.left = s.left[n:]
	return n, nil
}

// honest is a daemon that knows a secret and asks for it.
func honest(t *testing.T, s Secret, exporter []byte) *script {
	nonce := NewNonce()
	var transcript Transcript
	asked := false
	return &script{reply: func(said []byte) []byte {
		r := bytes.NewReader(said)
		_, frame, err := ReadHelloFrame(r)
		if err != nil {
			t.Fatal(err)
		}
		if !asked {
			asked, transcript = true, NewTranscript(frame, nonce, exporter)
			return AppendChallenge(nil, &Challenge{nonce, []Proof{{}, transcript.DaemonProof(s)}})
		}
		proof, err := ReadProof(r)
		if err != nil || !proof.Equal(transcript.ClientProof(s)) || r.Len() != 0 {
			return AppendRefusal(nil, Refuse(CodeNotAuthenticated, "no"))
		}
		b, err := AppendAccepted(nil, &AcceptedManifest{Table: "t", Manifest: json.RawMessage("{}")})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}}
}

func TestGreet(t *testing.T) {
	accepted, err := AppendAccepted(nil, &AcceptedManifest{Table: "t", Manifest: json.RawMessage("{}")})
	if err != nil {
		t.Fatal(err)
	}
	always := func(b []byte) *script { return &script{reply: func([]byte) []byte { return b }} }
	token := Token{"worker", secret(t, secretText)}
	other := secret(t, secretText+"x")
	exporter := bytes.Repeat([]byte{9}, ExporterBytes)
	challenge := AppendChallenge(nil, &Challenge{NewNonce(), []Proof{{1}}})
	broken := errors.New("broken pipe")
	failing := always(nil)
	failing.fail = broken
	refusing := always(AppendRefusal(nil, Refuse(CodeBanned, "come back later")))
	refusing.fail = broken
	twice := honest(t, token.Secret, nil)
	ask, times := twice.reply, 0
	twice.reply = func(said []byte) []byte {
		if times++; times == 1 {
			return ask(said)
		}
		return challenge
	}
	for name, c := range map[string]struct {
		daemon   *script
		token    Token
		exporter []byte
		want     error
		says     string
	}{
		"no token":              {always(accepted), Token{}, nil, nil, ""},
		"proved":                {honest(t, token.Secret, nil), token, nil, nil, ""},
		"proved over TLS":       {honest(t, token.Secret, exporter), token, exporter, nil, ""},
		"downgrade":             {always(accepted), token, nil, ErrNotChallenged, "did not prove"},
		"the wrong secret":      {honest(t, other, nil), token, nil, ErrDaemonUnproven, `token "worker"`},
		"two TLS connections":   {honest(t, token.Secret, exporter), token, bytes.Repeat([]byte{8}, ExporterBytes), ErrDaemonUnproven, ""},
		"TLS on one side":       {honest(t, token.Secret, exporter), token, nil, ErrDaemonUnproven, ""},
		"asked without a token": {always(challenge), Token{}, nil, ErrProtocol, "no"},
		"asked twice":           {twice, token, nil, ErrProtocol, "asked for proof twice"},
		"gone":                  {always(nil), token, nil, io.ErrUnexpectedEOF, ""},
		"not taken":             {failing, token, nil, broken, "write to the daemon"},
		"refused unheard":       {refusing, token, nil, nil, "come back later"},
		"no secret":             {always(accepted), Token{Name: "worker"}, nil, nil, "has no secret"},
	} {
		t.Run(name, func(t *testing.T) {
			var a AcceptedManifest
			h := &Hello{Role: RoleManifest, Table: "t", ManifestID: strings.Repeat("0", 16)}
			h.SetToken(c.token)
			err := Greet(c.daemon, c.daemon, h, c.exporter, &a)
			if c.want != nil && !errors.Is(err, c.want) || (err != nil) != (c.want != nil || c.says != "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v; want %v, %q", err, c.want, c.says)
			}
			if err == nil && a.Table != "t" {
				t.Errorf("accepted: %+v", a)
			}
			if strings.Contains(c.daemon.said.String(), c.token.Secret.Reveal()) && !c.token.Secret.IsZero() {
				t.Error("the secret was sent")
			}
		})
	}
}

// TestGreetAnew: one hello serves many tries, each with a nonce of its own, and none is left when the token is gone.
func TestGreetAnew(t *testing.T) {
	h := &Hello{Role: RoleManifest, Table: "t", ManifestID: strings.Repeat("0", 16)}
	token := Token{"worker", secret(t, secretText)}
	nonces := map[Nonce]bool{}
	for range 3 {
		daemon := honest(t, token.Secret, nil)
		h.SetToken(token)
		if err := Greet(daemon, daemon, h, nil, new(AcceptedManifest)); err != nil {
			t.Fatal(err)
		}
		nonces[h.Nonce] = true
	}
	if len(nonces) != 3 || nonces[Nonce{}] {
		t.Errorf("nonces: %v", nonces)
	}
	daemon := honest(t, token.Secret, nil)
	h.SetToken(Token{})
	if err := Greet(daemon, daemon, h, nil, new(AcceptedManifest)); err == nil || h.Token != "" || !h.Nonce.IsZero() {
		t.Errorf("%v, %+v", err, h)
	}
}

func TestSecretLimits(t *testing.T) {
	for text, says := range map[string]string{
		strings.Repeat("s", SecretBytesMin-1):        "has 31 characters",
		strings.Repeat("s", SecretBytesMax+1):        "has 1025 characters",
		strings.Repeat("s", SecretBytesMin) + " ":    "or a space",
		strings.Repeat("s", SecretBytesMin) + "\x7f": "printable ASCII",
		strings.Repeat("s", SecretBytesMin) + "ü":    "printable ASCII",
	} {
		if _, err := NewSecret(text); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), text) {
			t.Errorf("%v; want %q", err, says)
		}
	}
	for _, n := range []int{SecretBytesMin, SecretBytesMax} {
		if s := secret(t, strings.Repeat("~", n)); s.IsZero() || len(s.Reveal()) != n {
			t.Errorf("%d characters: %d came back", n, len(s.Reveal()))
		}
	}
}

func TestParseToken(t *testing.T) {
	token, err := ParseToken("wörker 1:" + secretText + ":with:colons")
	if err != nil || token.Name != "wörker 1" || token.Secret.Reveal() != secretText+":with:colons" {
		t.Errorf("%v, %v", token, err)
	}
	for text, says := range map[string]string{
		"":                              "NAME:SECRET",
		secretText:                      "NAME:SECRET",
		":" + secretText:                "is empty",
		"worker:" + secretText[1:]:      "has 31 characters",
		"a\nb:" + secretText:            "control character",
		strings.Repeat("n", 129) + ":x": "129 bytes",
		secretText + ":worker":          "other way round", // which must not show the secret either
	} {
		if _, err := ParseToken(text); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), secretText[1:]) {
			t.Errorf("%q: %v; want %q", text, err, says)
		}
	}
	if err := CheckTokenName("a:b"); err == nil {
		t.Error("a name with a colon")
	}
}

// TestSecretsAreNotShown writes secrets with all that writes values, bare and inside of others.
func TestSecretsAreNotShown(t *testing.T) {
	type inside struct {
		Shown  Token
		hidden Token
		deep   *struct{ s Secret }
	}
	s := secret(t, secretText)
	token := Token{"worker", s}
	in := inside{token, token, &struct{ s Secret }{s}}
	values := []any{s, &s, token, &token, in, &in, []Token{token}, map[string]Secret{"k": s}, []any{s, token}, struct{ s Secret }{s}}
	shown := func(how string, text string) {
		t.Helper()
		for _, part := range []string{secretText, secretText[4:12], fmt.Sprintf("%x", secretText[4:12]), fmt.Sprintf("%X", secretText[4:12]), fmt.Sprint([]byte(secretText[4:8]))} {
			if strings.Contains(text, strings.Trim(part, "[]")) {
				t.Errorf("%s shows the secret: %s", how, text)
			}
		}
	}
	for i, v := range values {
		for _, verb := range strings.Fields("%v %+v %#v %s %q %x %X %d %b %o %c %U %t %e %g %T %p") {
			shown(fmt.Sprintf("value %d, %s", i, verb), fmt.Sprintf(verb, v))
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Error(err)
		}
		shown(fmt.Sprintf("value %d, JSON", i), string(b))
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("m", "v", v)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "v", v)
		shown(fmt.Sprintf("value %d, slog", i), log.String())
		shown(fmt.Sprintf("value %d, an error", i), fmt.Errorf("%w: %v", io.EOF, v).Error())
	}
	if got := fmt.Sprintf("%v|%s|%x|%v|%v", token, s, s, Secret{}, Token{}); got != "worker:[secret]|[secret]|[secret]||" {
		t.Error(got)
	}
}
