package certfile

import (
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Files are the names of files in PEM.
type Files struct {
	Certificate string // with those between it and its authority
	Key         string
	ClientCA    string // authorities of clients, who must then have a certificate; "": clients need none
}

// Source reads Files again when they change.
type Source struct {
	files Files
	log   *slog.Logger

	mu      sync.Mutex
	seen    [3]stamp
	current *tls.Config
}

// stamp is how a file looked from outside.
type stamp struct {
	modified time.Time
	size     int64
	inode    uint64
}

// Open reads the files for the first time. The error names the one that cannot be used.
func Open(files Files, log *slog.Logger) (*Source, error) {
	s := &Source{files: files, log: log, seen: files.look()}
	var err error
	if s.current, err = files.load(); err == nil {
		s.judge()
	}
	return s, err
}

// Expires returns until when the certificate is good that is shown now.
func (s *Source) Expires() time.Time {
	return s.now().Certificates[0].Leaf.NotAfter
}

// Secret returns 32 bytes for a use, which stay the same as long as the private key does, over restarts too, and which only who has that key can know.
func (s *Source) Secret(use string) ([32]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.now().Certificates[0].PrivateKey)
	if err != nil {
		return [32]byte{}, fmt.Errorf("certfile: a key of which no secret can be made: %w", err)
	}
	secret, err := hkdf.Key(sha256.New, key, nil, "ingestd "+use, 32)
	if err != nil {
		return [32]byte{}, fmt.Errorf("certfile: make a secret: %w", err)
	}
	return [32]byte(secret), nil
}

// judge says if clients will not take the certificate.
func (s *Source) judge() {
	if leaf := s.current.Certificates[0].Leaf; time.Now().After(leaf.NotAfter) {
		s.log.Error("the certificate has expired: no client that looks at it will take it; put another in its place",
			"component", "certfile", "path", s.files.Certificate, "expired", leaf.NotAfter)
	}
}

// Config returns a configuration for servers that asks the source at each handshake.
func (s *Source) Config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.now(), nil },
	}
}

// now returns what is in the files, or was when they were last in order.
func (s *Source) now() *tls.Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.files.look()
	if seen == s.seen {
		return s.current
	}
	s.seen = seen
	fresh, err := s.files.load()
	if err != nil {
		s.log.Error("changed certificates cannot be used; those before go on being used", "component", "certfile", "err", err)
		return s.current
	}
	s.log.Info("certificates read again", "component", "certfile", "path", s.files.Certificate)
	s.current = fresh
	s.judge()
	return fresh
}

func (f *Files) look() (seen [3]stamp) {
	for i, path := range []string{f.Certificate, f.Key, f.ClientCA} {
		if info, err := os.Stat(path); err == nil {
			seen[i] = stamp{info.ModTime(), info.Size(), inode(info)}
		}
	}
	return seen
}

func (f *Files) load() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return nil, fmt.Errorf("certificate %s with key %s: %w", f.Certificate, f.Key, err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}}
	if f.ClientCA == "" {
		return c, nil
	}
	text, err := os.ReadFile(f.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("authorities of clients: %w", err)
	}
	c.ClientCAs, c.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !c.ClientCAs.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("authorities of clients: %s holds no certificate in PEM", f.ClientCA)
	}
	return c, nil
}
