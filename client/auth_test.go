//go:build linux

package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/wire"
)

const rightSecret = "the-right-secret-of-32-characters"

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tokenOf(t *testing.T, text string) Token {
	t.Helper()
	token, err := ParseToken(text)
	noError(t, err)
	return token
}

// gated is a daemon that goes no further than its gate.
type gated struct {
	addr string
	let  chan string // who was let in, or the code of the refusal
}

// passedOn is what those are told who were let in.
var passedOn = wire.Refuse(wire.CodeInternal, "let in")

func startGated(t *testing.T, l net.Listener, addr string) *gated {
	tokens, err := auth.Parse([]byte(`tokens: [{name: worker, secret: ` + rightSecret + `, rights: [push, read, publish], tables: ["t"]}]`))
	noError(t, err)
	g := &gated{addr, make(chan string, 1)}
	gate := auth.NewGate(auth.GateConfig{Tokens: tokens})
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			g.serve(t, gate, conn)
		}
	}()
	return g
}

func (g *gated) serve(t *testing.T, gate *auth.Gate, conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	hello, frame, err := wire.ReadHelloFrame(conn)
	if err != nil {
		t.Error(err)
		return
	}
	peer, err := auth.PeerOf(conn)
	if err != nil {
		t.Error(err)
		return
	}
	peer.User = -1 // nobody may come without a token
	id, refusal := gate.Admit(conn, hello, frame, peer)
	what := ""
	if refusal == nil {
		what, refusal = id.Token, passedOn
	} else {
		what = string(refusal.Code)
	}
	_ = wire.WriteRefusal(conn, refusal)
	g.let <- what
}

// open opens each kind of client once.
func open(ctx context.Context, t *testing.T, addr, what string, token Token) error {
	m := stepManifest(t, raw("w", 8))
	var err error
	switch what {
	case "Producer":
		_, err = Dial(ctx, addr, Config{Table: "t", Spec: specOf(t, "a:U8"), Token: token})
	case "StepProducer":
		_, err = DialSteps(ctx, addr, StepsConfig{Table: "t", Name: "n", Manifest: m, Token: token})
	case "StepProducer in place":
		_, err = DialSteps(ctx, addr, StepsConfig{Table: "t", Name: "n", Manifest: m, Token: token, InPlace: true})
	case "Filler":
		_, err = AttachFiller(ctx, addr, FillerConfig{Table: "t", Token: token})
	case "Trainer":
		_, err = Attach(ctx, addr, TrainerConfig{Table: "t", Token: token})
	case "GradReader":
		_, err = OpenGrads(ctx, addr, GradConfig{Table: "t", Token: token})
	case "Publisher":
		_, err = OpenPublisher(ctx, addr, PublisherConfig{Table: "t", Manifest: m, Token: token})
	case "Publisher that streams":
		_, err = OpenPublisher(ctx, addr, PublisherConfig{Table: "t", Manifest: m, Token: token, Stream: true})
	case "Subscription":
		_, err = Subscribe(ctx, addr, SubscribeConfig{Table: "t", Token: token})
	case "Subscription that streams":
		_, err = Subscribe(ctx, addr, SubscribeConfig{Table: "t", Token: token, Stream: true})
	case "manifest":
		cfg := TrainerConfig{Token: token}.withDefaults()
		s := &ringSource{t: &Trainer{accepted: wire.AcceptedTrain{Table: "t"}}, cfg: cfg, network: "unix", address: strings.TrimPrefix(addr, "unix://")}
		_, err = s.fetch(ctx, 1)
	default:
		t.Fatalf("no client %q", what)
	}
	return err
}

// TestEveryClientProvesItsToken: with the right secret each is let in, with a wrong one it ends without a proof, without a token it is refused.
func TestEveryClientProvesItsToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	noError(t, err)
	g := startGated(t, l, "unix://"+path)
	for _, what := range []string{
		"Producer", "StepProducer", "StepProducer in place", "Filler", "Trainer", "GradReader", "Publisher", "Publisher that streams", "Subscription",
		"Subscription that streams", "manifest",
	} {
		t.Run(what, func(t *testing.T) {
			err := open(t.Context(), t, g.addr, what, tokenOf(t, "worker:"+rightSecret))
			var refusal *wire.Refusal
			if got := <-g.let; got != "worker" || !errors.As(err, &refusal) || refusal.Reason != passedOn.Reason {
				t.Errorf("with the right secret: %s, %v", got, err)
			}
			err = open(t.Context(), t, g.addr, what, tokenOf(t, "worker:x"+rightSecret))
			if got := <-g.let; got != string(wire.CodeNotAuthenticated) || !errors.Is(err, ErrDaemonUnproven) || errors.Is(err, ErrDaemonGone) || !strings.Contains(err.Error(), `token "worker"`) {
				t.Errorf("with a wrong secret: %s, %v", got, err)
			}
			err = open(t.Context(), t, g.addr, what, Token{})
			if got := <-g.let; got != string(wire.CodeNotAuthenticated) || codeOf(err) != wire.CodeNotAuthenticated {
				t.Errorf("without a token: %s, %v", got, err)
			}
			for _, text := range []string{fmt.Sprint(err), fmt.Sprintf("%+v", err)} {
				if strings.Contains(text, rightSecret) {
					t.Errorf("the error shows the secret: %s", text)
				}
			}
		})
	}
}

// TestTokenOverTLS: the proof is bound to the TLS connection, so one that was carried from one to another is worth nothing.
func TestTokenOverTLS(t *testing.T) {
	ca, err := devcert.NewAuthority("test", time.Hour)
	noError(t, err)
	pair, err := ca.NewServer([]string{"127.0.0.1"}, time.Hour)
	noError(t, err)
	serverTLS := &tls.Config{Certificates: []tls.Certificate{pair.TLS()}, MinVersion: tls.VersionTLS13}
	clientTLS := &tls.Config{RootCAs: ca.Pool(), ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13}
	l, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS)
	noError(t, err)
	g := startGated(t, l, l.Addr().String())
	dialTLS := func(ctx context.Context, network, address string) (net.Conn, error) {
		return (&tls.Dialer{Config: clientTLS}).DialContext(ctx, network, address)
	}
	cfg := Config{Table: "t", Spec: specOf(t, "a:U8"), Token: tokenOf(t, "worker:"+rightSecret), Dialer: dialTLS}
	_, err = Dial(t.Context(), "tcp://"+g.addr, cfg)
	if got := <-g.let; got != "worker" || codeOf(err) != passedOn.Code {
		t.Fatalf("%s, %v", got, err)
	}
	// One in the middle with a certificate that the client trusts: two TLS connections, between which it carries the bytes.
	middle, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS)
	noError(t, err)
	defer middle.Close()
	carried := make(chan error, 1)
	go func() { carried <- carry(t.Context(), middle, dialTLS, g.addr) }()
	_, err = Dial(t.Context(), "tcp://"+middle.Addr().String(), cfg)
	if !errors.Is(err, ErrDaemonUnproven) {
		t.Errorf("through one in the middle: %v", err)
	}
	if got := <-g.let; got != string(wire.CodeNotAuthenticated) {
		t.Errorf("the daemon let in %s", got)
	}
	noError(t, <-carried)
}

// carry takes one connection and carries its bytes both ways, until the client has ended.
func carry(ctx context.Context, l net.Listener, dial func(context.Context, string, string) (net.Conn, error), to string) error {
	in, err := l.Accept()
	if err != nil {
		return err
	}
	out, err := dial(ctx, "tcp", to)
	if err != nil {
		return errors.Join(err, in.Close())
	}
	back := make(chan struct{})
	go func() {
		defer close(back)
		pump(in, out)
	}()
	pump(out, in)
	<-back
	_, _ = in.Close(), out.Close() // what a peer has closed meanwhile may complain
	return nil
}

func pump(to, from net.Conn) {
	b := make([]byte, 4096)
	for {
		n, err := from.Read(b)
		if n > 0 {
			if _, failed := to.Write(b[:n]); failed != nil {
				return
			}
		}
		if err != nil {
			_ = to.(*tls.Conn).CloseWrite()
			return
		}
	}
}

// TestDowngrade: a daemon that accepts a client with a token and proves nothing is not served, and that is final.
func TestDowngrade(t *testing.T) {
	client, daemon := net.Pipe()
	go func() {
		defer daemon.Close()
		hello, err := wire.ReadHello(daemon)
		if err != nil || hello.Token != "worker" {
			t.Errorf("%+v, %v", hello, err)
			return
		}
		_ = wire.WriteAccepted(daemon, &wire.AcceptedPush{Table: "t", Fingerprint: hello.Fingerprint, Ack: wire.AckQueued, WindowSamples: 1, WindowBytes: 1})
	}()
	cfg := Config{Table: "t", Spec: specOf(t, "a:U8"), Token: tokenOf(t, "worker:"+rightSecret), Dialer: func(context.Context, string, string) (net.Conn, error) { return client, nil }}
	_, err := Dial(t.Context(), "tcp://daemon:1", cfg)
	if !errors.Is(err, ErrNotChallenged) || passing(err) || passing(ErrDaemonUnproven) || errors.Is(err, ErrDaemonGone) {
		t.Errorf("%v", err)
	}
	if _, err := client.Write([]byte{0}); err == nil {
		t.Error("the connection is open still")
	}
}

func TestReadToken(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		noError(t, os.WriteFile(path, []byte(text), 0o600))
		noError(t, os.Chmod(path, mode))
		return path
	}
	for _, end := range []string{"", "\n", "\r\n"} {
		token, err := ReadToken(file("good", "worker:"+rightSecret+end, 0o640))
		if err != nil || token.Name != "worker" || token.Secret.Reveal() != rightSecret {
			t.Errorf("%q: %v, %v", end, token, err)
		}
	}
	for path, says := range map[string]string{
		file("readable", "worker:"+rightSecret, 0o604):             "chmod 600",
		file("two", "worker:"+rightSecret+"\nworker:other", 0o600): "printable ASCII",
		file("long", strings.Repeat("x", 10_000), 0o600):           "NAME:SECRET",
		filepath.Join(dir, "none"):                                 "no such file",
	} {
		if _, err := ReadToken(path); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), rightSecret) {
			t.Errorf("%s: %v; want %q", path, err, says)
		}
	}
	t.Setenv(TokenVariable, "")
	if token, err := TokenFromEnvironment(); err != nil || !token.IsZero() {
		t.Errorf("%v, %v", token, err)
	}
	t.Setenv(TokenVariable, "worker:"+rightSecret)
	if token, err := TokenFromEnvironment(); err != nil || token.Name != "worker" {
		t.Errorf("%v, %v", token, err)
	}
	t.Setenv(TokenVariable, rightSecret)
	if _, err := TokenFromEnvironment(); err == nil || strings.Contains(err.Error(), rightSecret) || !strings.Contains(err.Error(), TokenVariable) {
		t.Errorf("%v", err)
	}
}

// TestConfigsDoNotShowTheToken: whoever prints a configuration, or what holds one, does not print the secret.
func TestConfigsDoNotShowTheToken(t *testing.T) {
	token := tokenOf(t, "worker:"+rightSecret)
	for _, v := range []any{
		Config{Token: token}, StepsConfig{Token: token}, FillerConfig{Token: token}, TrainerConfig{Token: token}, GradConfig{Token: token},
		PublisherConfig{Token: token}, SubscribeConfig{Token: token}, target{cfg: Config{Token: token}}, &target{cfg: Config{Token: token}},
		ringSource{cfg: TrainerConfig{Token: token}}, wire.Hello{Token: token.Name, Secret: token.Secret},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
			if text := fmt.Sprintf(verb, v); strings.Contains(text, rightSecret) || strings.Contains(text, fmt.Sprintf("%x", rightSecret)) {
				t.Errorf("%T with %s: %s", v, verb, text)
			}
		}
	}
}
