package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"

	"github.com/ingestd/ingestd/wire"
)

// Token is what a client proves to the daemon to have, which proves the same to it: a name and a secret, as they stand in the daemon's file of tokens. The zero Token is
// none. Printed, logged or marshalled it does not show the secret.
type Token = wire.Token

// Secret is a token's secret; NewSecret makes one of a text.
type Secret = wire.Secret

// The errors of clients with a token.
var (
	// ErrNotChallenged says that the daemon accepted this client without having proved to know its token.
	ErrNotChallenged = wire.ErrNotChallenged
	// ErrDaemonUnproven says that the daemon does not know the token with this secret, or that it is another than it should be.
	ErrDaemonUnproven = wire.ErrDaemonUnproven
)

// TokenVariable is the environment variable that TokenFromEnvironment reads.
const TokenVariable = "INGESTD_TOKEN"

// NewSecret checks a secret: 32 to 1,024 characters of printable ASCII.
func NewSecret(text string) (Secret, error) { return wire.NewSecret(text) }

// ParseToken reads NAME:SECRET.
func ParseToken(text string) (Token, error) { return wire.ParseToken(text) }

// tokenFileMax is far above what a token can have.
const tokenFileMax = 4 << 10

// ReadToken reads a file whose first line is NAME:SECRET, and which has no other. Where files have modes, it refuses one that everybody may read.
func ReadToken(path string) (Token, error) {
	f, err := os.Open(path)
	if err != nil {
		return Token{}, fmt.Errorf("client: token: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && info.Mode()&0o007 != 0 && info.Mode().IsRegular() && runtime.GOOS != "windows" {
		err = fmt.Errorf("%s has mode %#o, so that everybody on this machine may use it; run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	if err != nil {
		return Token{}, fmt.Errorf("client: token: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(f, tokenFileMax))
	if err != nil {
		return Token{}, fmt.Errorf("client: token: %w", err)
	}
	t, err := ParseToken(strings.TrimRight(string(text), "\r\n"))
	if err != nil {
		return Token{}, fmt.Errorf("client: token file %s: %w", path, err)
	}
	return t, nil
}

// TokenFromEnvironment reads the token from INGESTD_TOKEN, NAME:SECRET. Without that variable it is the zero Token.
func TokenFromEnvironment() (Token, error) {
	text := os.Getenv(TokenVariable)
	if text == "" {
		return Token{}, nil
	}
	t, err := ParseToken(text)
	if err != nil {
		return Token{}, fmt.Errorf("client: %s: %w", TokenVariable, err)
	}
	return t, nil
}

// greet says hello over a connection, proves the hello's token if it names one, and reads the reply, until ctx ends.
func greet(ctx context.Context, conn net.Conn, hello *wire.Hello, accepted wire.Accepted) error {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(past) })
	exporter, err := exporterOf(ctx, conn)
	if err == nil {
		err = wire.Greet(conn, conn, hello, exporter, accepted)
	}
	switch {
	case !stop():
		return ctx.Err()
	case errors.Is(err, wire.ErrHello), err == nil, answered(err):
		return err
	}
	if refused := refusedTLS(err); refused != nil { // a daemon judges a certificate when its client has shaken hands already
		return refused
	}
	if taken := (*wire.WriteError)(nil); errors.As(err, &taken) {
		err = taken.Err
	}
	return fmt.Errorf("%w before it replied (%w): it may be stopping, or serve all it can: try again; its log may say why", ErrDaemonGone, err)
}

// exporterOf is what binds a proof to a connection with TLS; nil for others.
func exporterOf(ctx context.Context, conn net.Conn) ([]byte, error) {
	if c, ok := conn.(interface{ HandshakeContext(context.Context) error }); ok {
		if err := c.HandshakeContext(ctx); err != nil {
			return nil, err
		}
	}
	c, ok := conn.(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return nil, nil
	}
	state := c.ConnectionState()
	return state.ExportKeyingMaterial(wire.ExporterLabel, nil, wire.ExporterBytes)
}
