//go:build linux

package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// Config configures a Server. All but Trainers may be left zero.
type Config struct {
	// Trainers admits trainers, and knows the tables.
	Trainers *shm.Server

	// StallTimeout is how long a trainer may take nothing of a batch that is sent to it. Default 30 s.
	StallTimeout time.Duration

	// LingerTimeout is how long a trainer that is cut off may take to read why. Default 2 s.
	LingerTimeout time.Duration

	// Log is told of trainers and their ends. Default: nothing is logged.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.StallTimeout == 0 {
		c.StallTimeout = 30 * time.Second
	}
	if c.LingerTimeout == 0 {
		c.LingerTimeout = 2 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) check() error {
	switch {
	case c.Trainers == nil:
		return errors.New("remote: Config.Trainers is nil")
	case c.StallTimeout < 0:
		return fmt.Errorf("remote: StallTimeout is %v, must be positive", c.StallTimeout)
	case c.LingerTimeout < 0:
		return fmt.Errorf("remote: LingerTimeout is %v, must be positive", c.LingerTimeout)
	}
	return nil
}

// Server serves trainers over connections.
type Server struct {
	cfg       Config
	lastWords time.Duration // that of the constant
	known     identities
}

// NewServer returns a server, or an error for a configuration that cannot be.
func NewServer(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, lastWords: lastWords}, nil
}

// Serve answers a hello of role train and sends batches, until the trainer or ctx ends. It owns conn and closes it. When it returns the trainer holds nothing any
// more. What it returns the package's doc says.
func (s *Server) Serve(ctx context.Context, conn net.Conn, hello *wire.Hello) error {
	defer conn.Close()
	_ = conn.SetDeadline(time.Time{}) // that of the handshake is over
	log := s.cfg.Log.With("component", "remote", "table", hello.Table, "client", hello.Client, "peer", conn.RemoteAddr().String())
	err := s.serve(ctx, conn, hello, log)
	var refusal *wire.Refusal
	if errors.As(err, &refusal) {
		log.Info("refused", "role", hello.Role, "code", refusal.Code, "reason", refusal.Reason)
		if told := s.cfg.Trainers.Refused(refusal.Code); told != nil {
			defer told()
			s.dismiss(ctx, conn, wire.AppendRefusal(nil, refusal))
		}
		return refusal
	}
	return err
}

func (s *Server) serve(ctx context.Context, conn net.Conn, hello *wire.Hello, log *slog.Logger) error {
	if hello.Role != wire.RoleTrain {
		return wire.Refuse(wire.CodeWrongRole, "role %q is not served here: this side serves %q", hello.Role, wire.RoleTrain)
	}
	if ctx.Err() != nil {
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	ctx, leave, err := s.known.enter(ctx, hello)
	if err != nil {
		return err
	}
	defer leave()
	seat, err := s.cfg.Trainers.Seat(hello, peerOf(conn))
	if err != nil {
		return err
	}
	x := newSession(s, conn, seat, log.With("trainer", seat.ID, "group", seat.Member.Group()))
	return x.serve(ctx)
}

// peerOf is where a connection comes from; of a unix socket, which has no name there, what it is.
func peerOf(conn net.Conn) string {
	a := conn.RemoteAddr()
	if name := a.String(); name != "" && name != "@" {
		return name
	}
	return a.Network()
}

// lingerBytes is the most that is read and dropped while a peer reads why it was ended.
const lingerBytes = 64 << 10

// onlyReader hides the connection's other methods, so that the copy goes through a small buffer and no splice.
type onlyReader struct{ io.Reader }

// lastWords is how long peers may take to read why they are ended once the daemon waits for nobody any more.
const lastWords = 500 * time.Millisecond

// say tells the peer why it is ended, and reports whether it can read that: our side is closed then, and reads have a deadline. The caller reads what the peer still sends, for
// closing over unread bytes would reset the connection and take the reason along. stop is called when that is done.
func (s *Server) say(ctx context.Context, conn net.Conn, words []byte) (stop func() bool, ok bool) {
	_ = conn.SetDeadline(time.Now().Add(s.cfg.LingerTimeout))
	if _, err := conn.Write(words); err != nil {
		return nil, false
	}
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return nil, false
	}
	return context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now().Add(min(s.lastWords, s.cfg.LingerTimeout))) }), true
}

// dismiss is say, and drops what the peer still sends. The connection is closed by the caller.
func (s *Server) dismiss(ctx context.Context, conn net.Conn, words []byte) {
	if stop, ok := s.say(ctx, conn, words); ok {
		defer stop()
		_, _ = io.CopyN(io.Discard, onlyReader{conn}, lingerBytes)
	}
}
