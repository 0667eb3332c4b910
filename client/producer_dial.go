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
	DefaultReconnectFor     = 5 * time.Minute
	DefaultReconnectFrom    = 10 * time.Millisecond
	DefaultReconnectTo      = time.Second
)

// keptBytesMax is the most a Producer with a session keeps (or two samples, if those are more) where Config.WindowBytes says nothing.
const keptBytesMax = 64 << 20

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

	Ack              wire.AckMode  // default wire.AckCommitted with a Session, else wire.AckQueued
	WindowSamples    int64         // most samples without an ack; 0: the daemon's limit
	WindowBytes      int64         // most bytes without an ack; 0: the daemon chooses; ask for more where the round trip is long
	BufferBytes      int           // most bytes of small samples sent with one write; default DefaultBufferBytes
	HandshakeTimeout time.Duration // for connecting and the reply; default DefaultHandshakeTimeout
	Client           string        // name shown in the daemon's status; default ingestd-go/VERSION

	// Compression compresses the samples on their way, if the daemon offers it; default: none. It pays where the connection is slower than the compressor, and the samples
	// shrink: docs/operations.md says when.
	Compression wire.Compression

	Token Token // proves to the daemon who this is, and the daemon to this; see ParseToken, TokenFromEnvironment. Zero: none

	// Session is the producer's identity that survives reconnects and restarts of the daemon. With one, a Producer whose
	// connection ends makes another by itself and sends again what the daemon does not hold: see the package's doc. Without, the end
	// of the connection is the end of the Producer.
	Session       string
	ReconnectFor  time.Duration // most time without a connection since the last ack; default DefaultReconnectFor; negative: do not reconnect
	ReconnectFrom time.Duration // least upper bound of a pause before a try; default DefaultReconnectFrom
	ReconnectTo   time.Duration // greatest one; default DefaultReconnectTo

	// ContinueAfterLoss goes on when the daemon does not hold samples it had acked; Stats.Lost counts them. By default the
	// Producer ends with a *LostError.
	ContinueAfterLoss bool

	TLS TLS // for addresses tls:// and quic://

	// Dialer connects, also from a goroutine of the Producer; default net.Dialer. A test or a tunnel may bring its own. TLS goes over what it makes; quic:// does not use it.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

func (c Config) withDefaults() (Config, error) {
	if c.Table == "" {
		return c, errors.New("client: Config.Table is empty; name the table to push to")
	}
	if c.Spec == nil {
		return c, errors.New("client: Config.Spec is nil; say what a sample is, with spec.ParseText for instance")
	}
	if err := c.Token.Check(); err != nil {
		return c, fmt.Errorf("client: Config.Token: %w", err)
	}
	if !c.Compression.Known() {
		return c, fmt.Errorf("client: Config.Compression is %q; it is s2, zstd, s2+shuffle, zstd+shuffle or empty", c.Compression)
	}
	if c.BufferBytes < 0 || c.HandshakeTimeout < 0 {
		return c, fmt.Errorf("client: Config.BufferBytes is %d and HandshakeTimeout %v; neither may be negative", c.BufferBytes, c.HandshakeTimeout)
	}
	if c.ReconnectFrom < 0 || c.ReconnectTo < 0 || c.ReconnectTo > 0 && c.ReconnectTo < max(c.ReconnectFrom, 1) {
		return c, fmt.Errorf("client: Config.ReconnectFrom is %v and ReconnectTo %v; they may not be negative, nor the second less than the first", c.ReconnectFrom, c.ReconnectTo)
	}
	if c.Session == "" && (c.ReconnectFor > 0 || c.ReconnectFrom > 0 || c.ReconnectTo > 0 || c.ContinueAfterLoss) {
		return c, errors.New("client: Config says how to reconnect but names no Session; without one the daemon cannot know which samples it holds")
	}
	if c.Ack == "" && c.Session != "" {
		c.Ack = wire.AckCommitted
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
	if c.ReconnectFor == 0 {
		c.ReconnectFor = DefaultReconnectFor
	}
	if c.ReconnectFrom == 0 {
		c.ReconnectFrom = DefaultReconnectFrom
		if c.ReconnectTo > 0 {
			c.ReconnectFrom = min(DefaultReconnectFrom, c.ReconnectTo)
		}
	}
	if c.ReconnectTo == 0 {
		c.ReconnectTo = max(DefaultReconnectTo, c.ReconnectFrom)
	}
	if c.Client == "" {
		c.Client = "ingestd-go/" + moduleVersion()
	}
	c.Dialer = c.TLS.dialer(c.Dialer)
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

// splitAddress takes tcp://host:port, tls://host:port, quic://host:port or unix:///path apart for a dialer.
func splitAddress(addr string) (network, address string, err error) {
	scheme, rest, ok := strings.Cut(addr, "://")
	switch {
	case ok && (scheme == "tcp" || scheme == "tls" || scheme == "quic"):
		if _, _, err := net.SplitHostPort(rest); err != nil {
			return "", "", fmt.Errorf("client: address %q: %w; write %s://host:port", addr, err, scheme)
		}
		return scheme, rest, nil
	case ok && scheme == "unix":
		if rest == "" {
			return "", "", fmt.Errorf("client: address %q has no path; write unix:///path/to/ingestd.sock", addr)
		}
		return "unix", rest, nil
	case ok && scheme == "echo":
		return "", "", fmt.Errorf("client: address %q is for clients of the echo protocol; use the daemon's tcp:// or unix:// address", addr)
	}
	return "", "", fmt.Errorf("client: address %q is not known; write tcp://host:port, tls://host:port, quic://host:port or unix:///path", addr)
}

// target is where a Producer connects to, and as what.
type target struct {
	addr             string // as given to Dial
	network, address string
	cfg              Config
	manifest         []byte // of a producer of tensors; its Spec is what the daemon makes of it
}

// Dial connects to a daemon and agrees with it on table, spec and window. ctx bounds the connecting only. It tries once; only a
// connection that was there is made again.
func Dial(ctx context.Context, addr string, cfg Config) (*Producer, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	t := target{addr: addr, network: network, address: address, cfg: cfg}
	conn, accepted, err := t.connect(ctx, cfg.HandshakeTimeout)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	return start(ctx, conn, accepted, t), nil
}

// connect makes a connection within the time given.
func (t *target) connect(ctx context.Context, within time.Duration) (net.Conn, wire.AcceptedPush, error) {
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	conn, err := t.cfg.Dialer(limited, t.network, t.address)
	if err != nil {
		if limited.Err() != nil {
			return nil, wire.AcceptedPush{}, &waitError{limited, fmt.Sprintf("dial %s: no connection in time (%v)", t.addr, err)}
		}
		return nil, wire.AcceptedPush{}, fmt.Errorf("dial %s: %w; %s", t.addr, err, dialAdvice(err))
	}
	accepted, err := t.handshake(limited, conn)
	if err != nil {
		conn.Close()
		if limited.Err() != nil {
			return nil, accepted, &waitError{limited, fmt.Sprintf("dial %s: connected, but no reply in time; is this the address of an ingestd daemon?", t.addr)}
		}
		return nil, accepted, fmt.Errorf("dial %s, table %q: %w", t.addr, t.cfg.Table, named(err))
	}
	if t.cfg.Compression != wire.CompressionNone {
		packed, err := newCompressedConn(conn, t.cfg.Compression, t.cfg.Spec)
		if err != nil {
			conn.Close()
			return nil, accepted, err
		}
		conn = packed
	}
	return conn, accepted, nil
}

func (t *target) handshake(ctx context.Context, conn net.Conn) (accepted wire.AcceptedPush, err error) {
	cfg := &t.cfg
	said := wire.Hello{
		Role: wire.RolePush, Table: cfg.Table, Spec: cfg.Spec, Session: cfg.Session, Ack: cfg.Ack,
		WindowSamples: cfg.WindowSamples, WindowBytes: cfg.WindowBytes, Notes: true, Client: cfg.Client, Manifest: t.manifest,
		Compression: cfg.Compression,
	}
	if cfg.Spec != nil {
		said.Fingerprint = cfg.Spec.Fingerprint()
	}
	said.SetToken(cfg.Token)
	if err = greet(ctx, conn, &said, &accepted); err == nil {
		err = checkAgreed(accepted, cfg)
	}
	return accepted, err
}

// past is a deadline that makes a blocked read or write return.
var past = time.Unix(1, 0)

func checkAgreed(a wire.AcceptedPush, cfg *Config) error {
	what := ""
	switch {
	case cfg.Spec != nil && a.Fingerprint != cfg.Spec.Fingerprint():
		what = "another spec"
	case a.Ack != cfg.Ack && a.Ack != wire.AckCommitted: // more than was asked for is what some tables give
		what = fmt.Sprintf("ack mode %s instead of %s", a.Ack, cfg.Ack)
	case cfg.WindowSamples > 0 && a.WindowSamples > cfg.WindowSamples, cfg.WindowBytes > 0 && a.WindowBytes > cfg.WindowBytes:
		what = "a larger window"
	case a.Compression != cfg.Compression:
		what = fmt.Sprintf("the compression %q instead of %q", a.Compression, cfg.Compression)
	default:
		return nil
	}
	return fmt.Errorf("%w: the daemon agreed to %s than asked for", wire.ErrProtocol, what)
}

func start(ctx context.Context, conn net.Conn, accepted wire.AcceptedPush, t target) *Producer {
	s, cfg := t.cfg.Spec, &t.cfg
	p := &Producer{
		target: t, conn: conn, spec: s, leafBytes: s.LeafBytes(), sampleBytes: s.SampleBytes(), accepted: accepted, first: accepted.Held,
		window: windowOf(accepted, s.SampleBytes()),
		wake:   make(chan struct{}, 1), kick: make(chan struct{}, 1), use: make(chan struct{}, 1),
		ended: make(chan struct{}), writerEnded: make(chan struct{}),
		vecRoom: make([][]byte, 0, s.NumLeaves()),
	}
	p.quiet.L = &p.mu
	p.life, p.die = context.WithCancel(context.WithoutCancel(ctx)) // what a Dialer may look up in ctx, but not its end
	leaves := int64(s.NumLeaves())
	keep := cfg.Session != "" && cfg.ReconnectFor > 0 || t.manifest != nil
	p.direct = !keep && cfg.Compression == wire.CompressionNone && (p.sampleBytes >= directBytes && p.sampleBytes/leaves >= leafBytesMin || p.sampleBytes > int64(cfg.BufferBytes))
	if !p.direct {
		// A quarter of the window to a write keeps the connection busy while acks are on their way.
		quarter := int64(min(p.window/4, uint64(cfg.BufferBytes))) * p.sampleBytes
		p.fillBytes = int(max(p.sampleBytes, min(int64(cfg.BufferBytes), quarter)))
	}
	switch {
	case keep:
		if cfg.WindowBytes == 0 && t.manifest == nil {
			p.window = min(p.window, uint64(max(2, keptBytesMax/p.sampleBytes)))
		}
		if t.manifest != nil {
			p.kept = &kept{sample: uint64(p.sampleBytes), lent: new(lent)}
		} else {
			p.kept = newKept(p.window, p.sampleBytes)
		}
		p.shift = accepted.Held
	case !p.direct:
		p.buf, p.spare = make([]byte, 0, p.fillBytes), make([]byte, 0, p.fillBytes)
	}
	go p.attend()
	go p.writeLeftovers()
	return p
}

// windowOf is the tighter of both windows, in samples, at least 1.
func windowOf(a wire.AcceptedPush, sampleBytes int64) uint64 {
	return uint64(max(1, min(a.WindowSamples, a.WindowBytes/sampleBytes)))
}

// deadlineExceeded says whether a read or write stopped because of a deadline.
func deadlineExceeded(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
