package tcpingest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/wire"
)

// Server receives samples from any number of listeners. Its methods may be called from any goroutine.
type Server struct {
	cfg      Config
	counters ingest.Counters
	staging  *staging
	nextID   atomic.Uint64

	// hurry ends when Shutdown may wait no longer: connections that wait for a slot or for their peer give up.
	hurry     context.Context
	stopHurry context.CancelFunc
	// cut ends a little later: until then they tell their peers why.
	cut     context.Context
	stopCut context.CancelFunc

	// halt is closed when Shutdown begins: nobody is kept waiting before its handshake any more.
	halt chan struct{}

	large chan struct{} // holds one for each large hello that is being read, see largeHellos

	mu        sync.Mutex
	stopping  bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	refusing  int            // of conns, those that are only told why they are refused; at most refusingMax
	running   sync.WaitGroup // one per connection
}

// New returns a server; Serve starts it.
func New(cfg Config) (*Server, error) {
	full, err := cfg.WithDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg:       full,
		staging:   newStaging(full.StagingBuffers),
		halt:      make(chan struct{}),
		large:     make(chan struct{}, largeHellos),
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},
	}
	s.hurry, s.stopHurry = context.WithCancel(context.Background())
	s.cut, s.stopCut = context.WithCancel(context.Background())
	return s, nil
}

// Serve accepts producers of the native protocol on l, TCP, unix, or TLS over one of them (NewTLSListener), until Shutdown, ctx's end or an error of the listener. It closes l. It returns nil after
// Shutdown or ctx's end; connections live on until Shutdown.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return s.accept(ctx, l, s.serveHello)
}

// ServeEcho is Serve for echo's protocol; all producers push to table.
func (s *Server) ServeEcho(ctx context.Context, l net.Listener, table ingest.Table) error {
	hello, err := echoHello(table.Spec())
	if err != nil {
		_ = l.Close()
		return err
	}
	return s.accept(ctx, l, func(c *conn) { s.serveEcho(c, table, hello) })
}

func (s *Server) accept(ctx context.Context, l net.Listener, serve func(*conn)) error {
	defer l.Close()
	if !s.addListener(l) {
		return nil
	}
	defer s.removeListener(l)
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	pause := time.Duration(0)
	for {
		nc, err := l.Accept()
		if err != nil {
			if s.isStopping() || ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept on %v: %w", l.Addr(), err)
			}
			// Out of descriptors, most likely, or the peer has gone already: others must not suffer.
			s.counters.AcceptErrors.Add(1)
			if pause == 0 {
				s.cfg.Log.Error("cannot accept; trying again", "component", "tcpingest", "listener", l.Addr().String(), "err", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		pause = 0
		s.start(nc, serve)
	}
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// start gives a new connection its goroutine.
func (s *Server) start(nc net.Conn, serve func(*conn)) {
	if secure, ok := nc.(*tls.Conn); ok {
		wrapped, err := newTLSConn(secure)
		if err != nil {
			_ = nc.Close()
			return
		}
		nc = wrapped
	}
	both, ok := nc.(netConn)
	if !ok {
		_ = nc.Close()
		return
	}
	if run := s.enter(both, serve); run != nil {
		go run()
	}
}

// ServeStream serves the native protocol on a stream that another transport accepted, until it ends, and closes it. The stream counts as a connection: for limits,
// Stats and Shutdown. meet is called if the peer is let in. It returns false if the stream was closed without a word.
func (s *Server) ServeStream(stream Stream, meet func()) (served bool) {
	run := s.enter(stream, func(c *conn) {
		c.meet = meet
		s.serveHello(c)
	})
	if run != nil {
		run()
	}
	return run != nil
}

// enter notes a new connection and returns what serves it, to its end; nil if it was closed at once.
func (s *Server) enter(nc netConn, serve func(*conn)) func() {
	s.counters.Accepted.Add(1)
	visit, closed := s.cfg.Door.Enter(nc.RemoteAddr())
	if closed != "" {
		s.counters.Refused.Add(string(closed))
		hangUp(nc)
		return nil
	}
	c, err := newConn(s, nc, s.nextID.Add(1))
	if err != nil {
		visit.Leave()
		_ = nc.Close()
		return nil
	}
	c.visit = visit
	full, code := s.add(c)
	if code != "" {
		s.counters.Refused.Add(string(code))
		visit.Leave()
		c.endWait()
		_ = nc.Close()
		return nil
	}
	return func() {
		defer s.remove(c)
		if full {
			s.refuse(c, wire.Refuse(wire.CodeTooManyConnections, "this daemon serves at most %d connections at once; try again later", s.cfg.MaxConnections))
			return
		}
		serve(c)
	}
}

// hangUp closes a connection without a word, so that nothing of it stays behind in the kernel either.
func hangUp(nc net.Conn) {
	if secure, ok := nc.(*tlsConn); ok {
		nc = secure.NetConn()
	}
	if c, ok := nc.(*net.TCPConn); ok {
		_ = c.SetLinger(0)
	}
	_ = nc.Close()
}

// refusingMax is how many peers are waited for at a time until they have read why they are refused. They take nobody's place. Others are told, and closed at once, or, above the limit of
// connections, closed without a word.
const refusingMax = 64

// add notes the connection. It tells whether the limit is reached, or why there is not even room to say so.
func (s *Server) add(c *conn) (full bool, code wire.Code) {
	s.mu.Lock()
	defer s.mu.Unlock()
	full = len(s.conns)-s.refusing >= s.cfg.MaxConnections
	switch {
	case s.stopping:
		return false, wire.CodeShuttingDown
	case full && !s.mayLinger(c):
		return false, wire.CodeTooManyConnections
	}
	s.conns[c] = struct{}{}
	s.running.Add(1)
	return full, ""
}

// mayLinger counts a connection as one that is being refused, if there is room for one more. It wants mu.
func (s *Server) mayLinger(c *conn) bool {
	if !c.refused && s.refusing < refusingMax {
		c.refused = true
		s.refusing++
	}
	return c.refused
}

func (s *Server) remove(c *conn) {
	_ = c.Close()
	c.endWait()
	c.readLarge(false)
	c.visit.Leave() // not before: who is refused and stays keeps its place among the handshakes
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.conns[c]; ok {
		delete(s.conns, c)
		if c.refused {
			s.refusing--
		}
		s.running.Done()
	}
}

// serveHello serves one connection of the native protocol.
func (s *Server) serveHello(c *conn) {
	s.slow(c)
	hello := s.greet(c)
	if hello == nil {
		return
	}
	c.visit.Succeeded()
	if c.meet != nil {
		c.meet()
	}
	switch hello.Role {
	case wire.RolePush:
		s.push(c, hello)
	case wire.RoleManifest:
		s.manifest(c, hello)
	default:
		s.attach(c, hello)
	}
}

// push serves a producer.
func (s *Server) push(c *conn, hello *wire.Hello) {
	if refusal := s.checkCompression(hello); refusal != nil {
		s.refuse(c, refusal)
		return
	}
	opening, cancel := context.WithTimeout(c.ctx, s.cfg.HandshakeTimeout)
	table, stream, accepted, refusal := ingest.OpenPush(opening, s.cfg.Tables, hello, s.window(), c.giveUp)
	cancel()
	if refusal != nil {
		s.refuse(c, refusal)
		return
	}
	defer stream.Close()
	if hello.Compression != wire.CompressionNone {
		samples, err := c.decompress(hello.Compression, table.Spec(), accepted.WindowBytes)
		if err != nil {
			s.refuse(c, wire.Refuse(wire.CodeInternal, "%v", err))
			return
		}
		defer samples.Close()
		accepted.Compression = hello.Compression
	}
	c.agreed.Store(&agreed{table: hello.Table, session: hello.Session, client: hello.Client, token: c.token, ack: accepted.Ack, stream: stream.ID()})
	if hello.Notes {
		c.watch.table = table
	}
	c.allowWrite(time.Now().Add(s.cfg.HandshakeTimeout))
	if err := wire.WriteAccepted(c.netConn, accepted); err != nil {
		s.counters.Ended.Add(ingest.EndReset)
		return
	}
	ses := newSession(c, stream, newPlan(table.Spec()), accepted)
	ses.notes = hello.Notes
	reason, notice := ses.ending(ses.run())
	s.ended(c, reason)
	if _, ok := c.netConn.(Stream); ok && reason == string(wire.CodeAckTimeout) {
		return // at once: in a stream, acks that nobody reads would stay in the way of what others on its connection are sent
	}
	if reason == ingest.EndReset {
		if ses.unacked == 0 {
			_ = c.CloseWrite() // the peer may read on, and a stream that is closed without it takes the acks along
		}
		return
	}
	var say []byte
	if notice != nil {
		say = wire.AppendNotice(nil, notice)
	}
	c.dismiss(s.cut, say)
}

func (s *Server) window() ingest.Window {
	return ingest.Window{Samples: s.cfg.WindowSamples, Bytes: s.cfg.WindowBytes, BytesMax: s.cfg.WindowBytesMax}
}

// manifest answers who asks for a manifest.
func (s *Server) manifest(c *conn, hello *wire.Hello) {
	accepted, refusal := ingest.Manifest(s.cfg.Tables, hello)
	if refusal != nil {
		s.refuse(c, refusal)
		return
	}
	c.allowWrite(time.Now().Add(s.cfg.HandshakeTimeout))
	if err := wire.WriteAccepted(c.netConn, accepted); err != nil {
		s.counters.Ended.Add(ingest.EndReset)
		return
	}
	s.counters.Ended.Add(ingest.EndClean)
	c.dismiss(s.cut, nil)
}

// attach hands a connection of another role to whom it may concern. From then on it is none of this server's:
// neither its limits nor Shutdown concern it.
func (s *Server) attach(c *conn, hello *wire.Hello) {
	if s.cfg.Tables.Kind(hello.Table) != "" { // else who serves the role says so
		if r := ingest.CheckKind(s.cfg.Tables, hello); r != nil {
			s.refuse(c, r)
			return
		}
	}
	_, local := c.netConn.(*net.UnixConn)
	if anywhere := hello.Role == wire.RolePublish || hello.Role == wire.RoleSubscribe || hello.Role == wire.RoleTrain; s.cfg.Attach == nil || !local && !anywhere {
		s.refuse(c, wire.Refuse(wire.CodeWrongRole, "role %q is served on the daemon's unix socket only; connect to unix:///PATH, which `ingestd serve` prints at its start", hello.Role))
		return
	}
	_ = c.SetDeadline(time.Time{})
	c.endWait()
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.running.Done()
	if err := s.cfg.Attach(c.netConn, hello); err != nil {
		s.cfg.Log.Info("attachment ended", "component", "tcpingest", "table", hello.Table, "peer", c.peer(), "token", c.token, "err", err)
	}
}

// refuse tells the peer why, and waits until it has read it, if not too many are waited for already.
func (s *Server) refuse(c *conn, r *wire.Refusal) {
	c.readLarge(false)
	c.visit.Refused(r.Code)
	s.counters.Refused.Add(string(r.Code))
	s.cfg.Log.Info("refused", "component", "tcpingest", "peer", c.peer(), "code", r.Code, "err", r.Reason)
	s.mu.Lock()
	linger := s.mayLinger(c)
	s.mu.Unlock()
	if linger {
		c.dismiss(s.cut, wire.AppendRefusal(nil, r))
	} else {
		c.tell(wire.AppendRefusal(nil, r))
	}
}

func (s *Server) ended(c *conn, reason string) {
	s.counters.Ended.Add(reason)
	a := c.agreed.Load()
	s.cfg.Log.Info("stream ended", "component", "tcpingest", "table", a.table, "stream", a.stream, "session", a.session, "peer", c.peer(), "token", a.token,
		"reason", reason, "samples", c.samples.Load(), "bytes", c.bytes.Load(), "dur", time.Since(c.opened))
}

// lastWords is how long peers have for reading why they are cut off.
const lastWords = 500 * time.Millisecond

// Shutdown implements ingest.Transport.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.stopping {
		close(s.halt)
	}
	s.stopping = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for c := range s.conns {
		c.stop()
	}
	s.mu.Unlock()
	gone := make(chan struct{})
	go func() {
		s.running.Wait()
		close(gone)
	}()
	defer s.stopCut()
	defer s.stopHurry()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
	}
	// Who waited for a slot, or still sends, is told why before it is cut off.
	s.stopHurry()
	select {
	case <-gone:
	case <-time.After(lastWords):
	}
	s.stopCut()
	s.mu.Lock()
	for c := range s.conns {
		hangUp(c.netConn)
	}
	s.mu.Unlock()
	<-gone
	return fmt.Errorf("connections were cut off: %w", context.Cause(ctx))
}

// Stats implements ingest.Transport.
func (s *Server) Stats() ingest.Stats {
	st := s.counters.Snapshot(s.cfg.Transport)
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Open = len(s.conns)
	for c := range s.conns {
		st.Connections = append(st.Connections, c.status())
	}
	return st
}

var _ ingest.Transport = (*Server)(nil)
