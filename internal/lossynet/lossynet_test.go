package lossynet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start makes a link that lasts as long as the test.
func start(t *testing.T, c Conditions) *Link {
	t.Helper()
	l, err := Start(c)
	if errors.Is(err, ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func (l *Link) mustStats(t *testing.T) (ab, ba Stats) {
	t.Helper()
	ab, ba, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return ab, ba
}

// wire is a UDP socket on each side.
type wire struct {
	t    *testing.T
	link *Link
	a, b *net.UDPConn // a is connected to b
}

func newWire(t *testing.T, l *Link) *wire {
	t.Helper()
	w := &wire{t: t, link: l}
	var err error
	if w.b, err = In(l.B, func() (*net.UDPConn, error) { return net.ListenUDP("udp", &net.UDPAddr{IP: l.B.Addr.AsSlice()}) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.b.Close() })
	if w.a, err = In(l.A, func() (*net.UDPConn, error) { return net.DialUDP("udp", nil, w.b.LocalAddr().(*net.UDPAddr)) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.a.Close() })
	deadline := time.Now().Add(time.Minute) // so that a broken link fails and does not hang
	if err := errors.Join(w.a.SetDeadline(deadline), w.b.SetDeadline(deadline), growBuffer(w.b)); err != nil {
		t.Fatal(err)
	}
	return w
}

// growBuffer makes room for all that a test sends, whatever the machine's limit is.
func growBuffer(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) }), err)
}

// send sends numbered datagrams of a size from A to B.
func (w *wire) send(n, size int) {
	w.t.Helper()
	b := make([]byte, size)
	for i := range n {
		binary.LittleEndian.PutUint64(b, uint64(i))
		if _, err := w.a.Write(b); err != nil {
			w.t.Fatal(err)
		}
	}
}

// arrivals waits until nothing of n datagrams is on its way any more and returns the numbers of those that came.
func (w *wire) arrivals(n int) []uint64 {
	w.t.Helper()
	var st Stats
	for {
		if st, _ = w.link.mustStats(w.t); st.Packets == uint64(n) && st.Delivered+st.Lost+st.Dropped == st.Packets {
			break
		}
		runtime.Gosched()
	}
	got := make([]uint64, st.Delivered)
	b := make([]byte, mtu)
	for i := range got {
		if _, err := w.b.Read(b); err != nil {
			w.t.Fatalf("datagram %d of %d: %v", i, st.Delivered, err)
		}
		got[i] = binary.LittleEndian.Uint64(b)
	}
	return got
}

// TestLinkCarries: TCP and UDP, both ways, byte for byte, each side at its address.
func TestLinkCarries(t *testing.T) {
	l := start(t, Conditions{})
	listener, err := In(l.B, func() (net.Listener, error) { return net.Listen("tcp", l.B.HostPort(0)) })
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	near, err := In(l.A, func() (net.Conn, error) { return net.Dial("tcp", listener.Addr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if from := far.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from != l.A.Addr {
		t.Errorf("B sees %v, not %v", from, l.A.Addr)
	}
	const size = 5 << 20
	var directions sync.WaitGroup
	for i, c := range [][2]net.Conn{{near, far}, {far, near}} {
		sent := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(sent) // never fails
		directions.Go(func() {
			if _, err := c[0].Write(sent); err != nil {
				t.Error(err)
			}
		})
		directions.Go(func() {
			got := make([]byte, size)
			if _, err := io.ReadFull(c[1], got); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("direction %d: other bytes came, %v", i, err)
			}
		})
	}
	directions.Wait()
	ab, ba := l.mustStats(t)
	for _, st := range []Stats{ab, ba} {
		if st.Packets < size/mtu || st.Lost != 0 || st.Overtaken != 0 {
			t.Errorf("counted %+v and %+v", ab, ba)
		}
	}
	w := newWire(t, l)
	w.send(1, 100)
	b := make([]byte, 200)
	n, from, err := w.b.ReadFromUDP(b)
	if err != nil || n != 100 {
		t.Fatalf("got %d bytes, %v", n, err)
	}
	if _, err := w.b.WriteToUDP([]byte("back"), from); err != nil {
		t.Fatal(err)
	}
	if n, err := w.a.Read(b); err != nil || string(b[:n]) != "back" {
		t.Errorf("got %q, %v", b[:n], err)
	}
}

// TestInOrder: what neither Loss nor Late touches comes whole and in order, at once or delayed.
func TestInOrder(t *testing.T) {
	for _, c := range []Conditions{{}, {Delay: 5 * time.Millisecond}, {Rate: 100 << 20, QueueTime: time.Minute}} {
		w := newWire(t, start(t, c))
		const n = 1000
		w.send(n, 100)
		got := w.arrivals(n)
		if len(got) != n {
			t.Errorf("%+v: %d of %d came", c, len(got), n)
		}
		for i, number := range got {
			if number != uint64(i) {
				t.Fatalf("%+v: %d came when %d was due", c, number, i)
			}
		}
	}
}

// TestLoss: the share that was asked for is lost, both ways, and counted; the same seed loses the same ones.
func TestLoss(t *testing.T) {
	const n, loss = 4000, 0.1
	var first []uint64
	for range 2 {
		w := newWire(t, start(t, Conditions{Loss: loss, Seed: 7}))
		w.send(n, 100)
		got := w.arrivals(n)
		ab, _ := w.link.mustStats(t)
		if share := float64(ab.Lost) / n; share < loss/2 || share > loss*2 || ab.Lost+uint64(len(got)) != n {
			t.Errorf("%d of %d lost, %d came", ab.Lost, n, len(got))
		}
		if first == nil {
			first = got
		} else if len(got) != len(first) || !equal(got, first) {
			t.Error("the same seed lost others")
		}
	}
	for _, c := range []Conditions{{Loss: 1}, {Loss: 1, Delay: time.Millisecond}} {
		w := newWire(t, start(t, c))
		w.send(n/100, 100)
		if got := w.arrivals(n / 100); len(got) != 0 {
			t.Errorf("%+v: %d came", c, len(got))
		}
	}
}

func equal(a, b []uint64) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// TestDelay: every datagram is on its way for at least the delay.
func TestDelay(t *testing.T) {
	const n, delay = 20, 30 * time.Millisecond
	w := newWire(t, start(t, Conditions{Delay: delay}))
	began := time.Now()
	w.send(n, 100)
	b := make([]byte, mtu)
	for range n {
		if _, err := w.b.Read(b); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < delay {
			t.Fatalf("one came after %v", took)
		}
	}
}

// TestLate: a share comes late, none is lost, and the late ones are overtaken.
func TestLate(t *testing.T) {
	const n, late = 2000, 0.2
	w := newWire(t, start(t, Conditions{Late: late, LateBy: 20 * time.Millisecond, Delay: time.Millisecond, Seed: 3}))
	w.send(n, 100)
	got := w.arrivals(n)
	behind, latest := 0, uint64(0)
	for _, number := range got {
		if number < latest {
			behind++
		}
		latest = max(latest, number)
	}
	st, _ := w.link.mustStats(t)
	if len(got) != n || behind == 0 || behind != int(st.Overtaken) || behind > n*late*2 {
		t.Errorf("%d of %d came, %d behind a later one, %+v", len(got), n, behind, st)
	}
}

// TestRate: no more goes through than the wire has room for, and what the queue has none for is dropped.
func TestRate(t *testing.T) {
	const n, size, rate = 400, 972, 1 << 20 // 1000 bytes with the headers of UDP and IP
	queue := 100 * time.Millisecond
	w := newWire(t, start(t, Conditions{Rate: rate, QueueTime: queue}))
	began := time.Now()
	w.send(n, size)
	sent := time.Since(began)
	got := w.arrivals(n)
	took := time.Since(began)
	if most := (took + queue).Seconds() * rate / 1000; float64(len(got)) > most+1 {
		t.Errorf("%d came within %v, more than %.0f", len(got), took, most)
	}
	st, _ := w.link.mustStats(t)
	if most := (sent + queue).Seconds() * rate / 1000; st.Dropped == 0 && most < n {
		t.Errorf("none was dropped, though all were sent within %v", sent)
	}
	if least := int(queue.Seconds() * rate / 1000); len(got) < least {
		t.Errorf("%d came, the queue alone holds %d", len(got), least)
	}
}

// TestNamespaces: only what Do calls sees the side's devices, and no goroutine gets a thread that was there.
func TestNamespaces(t *testing.T) {
	here := namespace(t)
	l, err := Start(Conditions{})
	if errors.Is(err, ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{here: true}
	for _, s := range []*Side{l.A, l.B} {
		for range 2 {
			there, err := In(s, func() (string, error) { return os.Readlink("/proc/thread-self/ns/net") })
			if err != nil {
				t.Fatal(err)
			}
			seen[there] = true
		}
	}
	if len(seen) != 3 {
		t.Errorf("namespaces: %v", seen)
	}
	devices, err := In(l.A, net.Interfaces)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if d.Name == deviceName && (d.MTU != mtu || d.Flags&net.FlagUp == 0) {
			t.Errorf("%+v", d)
		}
	}
	if err := l.A.Do(func() error { return io.ErrNoProgress }); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("Do returned %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a second Close: %v", err)
	}
	if err := l.A.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			runtime.LockOSThread() // each another thread
			defer runtime.UnlockOSThread()
			runtime.Gosched()
			if now := namespace(t); now != here {
				t.Errorf("a goroutine runs in %s, not in %s", now, here)
			}
		})
	}
	all.Wait()
}

func namespace(t *testing.T) string {
	t.Helper()
	ns, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Error(err)
	}
	return ns
}

// TestWithoutRights: a process that may not make networks is told what it lacks.
func TestWithoutRights(t *testing.T) {
	const child = "LOSSYNET_WITHOUT_RIGHTS"
	if os.Getenv(child) == "" {
		if os.Geteuid() != 0 {
			t.Skip("only root can give its rights up")
		}
		again := exec.Command("/proc/self/exe", "-test.run", "^TestWithoutRights$")
		again.Dir, again.Env = "/", append(os.Environ(), child+"=1")
		again.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if text, err := again.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
		return
	}
	l, err := Start(Conditions{})
	if err == nil {
		_ = l.Close()
	}
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("got %v", err)
	}
}

func TestConditionsRefused(t *testing.T) {
	for _, c := range []Conditions{
		{Loss: -0.1}, {Loss: 1.1}, {Late: -0.1, LateBy: 1}, {Late: 1.1, LateBy: 1}, {Late: 0.5}, {LateBy: 1}, {Delay: -1}, {QueueTime: -1}, {Rate: -1},
	} {
		if _, err := c.withDefaults(); err == nil || !strings.Contains(err.Error(), "lossynet") {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, c := range []Conditions{{}, {Loss: 1}, {Late: 1, LateBy: 1}, {Rate: 1, QueueTime: 1}} {
		if _, err := c.withDefaults(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
