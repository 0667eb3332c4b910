package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"sync"
	"time"
)

// TLS names the files (PEM) of listeners with TLS.
type TLS struct {
	Cert     string `yaml:"cert"`      // the daemon's certificate, with those between it and its authority
	Key      string `yaml:"key"`       // its key; only the daemon's user may read it
	ClientCA string `yaml:"client_ca"` // clients must have a certificate of one of these authorities; empty: they need none
}

// certificates is what the files hold, looked at again when a client comes, at most once a second. Files that cannot be used are logged once, and what was there stays in force.
type certificates struct {
	files TLS
	log   *slog.Logger

	mu     sync.Mutex
	now    *tls.Config
	looked time.Time
	stamps [3]fileStamp
}

type fileStamp struct {
	size  int64
	mtime time.Time
}

const certificatesEvery = time.Second

func loadCertificates(files TLS, log *slog.Logger) (*certificates, error) {
	c := &certificates{files: files, log: log.With("component", "tls"), looked: time.Now()}
	c.stamps = c.stampAll()
	var err error
	c.now, err = files.load()
	return c, err
}

func (f *TLS) load() (*tls.Config, error) {
	info, err := os.Stat(f.Key)
	if err != nil {
		return nil, configErrorf("tls.key", "%v", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, configErrorf("tls.key", "others may read or change %s: chmod 600 %s", f.Key, f.Key)
	}
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, configErrorf("tls.cert", "%v; ingestd cert makes certificates for development", err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{pair}}
	if f.ClientCA == "" {
		return c, nil
	}
	text, err := os.ReadFile(f.ClientCA)
	if err != nil {
		return nil, configErrorf("tls.client_ca", "%v", err)
	}
	c.ClientCAs, c.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !c.ClientCAs.AppendCertsFromPEM(text) {
		return nil, configErrorf("tls.client_ca", "%s holds no certificate in PEM", f.ClientCA)
	}
	return c, nil
}

func (c *certificates) stampAll() (all [3]fileStamp) {
	for i, path := range []string{c.files.Cert, c.files.Key, c.files.ClientCA} {
		if info, err := os.Stat(path); err == nil {
			all[i] = fileStamp{info.Size(), info.ModTime()}
		}
	}
	return all
}

// current returns what the next client is shown.
func (c *certificates) current() *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < certificatesEvery {
		return c.now
	}
	c.looked = time.Now()
	stamps := c.stampAll()
	if stamps == c.stamps {
		return c.now
	}
	c.stamps = stamps
	next, err := c.files.load()
	if err != nil {
		c.log.Error("the files were changed and cannot be used; what they held before stays in force", "err", err)
		return c.now
	}
	c.log.Info("files taken up")
	c.now = next
	return next
}

// config is for a listener. complete puts in what the transport wants of versions and protocols.
func (c *certificates) config(complete func(*tls.Config) *tls.Config) *tls.Config {
	base := complete(c.current())
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return complete(c.current()), nil }
	return base
}

// checkTLS says what is missing. The files are read when the daemon starts.
func (p *plan) checkTLS() error {
	t := &p.TLS
	switch {
	case t.Cert == "" && t.Key == "" && t.ClientCA == "":
		return nil
	case t.Cert == "" || t.Key == "":
		return configErrorf("tls", "has one of cert and key without the other")
	}
	for name, path := range map[string]string{"cert": t.Cert, "key": t.Key, "client_ca": t.ClientCA} {
		if path == "" {
			continue
		}
		if _, err := os.Stat(path); err != nil {
			return configErrorf("tls."+name, "%v", err)
		}
	}
	return nil
}

// needTLS is what a listener with TLS lacks.
func (p *plan) needTLS(a address) error {
	if p.TLS.Cert == "" {
		return configErrorf("listen", "%v needs a certificate: say --tls-cert and --tls-key (tls.cert, tls.key); ingestd cert makes some for development", a)
	}
	return nil
}
