package quicingest

import (
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/tcpingest"
)

// Config says what a Server serves and what it puts up with. Zero fields take the default.
type Config struct {
	// Streams is what becomes of each stream; its MaxConnections counts streams, and its timeouts hold for them. Tables is required. A connection on which nobody was let in yet is a
	// handshake before Door, too: it and streams are counted apart, each within Door's bounds.
	Streams tcpingest.Config
	// TLS has the certificates, and the authorities of clients' if they must have some; required. Its versions and protocols are set here.
	TLS *tls.Config
	// ResetKey, where a daemon and the one after it have the same, lets the second tell clients of the first that their connections are gone, with the first packet that they
	// send it: otherwise they wait until they give up. Nobody else may know it. nil: they are told nothing.
	ResetKey *[32]byte

	MaxConnections       int           // of QUIC at once, in any state; default 1024
	StreamsPerConnection int           // at once; default 64
	RetryAbove           int           // so many half-open handshakes, and from there on addresses are verified first; default 64; negative: always
	HandshakeTimeout     time.Duration // without a packet in QUIC's handshake, which may last twice as long; default 5 s
	IdleTimeout          time.Duration // without a packet; clients that are there send some; default 30 s
}

func (c *Config) withDefaults() (Config, error) {
	out := *c
	if out.TLS == nil {
		return out, errors.New("quicingest: Config.TLS is required")
	}
	if out.Streams.Transport == "" {
		out.Streams.Transport = "quic"
	}
	var err error
	if out.Streams, err = out.Streams.WithDefaults(); err != nil {
		return out, fmt.Errorf("quicingest: Config.Streams: %w", err)
	}
	if out.MaxConnections < 0 || out.StreamsPerConnection < 0 || out.HandshakeTimeout < 0 || out.IdleTimeout < 0 {
		return out, fmt.Errorf("quicingest: MaxConnections is %d, StreamsPerConnection %d, HandshakeTimeout %v, IdleTimeout %v: none may be negative",
			out.MaxConnections, out.StreamsPerConnection, out.HandshakeTimeout, out.IdleTimeout)
	}
	for _, d := range []struct {
		v   *int
		def int
	}{{&out.MaxConnections, 1024}, {&out.StreamsPerConnection, 64}, {&out.RetryAbove, 64}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if out.HandshakeTimeout == 0 {
		out.HandshakeTimeout = 5 * time.Second
	}
	if out.IdleTimeout == 0 {
		out.IdleTimeout = 30 * time.Second
	}
	return out, nil
}

// quic is the configuration for quic-go. A producer never has more under way than its window, so that flow control only stops one that does not keep to it, and bounds
// what a stream holds that nobody reads. A connection may hold what all of its streams may: with less, some whose table is full would keep the others from sending.
func (c *Config) quic() *quic.Config {
	window, windowMax := uint64(c.Streams.WindowBytes), uint64(c.Streams.WindowBytesMax)
	all := uint64(c.StreamsPerConnection) * windowMax
	return &quic.Config{
		HandshakeIdleTimeout:           c.HandshakeTimeout,
		MaxIdleTimeout:                 c.IdleTimeout,
		InitialStreamReceiveWindow:     window,
		MaxStreamReceiveWindow:         windowMax,
		InitialConnectionReceiveWindow: all,
		MaxConnectionReceiveWindow:     all,
		MaxIncomingStreams:             int64(c.StreamsPerConnection),
		MaxIncomingUniStreams:          -1,
		Allow0RTT:                      false,
	}
}
