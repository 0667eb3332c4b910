package quicingest

import (
	"net"
	"sync"
	"testing"
)

// router is between clients and a daemon: it forwards datagrams, each client's from an address of its own, which it may forget.
type router struct {
	t     *testing.T
	front *net.UDPConn // clients send here

	mu      sync.Mutex
	daemon  *net.UDPAddr
	closed  bool
	paths   map[string]*path // by client
	running sync.WaitGroup
}

// path is one client's way, under an address of its own.
type path struct {
	client *net.UDPAddr
	out    *net.UDPConn
}

func newRouter(t *testing.T, daemon net.Addr) *router {
	t.Helper()
	front, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	r := &router{t: t, front: front, daemon: daemon.(*net.UDPAddr), paths: map[string]*path{}}
	r.running.Go(r.forward)
	t.Cleanup(r.close)
	return r
}

func (r *router) addr() net.Addr { return r.front.LocalAddr() }

func (r *router) close() {
	r.mu.Lock()
	r.closed = true
	_ = r.front.Close()
	for _, p := range r.paths {
		_ = p.out.Close()
	}
	r.mu.Unlock()
	r.running.Wait()
}

// forward takes what clients send.
func (r *router) forward() {
	b := make([]byte, 1<<16)
	for {
		size, from, err := r.front.ReadFromUDP(b)
		if err != nil {
			return
		}
		if p, daemon := r.path(from); p != nil {
			_, _ = p.out.WriteToUDP(b[:size], daemon)
		}
	}
}

// path finds a client's way, or opens one, and says where it leads.
func (r *router) path(from *net.UDPAddr) (*path, *net.UDPAddr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.paths[from.String()]; p != nil || r.closed {
		return p, r.daemon
	}
	out, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		r.t.Error(err)
		return nil, nil
	}
	p := &path{client: from, out: out}
	r.paths[from.String()] = p
	r.running.Go(func() { r.backward(p, out) })
	return p, r.daemon
}

// backward takes what the daemon sends to a client's address.
func (r *router) backward(p *path, out *net.UDPConn) {
	b := make([]byte, 1<<16)
	for {
		size, _, err := out.ReadFromUDP(b)
		if err != nil {
			return
		}
		_, _ = r.front.WriteToUDP(b[:size], p.client)
	}
}

// move gives every client another address, as a router does that has forgotten them. What the daemon sends to the old ones is lost.
func (r *router) move() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.paths {
		_ = p.out.Close()
	}
	r.paths = map[string]*path{}
}

// lead sends what clients send to another daemon from now on. The one before hears nothing more and is not heard.
func (r *router) lead(daemon net.Addr) {
	r.mu.Lock()
	r.daemon = daemon.(*net.UDPAddr)
	r.mu.Unlock()
	r.move()
}
