package quicingest

import (
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ingest/ingesttest"
)

// network is what is between a client and a daemon: it forwards datagrams from one address, loses some, and delays each for a time of its own, so that they overtake each other.
type network struct {
	loss          float64
	delay, jitter time.Duration

	t      *testing.T
	front  *net.UDPConn // clients send here
	daemon *net.UDPAddr

	mu      sync.Mutex
	rng     *rand.Rand
	closed  bool
	paths   map[string]*path // by client
	running sync.WaitGroup
}

// path is one client's way, under an address of its own.
type path struct {
	client *net.UDPAddr
	out    *net.UDPConn
}

func newNetwork(t *testing.T, daemon net.Addr, loss float64, delay, jitter time.Duration) *network {
	t.Helper()
	front, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("network with seed %#x", seed)
	n := &network{
		loss: loss, delay: delay, jitter: jitter, t: t, front: front, daemon: daemon.(*net.UDPAddr), rng: rand.New(rand.NewPCG(seed, 0)), paths: map[string]*path{},
	}
	n.running.Go(n.forward)
	t.Cleanup(n.close)
	return n
}

func (n *network) addr() net.Addr { return n.front.LocalAddr() }

func (n *network) close() {
	n.mu.Lock()
	n.closed = true
	_ = n.front.Close()
	for _, p := range n.paths {
		_ = p.out.Close()
	}
	n.mu.Unlock()
	n.running.Wait()
}

// forward takes what clients send.
func (n *network) forward() {
	b := make([]byte, 1<<16)
	for {
		size, from, err := n.front.ReadFromUDP(b)
		if err != nil {
			return
		}
		if p := n.path(from); p != nil {
			n.later(b[:size], func(d []byte) { _, _ = p.out.WriteToUDP(d, n.daemon) })
		}
	}
}

// path finds a client's way, or opens one.
func (n *network) path(from *net.UDPAddr) *path {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.paths[from.String()]; p != nil || n.closed {
		return p
	}
	out, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		n.t.Error(err)
		return nil
	}
	p := &path{client: from, out: out}
	n.paths[from.String()] = p
	n.running.Go(func() { n.backward(p, out) })
	return p
}

// backward takes what the daemon sends to a client's address.
func (n *network) backward(p *path, out *net.UDPConn) {
	b := make([]byte, 1<<16)
	for {
		size, _, err := out.ReadFromUDP(b)
		if err != nil {
			return
		}
		n.later(b[:size], func(d []byte) { _, _ = n.front.WriteToUDP(d, p.client) })
	}
}

// later delivers a datagram, or not.
func (n *network) later(b []byte, deliver func([]byte)) {
	n.mu.Lock()
	lost, wait := n.rng.Float64() < n.loss, n.delay+time.Duration(n.rng.Float64()*float64(n.jitter))
	n.mu.Unlock()
	if lost {
		return
	}
	b = append([]byte(nil), b...)
	n.running.Add(1)
	time.AfterFunc(wait, func() {
		defer n.running.Done()
		deliver(b)
	})
}

// move gives every client another address, as a router does that has forgotten them. What the daemon sends to the old ones is lost.
func (n *network) move() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.paths {
		_ = p.out.Close()
	}
	n.paths = map[string]*path{}
}

// TestConformanceOverALossyNetwork: one datagram of a hundred is lost, and each overtakes some of the others.
func TestConformanceOverALossyNetwork(t *testing.T) {
	ingesttest.RunSlow(t, start(false, func(t *testing.T, daemon net.Addr) net.Addr {
		return newNetwork(t, daemon, 0.01, 2*time.Millisecond, 6*time.Millisecond).addr()
	}))
}

// TestSamplesOverALongWay: 50 ms each way.
func TestSamplesOverALongWay(t *testing.T) {
	ingesttest.RunPush(t, start(false, func(t *testing.T, daemon net.Addr) net.Addr {
		return newNetwork(t, daemon, 0.01, 50*time.Millisecond, 10*time.Millisecond).addr()
	}), "a:U64,b:U8[3000]", 60)
}
