package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/devcert"
)

func certCommand(std streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cert",
		Short: "Make an authority and certificates for TLS and QUIC, for development",
		Long: `cert ca makes an authority of your own in a folder; cert server and cert client make certificates that it signs. Daemons take server.pem and server.key, and with
ca.pem ask clients for a certificate of it; clients take ca.pem, to know the daemon, and client.pem and client.key. Whoever has ca.key can make more of both, so
keep it where only you read it. Nothing is overwritten.`,
		Example: `  ingestd cert ca
  ingestd cert server --host daemon.example.com --host 192.0.2.7
  ingestd cert client --name worker-1`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usagef("cert: no command given")
		},
	}
	cmd.AddCommand(certAuthorityCommand(std), certServerCommand(std), certClientCommand(std))
	return cmd
}

// certOptions is what the commands that make certificates share.
type certOptions struct {
	dir  string
	name string
	days int
}

func (o *certOptions) flags(cmd *cobra.Command, days int) {
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "certs", "folder of the authority and of the certificates")
	f.IntVar(&o.days, "days", days, "how long it is valid")
}

// daysMax keeps dates within what certificates can say.
const daysMax = 36500

func (o *certOptions) check() error {
	if o.days < 1 || o.days > daysMax {
		return usagef("cert: --days is %d: must be 1 to %d", o.days, daysMax)
	}
	if o.name == "" || o.name != filepath.Base(o.name) || o.name == "." || o.name == ".." || strings.HasPrefix(o.name, "-") {
		return usagef("cert: --name is %q: must be the name of a file, without a folder", o.name)
	}
	return nil
}

func (o *certOptions) valid() time.Duration { return time.Duration(o.days) * 24 * time.Hour }

// write writes the pair and says where it is.
func (o *certOptions) write(std streams, what string, pair *devcert.Pair) error {
	certificate, key, err := pair.Write(o.dir, o.name)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(std.out, "%s\n  certificate  %s\n  key          %s\n  valid until  %s\n", what, certificate, key, pair.Parsed().NotAfter.UTC().Format(time.DateOnly))
	return err
}

func certAuthorityCommand(std streams) *cobra.Command {
	o := &certOptions{name: "ca"}
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Make an authority: ca.pem and ca.key",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if err := o.check(); err != nil {
				return err
			}
			if err := os.MkdirAll(o.dir, 0o700); err != nil {
				return err
			}
			host, err := os.Hostname()
			if err != nil {
				host = "unknown host"
			}
			ca, err := devcert.NewAuthority("ingestd authority of "+host, o.valid())
			if err != nil {
				return err
			}
			return o.write(std, "authority", &ca.Pair)
		},
	}
	o.flags(cmd, 3650)
	return cmd
}

func certServerCommand(std streams) *cobra.Command {
	o := &certOptions{}
	var hosts []string
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Make a certificate for a daemon, valid for the names and addresses under which clients reach it",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			return o.make(std, "server, reached as "+strings.Join(hosts, ", "), func(ca *devcert.Authority) (*devcert.Pair, error) {
				return ca.NewServer(hosts, o.valid())
			})
		},
	}
	o.flags(cmd, 365)
	f := cmd.Flags()
	f.StringVar(&o.name, "name", "server", "name of the files")
	f.StringSliceVar(&hosts, "host", []string{"localhost", "127.0.0.1", "::1"}, "name or address of the daemon; may be given more than once")
	return cmd
}

func certClientCommand(std streams) *cobra.Command {
	o := &certOptions{}
	cmd := &cobra.Command{
		Use:   "client",
		Short: "Make a certificate for a client, for daemons that ask for one",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			return o.make(std, "client "+o.name, func(ca *devcert.Authority) (*devcert.Pair, error) {
				return ca.NewClient(o.name, o.valid())
			})
		},
	}
	o.flags(cmd, 365)
	cmd.Flags().StringVar(&o.name, "name", "client", "name of the client and of the files")
	return cmd
}

// make makes a certificate that the folder's authority signs.
func (o *certOptions) make(std streams, what string, sign func(*devcert.Authority) (*devcert.Pair, error)) error {
	if err := o.check(); err != nil {
		return err
	}
	ca, err := devcert.ReadAuthority(o.dir)
	if err != nil {
		return err
	}
	pair, err := sign(ca)
	if err != nil {
		return err
	}
	return o.write(std, what, pair)
}
