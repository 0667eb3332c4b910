package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/lossynet"
)

// LinkRecord is everything that bench link found out, as --json writes it.
type LinkRecord struct {
	Format     int          `json:"format"` // 1
	Started    time.Time    `json:"started"`
	Machine    Machine      `json:"machine"`
	Options    Options      `json:"options"`
	Congestion string       `json:"congestion"` // control of TCP
	Results    []LinkResult `json:"results"`
	Finished   time.Time    `json:"finished"`
}

// LinkResult is what one transport did over one link.
type LinkResult struct {
	CaseResult
	Link       string              `json:"link"`
	Conditions lossynet.Conditions `json:"conditions"`
	ToDaemon   lossynet.Stats      `json:"to_daemon"` // of all runs, the bare loop's too
	FromDaemon lossynet.Stats      `json:"from_daemon"`
}

// linkCase is one link.
type linkCase struct {
	name, what string
	conditions lossynet.Conditions
	alone      bool // sender and daemon are on one side, so that the link has nothing to do
}

const linkSeed = 1

// linkCases go from a loopback device to a bad day. Delays are those of one direction.
func linkCases() []linkCase {
	return []linkCase{
		{name: "loopback", what: "the loopback device of a namespace", alone: true},
		{name: "clean", what: "packets of 1,500 bytes, untouched"},
		{name: "loss", what: "1 % lost", conditions: lossynet.Conditions{Loss: 0.01}},
		{name: "delay", what: "50 ms each way", conditions: lossynet.Conditions{Delay: 50 * time.Millisecond}},
		{name: "reorder", what: "10 % up to 5 ms late", conditions: lossynet.Conditions{Late: 0.1, LateBy: 5 * time.Millisecond}},
		{name: "narrow", what: "100 Mbit/s, 10 ms each way", conditions: lossynet.Conditions{Rate: 12_500_000, Delay: 10 * time.Millisecond}},
		{name: "all", what: "1 % lost, 50 ms each way, 10 % up to 5 ms late",
			conditions: lossynet.Conditions{Loss: 0.01, Delay: 50 * time.Millisecond, Late: 0.1, LateBy: 5 * time.Millisecond}},
	}
}

func smokeLinkCases() []linkCase {
	return []linkCase{
		{name: "loopback", what: "the loopback device of a namespace", alone: true},
		{name: "all", what: "everything at once",
			conditions: lossynet.Conditions{Loss: 0.01, Delay: 2 * time.Millisecond, Late: 0.1, LateBy: time.Millisecond, Rate: 100_000_000}},
	}
}

func linkNames(cases []linkCase) string {
	var names []string
	for _, c := range cases {
		names = append(names, c.name)
	}
	return strings.Join(names, ", ")
}

// linkTransports are what is compared; the others' rates are shown as ratios to the first one's.
var linkTransports = []string{transportTCP, transportTLS, transportQUIC}

func linkCommand() *cobra.Command {
	opt := defaultLinkOptions()
	congestion := ""
	cmd := &cobra.Command{
		Use:   "link",
		Short: "TCP, TLS and QUIC over links that lose, delay and reorder packets, beside bare loops over the same links; needs root",
		Example: "  ingestd bench link --json bench.json\n" +
			"  ingestd bench link --case loss,delay --congestion reno",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runLink(ctx, opt, congestion, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	opt.Common.flags(f, linkNames(linkCases()))
	f.StringVar(&congestion, "congestion", "", "congestion control of TCP, such as reno, cubic or bbr; default: this machine's. That of quic-go is Reno")
	f.BoolVar(&opt.Client, "client", false, "send with the client library instead of the bench's own loop")
	return cmd
}

// defaultLinkOptions leave connections over long ways some time, and the kernel the choice of buffers.
func defaultLinkOptions() Options {
	opt := defaultOptions()
	opt.Runs, opt.Duration, opt.Warmup = 3, 3*time.Second, 2*time.Second
	opt.OpenDuration, opt.SendBuffer, opt.Only = 0, 0, contenderFull+","+contenderBare
	return opt
}

// chooseLinks returns the links that are asked for.
func chooseLinks(opt *Options) ([]linkCase, error) {
	cases := linkCases()
	if opt.Smoke {
		cases = smokeLinkCases()
	}
	if opt.Case == "" {
		return cases, nil
	}
	var chosen []linkCase
	for name := range strings.SplitSeq(opt.Case, ",") {
		i := slices.IndexFunc(cases, func(c linkCase) bool { return c.name == strings.TrimSpace(name) })
		if i < 0 {
			return nil, fmt.Errorf("no link is called %q: choose from %s", name, linkNames(cases))
		}
		chosen = append(chosen, cases[i])
	}
	return chosen, nil
}

// runLink measures, prints and writes the record.
func runLink(ctx context.Context, opt Options, congestion string, out, log io.Writer) error {
	links, err := chooseLinks(&opt)
	if err == nil {
		err = opt.Common.settle()
	}
	if err != nil {
		return err
	}
	record := &LinkRecord{Format: 1, Started: time.Now().UTC(), Machine: readMachine(), Options: opt}
	for _, link := range links {
		for _, transport := range linkTransports {
			result, used, err := measureLink(ctx, opt, link, transport, congestion, log)
			if err != nil {
				return fmt.Errorf("link %s, %s: %w", link.name, transport, err)
			}
			record.Results, record.Congestion = append(record.Results, *result), used
		}
	}
	record.Finished = time.Now().UTC()
	if opt.JSON != "-" {
		printLinks(out, record, links)
	}
	return opt.report(record, nil, out)
}

// measureLink has one transport push over a new link, in all runs, and returns also which congestion control TCP had.
func measureLink(ctx context.Context, opt Options, link linkCase, transport, congestion string, log io.Writer) (_ *LinkResult, used string, err error) {
	link.conditions.Seed = linkSeed
	l, err := lossynet.Start(link.conditions)
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	for _, side := range []*lossynet.Side{l.A, l.B} {
		if used, err = controlCongestion(side, congestion); err != nil {
			return nil, "", err
		}
	}
	opt.sites = sites{sender: l.A, server: l.B}
	if link.alone {
		opt.sites.sender = l.B
	}
	if opt.certs, err = makeCertificates(opt.sites.host()); err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, opt.certs.remove()) }()
	c := makeCase(16*kib, 1, 1, 4, 256).over(transport)
	c.Name = link.name + "/" + transport
	measured, err := (&runner{opt: &opt, log: log}).runCase(ctx, c)
	if err != nil {
		return nil, "", err
	}
	result := &LinkResult{CaseResult: *measured, Link: link.name, Conditions: link.conditions}
	if result.ToDaemon, result.FromDaemon, err = l.Stats(); err != nil {
		return nil, "", err
	}
	return result, used, result.check(link)
}

// check makes sure that the link was what its figures are said to be of.
func (r *LinkResult) check(link linkCase) error {
	both := plus(r.ToDaemon, r.FromDaemon)
	switch {
	case link.alone != (both.Packets == 0):
		return fmt.Errorf("%d packets went over the link", both.Packets)
	case (r.Conditions.Loss > 0) != (both.Lost > 0) || (r.Conditions.Late > 0) != (both.Overtaken > 0):
		return fmt.Errorf("of %d packets, %d were lost and %d overtaken: that is not what was asked for", both.Packets, both.Lost, both.Overtaken)
	}
	return nil
}

func plus(a, b lossynet.Stats) lossynet.Stats {
	return lossynet.Stats{
		Packets: a.Packets + b.Packets, Lost: a.Lost + b.Lost, Dropped: a.Dropped + b.Dropped, Delivered: a.Delivered + b.Delivered, Overtaken: a.Overtaken + b.Overtaken,
	}
}

const congestionFile = "/proc/sys/net/ipv4/tcp_congestion_control" // of the namespace of the thread that opens it

// controlCongestion chooses a side's congestion control of TCP unless that is "", and returns which it is.
func controlCongestion(side *lossynet.Side, name string) (used string, err error) {
	return lossynet.In(side, func() (string, error) {
		if name != "" {
			if err := os.WriteFile(congestionFile, []byte(name), 0); err != nil {
				return "", fmt.Errorf("--congestion %s: %w; this machine has: %s", name, err, readLine("/proc/sys/net/ipv4/tcp_available_congestion_control"))
			}
		}
		text, err := os.ReadFile(congestionFile)
		return strings.TrimSpace(string(text)), err
	})
}

func printLinks(out io.Writer, r *LinkRecord, links []linkCase) {
	printMachine(out, &r.Machine)
	fmt.Fprintf(out, "Samples of 16 KiB over one connection. Medians of %d runs of %v each after %v of warm-up. bare: a loop over the same transport and link that only reads and acks.\n"+
		"TCP and TLS: congestion control %s; QUIC: Reno. What the link did counts packets of both directions and all runs.\n", r.Options.Runs, r.Options.Duration, r.Options.Warmup, r.Congestion)
	for _, link := range links {
		fmt.Fprintf(out, "  %s: %s\n", link.name, link.what)
	}
	fmt.Fprintln(out)
	t := newRows(out, "Links", "link", "over", "MB/s", "bare", "ours/bare", "to TCP", "CPU-s/GB", "bare", "lost", "overtaken", "dropped")
	tcp := map[string]float64{} // MB/s by link
	for i := range r.Results {
		one := &r.Results[i]
		ours, bare := one.Full.Median, one.Bare.Median
		if one.Transport == transportTCP {
			tcp[one.Link] = ours.GBPerSecond
		}
		did := plus(one.ToDaemon, one.FromDaemon)
		share := func(n uint64) string {
			if n == 0 {
				return ""
			}
			return fmt.Sprintf("%.2f %%", 100*float64(n)/float64(did.Packets))
		}
		t.add(one.Link, one.Transport, fmt.Sprintf("%.1f", 1e3*ours.GBPerSecond), fmt.Sprintf("%.1f", 1e3*bare.GBPerSecond), fmt.Sprintf("%.2f", ours.GBPerSecond/bare.GBPerSecond),
			fmt.Sprintf("%.2f", ours.GBPerSecond/tcp[one.Link]), cpuText(ours.ServerCPU), cpuText(bare.ServerCPU), share(did.Lost), share(did.Overtaken), share(did.Dropped))
	}
	t.end()
}
