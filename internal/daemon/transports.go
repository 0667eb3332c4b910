package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/certfile"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/tcpingest"
)

// listener is one place to listen: a listener of connections, or of QUIC a UDP socket.
type listener struct {
	address
	net.Listener
	socket net.PacketConn
}

func (l listener) url() string {
	a := l.address
	if a.scheme != "unix" {
		a.host = l.Addr().String()
	}
	return a.String()
}

// Addr implements net.Listener.
func (l listener) Addr() net.Addr {
	if l.socket != nil {
		return l.socket.LocalAddr()
	}
	return l.Listener.Addr()
}

// Close implements net.Listener.
func (l listener) Close() error {
	if l.socket != nil {
		return l.socket.Close()
	}
	return l.Listener.Close()
}

// listenAt opens one of the configured listeners.
func listenAt(a address, log *slog.Logger) (listener, error) {
	if a.scheme != "quic" {
		l, err := listen(context.Background(), a)
		return listener{address: a, Listener: l}, err
	}
	socket, err := quicingest.Listen(context.Background(), a.host, log)
	if err != nil {
		return listener{}, listenError(a, err)
	}
	return listener{address: a, socket: socket}, nil
}

// openTransports makes what serves listeners.
func (d *Daemon) openTransports(log *slog.Logger) error {
	l := &d.plan.Limits
	cfg := tcpingest.Config{
		Tables:           ingestTables{d.registry()},
		Attach:           d.attach,
		Gate:             d.access.gate,
		Door:             d.access.door,
		Compression:      d.plan.compressions(),
		MaxConnections:   l.MaxConnections,
		HandshakeTimeout: time.Duration(l.HandshakeTimeout),
		IdleTimeout:      time.Duration(l.IdleTimeout),
		StallTimeout:     time.Duration(l.StallTimeout),
		AckTimeout:       time.Duration(l.AckTimeout),
		WindowSamples:    int64(l.WindowSamples),
		WindowBytes:      int64(l.WindowBytes),
		WindowBytesMax:   int64(l.WindowBytesMax),
		Log:              log,
	}
	var err error
	if d.ingest, err = tcpingest.New(cfg); err != nil {
		return err
	}
	d.transports = []ingest.Transport{d.ingest}
	for _, a := range d.plan.listeners {
		if a.scheme != "quic" || d.quic != nil {
			continue
		}
		key, err := d.certs.Secret("QUIC stateless reset")
		if err != nil {
			return err
		}
		d.quic, err = quicingest.New(quicingest.Config{
			Streams: cfg, TLS: d.certs.Config(), ResetKey: &key, MaxConnections: l.MaxConnections, RetryAbove: min(l.HalfOpen, 64), HandshakeTimeout: time.Duration(l.HandshakeTimeout) / 2,
		})
		if err != nil {
			return err
		}
		d.transports = append(d.transports, d.quic)
	}
	return nil
}

// openCertificates reads the files of TLS.
func (d *Daemon) openCertificates(log *slog.Logger) (err error) {
	if t := &d.plan.TLS; t.Cert != "" {
		d.certs, err = certfile.Open(certfile.Files{Certificate: t.Cert, Key: t.Key, ClientCA: t.ClientCA}, log)
		if err != nil {
			return configErrorf("tls", "%v; ingestd cert makes certificates for development", err)
		}
	}
	return nil
}

func (d *Daemon) serve(ctx context.Context, l listener) error {
	switch l.scheme {
	case "echo":
		return d.ingest.ServeEcho(ctx, l, d.registry().find(l.table))
	case "tls":
		return d.ingest.Serve(ctx, tcpingest.NewTLSListener(l, d.certs.Config()))
	case "quic":
		return d.quic.Serve(ctx, l.socket)
	}
	return d.ingest.Serve(ctx, l)
}

// shutdown ends the connections of all transports at once.
func (d *Daemon) shutdown(ctx context.Context) error {
	errs := make([]error, len(d.transports))
	var group sync.WaitGroup
	for i, t := range d.transports {
		group.Go(func() { errs[i] = t.Shutdown(ctx) })
	}
	group.Wait()
	return errors.Join(errs...)
}

func (d *Daemon) transportStats() (all []ingest.Stats) {
	for _, t := range d.transports {
		all = append(all, t.Stats())
	}
	return all
}

// addTransport adds the counts of one to those of all.
func (s *ProducerStatus) addTransport(in *ingest.Stats) {
	s.Accepted += in.Accepted
	s.Open += in.Open
	s.Samples += in.Samples
	s.Bytes += in.Bytes
	s.CutShort += in.CutShort
	s.AcceptErrors += in.AcceptErrors
	s.Notes += in.Notes
	if in.Carriers != nil {
		s.QUIC = in.Carriers
	}
	for reason, n := range in.Ended {
		s.Ended[reason] += n
	}
	for reason, n := range in.Refused {
		s.Refused[reason] += n
	}
}
