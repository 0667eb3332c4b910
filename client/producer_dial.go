package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// Defaults of Config.
const (
	DefaultBufferBytes      = 256 << 10
	DefaultHandshakeTimeout = 10 * time.Second
)

// Samples from directBytes on whose leaves have leafBytesMin on average are written from the caller's memory: there the copy
// costs more than a system call of its own and its list of leaves.
const (
	directBytes  = 64 << 10
	leafBytesMin = 4 << 10
)

// Config says what a Producer pushes and how.
type Config struct {
	Table string     // required
	Spec  *spec.Spec // required: the layout of the samples

	Session          string        // identity that survives reconnects; may be empty
	Ack              wire.AckMode  // default wire.AckQueued
	WindowSamples    int64         // most samples without an ack; 0: the daemon's limit
	WindowBytes      int64         // most bytes without an ack; 0: the daemon chooses; ask for more where the round trip is long
	BufferBytes      int           // most bytes of small samples sent with one write; default DefaultBufferBytes
	HandshakeTimeout time.Duration // for connecting and the reply; default DefaultHandshakeTimeout
	Client           string        // name shown in the daemon's status; default ingestd-go/VERSION

	// Dialer connects; default net.Dialer. A test or a tunnel may bring its own.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

func (c Config) withDefaults() (Config, error) {
	if c.Table == "" {
		return c, errors.New("client: Config.Table is empty; name the table to push to")
	}
	if c.Spec == nil {
		return c, errors.New("client: Config.Spec is nil; say what a sample is, with spec.ParseText for instance")
	}
	if c.BufferBytes < 0 || c.HandshakeTimeout < 0 {
		return c, fmt.Errorf("client: Config.BufferBytes is %d and HandshakeTimeout %v; neither may be negative", c.BufferBytes, c.HandshakeTimeout)
	}
	if c.Ack == "" {
		c.Ack = wire.AckQueued
	}
	if c.BufferBytes == 0 {
		c.BufferBytes = DefaultBufferBytes
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if c.Client == "" {
		c.Client = "ingestd-go/" + moduleVersion()
	}
	if c.Dialer == nil {
		c.Dialer = new(net.Dialer).DialContext
	}
	return c, nil
}

// moduleVersion is the version of this module in the running program.
func moduleVersion() string {
	const module = "github.com/ingestd/ingestd"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := ""
	if info.Main.Path == module {
		version = info.Main.Version
	}
	for _, dep := range info.Deps {
		if dep.Path == module {
			version = dep.Version
		}
	}
	if version = strings.Trim(version, "()"); version == "" || len(version) > 64 {
		return "devel"
	}
	return version
}

// splitAddress takes tcp://host:port or unix:///path apart for net.Dial.
func splitAddress(addr string) (network, address string, err error) {
	scheme, rest, ok := strings.Cut(addr, "://")
	switch {
	case ok && scheme == "tcp":
		if _, _, err := net.SplitHostPort(rest); err != nil {
			return "", "", fmt.Errorf("client: address %q: %w; write tcp://host:port", addr, err)
		}
		return "tcp", rest, nil
	case ok && scheme == "unix":
		if rest == "" {
			return "", "", fmt.Errorf("client: address %q has no path; write unix:///path/to/ingestd.sock", addr)
		}
		return "unix", rest, nil
	case ok && scheme == "echo":
		return "", "", fmt.Errorf("client: address %q is for clients of the echo protocol; use the daemon's tcp:// or unix:// address", addr)
	}
	return "", "", fmt.Errorf("client: address %q is not known; write tcp://host:port or unix:///path", addr)
}

// Dial connects to a daemon and agrees with it on table, spec and window. ctx bounds the connecting only.
func Dial(ctx context.Context, addr string, cfg Config) (*Producer, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	conn, err := cfg.Dialer(limited, network, address)
	if err != nil {
		if limited.Err() != nil {
			return nil, &waitError{limited, fmt.Sprintf("client: dial %s: no connection in time (%v)", addr, err)}
		}
		return nil, fmt.Errorf("client: dial %s: %w; is the daemon running, and is this its address?", addr, err)
	}
	accepted, err := handshake(limited, conn, cfg)
	if err != nil {
		conn.Close()
		if limited.Err() != nil {
			return nil, &waitError{limited, fmt.Sprintf("client: dial %s: connected, but no reply in time; is this the address of an ingestd daemon?", addr)}
		}
		return nil, fmt.Errorf("client: dial %s, table %q: %w", addr, cfg.Table, err)
	}
	return start(conn, accepted, cfg), nil
}

func handshake(ctx context.Context, conn net.Conn, cfg Config) (accepted wire.AcceptedPush, err error) {
	hello, err := wire.AppendHello(nil, &wire.Hello{
		Role: wire.RolePush, Table: cfg.Table, Spec: cfg.Spec, Fingerprint: cfg.Spec.Fingerprint(), Session: cfg.Session, Ack: cfg.Ack,
		WindowSamples: cfg.WindowSamples, WindowBytes: cfg.WindowBytes, Client: cfg.Client,
	})
	if err != nil {
		return accepted, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(past) })
	_, writeErr := conn.Write(hello)
	// A daemon that refuses before it has read all leaves its reason behind, so the reply is read in any case.
	err = wire.ReadReply(conn, &accepted)
	switch {
	case !stop():
		return accepted, ctx.Err()
	case err == nil:
		return accepted, checkAgreed(accepted, cfg)
	case !answered(err):
		if writeErr != nil {
			err = writeErr
		}
		return accepted, fmt.Errorf("%w before it replied (%w): it may be stopping, or serve all it can: try again; its log may say why", ErrDaemonGone, err)
	}
	return accepted, err
}

// past is a deadline that makes a blocked read or write return.
var past = time.Unix(1, 0)

// answered says whether the error is something that the daemon said.
func answered(err error) bool {
	var refusal *wire.Refusal
	return errors.As(err, &refusal) || errors.Is(err, wire.ErrProtocol)
}

func checkAgreed(a wire.AcceptedPush, cfg Config) error {
	what := ""
	switch {
	case a.Fingerprint != cfg.Spec.Fingerprint():
		what = "another spec"
	case a.Ack != cfg.Ack:
		what = fmt.Sprintf("ack mode %s instead of %s", a.Ack, cfg.Ack)
	case cfg.WindowSamples > 0 && a.WindowSamples > cfg.WindowSamples, cfg.WindowBytes > 0 && a.WindowBytes > cfg.WindowBytes:
		what = "a larger window"
	default:
		return nil
	}
	return fmt.Errorf("%w: the daemon agreed to %s than asked for", wire.ErrProtocol, what)
}

func start(conn net.Conn, accepted wire.AcceptedPush, cfg Config) *Producer {
	s := cfg.Spec
	p := &Producer{
		conn: conn, spec: s, leafBytes: s.LeafBytes(), sampleBytes: s.SampleBytes(), accepted: accepted,
		window: uint64(max(1, min(accepted.WindowSamples, accepted.WindowBytes/s.SampleBytes()))),
		wake:   make(chan struct{}, 1), kick: make(chan struct{}, 1),
		ended: make(chan struct{}), writerEnded: make(chan struct{}),
		vecRoom: make([][]byte, 0, s.NumLeaves()),
	}
	leaves := int64(s.NumLeaves())
	p.direct = p.sampleBytes >= directBytes && p.sampleBytes/leaves >= leafBytesMin || p.sampleBytes > int64(cfg.BufferBytes)
	if !p.direct {
		// A quarter of the window to a write keeps the connection busy while acks are on their way.
		quarter := int64(min(p.window/4, uint64(cfg.BufferBytes))) * p.sampleBytes
		p.fillBytes = int(max(p.sampleBytes, min(int64(cfg.BufferBytes), quarter)))
		p.buf, p.spare = make([]byte, 0, p.fillBytes), make([]byte, 0, p.fillBytes)
	}
	go p.readAcks()
	go p.writeLeftovers()
	return p
}

// deadlineExceeded says whether a read or write stopped because of a deadline.
func deadlineExceeded(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
