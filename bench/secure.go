package bench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// Transports of cases: schemes of addresses.
const (
	transportTCP  = "tcp"
	transportTLS  = "tls"
	transportQUIC = "quic"
)

// secureRateMin is the target for samples/s of the daemon to those of a bare loop over the same encryption.
const secureRateMin = 0.9

// secureCases are the cases of the targets.
func secureCases() []Case {
	return overEach(makeCase(64*kib, 1, 1, 16, 32), makeCase(4*mib, 1, 1, 4, 8))
}

func smokeSecureCases() []Case {
	return overEach(makeCase(64*kib, 1, 1, 2, 4), makeCase(4*mib, 1, 1, 1, 2))
}

// overEach has each of the cases over TLS and over QUIC.
func overEach(cases ...Case) []Case {
	var all []Case
	for _, transport := range []string{transportTLS, transportQUIC} {
		for _, c := range cases {
			all = append(all, c.over(transport).want(secureRateMin, 0))
		}
	}
	return all
}

func secureCommand() *cobra.Command {
	opt := defaultOptions()
	opt.Secure, opt.OpenDuration, opt.Only = true, 0, contenderFull+","+contenderBare
	cmd := &cobra.Command{
		Use:   "secure",
		Short: "Socket to lease over TLS and QUIC, beside loops over crypto/tls and quic-go that only read and ack",
		Example: "  ingestd bench secure --json bench.json\n" +
			"  ingestd bench secure --case quic/64KiB/1 --runs 3 --cpuprofile profiles/",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runSecure(ctx, opt, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	opt.Common.flags(f, caseNames(secureCases()))
	opt.peerFlags(f)
	f.StringVar(&opt.Only, "only", opt.Only, "only these contenders, separated by commas: full, bare, copy")
	return cmd
}

// runSecure is runTCP with certificates for everybody.
func runSecure(ctx context.Context, opt Options, out, log io.Writer) (err error) {
	if opt.certs, err = makeCertificates(opt.sites.host()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, opt.certs.remove()) }()
	return runTCP(ctx, opt, out, log)
}

// certificates is a folder that holds a server's certificate and the authority that signed it. "" is none.
type certificates string

const certificatesValid = 24 * time.Hour

// makeCertificates makes them, for a server at a host's address.
func makeCertificates(host string) (certificates, error) {
	folder, err := os.MkdirTemp("", "ingestd-bench-")
	if err != nil {
		return "", fmt.Errorf("make a folder for certificates: %w", err)
	}
	c := certificates(folder)
	ca, err := devcert.NewAuthority("ingestd bench", certificatesValid)
	if err == nil {
		var server *devcert.Pair
		if server, err = ca.NewServer([]string{host}, certificatesValid); err == nil {
			_, _, err = server.Write(folder, "server")
		}
	}
	if err == nil {
		err = os.WriteFile(c.authority(), ca.CertificatePEM(), 0o600)
	}
	if err != nil {
		return "", errors.Join(err, c.remove())
	}
	return c, nil
}

func (c certificates) authority() string {
	return filepath.Join(string(c), devcert.AuthorityCertificate)
}
func (c certificates) pair() (certificate, key string) {
	return filepath.Join(string(c), "server.pem"), filepath.Join(string(c), "server.key")
}

func (c certificates) remove() error { return os.RemoveAll(string(c)) }

// serve is what makes a daemon listen for a transport at a host's address.
func (c certificates) serve(transport, host string) []string {
	if transport == transportTCP {
		return nil // it does
	}
	certificate, key := c.pair()
	return []string{"--listen", transport + "://" + net.JoinHostPort(host, "0"), "--tls-cert", certificate, "--tls-key", key}
}

// dialPeer connects the sender to an address of any transport. sendBuffer is SO_SNDBUF of what goes over TCP; 0 leaves it to the kernel.
func dialPeer(ctx context.Context, address, authorities string, sendBuffer int) (net.Conn, error) {
	transport, host, _ := strings.Cut(address, "://")
	if !slices.Contains([]string{transportTCP, transportTLS, transportQUIC}, transport) {
		return nil, fmt.Errorf("address %q: must begin with tcp://, tls:// or quic://", address)
	}
	var secure *tls.Config
	if transport != transportTCP {
		text, err := os.ReadFile(authorities)
		if err != nil {
			return nil, err
		}
		name, _, err := net.SplitHostPort(host)
		if err != nil {
			return nil, err
		}
		secure = &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPN}, ServerName: name, RootCAs: x509.NewCertPool()}
		secure.RootCAs.AppendCertsFromPEM(text)
	}
	if transport == transportQUIC {
		return dialStream(ctx, host, secure)
	}
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	conn, err := dialer.DialContext(ctx, "tcp", host)
	if err != nil {
		return nil, err
	}
	if sendBuffer > 0 {
		if err := conn.(*net.TCPConn).SetWriteBuffer(sendBuffer); err != nil {
			return nil, errors.Join(fmt.Errorf("set the send buffer: %w", err), conn.Close())
		}
	}
	if transport == transportTLS {
		return tls.Client(conn, secure), nil
	}
	return conn, nil
}

// dialStream opens a stream on a connection of its own.
func dialStream(ctx context.Context, host string, secure *tls.Config) (net.Conn, error) {
	c, err := quic.DialAddr(ctx, host, secure, &quic.Config{MaxIncomingStreams: -1, MaxIncomingUniStreams: -1})
	if err != nil {
		return nil, err
	}
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return nil, errors.Join(err, c.CloseWithError(quicconn.CodeDone, ""))
	}
	return &ownStream{quicconn.New(c, s), c}, nil
}

// ownStream is a stream that has a connection of its own.
type ownStream struct {
	*quicconn.Conn
	of *quic.Conn
}

func (s *ownStream) Close() error { return s.of.CloseWithError(quicconn.CodeDone, "") }

// listenBare opens the bare loop's listener for a transport at a host's address.
func listenBare(ctx context.Context, transport, host string, certs certificates) (net.Listener, error) {
	address := net.JoinHostPort(host, "0")
	if transport == transportTCP {
		return tcpingest.Listen(ctx, "tcp", address)
	}
	pair, err := tls.LoadX509KeyPair(certs.pair())
	if err != nil {
		return nil, err
	}
	secure := tcpingest.TLSConfig(&tls.Config{Certificates: []tls.Certificate{pair}})
	if transport == transportQUIC {
		return listenStreams(ctx, address, secure)
	}
	l, err := tcpingest.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(l, secure), nil
}

// bareQUICWindow is as large as a daemon lets it become: what bounds the bytes under way is the sender's window, and flow control never holds the bare loop up.
const bareQUICWindow = 16 * mib

func listenStreams(ctx context.Context, address string, secure *tls.Config) (net.Listener, error) {
	socket, err := quicingest.Listen(ctx, address, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	l, err := quic.Listen(socket, secure, &quic.Config{
		InitialStreamReceiveWindow: bareQUICWindow, MaxStreamReceiveWindow: bareQUICWindow,
		InitialConnectionReceiveWindow: bareQUICWindow, MaxConnectionReceiveWindow: bareQUICWindow,
	})
	if err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	return &streamListener{l, socket}, nil
}

// streamListener is a listener of the one stream that each of its connections has.
type streamListener struct {
	*quic.Listener
	socket *net.UDPConn
}

func (l *streamListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept(context.Background())
	if err != nil {
		return nil, err
	}
	s, err := c.AcceptStream(context.Background()) // the sender's hello is on its way
	if err != nil {
		return nil, err
	}
	return &ownStream{quicconn.New(c, s), c}, nil
}

func (l *streamListener) Close() error { return errors.Join(l.Listener.Close(), l.socket.Close()) }
