package bench

import (
	"context"
	"net"
	"net/http"

	"github.com/ingestd/ingestd/internal/lossynet"
)

// sites are where the processes of a measurement are. The zero sites are this machine, with its loopback device between them.
type sites struct {
	sender, server *lossynet.Side
}

const loopback = "127.0.0.1"

// host is the address at which the server is reached.
func (s sites) host() string {
	if s.server == nil {
		return loopback
	}
	return s.server.Addr.String()
}

// listen is what makes a daemon listen there.
func (s sites) listen() []string {
	if s.server == nil {
		return []string{"--listen", anyPort}
	}
	return []string{"--listen", "tcp://" + s.server.HostPort(0), "--insecure"} // the namespace is nobody else's
}

// transport reaches the server's loopback device; nil is this machine's.
func (s sites) transport() http.RoundTripper {
	if s.server == nil {
		return nil
	}
	return &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return lossynet.In(s.server, func() (net.Conn, error) { return new(net.Dialer).DialContext(ctx, network, address) })
	}}
}
