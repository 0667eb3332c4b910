package tcpingest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/wire"
)

// Config says what a Server serves and what it puts up with. Zero fields take the default.
type Config struct {
	Tables ingest.Tables // required

	// Attach serves the roles other than push and manifest, until the attachment ends: those that map memory on unix sockets, publish and subscribe on both. The
	// connection is its to close, and Shutdown does not wait for it. Nil refuses those roles.
	Attach func(conn net.Conn, hello *wire.Hello) error

	Gate *auth.Gate // asks who they are that connect; nil: nobody is asked
	Door *bans.Door // says who is banned or slowed, and bounds handshakes under way; nil: nobody is, and MaxConnections does

	Transport string // name in Stats; default "tcp"

	Compression []wire.Compression // offered to producers; default: none

	MaxConnections   int           // at once, in any state; default 1024
	HandshakeTimeout time.Duration // for the handshake of TLS and the whole hello; default 10 s
	IdleTimeout      time.Duration // without a byte, between samples; default 5 min
	StallTimeout     time.Duration // without a byte, inside a sample; default 10 s
	AckTimeout       time.Duration // for the peer to take its acks; default 10 s
	LingerTimeout    time.Duration // for the peer to read why it was ended; default 2 s
	WindowSamples    int64         // most samples without an ack; default 65,536
	// WindowBytes is the window of a producer that asks for none, unless two samples are more; default 1 MiB. It decides what lies in
	// socket buffers, and so whether that is still in the cache when it is read: with 64 connections, 16 MiB each cost twice the
	// processor time of 1 MiB each, and one connection alone gained nothing from more. Paths with a long round trip need more.
	WindowBytes    int64
	WindowBytesMax int64 // most bytes without an ack that a producer may ask for; default 16 MiB
	StagingBuffers int   // of readBytes each, shared by all connections; default 4 per processor

	Log *slog.Logger // default: none

	passingBy time.Duration // default passingBy; another in tests
}

// WithDefaults returns the configuration with every field that is zero filled in, or what is wrong with it.
func (c Config) WithDefaults() (Config, error) {
	out := c
	if out.Tables == nil {
		return out, fmt.Errorf("tcpingest: Config.Tables is required")
	}
	for _, d := range []struct {
		name string
		v    *time.Duration
		def  time.Duration
	}{
		{"HandshakeTimeout", &out.HandshakeTimeout, 10 * time.Second},
		{"IdleTimeout", &out.IdleTimeout, 5 * time.Minute},
		{"StallTimeout", &out.StallTimeout, 10 * time.Second},
		{"AckTimeout", &out.AckTimeout, 10 * time.Second},
		{"LingerTimeout", &out.LingerTimeout, 2 * time.Second},
	} {
		if *d.v < 0 {
			return out, fmt.Errorf("tcpingest: Config.%s is %v, must not be negative", d.name, *d.v)
		}
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	for _, d := range []struct {
		name string
		v    *int64
		def  int64
	}{
		{"WindowSamples", &out.WindowSamples, 1 << 16},
		{"WindowBytes", &out.WindowBytes, 1 << 20},
		{"WindowBytesMax", &out.WindowBytesMax, 16 << 20},
	} {
		if *d.v < 0 {
			return out, fmt.Errorf("tcpingest: Config.%s is %d, must not be negative", d.name, *d.v)
		}
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if out.WindowBytes > out.WindowBytesMax {
		return out, fmt.Errorf("tcpingest: Config.WindowBytes is %d, above WindowBytesMax of %d", out.WindowBytes, out.WindowBytesMax)
	}
	for _, kind := range out.Compression {
		if kind == wire.CompressionNone || !kind.Known() {
			return out, fmt.Errorf("tcpingest: Config.Compression has %q, which is not known", kind)
		}
	}
	if out.MaxConnections < 0 || out.StagingBuffers < 0 {
		return out, fmt.Errorf("tcpingest: MaxConnections is %d, StagingBuffers %d: neither may be negative", out.MaxConnections, out.StagingBuffers)
	}
	if out.MaxConnections == 0 {
		out.MaxConnections = 1024
	}
	if out.StagingBuffers == 0 {
		out.StagingBuffers = 4 * runtime.GOMAXPROCS(0)
	}
	if out.passingBy == 0 {
		out.passingBy = passingBy
	}
	if out.Transport == "" {
		out.Transport = "tcp"
	}
	if out.Log == nil {
		out.Log = slog.New(slog.DiscardHandler)
	}
	return out, nil
}

// Listen opens a listener of network "tcp" or "unix" with the options this package wants: no multipath TCP, on whose sockets some options fail, and keepalive.
func Listen(ctx context.Context, network, address string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6}}
	lc.SetMultipathTCP(false)
	return lc.Listen(ctx, network, address)
}
