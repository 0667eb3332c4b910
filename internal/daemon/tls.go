package daemon

import "os"

// TLS names the files (PEM) of listeners with TLS.
type TLS struct {
	Cert     string `yaml:"cert"`      // the daemon's certificate, with those between it and its authority
	Key      string `yaml:"key"`       // its key; only the daemon's user may read it
	ClientCA string `yaml:"client_ca"` // clients must have a certificate of one of these authorities; empty: they need none
}

// checkTLS says what is missing. What is in the files is looked at when the daemon starts.
func (p *plan) checkTLS() error {
	t := &p.TLS
	switch {
	case t.Cert == "" && t.Key == "" && t.ClientCA == "":
		return nil
	case t.Cert == "" || t.Key == "":
		return configErrorf("tls", "needs both cert and key: ingestd cert makes some for development")
	}
	for _, f := range [][2]string{{"cert", t.Cert}, {"key", t.Key}, {"client_ca", t.ClientCA}} {
		if f[1] == "" {
			continue
		}
		info, err := os.Stat(f[1])
		if err != nil {
			return configErrorf("tls."+f[0], "%v", err)
		}
		if f[0] == "key" && info.Mode().Perm()&0o077 != 0 {
			return configErrorf("tls.key", "others may read or change %s: chmod 600 %s", f[1], f[1])
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
