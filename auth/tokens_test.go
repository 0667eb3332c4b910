package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/wire"
)

func writeFile(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// file is one with a token that has these secrets, the second one optional.
func file(name string, secrets ...string) string {
	text := "tokens:\n- name: " + name + "\n  secret: \"" + secrets[0] + "\"\n  rights: [push]\n  tables: [\"*\"]\n"
	if len(secrets) > 1 {
		text += "  previous: \"" + secrets[1] + "\"\n"
	}
	return text
}

// admits says whether a token is let in.
func admits(t testing.TB, tokens *Tokens, name, secret string) bool {
	t.Helper()
	by := token(t, name, secret)
	hello, frame := helloOf(t, wire.RolePush, "grads", by)
	id, refusal := NewGate(GateConfig{Tokens: tokens}).Admit(&tape{answer: honest(t, frame, by, nil)}, hello, frame, Peer{})
	bearer, ok := tokens.Bearer("Bearer " + name + ":" + secret)
	if ok != (refusal == nil) || ok && !reflect.DeepEqual(bearer, id) {
		t.Errorf("as a bearer %s is %v, %v; at the gate %v", name, bearer, ok, refusal)
	}
	return refusal == nil
}

const a, b, c = "secret-a-0123456789-0123456789-01", "secret-b-0123456789-0123456789-01", "secret-c-0123456789-0123456789-01"

// TestFile: both sides of every rule of the file.
func TestFile(t *testing.T) {
	long := strings.Repeat("n", wire.NameBytesMax)
	entry := func(name, secret, rest string) string {
		return "tokens: [{name: " + name + ", secret: " + secret + ", " + rest + "}]"
	}
	const all = `rights: [push, read, publish, admin], tables: ["*"]`
	for _, good := range []string{
		"tokens: []", testFile, entry("worker", a, all), entry(long, strings.Repeat("s", wire.SecretBytesMax), all), entry("w", a, "rights: [admin]"),
		entry("w", a, `rights: [push], tables: [`+strings.Repeat("x, ", TablesMax-1)+`x]`), entry("w", a, `rights: [push], tables: [`+strings.Repeat("x", wire.NameBytesMax)+`]`),
		entry(`"12"`, `"01234567890123456789012345678901"`, all), "# a comment\n---\ntokens: []\n", entry("w", a, "previous: "+b+", "+all),
	} {
		if _, err := Parse([]byte(good)); err != nil {
			t.Errorf("%.80s: %v", good, err)
		}
	}
	for text, says := range map[string]string{
		"":                              "it is empty",
		"tokens: [":                     "line 1: this is not YAML",
		"tokens: *x":                    "this is not YAML",
		"[]":                            "line 1: here must be the fields",
		"tokens: {}":                    "`tokens` must be a list",
		"{}":                            "`tokens` is missing",
		"tokens: []\nother: 1":          "line 2: a field that is none of",
		"tokens: []\ntokens: []":        "`tokens` is there twice",
		"tokens: []\n---\n{}":           "more follows",
		"tokens: [x]":                   "here must be the fields",
		"tokens: [{<<: {}}]":            "a field that is none of",
		"tokens: [{secret: " + a + "}]": "`name`: it is missing",
		entry("", a, all):               "the token's `name`",
		entry(`""`, a, all):             "name is empty",
		entry(`"a:b"`, a, all):          "has a colon",
		entry(long+"n", a, all):         "129 bytes",
		entry("5", a, all):              "put it between quotes",
		entry("w", "short", all):        "`secret` of token \"w\": the secret has 5 characters",
		entry("w", `"`+a+` x"`, all):    "or a space",
		entry("w", "01234567890123456789012345678901", all):                              "put it between quotes",
		entry("w", strings.Repeat("s", wire.SecretBytesMax+1), all):                      "at most 1024",
		entry("w", a, "previous: x, "+all):                                               "`previous` of token \"w\": the secret has 1 char",
		entry("w", a, "previous: "+a+", "+all):                                           "are the same",
		entry("w", a, `tables: ["*"]`):                                                   "`rights` of token \"w\" must be a list",
		entry("w", a, `rights: [], tables: ["*"]`):                                       "must be a list of some of",
		entry("w", a, `rights: push, tables: ["*"]`):                                     "must be a list of some of",
		entry("w", a, `rights: [write], tables: ["*"]`):                                  "a right is one of",
		entry("w", a, `rights: [push]`):                                                  "`tables` of token \"w\" is missing",
		entry("w", a, `rights: [push], tables: []`):                                      "`tables` of token \"w\" is missing",
		entry("w", a, `rights: [push], tables: x`):                                       "must be a list of names or patterns",
		entry("w", a, `rights: [push], tables: [""]`):                                    "1 to 128 bytes",
		entry("w", a, `rights: [push], tables: [`+strings.Repeat("x", 129)+`]`):          "1 to 128 bytes",
		entry("w", a, `rights: [push], tables: [`+strings.Repeat("x, ", TablesMax)+`x]`): "has 65 patterns",
		file("w", a) + strings.TrimPrefix(file("w", b), "tokens:\n"):                     "line 6: token \"w\" is there twice",
		"tokens: [" + strings.Repeat("{}, ", TokensMax) + "{}]":                          "there are 4097 tokens",
	} {
		_, err := Parse([]byte(text))
		var bad *FormatError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), says) {
			t.Errorf("%.80s: %v; want %q", text, err, says)
		}
		if err != nil && (strings.Contains(err.Error(), a) || len(err.Error()) > 1000) {
			t.Errorf("the error shows too much: %.2000v", err)
		}
	}
}

// TestDocumentedFile reads the file that docs/operations.md shows.
func TestDocumentedFile(t *testing.T) {
	text, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Tokens\n")
	_, shown, _ := strings.Cut(section, "```yaml\n")
	shown, _, _ = strings.Cut(shown, "```")
	tokens, err := Parse([]byte(shown))
	if err != nil {
		t.Fatal(err)
	}
	if st := tokens.Stats().Tokens; len(st) != 1 || !st[0].Rotating || !reflect.DeepEqual(st[0].Tables, []string{"grads", "w*"}) {
		t.Errorf("%+v", st)
	}
}

// TestErrorsShowNoSecret puts a secret into every place of a file where it does not belong.
func TestErrorsShowNoSecret(t *testing.T) {
	whole := file("worker", b, c)
	for i := 0; i <= len(whole); i++ {
		for _, with := range []string{a, "*" + a, "&" + a + " ", "!!" + a + " ", "{" + a, "'" + a, a + ": ", "- " + a + "\n", "\n" + a + "\n"} {
			_, err := Parse([]byte(whole[:i] + with + whole[i:]))
			for _, secret := range []string{a, b, c} {
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Fatalf("at %d, %q: %v", i, with, err)
				}
			}
		}
	}
}

func TestFileModes(t *testing.T) {
	path := writeFile(t, file("w", a))
	for mode, says := range map[os.FileMode]string{
		0o600: "", 0o400: "", 0o640: "", 0o440: "",
		0o604: "chmod 600", 0o602: "chmod 600", 0o601: "chmod 600", 0o644: "chmod 600", 0o660: "chmod g-w", 0o620: "chmod g-w",
	} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := Load(path, nil)
		var denied *PermissionError
		if says == "" && err != nil || says != "" && (!errors.As(err, &denied) || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path)) {
			t.Errorf("mode %#o: %v; want %q", mode, err, says)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Load(t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a folder: %v", err)
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(pipe, nil); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a pipe: %v", err)
	}
	for size, good := range map[int]bool{FileBytesMax: true, FileBytesMax + 1: false} {
		text := file("w", a)
		big := writeFile(t, text+"#"+strings.Repeat("x", size-len(text)-1))
		if _, err := Load(big, nil); (err == nil) != good {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	other := &fakeInfo{mode: 0o600, uid: uint32(os.Geteuid()) + 1}
	if err := checkMode("f", other); err == nil || !strings.Contains(err.Error(), "chown") {
		t.Errorf("another's file: %v", err)
	}
	other.uid = 0
	if err := checkMode("f", other); err != nil {
		t.Errorf("root's file: %v", err)
	}
}

// fakeInfo is a file of another user, which a test cannot make.
type fakeInfo struct {
	os.FileInfo
	mode os.FileMode
	uid  uint32
}

func (f *fakeInfo) Mode() os.FileMode { return f.mode }
func (f *fakeInfo) Sys() any          { return &syscall.Stat_t{Uid: f.uid} }

// TestRotation: while a token has two secrets both are good; before and after only one. The counts follow the secrets.
func TestRotation(t *testing.T) {
	path := writeFile(t, file("w", a))
	tokens, err := Load(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	change := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := tokens.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	want := func(which string, used, previous uint64) {
		t.Helper()
		for _, s := range []string{a, b, c} {
			if got, want := admits(t, tokens, "w", s), strings.Contains(which, s[7:8]); got != want {
				t.Errorf("secret %s: let in: %v, want %v", s[7:8], got, want)
			}
		}
		if s := tokens.Stats().Tokens[0]; s.Used != used || s.PreviousUsed != previous || s.LastUsed.IsZero() || s.PreviousLast.IsZero() != (previous == 0) || s.Rotating != (len(which) > 1) {
			t.Errorf("%+v; want %d, %d", s, used, previous)
		}
	}
	want("a", 2, 0)
	change(file("w", b, a))
	want("ba", 2, 4)
	change(file("w", b, a)) // nothing new
	want("ba", 4, 6)
	change(file("w", b))
	want("b", 6, 0)
	change(file("w", c, b))
	want("cb", 2, 8)
	change(file("w", c))
	want("c", 4, 0)
	change(file("other", c))
	if admits(t, tokens, "w", c) || !admits(t, tokens, "other", c) || tokens.Stats().Tokens[0].Used != 2 {
		t.Errorf("%+v", tokens.Stats())
	}
	if s := tokens.Stats(); s.Reloads != 7 || s.Failures != 0 || s.Broken != nil {
		t.Errorf("%+v", s)
	}
}

// TestUnderWay: a handshake that began before a change ends by what was then.
func TestUnderWay(t *testing.T) {
	path := writeFile(t, file("w", a))
	tokens, err := Load(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	by := token(t, "w", a)
	_, frame := helloOf(t, wire.RolePush, "t", by)
	challenge := tokens.Challenge("w", frame, nil)
	if err := errors.Join(os.WriteFile(path, []byte("tokens: []"), 0o600), tokens.Reload()); err != nil {
		t.Fatal(err)
	}
	proof := wire.NewTranscript(frame, challenge.Message().Nonce, nil).ClientProof(by.Secret)
	if id, ok := challenge.Verify(proof); !ok || id.Token != "w" {
		t.Errorf("%v, %v", id, ok)
	}
	if admits(t, tokens, "w", a) {
		t.Error("let in after the change")
	}
}

// lockedText is a log that is read while others write.
type lockedText struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lockedText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lockedText) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Reset()
}

// TestRun: a changed file is in force within a second, a broken one is logged once, keeps the old tokens, and shows no secret.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := writeFile(t, file("w", a))
		var log lockedText
		tokens, err := Load(path, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ran := make(chan error)
		go func() { ran <- tokens.Run(ctx) }()
		times := time.Unix(1_000_000_000, 0)
		state := func(text string, mode os.FileMode, logged int, in ...string) {
			t.Helper()
			if text == "" {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			} else {
				times = times.Add(time.Hour)
				if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode), os.Chtimes(path, times, times)); err != nil {
					t.Fatal(err)
				}
			}
			log.reset()
			<-time.After(5*pollEvery + pollEvery/2)
			synctest.Wait()
			if got := strings.Count(log.String(), "\n"); got != logged {
				t.Errorf("%d lines were logged, want %d: %s", got, logged, &log)
			}
			for _, s := range []string{a, b, c} {
				want := strings.Contains(strings.Join(in, ""), s)
				if admits(t, tokens, "w", s) != want {
					t.Errorf("secret %s: want %v", s[7:8], want)
				}
				if strings.Contains(log.String(), s) {
					t.Errorf("the log shows a secret: %s", &log)
				}
			}
		}
		state(file("w", b, a), 0o600, 1, a, b)
		if !strings.Contains(log.String(), "tokens read anew") || !strings.Contains(log.String(), "tokens=1") {
			t.Error(log.String())
		}
		state("tokens: ["+c, 0o600, 1, a, b)
		if !strings.Contains(log.String(), "stay as they were") || tokens.Stats().Broken == nil || tokens.Stats().Failures != 1 {
			t.Error(log.String())
		}
		state(file("w", c), 0o644, 1, a, b)
		if err := os.Chmod(path, 0o600); err != nil { // a change of the mode alone
			t.Fatal(err)
		}
		<-time.After(2 * pollEvery)
		synctest.Wait()
		if !admits(t, tokens, "w", c) || admits(t, tokens, "w", a) || tokens.Stats().Broken != nil {
			t.Errorf("%+v", tokens.Stats())
		}
		state("", 0, 1, c)
		state(file("w", a), 0o600, 1, a)
		state(file("w", a), 0o600, 1, a) // touched
		stop()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
}

func TestBearer(t *testing.T) {
	tokens, err := Parse([]byte(file("w", a, b)))
	if err != nil {
		t.Fatal(err)
	}
	for header, want := range map[string]bool{
		"Bearer w:" + a: true, "bearer w:" + b: true, "BEARER  w:" + a: true, "Bearer w:" + a + " ": true,
		"": false, "Bearer": false, "Bearer ": false, "Bearer :": false, "Bearer w": false, "Bearer w:": false, "w:" + a: false, "Basic w:" + a: false,
		"Bearer w:" + c: false, "Bearer x:" + a: false, "Bearer W:" + a: false, "Bearer w:" + a[:32]: false, "Bearer w:" + a + "x": false, "Bearer " + a: false,
		"Bearer w:" + tokens.decoy.secrets[0].Reveal(): false, "Bearer nobody:" + tokens.decoy.secrets[0].Reveal(): false,
	} {
		if id, ok := tokens.Bearer(header); ok != want || ok && (id.Token != "w" || !id.May(Push, "any") || id.May(Admin, "")) {
			t.Errorf("%q: %v, %v", header, id, ok)
		}
	}
}

// TestDecoysAreNoSecrets: who knew the secrets that stand in for missing ones, which nobody does, would not be let in either.
func TestDecoysAreNoSecrets(t *testing.T) {
	tokens, err := Parse([]byte(file("w", a)))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"w", "nobody"} {
		for _, s := range tokens.decoy.secrets {
			if admits(t, tokens, name, s.Reveal()) {
				t.Errorf("%s was let in", name)
			}
		}
	}
}

func TestMatches(t *testing.T) {
	for _, x := range []struct {
		pattern, name string
		want          bool
	}{
		{"*", "", true}, {"*", "any/thing", true}, {"grads", "grads", true}, {"grads", "grad", false}, {"grads", "grads2", false}, {"w*", "w", true}, {"w*", "weights", true},
		{"w*", "xw", false}, {"*w", "xw", true}, {"*w", "xwx", false}, {"a*b*c", "axxbyybzzc", true}, {"a*b*c", "axxc", false}, {"a?c", "abc", true}, {"a?c", "ac", false},
		{"a?c", "aüc", true}, {"", "", true}, {"", "a", false}, {"[ab]", "a", false}, {"[ab]", "[ab]", true}, {"**", "x", true}, {"?", "", false},
	} {
		if got := matches(x.pattern, x.name); got != x.want {
			t.Errorf("%q, %q: %v", x.pattern, x.name, got)
		}
	}
	// The worst pattern takes steps in proportion to pattern times name, not more.
	if matches(strings.Repeat("*a", 64)+"b", strings.Repeat("a", 128)) {
		t.Error("matched")
	}
}

func TestRightNames(t *testing.T) {
	for _, r := range rightNames {
		if got, err := ParseRight(r.name); err != nil || got != r.right || got.String() != r.name {
			t.Errorf("%s: %v, %v", r.name, got, err)
		}
	}
	if All.String() != "push, read, publish, admin" || Rights(0).String() != "no right" {
		t.Error(All, Rights(0))
	}
	for _, role := range []wire.Role{wire.RolePush, wire.RoleFill, wire.RoleTrain, wire.RoleObserve, wire.RolePublish, wire.RoleSubscribe, wire.RoleManifest} {
		if RightFor(role) == 0 || !Everybody().May(RightFor(role), "any") {
			t.Errorf("role %s has no right", role)
		}
	}
	if RightFor("other") != 0 || Everybody().May(0, "any") || !Everybody().May(Admin, "") {
		t.Error("a role that nobody has")
	}
}

func TestNewEntry(t *testing.T) {
	for _, name := range []string{"worker", "grüße 1", "true", "12", "- x", "a#b", `q"uote`} {
		made, lines, err := NewEntry(name, []string{"push", "read"}, []string{"grads", "w*"})
		if err != nil {
			t.Fatal(err)
		}
		tokens, err := Parse([]byte("tokens:\n" + lines))
		if err != nil {
			t.Fatalf("%v in\n%s", err, lines)
		}
		if !admits(t, tokens, name, made.Secret.Reveal()) || len(made.Secret.Reveal()) != 43 || made.Name != name {
			t.Errorf("%q: %s", name, lines)
		}
	}
	other, _, _ := NewEntry("worker", []string{"push"}, []string{"*"})
	if again, _, _ := NewEntry("worker", []string{"push"}, []string{"*"}); again.Secret.Reveal() == other.Secret.Reveal() {
		t.Error("the same secret twice")
	}
	if _, lines, err := NewEntry("boss", []string{"admin"}, nil); err != nil || strings.Contains(lines, "tables") {
		t.Errorf("%s, %v", lines, err)
	}
	for says, make := range map[string]func() (wire.Token, string, error){
		"colon":       func() (wire.Token, string, error) { return NewEntry("a:b", []string{"push"}, []string{"*"}) },
		"is empty":    func() (wire.Token, string, error) { return NewEntry("", []string{"push"}, []string{"*"}) },
		"one of push": func() (wire.Token, string, error) { return NewEntry("w", []string{"write"}, []string{"*"}) },
		"is missing":  func() (wire.Token, string, error) { return NewEntry("w", []string{"push"}, nil) },
	} {
		if made, lines, err := make(); err == nil || !strings.Contains(err.Error(), says) || lines != "" || !made.IsZero() {
			t.Errorf("%q, %v; want %q", lines, err, says)
		}
	}
}

// TestSecretsAreNotShown prints all that holds secrets, with all that prints.
func TestSecretsAreNotShown(t *testing.T) {
	path := writeFile(t, file("w", a, b))
	tokens, err := Load(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	gate := NewGate(GateConfig{Tokens: tokens})
	challenge := tokens.Challenge("w", []byte("hello"), nil)
	id, _ := tokens.Bearer("Bearer w:" + a)
	entry, _ := tokens.find("w")
	var awaited []wire.Proof
	for _, s := range entry.secrets {
		awaited = append(awaited, challenge.transcript.ClientProof(s))
	}
	for _, v := range []any{
		tokens, gate, GateConfig{Tokens: tokens}, challenge, *challenge, id, *id, entry, *entry, tokens.decoy, tokens.now.Load(), *tokens.now.Load(), tokens.Stats(), gate.Stats(),
		struct{ hidden *Tokens }{tokens}, []any{tokens}, map[string]*Tokens{"k": tokens},
	} {
		for _, verb := range strings.Fields("%v %+v %#v %s %q %x %X %d") {
			text := fmt.Sprintf(verb, v)
			for _, secret := range []string{a, b, tokens.decoy.secrets[0].Reveal(), tokens.decoy.secrets[1].Reveal()} {
				if strings.Contains(text, secret) || strings.Contains(strings.ToLower(text), fmt.Sprintf("%x", secret)) {
					t.Errorf("%T with %s shows a secret: %s", v, verb, text)
				}
			}
			for _, p := range awaited { // who reads the log in time could answer in the client's place
				if strings.Contains(strings.ToLower(text), p.String()) || strings.Contains(text, strings.Trim(fmt.Sprint([32]byte(p)), "[]")) {
					t.Errorf("%T with %s shows the proof that is awaited: %s", v, verb, text)
				}
			}
		}
		var log bytes.Buffer
		slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "v", v)
		slog.New(slog.NewTextHandler(&log, nil)).Info("m", "v", v)
		if strings.Contains(log.String(), a) || strings.Contains(log.String(), b) {
			t.Errorf("%T in the log: %s", v, &log)
		}
	}
}
