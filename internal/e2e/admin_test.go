//go:build linux && !race

package e2e

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/wire"
)

// TestAdminSocket: on a unix socket the admin endpoint answers the daemon's own user without a token, and nobody else who came to have access.
func TestAdminSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "ingestd-admin-")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "admin")
	d := serve(t, []table{small}, "--admin", "unix://"+path)
	if d.Admin != "unix://"+path {
		t.Errorf("it listens at %q", d.Admin)
	}
	info, err := os.Stat(path)
	check(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
	p := start(t, "status", "--addr", d.Admin)
	p.ends(exitOK)
	says(t, p.out.String(), "serving")
	p = start(t, "bans", "ls", "--addr", d.Admin)
	p.ends(exitOK)
	says(t, run(t, exitUnreachable, "status", "--addr", "unix://"+path+"-not"), "no daemon answers")
	says(t, run(t, exitUsage, "serve", "--table", "x", "--spec", small.spec, "--admin", d.Unix, "--listen", d.Unix, "--print-config"), "another path")
	if os.Geteuid() != 0 {
		t.Skip("what another user gets can be tried as root only")
	}
	// Another user, whom somebody has given access to the socket.
	check(t, os.Chmod(path, 0o666))
	if text := get1(t, dialAs(t, 65534, path), ""); !strings.HasPrefix(text, "HTTP/1.1 401 ") {
		t.Errorf("another user gets %q", text)
	}
}

// dialAs connects to a unix socket as another user.
func dialAs(t *testing.T, user uintptr, path string) net.Conn {
	t.Helper()
	type result struct {
		fd  int
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which is that user's from here on, ends with the goroutine
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if _, _, failed := syscall.RawSyscall(syscall.SYS_SETRESUID, user, user, user); failed != 0 {
			err = failed
		}
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		}
		done <- result{fd, err}
	}()
	r := <-done
	check(t, r.err)
	f := os.NewFile(uintptr(r.fd), path)
	defer f.Close()
	c, err := net.FileConn(f)
	check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	check(t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

// TestAdminTokenUnasked: a token in the environment goes to nobody who asks for one at the admin address; the one of --token-file does.
func TestAdminTokenUnasked(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", "*")
	var heard output
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	greedy := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		check(t, r.Header.Write(&heard))
		w.WriteHeader(http.StatusUnauthorized)
	})}
	go func() { _ = greedy.Serve(l) }()
	t.Cleanup(func() { _ = greedy.Close() })
	at := "http://" + l.Addr().String()
	for _, args := range [][]string{{"status", "--addr", at}, {"bans", "ls", "--addr", at}, {"bans", "clear", "--all", "--addr", at}, {"weights", "ls", "--admin", at}} {
		p := startWith(t, []string{client.TokenVariable + "=worker:" + k.tokens["worker"].Secret.Reveal()}, args...)
		p.ends(exitRefused)
		says(t, p.err.String(), "--token-file")
	}
	k.hides("a command", heard.String())
	run(t, exitRefused, "status", "--addr", at, "--token-file", k.file("worker"))
	says(t, heard.String(), "Bearer worker:")
}

// get1 asks over a connection of its own, and returns what comes back until its end.
func get1(t *testing.T, c net.Conn, header string) string {
	t.Helper()
	_, _ = io.WriteString(c, "GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n"+header+"\r\n")
	text, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection stays open")
	}
	return string(text)
}

// TestAdminStrangers: at an admin address that others reach, strangers are held within the limits of handshakes, their failures count by reason, and at the fifth their address is
// banned, at all listeners; while one is open to somebody with a token, that goes on.
func TestAdminStrangers(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("boss", "admin", "*")
	k.add("worker", "push", "*")
	d := serve(t, []table{small}, "--admin", "0.0.0.0:0", "--tokens", k.path(), "--bans-loopback", "--bans-kernel=false", "--half-open-per-address", "3")
	_, port, err := net.SplitHostPort(strings.TrimPrefix(d.Admin, "http://"))
	check(t, err)
	bearer := "Authorization: Bearer boss:" + k.tokens["boss"].Secret.Reveal()
	dial := func() net.Conn {
		t.Helper()
		c, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		check(t, err)
		t.Cleanup(func() { _ = c.Close() })
		check(t, c.SetDeadline(time.Now().Add(patience)))
		return c
	}
	// turnedAway fails the test unless a connection is closed without a word.
	turnedAway := func() {
		t.Helper()
		c, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		if errors.Is(err, syscall.ECONNRESET) { // before it was there for us
			return
		}
		check(t, err)
		t.Cleanup(func() { _ = c.Close() })
		check(t, c.SetDeadline(time.Now().Add(patience)))
		if text := get1(t, c, bearer+"\r\n"); text != "" {
			t.Errorf("who is turned away hears %q", text)
		}
	}
	friend := dial()
	answers := bufio.NewReader(friend)
	ask := func() string {
		t.Helper()
		_, err := io.WriteString(friend, "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n"+bearer+"\r\n\r\n")
		check(t, err)
		resp, err := http.ReadResponse(answers, nil)
		check(t, err)
		text, err := io.ReadAll(resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		return string(text)
	}
	counted := func(want string) {
		t.Helper()
		eventually(t, want, func() bool { return strings.Contains(ask(), want+"\n") })
	}
	ask()
	// Headers that never end take the places of handshakes, and no more; they fail when their time is over.
	var slow []net.Conn
	for range 3 {
		c := dial()
		_, err := io.WriteString(c, "GET /status HT")
		check(t, err)
		slow = append(slow, c)
	}
	counted("ingestd_half_open_handshakes 3")
	turnedAway() // the fourth
	counted(`ingestd_refused_total{reason="too_many_connections",transport="admin"} 1`)
	for _, c := range slow {
		_, _ = io.Copy(io.Discard, c) // until it is closed
	}
	counted(`ingestd_refused_total{reason="handshake_timeout",transport="admin"} 3`)
	counted("ingestd_half_open_handshakes 0")
	counted("ingestd_handshake_failures_total 3")
	// Wrong tokens: the connection ends after the answer.
	for header, reason := range map[string]wire.Code{
		"Authorization: Bearer boss:" + strings.Repeat("x", 40):              wire.CodeNotAuthenticated,
		"Authorization: Bearer worker:" + k.tokens["worker"].Secret.Reveal(): wire.CodeNotPermitted,
	} {
		if text := get1(t, dial(), header+"\r\n"); !strings.HasPrefix(text, "HTTP/1.1 401 ") {
			t.Errorf("%s: %q", reason, text)
		}
		counted(`ingestd_refused_total{reason="` + string(reason) + `",transport="admin"} 1`)
	}
	counted("ingestd_banned_addresses 1")
	turnedAway()
	counted(`ingestd_refused_total{reason="banned",transport="admin"} 1`)
	d.turnsAway()                   // at the others, too
	counted("ingestd_bans_total 1") // which who was let in before still hears
}
