package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/tensorfile"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// The exit codes; docs/cli.md has the same table, and a test compares them.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitRefused     = 3
	exitUnreachable = 4
	exitTimeout     = 5
	exitData        = 6
	exitInterrupted = 7
)

var exitCodes = []struct {
	code int
	text string
}{
	{exitOK, "done"},
	{exitFailure, "failed for a reason that has no code of its own"},
	{exitUsage, "the command line or the configuration is wrong"},
	{exitRefused, "the daemon refused the connection, or ended it with a reason, or is not the one that it should be"},
	{exitUnreachable, "no daemon answered, or it went away without a reason"},
	{exitTimeout, "a time that was given ran out"},
	{exitData, "a file, a segment or a sample is not what it should be, or samples were lost"},
	{exitInterrupted, "a signal ended it before it was done"},
}

func exitCodesCommand() *cobra.Command {
	var b strings.Builder
	b.WriteString("Every command ends with one of these codes.\n\n")
	for _, c := range exitCodes {
		fmt.Fprintf(&b, "  %d  %s\n", c.code, c.text)
	}
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: b.String()}
}

// codeError gives an error its exit code.
type codeError struct {
	code int
	err  error
}

func (e *codeError) Error() string { return e.err.Error() }
func (e *codeError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &codeError{exitUsage, fmt.Errorf(format, args...)}
}

func dataf(format string, args ...any) error {
	return &codeError{exitData, fmt.Errorf(format, args...)}
}

// exitCode tells an error's code. The order matters where an error is several of these.
func exitCode(err error) int {
	var coded *codeError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.Is(err, errSignal), errors.Is(err, daemon.ErrStoppedAtOnce):
		return exitInterrupted
	case is[*daemon.ConfigError](err):
		return exitUsage
	case is[*wire.Refusal](err), is[*wire.Notice](err), errors.Is(err, client.ErrNotChallenged), errors.Is(err, client.ErrDaemonUnproven),
		is[*client.TLSRefusedError](err), is[*tls.CertificateVerificationError](err):
		return exitRefused
	case is[*tensorfile.FormatError](err), is[*ring.FormatError](err), is[*spec.MismatchError](err), is[*daemon.UnreadError](err), is[*daemon.SegmentError](err),
		is[*safetensors.FormatError](err), is[*client.BadSumError](err):
		return exitData
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	case unreachable(err):
		return exitUnreachable
	}
	return exitFailure
}

func is[T error](err error) bool {
	var t T
	return errors.As(err, &t)
}

func unreachable(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	return errors.Is(err, client.ErrDaemonGone) || errors.Is(err, wire.ErrProtocol) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// advice adds what to do where the error itself cannot know it.
func advice(err error) string {
	var refusal *wire.Refusal
	switch {
	case errors.As(err, &refusal) && refusal.Code == wire.CodeSpecMismatch && refusal.Spec != nil:
		return "the table's spec is " + cut(refusal.Spec.Text(), 400)
	case errors.As(err, &refusal) && weightsAdvice(refusal) != "":
		return weightsAdvice(refusal)
	case is[*client.TLSRefusedError](err):
		return "--tls-cert and --tls-key name the certificate of this client"
	case is[*tls.CertificateVerificationError](err):
		return "--tls-ca names the authorities that are believed, --tls-name the name that the daemon's certificate must have"
	case errors.Is(err, fs.ErrNotExist) && exitCode(err) == exitUnreachable:
		return "no socket is there: is the daemon running, and with this --listen?"
	}
	return ""
}

func cut(s string, most int) string {
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// report prints an error the way all commands do.
func report(w io.Writer, err error) {
	fmt.Fprintf(w, "ingestd: %v\n", err)
	if a := advice(err); a != "" {
		fmt.Fprintf(w, "  %s\n", a)
	}
	if exitCode(err) == exitUsage {
		fmt.Fprintln(w, "  see: ingestd help")
	}
}
