package quicingest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// Server receives samples from any number of UDP sockets. Its methods may be called from any goroutine.
type Server struct {
	cfg      Config
	quic     *quic.Config
	tls      *tls.Config
	streams  *tcpingest.Server
	door     *bans.Door // before connections
	halfOpen atomic.Int64
	stray    atomic.Uint64  // datagrams that belonged to nothing
	refused  ingest.Reasons // connections of which nobody had any use
	ended    ingest.Reasons // others

	mu       sync.Mutex
	stopping bool
	doors    map[*quic.Listener]*quic.Transport
	conns    map[*conn]struct{} // those whose handshake is done
	open     int                // those, and those whose is not
	running  sync.WaitGroup     // one per conns
	counting sync.WaitGroup     // one per doors
}

// New returns a server; Serve starts it.
func New(cfg Config) (*Server, error) {
	full, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: full, quic: full.quic(), tls: tcpingest.TLSConfig(full.TLS), door: full.Streams.Door.Beside(),
		doors: map[*quic.Listener]*quic.Transport{}, conns: map[*conn]struct{}{},
	}
	s.streams, err = tcpingest.New(full.Streams)
	return s, err
}

// Serve accepts producers on a UDP socket (see Listen) until Shutdown, ctx's end or an error of the socket. It closes the socket, after Shutdown. It returns nil after Shutdown or
// ctx's end; connections live on until Shutdown.
func (s *Server) Serve(ctx context.Context, socket net.PacketConn) error {
	tr := &quic.Transport{
		Conn:                socket,
		VerifySourceAddress: func(net.Addr) bool { return s.halfOpen.Load() >= int64(s.cfg.RetryAbove) },
		ConnContext:         s.begin,
		StatelessResetKey:   (*quic.StatelessResetKey)(s.cfg.ResetKey),
		Tracer:              (*strays)(s),
	}
	l, err := tr.Listen(s.tls, s.quic)
	if err != nil {
		_ = socket.Close()
		return fmt.Errorf("serve QUIC on %v: %w", socket.LocalAddr(), err)
	}
	if !s.addDoor(l, tr) {
		_ = tr.Close()
		_ = socket.Close()
		return nil
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		c, err := l.Accept(context.Background())
		if err != nil {
			if s.isStopping() || ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept on %v: %w", socket.LocalAddr(), err)
		}
		s.start(c)
	}
}

func (s *Server) addDoor(l *quic.Listener, tr *quic.Transport) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.doors[l] = tr
	(*strays)(s).count(tr, s.counting.Go)
	return true
}

func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// unusedNow tells whether the connection has no stream.
func (c *conn) unusedNow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams == 0
}

// How long what was written last has for arriving, as often as it is lost on the way, before its connection is closed.
const (
	lingerMin   = 50 * time.Millisecond
	lingerTrips = 16 // round trips
)

// linger returns how long that is for all connections.
func (s *Server) linger() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	longest := lingerMin
	for c := range s.conns {
		longest = max(longest, lingerTrips*c.ConnectionStats().SmoothedRTT)
	}
	return min(longest, s.cfg.Streams.LingerTimeout)
}

// Shutdown implements ingest.Transport. Connections with streams that were handed to Config.Streams.Attach stay open: Close ends them.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopping = true
	doors := slices.Collect(maps.Keys(s.doors))
	s.mu.Unlock()
	for _, l := range doors {
		_ = l.Close() // which waits for begin
	}
	err := s.streams.Shutdown(ctx)
	// What was written last is on its way yet, and a close would not wait for it. A client that has it closes.
	gone := s.gone()
	select {
	case <-gone:
	case <-time.After(s.linger()):
	}
	if s.cutOff(func(c *conn) bool { return c.unusedNow() }) == 0 {
		return errors.Join(err, s.Close())
	}
	return err
}

// Close ends all connections at once, and closes the sockets. It may be called more than once.
func (s *Server) Close() error {
	s.mu.Lock()
	s.stopping = true
	doors := s.doors
	s.doors = map[*quic.Listener]*quic.Transport{}
	s.mu.Unlock()
	s.cutOff(func(*conn) bool { return true })
	s.running.Wait()
	var errs []error
	for l, tr := range doors {
		errs = append(errs, l.Close(), tr.Close())
		if err := tr.Conn.Close(); !errors.Is(err, net.ErrClosed) { // whoever opened it may close it, too
			errs = append(errs, err)
		}
	}
	s.counting.Wait()
	return errors.Join(errs...)
}

// gone is closed when all connections are.
func (s *Server) gone() <-chan struct{} {
	gone := make(chan struct{})
	go func() {
		s.running.Wait()
		close(gone)
	}()
	return gone
}

// cutOff closes the connections for which which is true, and returns how many others there are.
func (s *Server) cutOff(which func(*conn) bool) (left int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if which(c) {
			s.running.Go(func() { c.close(string(wire.CodeShuttingDown), quicconn.CodeShutdown) })
		} else {
			left++
		}
	}
	return left
}

// Stats implements ingest.Transport. Connections are those of streams.
func (s *Server) Stats() ingest.Stats {
	st := s.streams.Stats()
	for reason, n := range s.refused.Snapshot() {
		st.Refused[reason] += n
	}
	st.Refused[ingest.RefusedDatagram] += s.stray.Load()
	st.Carriers = s.connections()
	return st
}

func (s *Server) connections() *ingest.Carriers {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &ingest.Carriers{Open: len(s.conns), HalfOpen: int(s.halfOpen.Load()), Max: s.cfg.MaxConnections, Ended: s.ended.Snapshot()}
	for c := range s.conns {
		c.mu.Lock()
		if !c.known {
			st.Strangers++
		}
		c.mu.Unlock()
	}
	return st
}

var _ ingest.Transport = (*Server)(nil)
