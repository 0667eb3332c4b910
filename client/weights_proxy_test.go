//go:build linux

package client

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// cuttingProxy is a proxy that ends connections after so many bytes from the daemon; later connections have later limits, and the last limit is for all that
// follow.
type cuttingProxy struct {
	addr string

	mu     sync.Mutex
	limits []int64 // negative: none
	used   []int64 // bytes that each connection has brought
}

func cutting(t testing.TB, daemon string, limits ...int64) *cuttingProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &cuttingProxy{addr: "tcp://" + l.Addr().String(), limits: limits}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", strings.TrimPrefix(daemon, "tcp://"))
			if err != nil {
				conn.Close()
				continue
			}
			running.Go(func() { p.serve(conn, up) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		running.Wait()
	})
	return p
}

// serve copies both ways until the limit, or an end.
func (p *cuttingProxy) serve(down, up net.Conn) {
	p.mu.Lock()
	limit := p.limits[min(len(p.used), len(p.limits)-1)]
	k := len(p.used)
	p.used = append(p.used, 0)
	p.mu.Unlock()
	var asking sync.WaitGroup
	asking.Go(func() {
		io.Copy(up, down)
		up.Close()
	})
	n := int64(0)
	if limit < 0 {
		n, _ = io.Copy(down, up)
	} else {
		n, _ = io.CopyN(down, up, limit)
	}
	p.mu.Lock()
	p.used[k] = n
	p.mu.Unlock()
	down.Close()
	up.Close()
	asking.Wait()
}

func (p *cuttingProxy) connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.used)
}
