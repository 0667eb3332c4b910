package sockfilter

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/bans"
)

// patience ends a test that would hang.
const patience = time.Minute

// guard is a filter of a table that counts loopback, before one listener of TCP.
func guard(t testing.TB, address string) (*Filter, *bans.Table, net.Listener) {
	t.Helper()
	table := bans.New(bans.Config{Loopback: true})
	f := New(Config{Table: table})
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Skipf("this machine has no %s: %v", address, err)
	}
	t.Cleanup(func() { _ = l.Close() })
	guarded, err := f.Guard(l.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	return f, table, guarded
}

func banAll(f *Filter, table *bans.Table, addresses ...netip.Addr) {
	for _, a := range addresses {
		for range bans.FailuresMax {
			table.Failed(a)
		}
	}
	f.renew()
}

func dial(t *testing.T, l net.Listener, from netip.Addr) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	to := net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, uint16(l.Addr().(*net.TCPAddr).Port)))
	if from.Is4() {
		to.IP = net.IPv4(127, 0, 0, 1)
	}
	return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}).DialContext(ctx, "tcp", to.String())
}

// TestListener: SYNs of banned addresses are dropped and counted, those of others and connections that are there are not, and who is cleared gets in.
func TestListener(t *testing.T) {
	for _, c := range []struct{ name, listen, stranger, honest string }{
		{"IPv4", "127.0.0.1:0", "127.0.0.2", "127.0.0.1"},
		{"IPv4 at a socket of IPv6", "[::]:0", "127.0.0.2", "127.0.0.1"},
		{"IPv6", "[::]:0", "::1", "127.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, table, l := guard(t, c.listen)
			stranger, honest := netip.MustParseAddr(c.stranger), netip.MustParseAddr(c.honest)
			before, err := dial(t, l, stranger)
			if err != nil {
				t.Fatal(err)
			}
			defer before.Close()
			there, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer there.Close()

			banAll(f, table, stranger)
			if st := f.Stats(); st.Addresses != 1 || st.DroppedTCP != 0 || st.Failures != 0 {
				t.Fatalf("%+v", st)
			}
			came := make(chan error, 1)
			go func() {
				c, err := dial(t, l, stranger)
				if err == nil {
					err = c.Close()
				}
				came <- err
			}()
			for deadline := time.Now().Add(patience); f.Stats().DroppedTCP == 0; {
				if time.Now().After(deadline) {
					t.Fatal("nothing is dropped")
				}
				select {
				case err := <-came:
					t.Fatalf("who is banned is served: %v", err)
				default:
				}
			}
			if c, err := dial(t, l, honest); err != nil {
				t.Errorf("another address: %v", err)
			} else {
				defer c.Close()
			}
			if _, err := before.Write([]byte("still here")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(there, make([]byte, 10)); err != nil {
				t.Errorf("a connection that was there: %v", err)
			}
			select {
			case err := <-came:
				t.Errorf("who is banned is served: %v", err)
			default:
			}

			table.Succeeded(stranger)
			f.renew()
			if err := <-came; err != nil { // the kernel sends the next SYN after a second
				t.Errorf("who is cleared: %v", err)
			}
		})
	}
}

// filtered says whether the kernel asks a program about what comes to a socket.
func filtered(t *testing.T, c syscall.Conn) bool {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { // there is room for four instructions in the answer
		_, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER)
	}); err != nil {
		t.Fatal(err)
	}
	if failed != nil && !errors.Is(failed, unix.EINVAL) {
		t.Fatal(failed)
	}
	return failed != nil
}

// TestAccepted: sockets inherit the program of their listener, and are given back without.
func TestAccepted(t *testing.T) {
	f, table, l := guard(t, "127.0.0.1:0")
	accepted := func(from net.Listener) bool {
		t.Helper()
		c, err := dial(t, l, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := from.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		return filtered(t, s.(*net.TCPConn))
	}
	unguarded := l.(*listener).Listener
	if filtered(t, unguarded.(*net.TCPListener)) || accepted(l) {
		t.Error("there is a program for nobody")
	}
	banAll(f, table, netip.MustParseAddr("127.0.0.2"))
	if !accepted(unguarded) {
		t.Error("what the kernel accepts inherits no program, so that this test cannot fail")
	}
	if accepted(l) {
		t.Error("an accepted socket has a program")
	}
	table.ClearAll()
	f.renew()
	if filtered(t, unguarded.(*net.TCPListener)) || accepted(l) {
		t.Error("the program stays")
	}
}

// TestRenewedUnderWay: while programs come and go, everybody else connects, and no accepted socket keeps one. (Some are accepted a second late: see doc.go.)
func TestRenewedUnderWay(t *testing.T) {
	f, table, l := guard(t, "127.0.0.1:0")
	const connects = 500
	over := make(chan int)
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		renewals := 0
		for n := uint32(0); ctx.Err() == nil; n++ {
			if n%8 == 7 {
				table.ClearAll()
			}
			banAll(f, table, netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x7f010000+n))))
			renewals++
		}
		over <- renewals
	}()
	for range connects {
		c, err := dial(t, l, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if filtered(t, s.(*net.TCPConn)) {
			t.Error("an accepted socket has a program")
		}
		if n := sentAgain(t, c.(*net.TCPConn)); n > 0 {
			t.Errorf("the SYN of an address that is not banned was sent %d times more", n)
		}
		_, _ = s.Close(), c.Close()
	}
	stop()
	if n := <-over; n < 10 || f.Stats().Failures != 0 {
		t.Errorf("%d renewals, %+v", n, f.Stats())
	}
}

// sentAgain returns how many packets of a connection the kernel sent once more, since they were not answered.
func sentAgain(t *testing.T, c *net.TCPConn) (n uint32) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); failed == nil {
			n = info.Total_retrans
		}
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	return n
}

// TestRun: programs go when the filter ends.
func TestRun(t *testing.T) {
	f, table, l := guard(t, "127.0.0.1:0")
	banAll(f, table, netip.MustParseAddr("127.0.0.2"))
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := f.Run(ctx); err != nil {
		t.Error(err)
	}
	if filtered(t, l.(*listener).Listener.(*net.TCPListener)) {
		t.Error("the program stays")
	}
	_ = l.Close()
	banAll(f, table, netip.MustParseAddr("127.0.0.3"))
	if st := f.Stats(); st.Failures != 0 || st.Addresses != 0 {
		t.Errorf("of a listener that is closed: %+v", st)
	}
}

// TestDatagrams: of banned addresses those that begin connections are dropped.
func TestDatagrams(t *testing.T) {
	table := bans.New(bans.Config{Loopback: true})
	f := New(Config{Table: table})
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := f.GuardQUIC(socket); err != nil {
		t.Fatal(err)
	}
	banAll(f, table, netip.MustParseAddr("127.0.0.2"))
	send := func(from byte, payload string) {
		t.Helper()
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, from)}, socket.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte(payload)); err != nil {
			t.Fatal(err)
		}
	}
	// Loopback keeps the order, and drops before write returns.
	send(2, "\xc3 an Initial")
	send(2, "\x43 a packet of a connection")
	send(1, "\xc3 an Initial of another")
	send(2, "")
	_ = socket.SetReadDeadline(time.Now().Add(patience))
	for _, want := range []string{"\x43 a packet of a connection", "\xc3 an Initial of another", ""} {
		buf := make([]byte, 100)
		n, from, err := socket.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("%q from %v, %v; want %q", buf[:n], from, err, want)
		}
	}
	if st := f.Stats(); st.DroppedQUIC != 1 || st.DroppedTCP != 0 {
		t.Errorf("%+v", st)
	}
}

// TestFull: the kernel takes full programs, one after another, and they do what they should there, too.
func TestFull(t *testing.T) {
	f, table, l := guard(t, "127.0.0.1:0")
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := f.GuardQUIC(socket); err != nil {
		t.Fatal(err)
	}
	many := func(network uint32) (all []netip.Addr) {
		for n := range uint32(4000) {
			all = append(all, netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, network+n))))
		}
		return all
	}
	for _, network := range []uint32{0x7f010000, 0xc0000000, 0x7f010000} { // numbers above 2^31 take the kernel more
		banAll(f, table, many(network)...)
		if st := f.Stats(); st.Addresses < 2000 || st.Failures != 0 {
			t.Errorf("%#x: %+v", network, st)
		}
	}
	all := many(0x7f010000)
	fits := f.Stats().Addresses
	for _, c := range []struct {
		from netip.Addr
		want bool
	}{{all[len(all)-1], false}, {all[len(all)-fits], false}, {all[len(all)-fits-1], true}, {all[0], true}, {netip.MustParseAddr("127.0.0.1"), true}} {
		u, err := net.DialUDP("udp", &net.UDPAddr{IP: c.from.AsSlice()}, socket.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		before := f.Stats().DroppedQUIC
		_, err = u.Write([]byte("\xc3 an Initial"))
		if passed := f.Stats().DroppedQUIC == before; err != nil || passed != c.want {
			t.Errorf("%v passed: %v, %v", c.from, passed, err)
		}
		_ = u.Close()
	}
	if !filtered(t, l.(*listener).Listener.(*net.TCPListener)) {
		t.Error("the listener has none")
	}
}

// TestMultipath: a program on a listener of multipath TCP would drop nothing, so there is none.
func TestMultipath(t *testing.T) {
	if on, err := os.ReadFile("/proc/sys/net/mptcp/enabled"); err != nil || strings.TrimSpace(string(on)) != "1" {
		t.Skipf("this kernel has no multipath TCP: %q, %v", on, err)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(true)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := New(Config{Table: bans.New(bans.Config{})})
	if _, err := f.Guard(l.(*net.TCPListener)); !errors.Is(err, errors.ErrUnsupported) || len(f.sockets) != 0 {
		t.Errorf("%v, %d sockets", err, len(f.sockets))
	}
}

// BenchmarkConnect is what a connection of a banned address costs where it is accepted and closed, and where the kernel drops its SYN. What the client does for it is in both.
func BenchmarkConnect(b *testing.B) {
	for _, c := range []struct {
		name   string
		banned uint32
	}{{"accepted-and-closed", 0}, {"banned=1", 1}, {"banned=2000", 2000}} {
		b.Run(c.name, func(b *testing.B) {
			f, table, l := guard(b, "127.0.0.1:0")
			for n := range c.banned {
				banAll(f, table, netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x7f000002+n))))
			}
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_ = c.(*net.TCPConn).SetLinger(0)
					_ = c.Close()
				}
			}()
			to := &unix.SockaddrInet4{Port: l.Addr().(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
			before := cpu(b)
			for b.Loop() {
				if err := connectAndClose(to); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
		})
	}
}

// cpu is the processor time of this process.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// connectAndClose sends a SYN from 127.0.0.2 and waits for nothing.
func connectAndClose(to unix.Sockaddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), // else the ports run out
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 2}}),
	); err != nil {
		return err
	}
	if err := unix.Connect(fd, to); !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	return nil
}
