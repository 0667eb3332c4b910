package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// target is where a command connects to.
type target struct {
	addr      string
	table     string
	wait      time.Duration
	tokenFile string
	tls       client.TLS
}

func (t *target) flags(cmd *cobra.Command, addr string) {
	f := cmd.Flags()
	f.StringVarP(&t.addr, "addr", "a", addr, "address of the daemon")
	f.StringVarP(&t.table, "table", "t", daemon.DefaultTable, "table")
	f.StringVar(&t.tokenFile, "token-file", "", "file whose one line is NAME:SECRET, a token of the daemon's; default: the environment variable "+client.TokenVariable)
	f.DurationVar(&t.wait, "wait", 0, "keep trying to connect for so long, for a daemon that is just starting")
}

// tlsFlags are for commands that connect to tls:// and quic:// addresses, too.
func (t *target) tlsFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&t.tls.Authorities, "tls-ca", "", "for tls:// and quic://: file (PEM) with the authorities that the daemon's certificate must come from; default: those that this machine believes")
	f.StringVar(&t.tls.Certificate, "tls-cert", "", "file (PEM) with a certificate of one's own, for daemons that ask for one")
	f.StringVar(&t.tls.Key, "tls-key", "", "file with its key")
	f.StringVar(&t.tls.ServerName, "tls-name", "", "name that the daemon's certificate must have; default: the address's")
	f.BoolVar(&t.tls.InsecureSkipVerify, "tls-insecure-skip-verify", false, "take any certificate: whoever sits in between can read and change all that is sent")
}

// token is the one of --token-file or the environment, or none.
func (t *target) token() (token client.Token, err error) {
	if t.tokenFile != "" {
		token, err = client.ReadToken(t.tokenFile)
	} else {
		token, err = client.TokenFromEnvironment()
	}
	if err != nil {
		return client.Token{}, usagef("%w", err)
	}
	return token, nil
}

// connectPause is the time between two tries to connect.
const connectPause = 100 * time.Millisecond

// retry calls connect until it does not fail for want of a daemon, or the time of --wait is over.
func (t *target) retry(ctx context.Context, connect func() error) error {
	until := time.Now().Add(t.wait)
	for {
		err := connect()
		if exitCode(err) != exitUnreachable || time.Now().Add(connectPause).After(until) {
			return err
		}
		select {
		case <-time.After(connectPause):
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

// dial connects as a producer. settle is asked when the daemon has another spec: it returns the one to try again with, or an error.
func (t *target) dial(ctx context.Context, cfg client.Config, settle func(table *spec.Spec) (*spec.Spec, error)) (*client.Producer, error) {
	cfg.Table = t.table
	cfg.Client = "ingestd push/" + version()
	cfg.TLS = t.tls
	var err error
	if cfg.Token, err = t.token(); err != nil {
		return nil, err
	}
	var p *client.Producer
	err = t.retry(ctx, func() (err error) {
		p, err = client.Dial(ctx, t.addr, cfg)
		return err
	})
	var refusal *wire.Refusal
	if errors.As(err, &refusal) && refusal.Code == wire.CodeSpecMismatch && refusal.Spec != nil {
		if s, no := settle(refusal.Spec); no == nil {
			cfg.Spec = s
			p, err = client.Dial(ctx, t.addr, cfg)
		}
	}
	return p, err
}

// optionalSpec reads --spec, which may be left out.
func optionalSpec(text string) (*spec.Spec, error) {
	if text == "" {
		return nil, nil
	}
	s, err := daemon.LoadSpec(text)
	if err != nil {
		return nil, usagef("--spec: %w", err)
	}
	return s, nil
}

// bytesText writes a number of bytes for people.
func bytesText(n float64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for n >= 1024 && i < len(units)-1 {
		n /= 1024
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%.0f B", n)
	}
	return fmt.Sprintf("%.1f %s", n, units[i])
}

// perSecond is n over d, 0 where d is.
func perSecond(n float64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return n / d.Seconds()
}

// deadline bounds ctx by a time that a flag gave; 0 is none.
func deadline(ctx context.Context, d time.Duration, flag string) (context.Context, context.CancelFunc) {
	if d == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("%w: %s %v is over", os.ErrDeadlineExceeded, flag, d))
}
