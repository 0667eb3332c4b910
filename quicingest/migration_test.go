package quicingest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// site is a daemon with one table, whose samples somebody takes.
type site struct {
	*Server
	addr   net.Addr
	certs  *ingesttest.Certificates
	tables ingesttest.Tables
	taken  func() map[uint64]uint64
}

const siteSpec = "a:U64"

func newSite(t *testing.T, change func(*Config)) *site {
	t.Helper()
	table := ingesttest.NewTable(t, "t", siteSpec, 64, 8)
	s := &site{certs: ingesttest.NewCertificates(t), tables: ingesttest.Tables{"t": table}}
	cfg := Config{TLS: s.certs.Server, Streams: tcpingest.Config{Tables: s.tables}}
	if change != nil {
		change(&cfg)
	}
	s.Server, s.addr = serve(t, cfg)
	s.taken = ingesttest.Drain(t, table)
	return s
}

// finish stops the daemon and returns how many samples each stream brought.
func (s *site) finish(t *testing.T) map[uint64]uint64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	return s.taken()
}

// push opens a stream and agrees on pushing.
func (s *site) push(t *testing.T, c *quic.Conn) (*quicconn.Conn, *wire.AcceptedPush) {
	t.Helper()
	st, accepted, err := s.tryPush(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return st, accepted
}

func (s *site) tryPush(ctx context.Context, c *quic.Conn) (*quicconn.Conn, *wire.AcceptedPush, error) {
	open, err := c.OpenStreamSync(ctx)
	if err != nil {
		return nil, nil, err
	}
	st, accepted := quicconn.New(c, open), &wire.AcceptedPush{}
	_ = st.SetDeadline(time.Now().Add(time.Minute))
	if err := wire.WriteHello(st, &wire.Hello{Role: wire.RolePush, Table: "t", Spec: s.tables["t"].Spec()}); err != nil {
		return nil, nil, err
	}
	return st, accepted, wire.ReadReply(st, accepted)
}

// send has samples acked, a few at a time, and calls at before it sends sample number mark.
func send(t *testing.T, st io.ReadWriter, samples, mark int, at func()) {
	t.Helper()
	const few = 10
	b, acks := make([]byte, few*8), make([]byte, few)
	for n := 0; n < samples; n += few {
		if n == mark {
			at()
		}
		for i := range few {
			binary.LittleEndian.PutUint64(b[i*8:], uint64(n+i))
		}
		if _, err := st.Write(b); err != nil {
			t.Fatalf("sample %d: %v", n, err)
		}
		if _, err := io.ReadFull(st, acks); err != nil {
			t.Fatalf("acks of sample %d: %v", n, err)
		}
	}
}

// peers returns where the daemon sees its clients.
func (s *site) peers() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]bool{}
	for c := range s.conns {
		all[c.RemoteAddr().String()] = true
	}
	return all
}

const movingSamples = 3000

// TestClientMoves: a client that goes on from another port, because it chose to, loses no sample and no ack.
func TestClientMoves(t *testing.T) {
	s := newSite(t, nil)
	transports := [2]*quic.Transport{}
	for i := range transports {
		socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		transports[i] = &quic.Transport{Conn: socket}
		defer func() {
			_ = transports[i].Close()
			_ = socket.Close()
		}()
	}
	c, err := transports[0].Dial(t.Context(), s.addr, s.certs.Client, clientQUIC)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseWithError(quicconn.CodeDone, "") }()
	st, accepted := s.push(t, c)
	send(t, st, movingSamples, movingSamples/2, func() {
		way, err := c.AddPath(transports[1])
		if err != nil {
			t.Fatal(err)
		}
		if err := way.Probe(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := way.Switch(); err != nil {
			t.Fatal(err)
		}
	})
	if to := transports[1].Conn.LocalAddr().String(); !s.peers()[to] {
		t.Errorf("the daemon sees the client at %v, not at %s", s.peers(), to)
	} else if all := s.Stats().Connections; len(all) != 1 || all[0].Peer != to {
		t.Errorf("the daemon says that its clients are %+v, not at %s", all, to)
	}
	_ = st.CloseWrite()
	if taken := s.finish(t); taken[accepted.Stream] != movingSamples {
		t.Errorf("%d of %d samples taken", taken[accepted.Stream], movingSamples)
	}
}

// TestClientIsMoved: a client whose port changes on the way, without its knowledge, loses no sample and no ack either.
func TestClientIsMoved(t *testing.T) {
	s := newSite(t, nil)
	between := newRouter(t, s.addr)
	c, err := quic.DialAddr(t.Context(), between.addr().String(), s.certs.Client, clientQUIC)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseWithError(quicconn.CodeDone, "") }()
	st, accepted := s.push(t, c)
	var before map[string]bool
	send(t, st, movingSamples, movingSamples/2, func() {
		before = s.peers()
		between.move()
	})
	for peer := range s.peers() {
		if before[peer] {
			t.Errorf("the daemon sees the client at %s still", peer)
		}
	}
	_ = st.CloseWrite()
	if taken := s.finish(t); taken[accepted.Stream] != movingSamples {
		t.Errorf("%d of %d samples taken", taken[accepted.Stream], movingSamples)
	}
}

// TestStreamsShareAConnection: several streams of one connection have sessions, handshakes and acks of their own; one's end is not the others'.
func TestStreamsShareAConnection(t *testing.T) {
	s := newSite(t, nil)
	c, err := quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseWithError(quicconn.CodeDone, "") }()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			st, _, err := s.tryPush(t.Context(), c)
			if err != nil {
				t.Error(err)
				return
			}
			defer st.Close()
			b := make([]byte, 50*8)
			if _, err := st.Write(b); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(st, make([]byte, 50)); err != nil {
				t.Error(err)
			}
			if i%2 == 0 {
				_ = st.CloseWrite()
				_, _ = io.Copy(io.Discard, st)
			}
		})
	}
	wg.Wait()
	total := uint64(0)
	for _, n := range s.finish(t) {
		total += n
	}
	if total != 8*50 {
		t.Errorf("%d of %d samples taken", total, 8*50)
	}
}

// TestAttachedStreamsOutliveShutdown: whoever attached is the daemon's to end, after producers: Shutdown leaves it its connection, and Close does not.
func TestAttachedStreamsOutliveShutdown(t *testing.T) {
	attached, say := make(chan struct{}), make(chan string)
	s := newSite(t, func(c *Config) {
		c.Streams.Attach = func(conn net.Conn, _ *wire.Hello) error {
			defer conn.Close()
			close(attached)
			if _, err := io.WriteString(conn, <-say); err != nil {
				return err
			}
			_, err := conn.Read(make([]byte, 1)) // until Close
			return err
		}
	})
	c := s.dial(t)
	open, err := c.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	st := quicconn.New(c, open)
	_ = st.SetDeadline(time.Now().Add(time.Minute))
	if err := wire.WriteHello(st, &wire.Hello{Role: wire.RoleSubscribe, Table: "weights of another kind"}); err != nil {
		t.Fatal(err)
	}
	<-attached
	producer, _ := s.push(t, s.dial(t))
	told := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(producer)
		told <- errors.Join(err, producer.Close())
	}()
	s.finish(t)
	if err := <-told; err != nil {
		t.Errorf("a producer was not told in order: %v", err)
	}
	say <- "still here"
	b := make([]byte, len("still here"))
	if _, err := io.ReadFull(st, b); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := st.Read(b); err == nil {
		t.Error("read after Close")
	}
}
