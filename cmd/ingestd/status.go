package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/daemon"
)

type statusOptions struct {
	adminTarget
	json    bool
	timeout time.Duration
}

func statusCommand(std streams) *cobra.Command {
	o := &statusOptions{}
	cmd := &cobra.Command{
		Use:   "status [flags]",
		Short: "Show who waits for whom in a running daemon",
		Long: `Show each table, producer, trainer and group of a running daemon, with what it waits for, on whom that depends, and since when. It asks the admin endpoint
(--admin of ingestd serve) and changes nothing. Ends with code 0 if the daemon serves, 3 if it is starting or draining, 4 if none answers.`,
		Example: `  ingestd status
  ingestd status --json | jq '.waits'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), std.out)
		},
	}
	cmd.Flags().StringVarP(&o.addr, "addr", "a", "http://"+daemon.DefaultAdmin, adminAddress)
	o.tokenFlag(cmd.Flags())
	cmd.Flags().BoolVar(&o.json, "json", false, "print the daemon's own JSON")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 10*time.Second, "for the daemon to answer (exit code 5)")
	return cmd
}

func (o *statusOptions) run(ctx context.Context, w io.Writer) error {
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	ctx, stop := deadline(ctx, o.timeout, "--timeout")
	defer stop()
	text, err := o.ask(ctx, "status", http.MethodGet, "/status")
	if err != nil {
		return because(ctx, err)
	}
	var s daemon.Status
	if err := json.Unmarshal(text, &s); err != nil || s.State == "" {
		return &codeError{exitUnreachable, fmt.Errorf("what answers at %s is no ingestd: its status is not one", o.addr)}
	}
	if o.json {
		_, err = w.Write(text)
	} else {
		_, err = io.WriteString(w, statusText(&s))
	}
	if err == nil && s.State != "serving" {
		err = &codeError{exitRefused, fmt.Errorf("the daemon is %s", s.State)}
	}
	return err
}

// statusText is the status for a person.
func statusText(s *daemon.Status) string {
	var b strings.Builder
	fmt.Fprintf(&b, "ingestd %s, %s for %v\n", s.Version, s.State, since(s, s.Started))
	accessText(&b, &s.Access)
	if q := s.Producers.QUIC; q != nil {
		fmt.Fprintf(&b, "%d of %d QUIC connections; of them, nobody was let in yet on %d, and %d are shaking hands\n", q.Open+q.HalfOpen, q.Max, q.Strangers, q.HalfOpen)
	}
	for _, t := range s.Tables {
		tableText(&b, s, &t)
	}
	for _, t := range s.Weights {
		weightsText(&b, s, &t)
	}
	first := true
	for _, c := range s.Producers.Connections {
		if c.Table == "" { // still shaking hands, or being told why it is refused
			if first {
				b.WriteString("\nno table yet\n")
			}
			first = false
			fmt.Fprintf(&b, "  %s%s\n", c.Name(), waitsText(s, c.Waits))
		}
	}
	return b.String()
}

// accessText says who was not let in, where anybody was not.
func accessText(b *strings.Builder, a *daemon.AccessStatus) {
	if t := a.Tokens; t != nil {
		fmt.Fprintf(b, "%d tokens; %d handshakes with one, %d by user, %d not authenticated, %d not permitted\n", len(t.Tokens), t.ByToken, t.ByUser, t.NotAuthenticated, t.NotPermitted)
		if t.Broken != "" {
			fmt.Fprintf(b, "  the file of tokens cannot be used, and those before are in force: %s\n", t.Broken)
		}
	}
	if bans := a.Bans; bans != nil && bans.Addresses > 0 {
		fmt.Fprintf(b, "%d addresses from which handshakes failed, %d of them banned: ingestd bans ls\n", bans.Addresses, bans.Banned)
		if k := bans.Kernel; k != nil && k.Addresses > 0 {
			fmt.Fprintf(b, "  the kernel turns %d of those away, and has dropped %d SYNs and %d datagrams\n", k.Addresses, k.DroppedTCP, k.DroppedQUIC)
		}
	}
}

func since(s *daemon.Status, t time.Time) time.Duration {
	d := s.Now.Sub(t)
	switch {
	case d > time.Minute:
		return d.Round(time.Second)
	case d > time.Second:
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Millisecond)
}

func waitsText(s *daemon.Status, w *daemon.Waits) string {
	if w == nil {
		return ""
	}
	return fmt.Sprintf(": has waited %v for %s, on %s", since(s, w.Since), w.For, w.On)
}

func tableText(b *strings.Builder, s *daemon.Status, t *daemon.TableStatus) {
	fmt.Fprintf(b, "\ntable %s: %s\n", t.Name, cut(t.Spec, 100))
	fmt.Fprintf(b, "  %d batches of %d, %.0f %% in use; %d samples committed, %d unread; %d streams open, %d sessions known\n",
		t.Batches, t.BatchSize, 100*t.Fill, t.Committed, t.Unread, t.Streams, t.Sessions)
	if t.Path != "" {
		fmt.Fprintf(b, "  kept in %s\n", t.Path)
	}
	if t.Tensors != nil {
		tensorsText(b, t.Tensors)
	}
	for _, c := range s.Producers.Connections {
		if c.Table != t.Name {
			continue
		}
		doing := waitsText(s, c.Waits)
		if doing == "" {
			doing = ": " + c.State
		}
		fmt.Fprintf(b, "  %s, stream %d, %d samples%s\n", c.Name(), c.Stream, c.Samples, doing)
	}
	for _, f := range s.Local.Producers {
		if f.Table != t.Name {
			continue
		}
		doing := waitsText(s, f.Waits)
		if doing == "" {
			doing = ": " + f.State
		}
		fmt.Fprintf(b, "  %s, stream %d, %d samples, has %d places%s\n", f.Name(), f.Stream, f.Samples, f.Lent, doing)
	}
	for _, g := range t.Groups {
		fmt.Fprintf(b, "  group %s: %d trainers, %d batches unread, %d held%s\n", g.Name, g.Trainers, g.Unread, g.Leased, waitsText(s, g.Waits))
	}
	for _, tr := range s.Trainers {
		if tr.Table == t.Name {
			fmt.Fprintf(b, "  %s%s%s\n", tr.Name(), heldText(s, tr.Held), waitsText(s, tr.Waits))
		}
	}
}

// tensorsText says which step each producer of tensors is at.
func tensorsText(b *strings.Builder, t *daemon.TensorsStatus) {
	bad := uint64(0)
	for _, n := range t.BadChunks {
		bad += n
	}
	fmt.Fprintf(b, "  newest step %d; %d steps completed, %d refused, %d aborted, %d cut short; %d chunks, %d bad\n",
		t.Newest, t.Completed, t.Refused, t.Aborted, t.CutShort, t.Chunks, bad)
	for _, p := range t.Producers {
		fmt.Fprintf(b, "  producer %q, stream %d, manifest %s: ", p.Name, p.Stream, p.Manifest)
		if p.State == "none" {
			b.WriteString("no step yet\n")
		} else {
			fmt.Fprintf(b, "step %d %s, %d of %d bytes\n", p.Step, p.State, p.Bytes, p.Of)
		}
	}
}

// weightsText is a table of weights for a person.
func weightsText(b *strings.Builder, s *daemon.Status, t *daemon.WeightsStatus) {
	fmt.Fprintf(b, "\ntable %s: weights, newest generation %d\n", t.Name, t.Newest)
	fmt.Fprintf(b, "  %d tensors of %v in %d places, segment of %v, at most %v; %d generations published\n",
		t.Tensors, daemon.Size(t.DataBytes), t.Places, daemon.Size(t.SegmentBytes), daemon.Size(t.Capacity), t.Published)
	if p := t.Publisher; p != nil {
		fmt.Fprintf(b, "  publisher %d, %s, for %v", p.Number, p.Who, since(s, p.Since))
		if p.Writing > 0 {
			fmt.Fprintf(b, ": writes generation %d", p.Writing)
		}
		b.WriteString("\n")
	}
	for _, g := range t.Generations {
		fmt.Fprintf(b, "  generation %d in place %d, published %v ago, %.16s\n", g.Generation, g.Place, since(s, g.Published), g.Digest)
		for _, p := range g.Pins {
			fmt.Fprintf(b, "    held by reader %d, %s, for %v\n", p.Reader, p.Who, since(s, p.Since))
		}
	}
	for _, r := range t.Readers {
		fmt.Fprintf(b, "  reader %d, %s, for %v", r.Number, r.Who, since(s, r.Since))
		if r.Remote != nil && r.Remote.Generation > 0 {
			fmt.Fprintf(b, ": is sent generation %d, %d of %d bytes", r.Remote.Generation, r.Remote.Sent, r.Remote.Total)
		}
		b.WriteString("\n")
	}
}

func heldText(s *daemon.Status, held []daemon.LeaseStatus) string {
	switch len(held) {
	case 0:
		return " holds no batch"
	case 1:
		return fmt.Sprintf(" has held batch %d for %v", held[0].Batch, since(s, held[0].Since))
	}
	return fmt.Sprintf(" holds %d batches, number %d for %v", len(held), held[0].Batch, since(s, held[0].Since))
}
