package client

import (
	"context"
	"net"
	"os"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/internal/quicconn"
)

// What clients' QUIC connections are like. A daemon that is silent for quicIdle is gone; a packet each quicAlive shows that the client is not.
const (
	quicIdle      = 30 * time.Second
	quicAlive     = 5 * time.Second
	quicWindow    = 1 << 20  // bytes that the daemon may send at first without being heard
	quicWindowMax = 64 << 20 // and when they are read quickly
)

// quietVariable is the environment variable that keeps quic-go from writing to the standard log.
const quietVariable = "QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING"

// dialQUIC connects, shakes hands and opens a stream, which ends with the connection.
func (t *TLS) dialQUIC(ctx context.Context, address string) (net.Conn, error) {
	secure, err := t.config(address)
	if err != nil {
		return nil, err
	}
	if _, set := os.LookupEnv(quietVariable); !set { // what it would say of UDP buffers that are small, in the log of a program that asked for nothing, costs a client little
		_ = os.Setenv(quietVariable, "true")
	}
	c, err := quic.DialAddr(ctx, address, secure, &quic.Config{
		MaxIdleTimeout: quicIdle, KeepAlivePeriod: quicAlive, MaxIncomingStreams: -1, MaxIncomingUniStreams: -1,
		InitialStreamReceiveWindow: quicWindow, InitialConnectionReceiveWindow: quicWindow,
		MaxStreamReceiveWindow: quicWindowMax, MaxConnectionReceiveWindow: quicWindowMax,
	})
	if err != nil {
		return nil, err
	}
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		_ = c.CloseWithError(quicconn.CodeDone, "")
		return nil, err
	}
	return &quicConn{Conn: quicconn.New(c, s), of: c}, nil
}

// quicConn is a stream that has a connection of its own.
type quicConn struct {
	*quicconn.Conn
	of *quic.Conn
}

// Close ends the connection, too. What was written and not received is lost; whoever closes has had its acks.
func (c *quicConn) Close() error {
	return c.of.CloseWithError(quicconn.CodeDone, "")
}
