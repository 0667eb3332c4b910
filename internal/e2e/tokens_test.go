//go:build linux && !race

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/wire"
)

// keyring is a daemon's file of tokens, and those of clients.
type keyring struct {
	t       *testing.T
	dir     string
	entries map[string]string // lines of the daemon's file, by name
	tokens  map[string]client.Token
	secrets []string // all there ever were
}

func newKeyring(t *testing.T) *keyring {
	return &keyring{t: t, dir: t.TempDir(), entries: map[string]string{}, tokens: map[string]client.Token{}}
}

// path is the daemon's file.
func (k *keyring) path() string { return filepath.Join(k.dir, "tokens.yaml") }

// add makes a token, and writes the daemon's file.
func (k *keyring) add(name, right, table string) {
	k.t.Helper()
	token, lines, err := auth.NewEntry(name, []string{right}, []string{table})
	check(k.t, err)
	k.entries[name], k.tokens[name] = lines, token
	k.secrets = append(k.secrets, token.Secret.Reveal())
	k.write()
}

// write replaces the file at once.
func (k *keyring) write() {
	k.t.Helper()
	text := "tokens:\n"
	for _, lines := range k.entries {
		text += lines
	}
	fresh := filepath.Join(k.dir, "fresh")
	check(k.t, os.WriteFile(fresh, []byte(text), 0o600))
	check(k.t, os.Rename(fresh, k.path()))
}

// file is one that a client takes its token from.
func (k *keyring) file(name string) string {
	k.t.Helper()
	return k.fileOf(name, k.tokens[name].Secret.Reveal())
}

func (k *keyring) fileOf(name, secret string) string {
	k.t.Helper()
	f, err := os.CreateTemp(k.dir, "client-")
	check(k.t, err)
	_, err = fmt.Fprintf(f, "%s:%s\n", name, secret)
	check(k.t, errors.Join(err, f.Close()))
	return f.Name()
}

// wrong is a file with a secret that nobody has.
func (k *keyring) wrong(name string) string {
	k.t.Helper()
	secret := auth.NewSecret().Reveal()
	k.secrets = append(k.secrets, secret)
	return k.fileOf(name, secret)
}

// hides fails the test if a text holds a secret.
func (k *keyring) hides(what, text string) {
	k.t.Helper()
	for _, s := range k.secrets {
		if strings.Contains(text, s) {
			k.t.Errorf("%s shows a secret", what)
		}
	}
}

// TestTokens: who proves a token gets what its rights are for, and nobody else gets anything; tokens change without a restart; no secret is ever shown.
func TestTokens(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	k.add("elsewhere", "push", "other*")
	k.add("reader", "read", small.name)
	d := serve(t, []table{small}, "--tokens", k.path(), "--log-level", "debug")
	var said strings.Builder
	push := func(code int, flags ...string) string {
		t.Helper()
		p := d.push(small.name, 3, 0, flags...)
		p.ends(code)
		said.WriteString(p.out.String() + p.err.String())
		return p.err.String()
	}
	worker := k.file("worker")
	push(exitOK, "--token-file", worker)
	says(t, push(exitRefused), "not_authenticated")
	says(t, push(exitRefused, "--token-file", k.wrong("worker")), "worker")
	says(t, push(exitRefused, "--token-file", k.wrong("nobody")), "nobody")
	says(t, push(exitRefused, "--token-file", k.file("elsewhere")), "not_permitted")
	says(t, push(exitRefused, "--token-file", k.file("reader")), "not_permitted")
	// On the unix socket the daemon's own user needs none; who names one has its rights.
	push(exitOK, "--addr", d.Unix)
	push(exitOK, "--addr", d.Unix, "--token-file", worker)
	says(t, push(exitRefused, "--addr", d.Unix, "--token-file", k.file("reader")), "not_permitted")
	says(t, push(exitRefused, "--addr", d.Unix, "--token-file", k.wrong("worker")), "worker")

	// A live connection says with which token it was let in.
	held := d.push(small.name, endless, 1, "--token-file", worker)
	d.await("the producer is there", func(s *status) bool {
		return len(s.Producers.Connections) == 1 && s.Producers.Connections[0].Token == "worker"
	})

	// The secret is rotated: both are good, then only the new one is.
	old, before := k.tokens["worker"].Secret.Reveal(), worker
	k.add("worker", "push", small.name)
	fresh := k.entries["worker"]
	k.entries["worker"] = fresh + "  previous: " + old + "\n"
	k.write()
	d.await("the new secret is taken up", func(s *status) bool {
		for _, tk := range s.Access.Tokens.Tokens {
			if tk.Name == "worker" && tk.Rotating {
				return true
			}
		}
		return false
	})
	push(exitOK, "--token-file", before)
	push(exitOK, "--token-file", k.file("worker"))
	reloads := d.status().Access.Tokens.Reloads
	k.entries["worker"] = fresh
	k.write()
	d.await("the old secret is gone", func(s *status) bool { return s.Access.Tokens.Reloads > reloads })
	push(exitRefused, "--token-file", before)
	push(exitOK, "--token-file", k.file("worker"))
	// A broken file changes nothing.
	check(t, os.WriteFile(k.path(), []byte("tokens: [{name: worker, secret: "+old+", rihgts: [push]}]\n"), 0o600))
	d.await("the broken file is noticed", func(s *status) bool { return s.Access.Tokens.Broken != "" })
	push(exitOK, "--token-file", k.file("worker"))
	if !held.running() {
		t.Error("who was let in before was ended")
	}

	s := d.status().Access.Tokens
	if s.ByToken < 7 || s.ByUser == 0 || s.NotAuthenticated != 5 || s.NotPermitted != 3 {
		t.Errorf("%+v", s)
	}
	if n := d.metric(`ingestd_authentications_total{result="not_authenticated"}`); n != float64(s.NotAuthenticated) {
		t.Errorf("the metric says %v, the status %d", n, s.NotAuthenticated)
	}
	k.hides("the status", string(d.get("/status")))
	k.hides("the metrics", string(d.get("/metrics")))
	k.hides("a client", said.String())
	k.hides("the daemon", d.out.String()+d.err.String())
	says(t, d.err.String(), "token=worker")
}

// TestTokenDowngrade: a client with a token goes on with no daemon that did not prove to know it: one without tokens refuses it, and one that lets it in unasked is an impostor.
func TestTokenDowngrade(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	d := serve(t, []table{small})
	p := d.push(small.name, 3, 0, "--token-file", k.file("worker"))
	p.ends(exitRefused)
	says(t, p.err.String(), "has no tokens")

	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	check(t, err)
	var got bytes.Buffer
	impostor, fingerprint := make(chan error, 1), small.layout(t).Fingerprint()
	go func() {
		c, err := l.Accept()
		if err != nil {
			impostor <- err
			return
		}
		defer c.Close()
		if _, _, err = wire.ReadHelloFrame(io.TeeReader(c, &got)); err == nil {
			err = wire.WriteAccepted(c, &wire.AcceptedPush{Stream: 1, Fingerprint: fingerprint, Ack: wire.AckQueued, WindowSamples: 10, WindowBytes: 1 << 20})
		}
		_, _ = io.Copy(&got, c)
		impostor <- err
	}()
	t.Cleanup(func() { _ = l.Close() })
	p = start(t, "push", "--addr", "tcp://"+l.Addr().String(), "--table", small.name, "--spec", small.spec, "--generate", "1", "--token-file", k.file("worker"))
	<-p.done
	check(t, <-impostor)
	if p.cmd.ProcessState.ExitCode() == exitOK {
		t.Error("it pushed to an impostor")
	}
	hello := got.Len()
	k.hides("the wire", got.String())
	if _, frame, err := wire.ReadHelloFrame(&got); err != nil || len(frame) != hello {
		t.Errorf("beside a hello of %d bytes the impostor got something: %d in all, %v", len(frame), hello, err)
	}
	k.hides("the client", p.out.String()+p.err.String())
}

// turnsAway fails the test unless a connection is closed without a word.
func (d *server) turnsAway() {
	d.t.Helper()
	d.turnsAwayFrom("127.0.0.1", strings.TrimPrefix(d.TCP, "tcp://"))
}

// turnsAwayFrom is turnsAway for a connection from one address of this machine to another.
func (d *server) turnsAwayFrom(from, to string) {
	d.t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := dialer.DialContext(d.t.Context(), "tcp", to)
	if errors.Is(err, syscall.ECONNRESET) { // before it was there for us
		return
	}
	check(d.t, err)
	defer c.Close()
	check(d.t, c.SetDeadline(time.Now().Add(patience)))
	_, _ = c.Write(d.helloBytes(small)) // it may be closed already
	if text, err := io.ReadAll(c); len(text) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		d.t.Errorf("who is turned away hears %q, %v", text, err)
	}
}

// dialFrom connects from one address of this machine to another.
func (d *server) dialFrom(from, to string) *producer {
	d.t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := dialer.DialContext(d.t.Context(), "tcp", to)
	check(d.t, err)
	d.t.Cleanup(func() { _ = c.Close() })
	check(d.t, c.SetDeadline(time.Now().Add(patience)))
	return &producer{Conn: c, t: d.t}
}

// TestBans: the fifth failure of an address bans it: then it hears no word. A producer that is there is not disturbed, and the address is let in again once it is cleared.
func TestBans(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	d := serve(t, []table{small}, "--tokens", k.path(), "--bans-loopback", "--bans=true", "--bans-kernel=false")
	beside := d.push(small.name, endless, 1000, "--token-file", k.file("worker"))
	d.pull(small.name)
	d.moves(small.name, 1)
	fail := func() {
		c := d.connect()
		check(t, wire.WriteHello(c, d.hello(small)))
		c.refusal(wire.CodeNotAuthenticated)
		check(t, c.Close())
	}
	for n := 1; n <= bans.FailuresMax; n++ {
		fail()
		d.await("the failure is counted", func(s *status) bool { return s.Access.Bans.Failures == uint64(n) })
	}
	list := func(flags ...string) *process {
		p := start(t, append([]string{"bans", "ls", "--addr", d.Admin}, flags...)...)
		p.ends(exitOK)
		return p
	}
	got := result[daemon.BanList](list("--json"))
	if len(got.Bans) != 1 || got.Bans[0].Address != "127.0.0.1" || !got.Bans[0].Banned || got.Bans[0].Failures != bans.FailuresMax {
		t.Fatalf("%+v", got)
	}
	d.turnsAway()
	d.turnsAway()
	// The right token does not help either.
	p := d.push(small.name, 1, 0, "--token-file", k.file("worker"))
	p.ends(exitUnreachable)
	d.moves(small.name, 2)
	if !beside.running() {
		t.Error("the producer that was there is gone")
	}
	if n := d.metric(`ingestd_refused_total{reason="banned",transport="tcp"}`); n < 3 {
		t.Errorf("%v banned connections are counted", n)
	}
	says(t, list().out.String(), "127.0.0.1", "5 failures", "banned for")

	run(t, exitUsage, "bans", "clear", "--addr", d.Admin)
	says(t, run(t, exitUsage, "bans", "clear", "nonsense", "--addr", d.Admin), "no address")
	clear := func(args ...string) uint64 {
		p := start(t, append([]string{"bans", "clear", "--json", "--addr", d.Admin}, args...)...)
		p.ends(exitOK)
		return uint64(result[daemon.BansCleared](p).Cleared)
	}
	if n := clear("192.0.2.1"); n != 0 {
		t.Errorf("%d cleared of an address that never came", n)
	}
	if n := clear("127.0.0.1"); n != 1 {
		t.Errorf("%d cleared", n)
	}
	says(t, list().out.String(), "no address has failed")
	p = d.push(small.name, 1, 0, "--token-file", k.file("worker"))
	p.ends(exitOK)
	fail()
	d.await("it failed again", func(s *status) bool { return s.Access.Bans.Addresses == 1 })
	if n := clear("--all"); n != 1 {
		t.Errorf("%d cleared of all", n)
	}
}

// TestHalfOpen: an address has no more handshakes under way than allowed, nor have all of them together, with bans or without; the rest are closed without a word, and others, here on
// the unix socket, are served.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certify(t, dir)
	for name, tc := range map[string]struct {
		flags  []string
		secure bool
		from   []string // of those that are half open, and of the one that is too many
	}{
		"of an address":               {[]string{"--half-open", "8", "--half-open-per-address", "4"}, false, []string{"127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"}},
		"of an address, over TLS":     {[]string{"--half-open", "8", "--half-open-per-address", "2"}, true, []string{"127.0.0.1", "127.0.0.1", "127.0.0.1"}},
		"of an address, without bans": {[]string{"--half-open-per-address", "2", "--bans=false"}, false, []string{"127.0.0.1", "127.0.0.1", "127.0.0.1"}},
		"in all":                      {[]string{"--half-open", "3", "--half-open-per-address", "2"}, false, []string{"127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"}},
		"in all, over TLS":            {[]string{"--half-open", "2", "--half-open-per-address", "2"}, true, []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := serve(t, []table{small}, append(tc.flags, "--bans-loopback", "--listen", "tls://127.0.0.1:0",
				"--tls-cert", filepath.Join(dir, "server.pem"), "--tls-key", filepath.Join(dir, "server.key"))...)
			at := strings.TrimPrefix(d.TCP, "tcp://")
			if tc.secure {
				at = strings.TrimPrefix(d.TLS, "tls://")
			}
			most, first := len(tc.from)-1, d.helloBytes(small)[:10]
			if tc.secure {
				first = []byte("\x16\x03\x01\x02\x00\x01\x00")
			}
			var waiting []*producer
			for _, from := range tc.from[:most] {
				c := d.dialFrom(from, at)
				c.write(first)
				waiting = append(waiting, c)
			}
			d.await("they are half open", func(s *status) bool { return s.Access.HalfOpen.Open == most })
			d.turnsAwayFrom(tc.from[most], at)
			p := d.push(small.name, 3, 0, "--addr", d.Unix)
			p.ends(exitOK)
			c := waiting[0]
			if tc.secure {
				check(t, c.Close())
			} else {
				c.write(d.helloBytes(small)[10:])
				check(t, wire.ReadReply(c, &c.accepted))
			}
			d.await("one is through", func(s *status) bool { return s.Access.HalfOpen.Open == most-1 })
			again := d.dialFrom(tc.from[0], at) // in its place
			again.write(first)
			d.await("another is half open", func(s *status) bool { return s.Access.HalfOpen.Open == most })
			if h := d.status().Access.HalfOpen; h.Refused != 1 {
				t.Errorf("%+v", h)
			}
		})
	}
}

// TestAdminToken: on an address that others reach, the admin endpoint answers nothing without a token that has the right.
func TestAdminToken(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("boss", "admin", "*")
	k.add("worker", "push", "*")
	ready := filepath.Join(k.dir, "ready.json")
	says(t, run(t, exitUsage, "serve", "--table", "x", "--spec", small.spec, "--admin", "0.0.0.0:0", "--print-config"), "credentials", "--tokens")
	p := start(t, "serve", "--table", "x", "--spec", small.spec, "--listen", "tcp://127.0.0.1:0", "--admin", "0.0.0.0:0", "--tokens", k.path(), "--ready-file", ready)
	var at daemon.Addresses
	eventually(t, "the daemon serves", func() bool {
		text, err := os.ReadFile(ready)
		return err == nil && json.Unmarshal(text, &at) == nil
	})
	_, port, err := net.SplitHostPort(strings.TrimPrefix(at.Admin, "http://"))
	check(t, err)
	admin := "http://127.0.0.1:" + port
	for _, path := range []string{"/", "/healthz", "/status", "/metrics", "/bans", "/debug/pprof/", "/nothing"} {
		var bodies []string
		for _, header := range []string{"", "Bearer", "Bearer boss:" + strings.Repeat("x", 40), "Bearer worker:" + k.tokens["worker"].Secret.Reveal(), "Basic Ym9zczp4"} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, admin+path, nil)
			check(t, err)
			if header != "" {
				req.Header.Set("Authorization", header)
			}
			resp, err := http.DefaultClient.Do(req)
			check(t, err)
			text, err := io.ReadAll(resp.Body)
			check(t, errors.Join(err, resp.Body.Close()))
			if resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("GET %s with %q: %s", path, header, resp.Status)
			}
			bodies = append(bodies, string(text))
			if bodies[0] != string(text) {
				t.Errorf("GET %s with %q says %q, and else %q", path, header, text, bodies[0])
			}
		}
	}
	says(t, run(t, exitRefused, "status", "--addr", admin), "token")
	said := run(t, exitRefused, "status", "--addr", admin, "--token-file", k.file("worker"))
	good := start(t, "status", "--addr", admin, "--token-file", k.file("boss"))
	good.ends(exitOK)
	says(t, good.out.String(), "serving")
	list := start(t, "weights", "ls", "--admin", admin, "--token-file", k.file("boss"))
	list.ends(exitOK)
	bansList := start(t, "bans", "ls", "--addr", admin, "--token-file", k.file("boss"))
	bansList.ends(exitOK)
	k.hides("a command", said+good.out.String()+good.err.String()+list.err.String())
	k.hides("the daemon", p.out.String()+p.err.String())
	says(t, p.err.String(), "in the clear")
}
