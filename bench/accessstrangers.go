package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/bans/sockfilter"
	served "github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/tcpingest"
)

// What a producer is beside.
const (
	besideNothing = "GB/s of a producer alone"
	besideBare    = "GB/s beside connects to a bare listener"
	besideDaemon  = "GB/s beside the same to the daemon, of a banned address"
	perSecond     = "connects/s of that address"
)

var besides = []string{besideNothing, besideBare, besideDaemon}

// Targets of strangers.
const (
	besideMin   = 0.9  // of the rate alone
	connectsMet = 0.95 // of the connects asked for, without which the other says nothing
)

// over is a figure over a transport.
func over(transport, figure string) string { return transport + ": " + figure }

// stranger is the address of the banned; producer and trainer have others of this machine.
var stranger = netip.MustParseAddr("127.0.0.2")

// strangers measures a producer alone, beside an address that is banned and connects all the time, and beside one that does so to a listener that nobody serves, whose
// kernel drops the same: what that takes is what connecting takes on these cores.
func (r *accessRunner) strangers(ctx context.Context, transport string) (err error) {
	opt, c := r.options("--bans-loopback", "--log-level", "warn"), accessCase()
	if transport != transportTCP {
		if opt.certs, err = makeCertificates(opt.sites.host()); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, opt.certs.remove()) }()
		c = c.over(transport)
	}
	g, err := startFull(ctx, opt, c)
	if g != nil {
		defer func() { err = errors.Join(err, g.stop(err != nil)) }()
	}
	if err != nil {
		return err
	}
	if err := ban(ctx, g.daemon); err != nil {
		return err
	}
	bare, err := startDropping(ctx, transport)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bare.stop()) }()
	daemonAt, err := netip.ParseAddrPort(strings.TrimPrefix(g.daemon.address(transport), transport+"://"))
	if err != nil {
		return err
	}
	return interleave(r.opt.Runs, besides, func(_ int, name string) error {
		var flood Flood
		var rate float64
		switch name {
		case besideNothing:
			rate, err = r.alone(ctx, g)
		case besideBare:
			rate, flood, err = r.beside(ctx, g, transport, bare.address, bare.arrived)
			flood.Against = "bare listener"
		case besideDaemon:
			rate, flood, err = r.beside(ctx, g, transport, daemonAt, func() (uint64, error) { return turnedAway(ctx, g.daemon) })
			flood.Against = "daemon"
		}
		if err != nil {
			return err
		}
		r.add(over(transport, name), rate)
		if name == besideNothing {
			return nil
		}
		if flood.Arrived == 0 {
			return fmt.Errorf("of %d connects none was turned away: %v is not banned", flood.Begun, stranger)
		}
		r.floods = append(r.floods, flood)
		if name == besideDaemon {
			r.add(over(transport, perSecond), float64(flood.Arrived)/flood.Seconds)
		}
		return nil
	})
}

func (r *accessRunner) alone(ctx context.Context, g *rig) (float64, error) {
	m, err := g.measure(ctx, false, nil)
	if err != nil {
		return 0, err
	}
	return m.GBPerSecond, nil
}

// beside measures the producer while a flood goes to an address; arrived counts what came of it.
func (r *accessRunner) beside(ctx context.Context, g *rig, transport string, to netip.AddrPort, arrived func() (uint64, error)) (float64, Flood, error) {
	before, err := arrived()
	if err != nil {
		return 0, Flood{}, err
	}
	f, err := startFlood(transport, stranger, to, r.opt.Connects)
	if err != nil {
		return 0, Flood{}, err
	}
	running, stop := context.WithCancel(ctx)
	defer stop()
	over := make(chan Flood, 1)
	go func() { over <- keep(running, f, r.opt.Connects) }()
	rate, err := r.alone(ctx, g)
	stop()
	flood := <-over
	if err != nil {
		return 0, flood, err
	}
	after, err := arrived()
	flood.Transport, flood.Arrived = transport, after-before
	return rate, flood, err
}

// ban has the stranger banned, and waits until the kernel knows where it is to.
func ban(ctx context.Context, d *daemon) error {
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: stranger.AsSlice()}, Timeout: progressTimeout}
	var strangers []net.Conn
	for range bans.FailuresMax { // all are there before the first fails, so that none has to wait
		c, err := from.DialContext(ctx, "tcp", strings.TrimPrefix(d.TCP, "tcp://"))
		if err != nil {
			return err
		}
		defer c.Close()
		strangers = append(strangers, c)
	}
	for _, c := range strangers {
		_ = c.SetDeadline(time.Now().Add(progressTimeout))
		if _, err := c.Write([]byte("this is no hello")); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, c); err != nil { // to the refusal, and the end
			return err
		}
	}
	for began := time.Now(); ; {
		b, err := bansOf(ctx, d)
		if err != nil {
			return err
		}
		if b.Banned > 0 && (b.Kernel == nil || b.Kernel.Addresses+int(b.Kernel.Failures) > 0) {
			return nil
		}
		if time.Since(began) > progressTimeout {
			return fmt.Errorf("%v is not banned: %+v", stranger, b)
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

// turnedAway counts what the daemon and its kernel did not let in.
func turnedAway(ctx context.Context, d *daemon) (uint64, error) {
	b, err := bansOf(ctx, d)
	if err != nil {
		return 0, err
	}
	n := b.Refused
	if b.Kernel != nil {
		n += b.Kernel.DroppedTCP + b.Kernel.DroppedQUIC
	}
	return n, nil
}

func bansOf(ctx context.Context, d *daemon) (*served.BansStatus, error) {
	body, err := d.get(ctx, "/status")
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var status served.Status
	if err := json.NewDecoder(body).Decode(&status); err != nil {
		return nil, fmt.Errorf("status of the daemon: %w", err)
	}
	if status.Access.Bans == nil {
		return nil, errors.New("the daemon bans nobody")
	}
	return status.Access.Bans, nil
}

// dropping is a listener that nobody serves, whose kernel drops what the stranger sends.
type dropping struct {
	address netip.AddrPort
	filter  *sockfilter.Filter
	stop    func() error
}

func startDropping(ctx context.Context, transport string) (*dropping, error) {
	table := bans.New(bans.Config{Loopback: true})
	for range bans.FailuresMax {
		table.Failed(stranger)
	}
	d := &dropping{filter: sockfilter.New(sockfilter.Config{Table: table})}
	var listener io.Closer
	if transport == transportQUIC {
		socket, err := quicingest.Listen(ctx, "127.0.0.1:0", slog.New(slog.DiscardHandler))
		if err != nil {
			return nil, err
		}
		listener, d.address = socket, socket.LocalAddr().(*net.UDPAddr).AddrPort()
		if err := d.filter.GuardQUIC(socket); err != nil {
			return nil, errors.Join(err, socket.Close())
		}
	} else {
		l, err := tcpingest.Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		listener, d.address = l, l.Addr().(*net.TCPAddr).AddrPort()
		if _, err := d.filter.Guard(l.(*net.TCPListener)); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	running, halt := context.WithCancel(ctx)
	over := make(chan error, 1)
	go func() { over <- d.filter.Run(running) }()
	d.stop = func() error {
		halt()
		return errors.Join(<-over, listener.Close())
	}
	for d.filter.Stats().Addresses == 0 {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return nil, errors.Join(err, d.stop())
		}
	}
	return d, nil
}

func (d *dropping) arrived() (uint64, error) {
	s := d.filter.Stats()
	return s.DroppedTCP + s.DroppedQUIC, nil
}
