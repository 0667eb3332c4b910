package devcert

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func authority(t *testing.T) *Authority {
	t.Helper()
	ca, err := NewAuthority("test authority", 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func server(t *testing.T, ca *Authority, hosts ...string) *Pair {
	t.Helper()
	p, err := ca.NewServer(hosts, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func client(t *testing.T, ca *Authority) *Pair {
	t.Helper()
	p, err := ca.NewClient("worker", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// shake does a TLS handshake and returns what each side said of it. With TLS 1.3 a client learns that its certificate was refused with its first read.
func shake(daemon, caller *tls.Config) (ofDaemon, ofClient error) {
	a, b := net.Pipe()
	defer b.Close()
	s, c := tls.Server(a, daemon), tls.Client(b, caller)
	done := make(chan error, 1)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte{1})
		}
		_ = a.Close()
		done <- err
	}()
	ofClient = c.Handshake()
	if ofClient == nil {
		_, ofClient = c.Read(make([]byte, 1))
	}
	_ = b.Close()
	return <-done, ofClient
}

func TestHandshakes(t *testing.T) {
	ca, other := authority(t), authority(t)
	good, mine := server(t, ca, "daemon.test", "192.0.2.7", "2001:db8::7", "*.example.test"), client(t, ca)
	later := func() time.Time { return time.Now().Add(2 * time.Hour) }
	for name, c := range map[string]struct {
		server *Pair
		client *Pair // nil: it has none
		roots  *Pair
		host   string
		time   func() time.Time
		daemon string // what the daemon says of it; empty: nothing
		says   string // what the client does
	}{
		"good":                       {good, mine, &ca.Pair, "daemon.test", nil, "", ""},
		"an address":                 {good, mine, &ca.Pair, "192.0.2.7", nil, "", ""},
		"an address of IPv6":         {good, mine, &ca.Pair, "2001:db8::7", nil, "", ""},
		"a name of many":             {good, mine, &ca.Pair, "a.example.test", nil, "", ""},
		"another name":               {good, mine, &ca.Pair, "other.test", nil, "bad certificate", "not other.test"},
		"another address":            {good, mine, &ca.Pair, "192.0.2.8", nil, "bad certificate", "not 192.0.2.8"},
		"another authority":          {server(t, other, "daemon.test"), mine, &ca.Pair, "daemon.test", nil, "bad certificate", "unknown authority"},
		"expired":                    {good, mine, &ca.Pair, "daemon.test", later, "bad certificate", "expired"},
		"no client's certificate":    {good, nil, &ca.Pair, "daemon.test", nil, "didn't provide a certificate", "certificate required"},
		"another authority's client": {good, client(t, other), &ca.Pair, "daemon.test", nil, "unknown authority", "unknown certificate authority"},
		"a server as a client":       {good, good, &ca.Pair, "daemon.test", nil, "incompatible key usage", "bad certificate"},
		"a client as a server":       {mine, mine, &ca.Pair, "worker", nil, "bad certificate", "x509"},
		"the authority as a server":  {&ca.Pair, mine, &ca.Pair, "daemon.test", nil, "bad certificate", "x509"},
	} {
		t.Run(name, func(t *testing.T) {
			caller := &tls.Config{RootCAs: c.roots.Pool(), ServerName: c.host, Time: c.time}
			if c.client != nil {
				caller.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // whatever the daemon asks for
					pair := c.client.TLS()
					return &pair, nil
				}
			}
			daemon, said := shake(&tls.Config{Certificates: []tls.Certificate{c.server.TLS()}, ClientCAs: ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}, caller)
			for _, got := range []struct {
				who  string
				err  error
				says string
			}{{"daemon", daemon, c.daemon}, {"client", said, c.says}} {
				if got.says == "" && got.err != nil || got.says != "" && (got.err == nil || !strings.Contains(got.err.Error(), got.says)) {
					t.Errorf("the %s: %v; want %q", got.who, got.err, got.says)
				}
			}
		})
	}
}

// TestUses: a server's certificate is none of a client, and the other way round.
func TestUses(t *testing.T) {
	ca := authority(t)
	for use, p := range map[x509.ExtKeyUsage]*Pair{x509.ExtKeyUsageServerAuth: server(t, ca, "daemon.test"), x509.ExtKeyUsageClientAuth: client(t, ca)} {
		for _, wanted := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
			_, err := p.Parsed().Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{wanted}})
			if (err == nil) != (use == wanted) {
				t.Errorf("made for use %d, wanted for %d: %v", use, wanted, err)
			}
		}
	}
}

// TestSignedBySigned: an end certificate cannot sign another.
func TestSignedBySigned(t *testing.T) {
	ca := authority(t)
	middle := &Authority{*server(t, ca, "middle.test")}
	forged := server(t, middle, "daemon.test")
	pool := x509.NewCertPool()
	pool.AddCert(middle.parsed)
	if _, err := forged.parsed.Verify(x509.VerifyOptions{Roots: ca.Pool(), Intermediates: pool, DNSName: "daemon.test"}); err == nil {
		t.Error("it was verified")
	}
}

// TestValidity: nothing outlives its authority, and what is over is not signed with.
func TestValidity(t *testing.T) {
	short, err := NewAuthority("short", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	p, err := short.NewClient("c", 48*time.Hour)
	if err != nil || !p.Parsed().NotAfter.Equal(short.Parsed().NotAfter) {
		t.Errorf("%v, %v", p, err)
	}
	p, err = short.NewClient("c", time.Minute)
	if err != nil || !p.Parsed().NotAfter.Before(short.Parsed().NotAfter) || !p.Parsed().NotBefore.Before(time.Now()) {
		t.Errorf("%v, %v", p, err)
	}
	short.parsed.NotAfter = time.Now().Add(-time.Second)
	if _, err := short.NewClient("c", time.Minute); err == nil || !strings.Contains(err.Error(), "make a new one") {
		t.Errorf("an authority whose time is over: %v", err)
	}
	if _, err := NewAuthority("x", 0); err == nil {
		t.Error("valid for no time")
	}
}

func TestNames(t *testing.T) {
	ca := authority(t)
	for _, bad := range []string{"", "https://x", "host:7420", "a b", "a..b", ".a", "*", "*.", "a*b", "a/b", strings.Repeat("x", 254), "\x00"} {
		if _, err := ca.NewServer([]string{"good", bad}, time.Hour); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if _, err := ca.NewServer(nil, time.Hour); err == nil {
		t.Error("no host was taken")
	}
	if _, err := ca.NewClient("", time.Hour); err == nil {
		t.Error("no name was taken")
	}
	long := strings.Repeat("x", 253)
	if p, err := ca.NewServer([]string{long}, time.Hour); err != nil || p.Parsed().DNSNames[0] != long || len(p.Parsed().Subject.CommonName) != 64 {
		t.Errorf("%v, %v", p, err)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	ca := authority(t)
	if _, err := ReadAuthority(dir); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "ingestd cert ca") {
		t.Errorf("no authority: %v", err)
	}
	certificate, key, err := ca.Write(dir, "ca")
	if err != nil || certificate != filepath.Join(dir, AuthorityCertificate) || key != filepath.Join(dir, AuthorityKey) {
		t.Fatal(certificate, key, err)
	}
	for _, path := range []string{certificate, key} {
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	again, err := ReadAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	p := server(t, again, "daemon.test")
	if _, err := p.Parsed().Verify(x509.VerifyOptions{Roots: ca.Pool(), DNSName: "daemon.test"}); err != nil {
		t.Error(err)
	}
	// Half of a pair that is there already keeps the whole from being written.
	for _, half := range []string{"one.pem", "two.key"} {
		if err := os.WriteFile(filepath.Join(dir, half), []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		var exists *ExistsError
		name, _, _ := strings.Cut(half, ".")
		if _, _, err := p.Write(dir, name); !errors.As(err, &exists) || !errors.Is(err, fs.ErrExist) || exists.Path != filepath.Join(dir, half) {
			t.Errorf("%s: %v", half, err)
		}
		if text, err := os.ReadFile(filepath.Join(dir, half)); err != nil || string(text) != "mine" {
			t.Errorf("%s: %q, %v", half, text, err)
		}
		if list, _ := filepath.Glob(filepath.Join(dir, name+".*")); len(list) != 1 {
			t.Errorf("left behind: %v", list)
		}
	}
	for _, bad := range []string{"", ".", "..", "a/b", "/a"} {
		if _, _, err := p.Write(dir, bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if _, _, err := p.Write(filepath.Join(dir, "none"), "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

func TestParseAuthority(t *testing.T) {
	ca, other := authority(t), authority(t)
	p := server(t, ca, "daemon.test")
	keyOf := func(p *Pair) []byte {
		k, err := p.KeyPEM()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	if _, err := ParseAuthority(ca.CertificatePEM(), keyOf(&ca.Pair)); err != nil {
		t.Error(err)
	}
	_, strange, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(strange)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][2][]byte{
		"a server's":    {p.CertificatePEM(), keyOf(p)},
		"another's key": {ca.CertificatePEM(), keyOf(&other.Pair)},
		"another kind":  {ca.CertificatePEM(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})},
		"no PEM":        {[]byte("x"), []byte("y")},
	} {
		if _, err := ParseAuthority(c[0], c[1]); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// TestKeys: they are on P-256, and each its own.
func TestKeys(t *testing.T) {
	ca := authority(t)
	a, b := client(t, ca), client(t, ca)
	public, ok := a.Parsed().PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve.Params().BitSize != 256 || a.key.Equal(b.key) || a.Parsed().SerialNumber.Cmp(b.Parsed().SerialNumber) == 0 {
		t.Errorf("%v, %v", a.Parsed(), b.Parsed())
	}
	if strings.Contains(a.String(), "PRIVATE") || a.String() != "certificate of worker" {
		t.Error(a)
	}
}
