package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	served "github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/wire"
)

// AccessOptions are the flags of bench access, kept in the record.
type AccessOptions struct {
	Common
	Clients  int `json:"clients"`  // handshakes at once
	Connects int `json:"connects"` // of strangers, per second; 0: as many as go
}

// AccessRecord is everything that bench access found out, as --json writes it.
type AccessRecord struct {
	Format   int               `json:"format"` // 1
	Started  time.Time         `json:"started"`
	Machine  Machine           `json:"machine"`
	Options  AccessOptions     `json:"options"`
	Figures  map[string]*Times `json:"figures"`
	Targets  []Target          `json:"targets"`
	Finished time.Time         `json:"finished"`
}

// The figures of bench access.
const (
	figureHandshakes = "handshakes/s with a token"
	figureUnasked    = "handshakes/s of a daemon without tokens"
	figureAlone      = "GB/s of a producer alone"
	figureBeside     = "GB/s beside a banned address that connects"
	figureConnects   = "connects/s of that address"
)

var accessFigures = []string{figureHandshakes, figureUnasked, figureAlone, figureBeside, figureConnects}

// Targets of bench access.
const (
	handshakesMin = 2000 // per second
	besideMin     = 0.9  // of the rate alone
)

func accessCommand() *cobra.Command {
	opt := AccessOptions{Common: defaultCommon(), Clients: 8, Connects: 5000}
	cmd := &cobra.Command{
		Use:   "access",
		Short: "Handshakes with tokens beside those without, and a producer beside a banned address that connects all the time",
		Example: "  ingestd bench access --json bench.json\n" +
			"  ingestd bench access --runs 3 --connects 0",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runAccess(ctx, opt, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	opt.Common.flags(f, "handshakes, strangers")
	f.IntVar(&opt.Clients, "clients", opt.Clients, "handshakes under way at once")
	f.IntVar(&opt.Connects, "connects", opt.Connects, "connects per second of the banned address; 0: as many as go")
	return cmd
}

// runAccess measures, prints and writes the record.
func runAccess(ctx context.Context, opt AccessOptions, out, log io.Writer) error {
	if err := opt.Common.settle(); err != nil {
		return err
	}
	if opt.Clients < 1 || opt.Connects < 0 {
		return errors.New("--clients must be at least 1, --connects at least 0")
	}
	r := &accessRunner{opt: &opt, log: log, figures: map[string]*Times{}}
	record := &AccessRecord{Format: 1, Started: time.Now().UTC(), Machine: readMachine(), Options: opt, Figures: r.figures}
	for _, c := range []struct {
		name    string
		measure func(context.Context) error
	}{{"handshakes", r.handshakes}, {"strangers", r.strangers}} {
		if opt.Case != "" && !strings.Contains(","+opt.Case+",", ","+c.name+",") {
			continue
		}
		if err := c.measure(ctx); err != nil {
			return fmt.Errorf("case %s: %w", c.name, err)
		}
	}
	if len(r.figures) == 0 {
		return fmt.Errorf("--case %q: there are handshakes and strangers", opt.Case)
	}
	for _, f := range r.figures {
		f.Median = median(f.Runs)
	}
	if f := r.figures[figureHandshakes]; f != nil {
		record.Targets = append(record.Targets, atLeast("handshakes", figureHandshakes, f.Median, handshakesMin))
	}
	if f := r.figures[figureBeside]; f != nil {
		record.Targets = append(record.Targets, atLeast("strangers", "GB/s to the rate alone", f.Median/r.figures[figureAlone].Median, besideMin))
	}
	record.Finished = time.Now().UTC()
	if opt.JSON != "-" {
		printAccess(out, record)
	}
	return opt.report(record, record.Targets, out)
}

// accessRunner collects figures.
type accessRunner struct {
	opt     *AccessOptions
	log     io.Writer
	figures map[string]*Times
}

func (r *accessRunner) add(figure string, v float64) {
	f := r.figures[figure]
	if f == nil {
		unit := "1/s"
		if strings.HasPrefix(figure, "GB/s") {
			unit = "GB/s"
		}
		f = &Times{Unit: unit}
		r.figures[figure] = f
	}
	f.Runs = append(f.Runs, v)
	if !r.opt.Quiet {
		fmt.Fprintf(r.log, "%s: %.4g\n", figure, v)
	}
}

// accessCase is what the daemon's table and the producer beside strangers are like.
func accessCase() Case { return makeCase(64*kib, 1, 1, 16, 16) }

func (r *accessRunner) options(more ...string) *Options {
	opt := defaultOptions()
	opt.Common, opt.OpenDuration, opt.SourceBytes = r.opt.Common, 0, 4*mib
	opt.ServeArgs = append(append([]string{}, r.opt.ServeArgs...), more...)
	return &opt
}

// handshakes shakes hands over and over, with a daemon that has a token and with one that has none.
func (r *accessRunner) handshakes(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "ingestd-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	token, lines, err := auth.NewEntry("bench", []string{"push"}, []string{"*"})
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "tokens.yaml")
	if err := os.WriteFile(file, []byte("tokens:\n"+lines), 0o600); err != nil {
		return err
	}
	daemons := map[string]*daemonOf{figureHandshakes: {token: token, args: []string{"--tokens", file}}, figureUnasked: {}}
	for _, d := range daemons {
		d.args = append(d.args, "--log-level", "warn")
		if d.daemon, err = startDaemon(ctx, r.options(d.args...), accessCase()); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.terminate(), d.cleanUp()) }()
	}
	return interleave(r.opt.Runs, []string{figureHandshakes, figureUnasked}, func(_ int, name string) error {
		rate, err := r.shake(ctx, daemons[name])
		r.add(name, rate)
		return err
	})
}

// daemonOf is a daemon and the token for it.
type daemonOf struct {
	*daemon
	token wire.Token
	args  []string
}

// shake returns handshakes per second.
func (r *accessRunner) shake(ctx context.Context, d *daemonOf) (float64, error) {
	layout, err := accessCase().spec()
	if err != nil {
		return 0, err
	}
	ctx, stop := context.WithTimeout(ctx, r.opt.Duration)
	defer stop()
	var done atomic.Uint64
	failed := make([]error, r.opt.Clients)
	began := time.Now()
	var clients sync.WaitGroup
	for i := range failed {
		clients.Go(func() {
			hello := &wire.Hello{Role: wire.RolePush, Table: tableName, Spec: layout, Client: "ingestd-bench"}
			hello.SetToken(d.token)
			for ctx.Err() == nil && failed[i] == nil {
				if failed[i] = greet(strings.TrimPrefix(d.TCP, "tcp://"), hello); failed[i] == nil {
					done.Add(1)
				}
			}
		})
	}
	clients.Wait()
	return float64(done.Load()) / time.Since(began).Seconds(), errors.Join(failed...)
}

// greet makes one connection, shakes hands and drops it.
func greet(address string, hello *wire.Hello) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.(*net.TCPConn).SetLinger(0) // else the ports run out
	_ = c.SetDeadline(time.Now().Add(progressTimeout))
	return wire.Greet(c, c, hello, nil, &wire.AcceptedPush{})
}

// stranger is the address of the banned; producer and trainer have others of this machine.
var stranger = netip.MustParseAddr("127.0.0.2")

// strangers measures a producer alone, and beside an address that is banned and connects all the time.
func (r *accessRunner) strangers(ctx context.Context) (err error) {
	g, err := startFull(ctx, r.options("--bans-loopback", "--log-level", "warn"), accessCase())
	if g != nil {
		defer func() { err = errors.Join(err, g.stop(err != nil)) }()
	}
	if err != nil {
		return err
	}
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: stranger.AsSlice()}, Timeout: progressTimeout}
	address := strings.TrimPrefix(g.daemon.TCP, "tcp://")
	for range bans.FailuresMax { // which takes the 7.5 s that it is slowed
		if err := misbehave(ctx, from, address); err != nil {
			return err
		}
	}
	err = interleave(r.opt.Runs, []string{figureAlone, figureBeside}, func(_ int, name string) error {
		running, stop := context.WithCancel(ctx)
		connects, over := uint64(0), make(chan struct{})
		began := time.Now()
		if name == figureBeside {
			go func() {
				defer close(over)
				connects = connectAll(running, from, address, r.opt.Connects)
			}()
		} else {
			close(over)
		}
		m, err := g.measure(ctx, false, nil)
		stop()
		<-over
		if err != nil {
			return err
		}
		r.add(name, m.GBPerSecond)
		if name == figureBeside {
			r.add(figureConnects, float64(connects)/time.Since(began).Seconds())
		}
		return nil
	})
	if err != nil {
		return err
	}
	return checkBanned(ctx, g.daemon)
}

// misbehave says what is no hello, and waits for the refusal.
func misbehave(ctx context.Context, from *net.Dialer, address string) error {
	c, err := from.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(progressTimeout))
	if _, err := c.Write([]byte("this is no hello")); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, c)
	return err
}

// connecting is how many goroutines a stranger has.
const connecting = 4

// connectAll connects at a rate until ctx ends, and returns how often.
func connectAll(ctx context.Context, from *net.Dialer, address string, rate int) uint64 {
	var made atomic.Uint64
	began := time.Now()
	var all sync.WaitGroup
	for range connecting {
		all.Go(func() {
			buf := make([]byte, 1)
			for ctx.Err() == nil {
				due := began.Add(time.Duration(float64(made.Add(1)) / float64(max(rate, 1)) * float64(time.Second)))
				if rate > 0 && sleep(ctx, time.Until(due)) != nil {
					made.Add(^uint64(0))
					return
				}
				c, err := from.DialContext(ctx, "tcp", address)
				if err != nil {
					continue // it may be reset before it is there
				}
				_ = c.(*net.TCPConn).SetLinger(0)
				_ = c.SetDeadline(time.Now().Add(progressTimeout))
				_, _ = c.Read(buf) // until the daemon closes
				_ = c.Close()
			}
		})
	}
	all.Wait()
	return made.Load()
}

// checkBanned makes sure that the stranger was turned away, or the figures mean nothing.
func checkBanned(ctx context.Context, d *daemon) error {
	body, err := d.get(ctx, "/bans")
	if err != nil {
		return err
	}
	defer body.Close()
	var list served.BanList
	if err := json.NewDecoder(body).Decode(&list); err != nil {
		return err
	}
	for _, e := range list.Bans {
		if e.Address == stranger.String() && e.Banned && e.Refused > 0 {
			return nil
		}
	}
	return fmt.Errorf("%v was not banned: the daemon lists %+v", stranger, list.Bans)
}

func printAccess(out io.Writer, record *AccessRecord) {
	t := newRows(out, "Access", "figure", "median", "")
	for _, name := range accessFigures {
		if f := record.Figures[name]; f != nil {
			t.add(name, fmt.Sprintf("%.4g", f.Median), f.Unit)
		}
	}
	t.end()
	printTargets(out, record.Targets)
}
