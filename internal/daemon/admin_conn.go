package daemon

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/wire"
)

const (
	// adminConnectionsMax is how many connections the endpoint has at once, so that it leaves descriptors to producers.
	adminConnectionsMax = 128
	// adminPassingBy is how long a connection may be there that says nothing and goes again, as checks of a port do, and nothing is remembered of it.
	adminPassingBy = time.Second
)

// adminListener takes connections as the other listeners do: banned addresses and too many handshakes under way are closed without a word.
type adminListener struct {
	net.Listener
	admin *admin
}

// Accept implements net.Listener.
func (l *adminListener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.admin.enter(nc); c != nil {
			return c, nil
		}
	}
}

// enter notes a new connection; nil if it was closed.
func (a *admin) enter(nc net.Conn) *adminConn {
	visit, code := a.door.Enter(nc.RemoteAddr())
	if code == "" && a.open.Add(1) > adminConnectionsMax {
		a.open.Add(-1)
		visit.Leave()
		code = wire.CodeTooManyConnections
	}
	if code != "" {
		a.refused.Add(string(code))
		if tcp, ok := nc.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = nc.Close()
		return nil
	}
	return &adminConn{Conn: nc, admin: a, began: time.Now(), visit: visit}
}

// adminConn is a connection of the endpoint. Until a request of it was let in it is a handshake under way.
type adminConn struct {
	net.Conn
	admin *admin
	began time.Time

	mu     sync.Mutex
	visit  *bans.Visit
	heard  bool // it said something
	judged bool // a request was let in, or was not
	closed bool
}

type adminConnKey struct{}

// withConn gives the requests of a connection their way to it.
func withConn(ctx context.Context, nc net.Conn) context.Context {
	return context.WithValue(ctx, adminConnKey{}, nc)
}

// Read implements net.Conn.
func (c *adminConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.heard = true
	}
	return n, err
}

// Close implements net.Conn. A connection whose first request never came whole is a handshake that failed.
func (c *adminConn) Close() error {
	err := c.Conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return err
	}
	c.closed = true
	if !c.judged && !c.heard {
		c.visit.Passed(time.Since(c.began), adminPassingBy)
	}
	if !c.judged && (c.heard || time.Since(c.began) > adminPassingBy) {
		c.visit.Failed()
		code := wire.CodeBadHandshake
		if time.Since(c.began) > adminHeaderTimeout {
			code = wire.CodeHandshakeTimeout
		}
		c.admin.refused.Add(string(code))
	}
	c.visit.Leave()
	c.admin.open.Add(-1)
	return err
}

// wait lets the first request of an address wait from which handshakes failed. It returns false if the peer went away meanwhile.
func (c *adminConn) wait(ctx context.Context) bool {
	c.mu.Lock()
	visit, judged := c.visit, c.judged
	c.mu.Unlock()
	if visit == nil || judged || visit.Wait <= 0 {
		return true
	}
	over := time.NewTimer(visit.Wait)
	defer over.Stop()
	select {
	case <-over.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// letIn notes that a request was let in, and whether it was by a token.
func (c *adminConn) letIn(proved bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.judged = true
	if proved {
		c.visit.Succeeded()
	}
	c.visit.Leave()
}

// fail notes that one was not. Each counts: the connection is closed after it.
func (c *adminConn) fail(code wire.Code) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.admin.refused.Add(string(code))
	if c.judged {
		c.admin.door.Failed(c.RemoteAddr())
	} else {
		c.visit.Failed()
	}
	c.judged = true
}

// user is the number of the peer's user on a unix socket; negative elsewhere, and where the kernel does not say.
func (c *adminConn) user() int {
	peer, err := auth.PeerOf(c.Conn)
	if err != nil || !peer.Local {
		return -1
	}
	return peer.User
}
