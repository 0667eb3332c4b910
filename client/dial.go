package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"

	"github.com/ingestd/ingestd/wire"
)

// TLS says how a client proves who it is, and whom it believes, at tls:// and quic:// addresses. The zero TLS believes the authorities that this machine believes and
// has no certificate of its own. Files are read anew for each connection, so that they may be replaced.
type TLS struct {
	Authorities string // file of certificates (PEM) that the daemon's must come from; "": those that this machine believes
	Certificate string // file of the client's own (PEM), for daemons that ask for one; with Key
	Key         string
	ServerName  string // name that the daemon's certificate must have; "": the address's

	// InsecureSkipVerify takes any certificate: whoever sits between this client and the daemon can read and change all that is sent. A token still shows that
	// the daemon is the right one, since its proof is bound to the connection.
	InsecureSkipVerify bool
}

// config is what crypto/tls needs for a connection to address.
func (t *TLS) config(address string) (*tls.Config, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPN}, ServerName: host, InsecureSkipVerify: t.InsecureSkipVerify}
	if t.ServerName != "" {
		c.ServerName = t.ServerName
	}
	if t.Authorities != "" {
		text, err := os.ReadFile(t.Authorities)
		if err != nil {
			return nil, fmt.Errorf("authorities: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("authorities: %s holds no certificate in PEM", t.Authorities)
		}
	}
	if t.Certificate != "" || t.Key != "" {
		pair, err := tls.LoadX509KeyPair(t.Certificate, t.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil } // also one that the daemon will not like: it says so
	}
	return c, nil
}

// dialer makes a connection to a network (tcp, tls, quic, unix) and an address of it.
type dialer = func(ctx context.Context, network, address string) (net.Conn, error)

// dialer makes all connections. What is over TCP or unix goes through base, nil for net.Dialer, also under TLS.
func (t TLS) dialer(base dialer) dialer {
	if base == nil {
		base = new(net.Dialer).DialContext
	}
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		switch network {
		case "tls":
			conn, err = t.dialTLS(ctx, base, address)
		case "quic":
			conn, err = t.dialQUIC(ctx, address)
		default:
			return base(ctx, network, address)
		}
		if refused := refusedTLS(err); refused != nil {
			err = refused
		}
		return conn, err
	}
}
