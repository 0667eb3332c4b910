package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/daemon"
)

type bansOptions struct {
	adminTarget
	timeout time.Duration
	json    bool
	all     bool
}

func bansCommand(std streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bans",
		Short: "Show and clear the addresses whose handshakes failed",
		Long: `A daemon slows addresses from which handshakes fail, and bans them at the fifth failure for 5 minutes from the last one. A handshake that succeeds clears the address.
These commands ask the admin endpoint (--admin of ingestd serve).`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usagef("bans: no command given")
		},
	}
	cmd.AddCommand(bansListCommand(std), bansClearCommand(std))
	return cmd
}

func (o *bansOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&o.addr, "addr", "a", "http://"+daemon.DefaultAdmin, adminAddress)
	o.tokenFlag(f)
	f.DurationVar(&o.timeout, "timeout", 10*time.Second, "for the daemon to answer (exit code 5)")
	f.BoolVar(&o.json, "json", false, "print the daemon's own JSON")
}

func bansListCommand(std streams) *cobra.Command {
	o := &bansOptions{}
	cmd := &cobra.Command{
		Use:     "ls [flags]",
		Short:   "List addresses from which handshakes failed, the latest first",
		Example: `  ingestd bans ls`,
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list daemon.BanList
			return o.run(cmd.Context(), std.out, http.MethodGet, "/bans", &list, func() string { return bansText(&list, time.Now()) })
		},
	}
	o.flags(cmd)
	return cmd
}

func bansClearCommand(std streams) *cobra.Command {
	o := &bansOptions{}
	cmd := &cobra.Command{
		Use:   "clear (ADDRESS | --all) [flags]",
		Short: "Forget the failures of an address, or of all",
		Example: `  ingestd bans clear 192.0.2.7
  ingestd bans clear 2001:db8:1:2::/64
  ingestd bans clear --all`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == o.all {
				return usagef("bans clear: give an address, or --all")
			}
			query := "all=true"
			if !o.all {
				query = "address=" + url.QueryEscape(args[0])
			}
			var cleared daemon.BansCleared
			return o.run(cmd.Context(), std.out, http.MethodDelete, "/bans?"+query, &cleared, func() string { return fmt.Sprintf("%d addresses cleared\n", cleared.Cleared) })
		},
	}
	o.flags(cmd)
	cmd.Flags().BoolVar(&o.all, "all", false, "all addresses")
	return cmd
}

// run asks, and prints the answer as JSON or for a person.
func (o *bansOptions) run(ctx context.Context, w io.Writer, method, path string, into any, people func() string) error {
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	ctx, stop := deadline(ctx, o.timeout, "--timeout")
	defer stop()
	text, err := o.ask(ctx, "bans", method, path)
	if err != nil {
		return because(ctx, err)
	}
	if err := json.Unmarshal(text, into); err != nil {
		return &codeError{exitUnreachable, fmt.Errorf("what answers at %s is no ingestd", o.addr)}
	}
	if !o.json {
		text = []byte(people())
	}
	_, err = w.Write(text)
	return err
}

// bansText is a list for a person.
func bansText(list *daemon.BanList, now time.Time) string {
	switch {
	case !list.Enabled:
		return "bans are switched off (bans.enabled)\n"
	case len(list.Bans) == 0:
		return "no address has failed\n"
	}
	var b strings.Builder
	for _, e := range list.Bans {
		fmt.Fprintf(&b, "%-24s %d failures, the last %v ago", e.Address, e.Failures, now.Sub(e.Last).Round(time.Second))
		if e.Banned {
			fmt.Fprintf(&b, "; banned for %v, %d connections turned away", e.Until.Sub(now).Round(time.Second), e.Refused)
		}
		b.WriteString("\n")
	}
	return b.String()
}
