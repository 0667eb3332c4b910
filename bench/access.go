package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/auth"
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
	Floods   []Flood           `json:"floods"` // one per run beside connects
	Targets  []Target          `json:"targets"`
	Finished time.Time         `json:"finished"`
}

// The figures of handshakes.
const (
	figureHandshakes = "handshakes/s with a token"
	figureUnasked    = "handshakes/s of a daemon without tokens"
)

// handshakesMin is the target, per second.
const handshakesMin = 2000

// accessCases are what --case takes.
var accessCases = []string{"handshakes", "strangers-tcp", "strangers-tls", "strangers-quic"}

// accessFigures are those of all cases, in order.
func accessFigures() []string {
	all := []string{figureHandshakes, figureUnasked}
	for _, transport := range []string{transportTCP, transportTLS, transportQUIC} {
		for _, figure := range append(slices.Clone(besides), perSecond) {
			all = append(all, over(transport, figure))
		}
	}
	return all
}

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
	opt.Common.flags(f, strings.Join(accessCases, ", "))
	f.IntVar(&opt.Clients, "clients", opt.Clients, "handshakes under way at once")
	f.IntVar(&opt.Connects, "connects", opt.Connects, "connects per second of the banned address; 0: as many as go, and no target for them")
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
	for _, name := range accessCases {
		if opt.Case != "" && !slices.Contains(strings.Split(opt.Case, ","), name) {
			continue
		}
		var err error
		if transport, ok := strings.CutPrefix(name, "strangers-"); ok {
			err = r.strangers(ctx, transport)
		} else {
			err = r.handshakes(ctx)
		}
		if err != nil {
			return fmt.Errorf("case %s: %w", name, err)
		}
	}
	if len(r.figures) == 0 {
		return fmt.Errorf("--case %q: there are %s", opt.Case, strings.Join(accessCases, ", "))
	}
	for _, f := range r.figures {
		f.Median = median(f.Runs)
	}
	record.Floods, record.Targets = r.floods, r.targets()
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
	floods  []Flood
}

// targets compares what was measured with what must be reached.
func (r *accessRunner) targets() (all []Target) {
	if f := r.figures[figureHandshakes]; f != nil {
		all = append(all, atLeast("handshakes", figureHandshakes, f.Median, handshakesMin))
	}
	for _, transport := range []string{transportTCP, transportTLS, transportQUIC} {
		name, rate := "strangers-"+transport, func(figure string) float64 { return r.figures[over(transport, figure)].Median }
		if r.figures[over(transport, perSecond)] == nil {
			continue
		}
		all = append(all, atLeast(name, "GB/s to the rate alone", rate(besideDaemon)/rate(besideNothing), besideMin))
		if r.opt.Connects > 0 {
			all = append(all, atLeast(name, perSecond, rate(perSecond), connectsMet*float64(r.opt.Connects)))
		}
	}
	return all
}

func (r *accessRunner) add(figure string, v float64) {
	f := r.figures[figure]
	if f == nil {
		unit := "1/s"
		if strings.Contains(figure, "GB/s") {
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

func printAccess(out io.Writer, record *AccessRecord) {
	printMachine(out, &record.Machine)
	t := newRows(out, "Access", "figure", "median", "")
	for _, name := range accessFigures() {
		if f := record.Figures[name]; f != nil {
			t.add(name, fmt.Sprintf("%.4g", f.Median), f.Unit)
		}
	}
	t.end()
	if len(record.Floods) > 0 {
		t = newRows(out, "Connects of the banned address, run by run; arrived: counted by the kernel or the daemon at the other side",
			"transport", "against", "arrived/s", "begun", "failed", "arrived", "unanswered", "closed", "open")
		for _, f := range record.Floods {
			cells := []string{f.Transport, f.Against, fmt.Sprintf("%.0f", float64(f.Arrived)/f.Seconds)}
			for _, n := range []uint64{f.Begun, f.Failed, f.Arrived, f.NoAnswer, f.Closed, f.Open} {
				cells = append(cells, fmt.Sprint(n))
			}
			t.add(cells...)
		}
		t.end()
	}
	printTargets(out, record.Targets)
}
