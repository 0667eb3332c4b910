//go:build linux

package weights

import (
	"context"
	"crypto/tls"
	"net"
	"testing"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
)

// listenAt listens on a network, which may also be tls or quic, and returns how to dial there.
func listenAt(t testing.TB, network, address string) (net.Listener, func(string) (net.Conn, error)) {
	t.Helper()
	if network != "tls" && network != "quic" {
		return must(net.Listen(network, address))(t), func(address string) (net.Conn, error) { return net.Dial(network, address) }
	}
	certs := ingesttest.NewCertificates(t)
	if network == "tls" {
		l := must(net.Listen("tcp", address))(t)
		return tcpingest.NewTLSListener(l, certs.Server), func(address string) (net.Conn, error) { return tls.Dial("tcp", address, certs.Client) }
	}
	l := must(quic.ListenAddr(address, tcpingest.TLSConfig(certs.Server), nil))(t)
	return quicListener{l}, func(address string) (net.Conn, error) {
		c, err := quic.DialAddr(context.Background(), address, certs.Client, nil)
		if err != nil {
			return nil, err
		}
		s, err := c.OpenStream()
		return &quicOwner{quicconn.New(c, s), c}, err
	}
}

// quicListener accepts the first stream of each connection.
type quicListener struct{ *quic.Listener }

func (l quicListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept(context.Background())
	if err != nil {
		return nil, err
	}
	s, err := c.AcceptStream(context.Background())
	if err != nil {
		return nil, err
	}
	return quicconn.New(c, s), nil
}

// quicOwner is a stream that ends its connection, too.
type quicOwner struct {
	*quicconn.Conn
	of *quic.Conn
}

func (o *quicOwner) Close() error { return o.of.CloseWithError(quicconn.CodeDone, "") }
