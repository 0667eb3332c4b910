package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ingestd/ingestd/ingest"
)

// Where a daemon listens unless told otherwise.
const (
	DefaultTCP   = "127.0.0.1:7420"
	DefaultAdmin = "127.0.0.1:7421"
)

// DefaultSocket is the unix socket of a daemon that was not told another: in the user's runtime folder, or in /tmp with the user's number.
func DefaultSocket() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "ingestd.sock")
	}
	return fmt.Sprintf("/tmp/ingestd-%d.sock", os.Getuid())
}

// address is one place to listen.
type address struct {
	scheme string // tcp, tls, quic, unix, echo, admin
	host   string // host:port, or a path
	table  string // echo only
}

func (a address) String() string {
	if a.scheme == "admin" {
		return "http://" + a.host
	}
	s := a.scheme + "://" + a.host
	if a.table != "" {
		s += "/" + a.table
	}
	return s
}

// sunPathMax is the longest path a unix socket may have on Linux.
const sunPathMax = 107

func (p *plan) checkListeners() error {
	if len(p.Listen) == 0 {
		return configErrorf("listen", "there is none: give at least one of tcp://host:port, tls://host:port, quic://host:port, unix:///path and echo://host:port/table")
	}
	for _, text := range p.Listen {
		a, err := parseAddress(text)
		if err != nil {
			return configErrorf("listen", "%v", err)
		}
		if err := p.checkAddress(&a); err != nil {
			return err
		}
		if port := strings.HasSuffix(a.host, ":0"); !port && slices.ContainsFunc(p.listeners, func(b address) bool { return a.host == b.host && (a.scheme == "quic") == (b.scheme == "quic") }) {
			return configErrorf("listen", "%s is there twice", text)
		}
		p.listeners = append(p.listeners, a)
	}
	if p.Admin == "off" {
		return nil
	}
	return p.checkAdmin()
}

// checkAdmin reads where the admin endpoint listens.
func (p *plan) checkAdmin() error {
	if strings.HasPrefix(p.Admin, "unix://") {
		a, err := parseAddress(p.Admin)
		switch {
		case err != nil:
			return configErrorf("admin", "%v", err)
		case slices.ContainsFunc(p.listeners, func(b address) bool { return b.scheme == "unix" && a.host == b.host }):
			return configErrorf("admin", "%v is a listener of producers and trainers: give the admin endpoint another path", a)
		}
		p.admin = &a
		return nil
	}
	a := address{scheme: "admin", host: strings.TrimPrefix(p.Admin, "http://")}
	if err := checkHostPort(a.host); err != nil {
		return configErrorf("admin", "%v (or unix:///path, or off)", err)
	}
	p.admin = &a
	return p.checkLoopback("admin", a)
}

func parseAddress(text string) (address, error) {
	scheme, rest, ok := strings.Cut(text, "://")
	a := address{scheme: scheme, host: rest}
	switch {
	case ok && scheme == "unix":
		if !filepath.IsAbs(rest) {
			return a, fmt.Errorf("%q: the path of a unix socket must be absolute: unix:///path", text)
		}
		if len(rest) > sunPathMax {
			return a, fmt.Errorf("%q: the path of a unix socket may have %d bytes, this one has %d", text, sunPathMax, len(rest))
		}
		return a, nil
	case ok && scheme == "echo":
		a.host, a.table, _ = strings.Cut(rest, "/")
	case ok && (scheme == "tcp" || scheme == "tls" || scheme == "quic"):
	default:
		return a, fmt.Errorf("%q is none of tcp://host:port, tls://host:port, quic://host:port, unix:///path and echo://host:port/table", text)
	}
	return a, checkHostPort(a.host)
}

func checkHostPort(host string) error {
	_, port, err := net.SplitHostPort(host)
	if err != nil {
		return fmt.Errorf("%q is not host:port, such as 127.0.0.1:7420", host)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return fmt.Errorf("%q: the port must be 0 to 65535", host)
	}
	return nil
}

func (p *plan) checkAddress(a *address) error {
	if a.scheme == "unix" {
		return nil
	}
	if a.scheme == "tls" || a.scheme == "quic" {
		if err := p.needTLS(*a); err != nil {
			return err
		}
	}
	if a.scheme == "echo" {
		switch {
		case p.Tokens != "" && !p.Insecure:
			return configErrorf("listen", "%v: echo's protocol cannot ask for tokens: take the listener out, or say --insecure (insecure: true) if all that reach it may push", a)
		case a.table == "" && len(p.Tables) == 1:
			a.table = p.Tables[0].Name
		case a.table == "":
			return configErrorf("listen", "%v: say which of the tables it feeds: echo://host:port/table", a)
		case !slices.ContainsFunc(p.Tables, func(t Table) bool { return t.Name == a.table }):
			return configErrorf("listen", "%v: there is no table %q", a, a.table)
		}
		for i := range p.Tables {
			if t := &p.Tables[i]; t.Name == a.table && t.kind() != ingest.KindSamples {
				return configErrorf("listen", "%v: table %q is of kind %s, and echo's protocol carries samples only", a, a.table, t.Kind)
			}
		}
	}
	return p.checkLoopback("listen", *a)
}

// checkLoopback refuses what other machines can reach where they are not asked for credentials.
func (p *plan) checkLoopback(where string, a address) error {
	if p.Insecure || a.loopback() || p.Tokens != "" && a.scheme != "echo" || p.TLS.ClientCA != "" && (a.scheme == "tls" || a.scheme == "quic") {
		return nil
	}
	advice := "use 127.0.0.1, or give a file of tokens (--tokens), or"
	if a.scheme == "echo" {
		advice = "use 127.0.0.1, or"
	}
	return configErrorf(where, "%v can be reached from other machines, and peers are not asked for credentials: %s say --insecure (insecure: true) if the network is trusted", a, advice)
}

// loopback says whether only this machine reaches the address.
func (a address) loopback() bool {
	host, _, _ := net.SplitHostPort(a.host)
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// listen opens a TCP or unix listener, with errors that say what to do.
func listen(ctx context.Context, a address) (net.Listener, error) {
	if a.scheme == "unix" {
		return listenUnix(ctx, a.host)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // some socket options fail on multipath listeners
	ln, err := lc.Listen(ctx, "tcp", a.host)
	if err != nil {
		return nil, listenError(a, err)
	}
	return ln, nil
}

// listenError says what to do about an address of TCP or UDP that cannot be listened on.
func listenError(a address, err error) *ListenError {
	which := "-ltnp"
	if a.scheme == "quic" {
		which = "-lunp"
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return &ListenError{a.String(), fmt.Sprintf("another program listens there: stop it, or choose another port (port 0 takes a free one); ss %s 'sport = :%s' shows which", which, portOf(a.host)), err}
	case errors.Is(err, syscall.EACCES):
		return &ListenError{a.String(), "not permitted: choose a port above 1023", err}
	}
	return &ListenError{a.String(), "the address is not one of this machine's, or not legal", err}
}

func portOf(host string) string {
	_, port, _ := net.SplitHostPort(host)
	return port
}

// ListenError says why an address cannot be listened on.
type ListenError struct {
	Address string
	Advice  string
	Err     error
}

func (e *ListenError) Error() string {
	return fmt.Sprintf("listen on %s: %s (%v)", e.Address, e.Advice, e.Err)
}

func (e *ListenError) Unwrap() error { return e.Err }

// listenUnix takes over the socket of a daemon that died, and no other file. The lock file beside it, which stays, keeps two daemons from doing so at once.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	name := "unix://" + path
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, &ListenError{name, "another ingestd serves there (it holds " + path + ".lock), or the folder cannot be written: stop it, or choose another path", err}
	}
	ln, err := takeSocket(ctx, path)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	return &lockedListener{Listener: ln, lock: lock}, nil
}

func takeSocket(ctx context.Context, path string) (net.Listener, error) {
	name := "unix://" + path
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode()&fs.ModeSocket == 0:
		return nil, &ListenError{name, "a file that is no socket is there: remove it or choose another path", fs.ErrExist}
	case err == nil:
		dialer := net.Dialer{Timeout: time.Second}
		if conn, err := dialer.DialContext(ctx, "unix", path); err == nil {
			_ = conn.Close()
			return nil, &ListenError{name, "another program serves there: stop it, or choose another path", syscall.EADDRINUSE}
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, &ListenError{name, "a socket is there and does not say whether it is in use: remove it if it is not", err}
		}
		if err := os.Remove(path); err != nil {
			return nil, &ListenError{name, "a socket that nobody serves is there and cannot be removed", err}
		}
	}
	// 0600 from the first moment on: whoever may connect may push and read.
	old := syscall.Umask(0o177)
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, &ListenError{name, "does the folder exist, and may you write there?", err}
	}
	return ln, nil
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// lockedListener holds the lock as long as the socket.
type lockedListener struct {
	net.Listener
	lock *os.File
}

// Close may be called again, also by others at once, as that of any listener.
func (l *lockedListener) Close() error {
	err, lockErr := l.Listener.Close(), l.lock.Close()
	if errors.Is(lockErr, os.ErrClosed) {
		lockErr = nil
	}
	return errors.Join(err, lockErr)
}
