package ingesttest

import (
	"crypto/tls"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/wire"
)

// Certificates are both ends' of a network in which everybody has one.
type Certificates struct {
	CA             *devcert.Authority
	Server, Client *tls.Config
}

// NewCertificates makes them, for a daemon at 127.0.0.1 and of the name ingestd.test.
func NewCertificates(t testing.TB) *Certificates {
	t.Helper()
	ca, err := devcert.NewAuthority("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &Certificates{
		CA: ca,
		Server: &tls.Config{
			Certificates: []tls.Certificate{Certify(t)(ca.NewServer([]string{"127.0.0.1", "ingestd.test"}, time.Hour))},
			ClientCAs:    ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
		},
		Client: &tls.Config{
			RootCAs: ca.Pool(), ServerName: "ingestd.test", NextProtos: []string{wire.ALPN},
			Certificates: []tls.Certificate{Certify(t)(ca.NewClient("producer", time.Hour))},
		},
	}
}

// Certify makes a pair that was made, or not, one for a tls.Config.
func Certify(t testing.TB) func(*devcert.Pair, error) tls.Certificate {
	return func(p *devcert.Pair, err error) tls.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return p.TLS()
	}
}
