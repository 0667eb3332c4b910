//go:build linux

package weights

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/sendfile"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// ServerConfig configures a Server. All but Stores may be left zero.
type ServerConfig struct {
	// Stores are the tables, by name.
	Stores map[string]*Store

	// Fill says who may publish in place: its Users and Groups, and the daemon's own user.
	Fill shm.FillConfig

	// ChunkBytes is the most data bytes of a chunk of a streamed publication. Default tensor.ChunkBytesDefault.
	ChunkBytes int

	// WriteTimeout is how long a peer may take to accept a reply, an answer or a notice. Default 5 s.
	WriteTimeout time.Duration

	// IdleTimeout is how long a streamed publisher may say nothing between two generations. Default 0: as long as its connection lives.
	IdleTimeout time.Duration

	// StallTimeout is how long no byte of a generation may move, to a reader or from a publisher over a connection. Default 30 s.
	StallTimeout time.Duration

	// AnswerTimeout is how long a reader over a connection may take to verify a generation that it was sent. Default 60 s.
	AnswerTimeout time.Duration

	// LingerTimeout is how long a peer that is cut off may take to read why. Default 2 s.
	LingerTimeout time.Duration

	// RemoteReadersMax is the most readers that are served over their connections, of all tables. Default 64.
	RemoteReadersMax int

	// Log is told of publishers and readers, and their ends. Default: nothing is logged.
	Log *slog.Logger
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.ChunkBytes == 0 {
		c.ChunkBytes = tensor.ChunkBytesDefault
	}
	if c.WriteTimeout == 0 {
		c.WriteTimeout = 5 * time.Second
	}
	if c.StallTimeout == 0 {
		c.StallTimeout = 30 * time.Second
	}
	if c.AnswerTimeout == 0 {
		c.AnswerTimeout = 60 * time.Second
	}
	if c.LingerTimeout == 0 {
		c.LingerTimeout = 2 * time.Second
	}
	if c.RemoteReadersMax == 0 {
		c.RemoteReadersMax = 64
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c ServerConfig) check() error {
	if err := tensor.CheckChunkBytes(c.ChunkBytes); err != nil {
		return fmt.Errorf("weights: ChunkBytes: %w", err)
	}
	for name, d := range map[string]time.Duration{
		"WriteTimeout": c.WriteTimeout, "IdleTimeout": c.IdleTimeout, "StallTimeout": c.StallTimeout, "AnswerTimeout": c.AnswerTimeout,
		"LingerTimeout": c.LingerTimeout,
	} {
		if d < 0 {
			return fmt.Errorf("weights: %s is %v, must not be negative", name, d)
		}
	}
	if c.RemoteReadersMax < 0 {
		return fmt.Errorf("weights: RemoteReadersMax is %d, must be at least 1", c.RemoteReadersMax)
	}
	return nil
}

// Server serves publishers and readers of weights.
type Server struct {
	cfg     ServerConfig
	remotes remotes

	mu       sync.Mutex
	total    ServerStats
	refusing int // peers that are being told why they are refused
}

// ServerStats counts peers since the server was made.
type ServerStats struct {
	Publishers uint64               // that were accepted
	Readers    uint64               // that were accepted
	Refused    map[wire.Code]uint64 // peers that were not
	CutOff     map[wire.Code]uint64 // peers that were accepted and ended by the daemon; bad_peer: they broke the rules
	Sent       RemoteCounts         // to readers over their connections
	Remote     []RemoteStats        // those there are now
}

// NewServer makes a server of these stores.
func NewServer(cfg ServerConfig) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, total: ServerStats{Refused: map[wire.Code]uint64{}, CutOff: map[wire.Code]uint64{}}}, nil
}

// Stats returns the counters.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.total
	all.Refused, all.CutOff = maps.Clone(all.Refused), maps.Clone(all.CutOff)
	all.Remote, all.Sent = s.remotes.stats()
	return all
}

// Serve serves a peer whose hello, of role publish or subscribe, was read, and closes its connection. It returns when the peer has ended, or soon after ctx
// has.
//
// It returns nil when the peer closed, whatever it left undone; a *wire.Refusal when it was refused and a *wire.Notice when it was cut off (both have been
// sent). Any other error is the daemon's own trouble, or the connection's.
func (s *Server) Serve(ctx context.Context, conn net.Conn, hello *wire.Hello) error {
	defer conn.Close()
	_ = conn.SetDeadline(time.Time{}) // that of the handshake is over
	sendfile.SetPatience(conn, s.cfg.StallTimeout)
	log := s.cfg.Log.With("component", "weights", "table", hello.Table, "client", hello.Client)
	err := s.serve(ctx, conn, hello, log)
	var refusal *wire.Refusal
	if errors.As(err, &refusal) {
		log.Info("refused", "role", hello.Role, "code", refusal.Code, "reason", refusal.Reason)
		s.refuse(conn, refusal)
		return refusal
	}
	var notice *wire.Notice
	if errors.As(err, &notice) {
		s.mu.Lock()
		s.total.CutOff[notice.Code]++
		s.mu.Unlock()
		log.Warn("cut off", "role", hello.Role, "code", notice.Code, "reason", notice.Reason)
	}
	return err
}

func (s *Server) serve(ctx context.Context, conn net.Conn, hello *wire.Hello, log *slog.Logger) error {
	if ctx.Err() != nil {
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	store, ok := s.cfg.Stores[hello.Table]
	if !ok {
		return wire.Refuse(wire.CodeUnknownTable, "there is no table %q of weights: this daemon has %s", hello.Table, s.tables())
	}
	who := Who{Client: hello.Client, Remote: true}
	local, _ := conn.(*net.UnixConn)
	if local != nil {
		who.PID, _ = shm.PeerOf(local)
	} else if a := conn.RemoteAddr(); a != nil {
		who.Addr = a.String()
	}
	switch hello.Role {
	case wire.RolePublish:
		m, err := tensor.ParseManifest(hello.Manifest)
		if err != nil {
			return wire.Refuse(wire.CodeBadOption, "the manifest: %v", err)
		}
		if !hello.InPlace {
			return s.servePublishStream(ctx, conn, m, store, who, log)
		}
		who.Remote = false
		return s.publishInPlace(ctx, local, m, store, who, log)
	case wire.RoleSubscribe:
		if local == nil || hello.Stream {
			return s.serveRemote(ctx, conn, hello, store, who, log)
		}
		who.Remote = false
		return s.subscribe(ctx, local, hello, store, who, log)
	default:
		return wire.Refuse(wire.CodeWrongRole, "role %q is not served here: this side serves %q and %q", hello.Role, wire.RolePublish, wire.RoleSubscribe)
	}
}

func (s *Server) tables() string {
	if len(s.cfg.Stores) == 0 {
		return "none"
	}
	return strings.Join(slices.Sorted(maps.Keys(s.cfg.Stores)), ", ")
}

// refusingMax is how many peers are told at a time why they are refused. They are under no other limit.
const refusingMax = 64

// refuse counts the refusal and sends it, then reads and drops what the peer may still have sent: closing over unread bytes would reset the connection, and the reason
// would be lost. Where too many are being told already, it says nothing.
func (s *Server) refuse(conn net.Conn, refusal *wire.Refusal) {
	if !s.beginRefusing(refusal.Code) {
		return
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.refusing--
	}()
	_ = conn.SetDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if wire.WriteRefusal(conn, refusal) == nil {
		drop(conn)
	}
}

func (s *Server) beginRefusing(code wire.Code) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.Refused[code]++
	if s.refusing >= refusingMax {
		return false
	}
	s.refusing++
	return true
}

// drop reads what still comes until the peer closes or the deadline passes.
func drop(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() != nil {
		return
	}
	for into := make([]byte, 4096); ; {
		if _, err := conn.Read(into); err != nil {
			return
		}
	}
}

// refusalOf is the refusal for what a Store would not.
func refusalOf(err error) error {
	code := wire.CodeInternal
	switch err := err.(type) {
	case *ActiveError:
		code = wire.CodePublisherActive
	case *CapacityError:
		code = wire.CodeBadOption
	case *NoGenerationError:
		code = wire.CodeNoGeneration
	case *TooManyReadersError:
		code = wire.CodeTooManyConnections
	default:
		if errors.Is(err, os.ErrClosed) {
			return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
		}
	}
	return wire.Refuse(code, "%v", err)
}

// noticeOf is the closing notice for why no newer generation comes.
func noticeOf(err error) *wire.Notice {
	replaced := (*ReplacedError)(nil)
	if errors.As(err, &replaced) {
		return &wire.Notice{Code: wire.CodeReplaced, Reason: replaced.Error()}
	}
	return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"}
}

// farewell writes a closing notice, gives a peer that broke the rules time to read it, and returns it.
func (s *Server) farewell(conn net.Conn, notice *wire.Notice) error {
	_ = conn.SetDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if _, err := conn.Write(wire.AppendNotice(nil, notice)); err == nil && notice.Code == wire.CodeBadPeer {
		drop(conn) // it may have written more, over which a close would lose the notice
	}
	return notice
}

// accepted counts a peer whose reply is about to be sent.
func (s *Server) accepted(readers, publishers uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.Readers += readers
	s.total.Publishers += publishers
}

// awaitFirst returns when the table has a generation. If there is none, a reader that did not ask to wait is refused; one that did may close meanwhile:
// io.EOF, or what the connection said.
func (s *Server) awaitFirst(ctx context.Context, conn net.Conn, store *Store, hello *wire.Hello) error {
	select {
	case <-store.First():
		return nil
	default:
	}
	if !hello.Wait {
		return refusalOf(&NoGenerationError{store.Table()})
	}
	heard := make(chan error, 1)
	go func() {
		var b [1]byte
		_, err := conn.Read(b[:])
		if err == nil {
			err = errSpoke
		}
		heard <- err
	}()
	select {
	case <-store.First():
	case <-ctx.Done():
	case err := <-heard:
		if err == errSpoke {
			return wire.Refuse(wire.CodeBadHandshake, "a reader says nothing before it was answered")
		}
		return err
	}
	_ = conn.SetReadDeadline(time.Unix(1, 0))
	err := <-heard
	_ = conn.SetReadDeadline(time.Time{})
	switch {
	case err == errSpoke:
		return wire.Refuse(wire.CodeBadHandshake, "a reader says nothing before it was answered")
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case ctx.Err() != nil:
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	return nil
}

var errSpoke = errors.New("a peer spoke out of turn")
