package quicingest

import (
	"context"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/internal/quicconn"
)

// TestShutdownWhileAConnectionBegins: quic-go's listener closes only after it is done with the first packet that it has in hand, and that asks this server.
func TestShutdownWhileAConnectionBegins(t *testing.T) {
	s := newSite(t, nil)
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked, stopping := make(chan struct{}), make(chan struct{})
	tr := &quic.Transport{Conn: socket, ConnContext: func(ctx context.Context, from *quic.ClientInfo) (context.Context, error) {
		close(asked)
		<-stopping
		return s.begin(ctx, from)
	}}
	l, err := tr.Listen(s.tls, s.quic)
	if err != nil {
		t.Fatal(err)
	}
	if !s.addDoor(l, tr) {
		t.Fatal("stopping already")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var dialing sync.WaitGroup
	dialing.Go(func() {
		if c, err := quic.DialAddr(ctx, socket.LocalAddr().String(), s.certs.Client, clientQUIC); err == nil {
			t.Error("a stopping daemon let a client in")
			_ = c.CloseWithError(quicconn.CodeDone, "")
		}
	})
	<-asked
	stopped := make(chan error, 1)
	go func() { stopped <- s.Shutdown(context.Background()) }()
	for begun := false; !begun; runtime.Gosched() {
		if begun = !s.mu.TryLock(); !begun { // nobody but Shutdown asks for it
			begun = s.stopping
			s.mu.Unlock()
		}
	}
	close(stopping)
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Shutdown does not return")
	}
	cancel()
	dialing.Wait()
	s.finish(t)
}

// TestShutdownInAStorm: clients that dial as fast as they can, while the daemon stops.
func TestShutdownInAStorm(t *testing.T) {
	for range 10 {
		s := newSite(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		var dialing sync.WaitGroup
		var dialed atomic.Int64
		for range 4 {
			dialing.Go(func() {
				for ctx.Err() == nil {
					c, err := quic.DialAddr(ctx, s.addr.String(), s.certs.Client, clientQUIC)
					dialed.Add(1)
					if err == nil {
						_ = c.CloseWithError(quicconn.CodeDone, "")
					}
				}
			})
		}
		until(t, "clients", func() bool { return dialed.Load() >= 8 })
		s.finish(t)
		cancel()
		dialing.Wait()
	}
}
