package certfile

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/internal/devcert"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is an authority with a folder in which a server finds its files.
type world struct {
	t     *testing.T
	ca    *devcert.Authority
	files Files
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, ca: newAuthority(t), files: Files{filepath.Join(dir, "d.pem"), filepath.Join(dir, "d.key"), filepath.Join(dir, "ca.pem")}}
	w.renew("one.test")
	w.put(w.files.ClientCA, w.ca.CertificatePEM())
	return w
}

func newAuthority(t *testing.T) *devcert.Authority {
	t.Helper()
	ca, err := devcert.NewAuthority("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// put replaces a file, as a tool that renews certificates does.
func (w *world) put(path string, content []byte) {
	w.t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		w.t.Fatal(err)
	}
}

// renew writes a certificate for a name, with its key.
func (w *world) renew(name string) {
	w.t.Helper()
	w.renewFor(name, time.Hour)
}

// renewFor is renew for so long.
func (w *world) renewFor(name string, valid time.Duration) {
	w.t.Helper()
	pair, err := w.ca.NewServer([]string{name}, valid)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(w.files.Certificate, pair.CertificatePEM())
	key, err := pair.KeyPEM()
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(w.files.Key, key)
}

// shake has a client with a certificate of ca's shake hands, and returns what each end says.
func (w *world) shake(s *Source, name string, ca *devcert.Authority) (client, server error) {
	w.t.Helper()
	pair, err := ca.NewClient("c", time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	ended := make(chan error, 1)
	go func() {
		ended <- tls.Server(ours, s.Config()).Handshake()
		_ = ours.Close()
	}()
	c := tls.Client(theirs, &tls.Config{
		RootCAs: w.ca.Pool(), ServerName: name,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			own := pair.TLS()
			return &own, nil
		},
	})
	client = c.Handshake()
	_, _ = c.Read(make([]byte, 1)) // what a server says of a client's certificate comes later
	_ = theirs.Close()
	return client, <-ended
}

// TestExpired: a certificate that has expired is said so when it is read, and until when one is good can be asked.
func TestExpired(t *testing.T) {
	w := newWorld(t)
	var log bytes.Buffer
	s, err := Open(w.files, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if until := time.Until(s.Expires()); until < 0 || log.Len() > 0 {
		t.Errorf("it is good for %v: %s", until, &log)
	}
	w.renewFor("one.test", time.Nanosecond)
	if until := time.Until(s.Expires()); until > 0 || !strings.Contains(log.String(), "has expired") {
		t.Errorf("it is good for %v: %s", until, &log)
	}
	log.Reset()
	if _, err := Open(w.files, slog.New(slog.NewTextHandler(&log, nil))); err != nil || !strings.Contains(log.String(), "has expired") {
		t.Errorf("opened: %v: %s", err, &log)
	}
}

// TestSecret: it is the key's, each use's, and the next daemon's too.
func TestSecret(t *testing.T) {
	w := newWorld(t)
	secret := func(use string) [32]byte {
		s, err := Open(w.files, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.Secret(use)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := secret("a")
	if secret("a") != first {
		t.Error("another daemon with the same key has another secret")
	}
	if secret("b") == first {
		t.Error("two uses have the same secret")
	}
	w.renew("one.test")
	if secret("a") == first {
		t.Error("two keys have the same secret")
	}
}

// TestReload: each handshake gets what is in the files, and what was there before while they are not in order.
func TestReload(t *testing.T) {
	w := newWorld(t)
	var log bytes.Buffer
	s, err := Open(w.files, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	good := func(step, name string) {
		t.Helper()
		if c, s := w.shake(s, name, w.ca); c != nil || s != nil {
			t.Errorf("%s: client %v, server %v", step, c, s)
		}
	}
	good("at first", "one.test")
	w.renew("two.test")
	good("renewed", "two.test")
	if c, _ := w.shake(s, "one.test", w.ca); c == nil {
		t.Error("the old name is still served")
	}
	key, err := os.ReadFile(w.files.Key)
	if err != nil {
		t.Fatal(err)
	}
	for name, broken := range map[string]func(){
		"key of another": func() {
			w.put(w.files.Key, key[:len(key)-60])
		},
		"no key":       func() { _ = os.Remove(w.files.Key) },
		"no authority": func() { w.put(w.files.Key, key); w.put(w.files.ClientCA, []byte("nothing")) },
	} {
		broken()
		good(name, "two.test")
	}
	if n := strings.Count(log.String(), "cannot be used"); n != 3 {
		t.Errorf("%d complaints, want 3:\n%s", n, &log)
	}
	if strings.Contains(log.String(), "PRIVATE") {
		t.Error("the key is in the log")
	}
	w.put(w.files.Key, key)
	w.put(w.files.ClientCA, w.ca.CertificatePEM())
	w.renew("three.test")
	good("in order again", "three.test")
	other := newAuthority(t)
	if _, server := w.shake(s, "three.test", other); server == nil {
		t.Error("a client of another authority was let in")
	}
	w.put(w.files.ClientCA, other.CertificatePEM())
	if c, server := w.shake(s, "three.test", other); c != nil || server != nil {
		t.Errorf("after the authority changed: client %v, server %v", c, server)
	}
}

// TestOpen: what is not in order at first is an error that names the file.
func TestOpen(t *testing.T) {
	for name, change := range map[string]func(*world) string{
		"no certificate": func(w *world) string { _ = os.Remove(w.files.Certificate); return w.files.Certificate },
		"no key":         func(w *world) string { _ = os.Remove(w.files.Key); return w.files.Key },
		"no authority":   func(w *world) string { _ = os.Remove(w.files.ClientCA); return w.files.ClientCA },
		"empty authority": func(w *world) string {
			w.put(w.files.ClientCA, nil)
			return w.files.ClientCA
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			path := change(w)
			_, err := Open(w.files, slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), path) {
				t.Fatalf("got %v, want an error that names %s", err, path)
			}
			if strings.HasPrefix(name, "no ") && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("got %v, want fs.ErrNotExist", err)
			}
		})
	}
	w := newWorld(t)
	w.files.ClientCA = ""
	s, err := Open(w.files, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if c, server := w.shake(s, "one.test", newAuthority(t)); c != nil || server != nil {
		t.Errorf("without an authority of clients: client %v, server %v", c, server)
	}
}
