package bans

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/wire"
)

var stranger = netip.MustParseAddr("192.0.2.7")

// v4 is the address of a number.
func v4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x0a000000|n)))
}

// TestLadder: 0.5, 1, 2, 4 s, then five minutes from the last failure.
func TestLadder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{})
		if v := table.Check(stranger); v != (Verdict{}) {
			t.Errorf("at first: %+v", v)
		}
		for i, want := range []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second} {
			if v := table.Failed(stranger); v.Banned || v.Wait != want {
				t.Errorf("failure %d: %+v", i+1, v)
			}
			if v := table.Check(stranger); v.Banned || v.Wait != want {
				t.Errorf("after failure %d: %+v", i+1, v)
			}
			<-time.After(want - 1)
			if v := table.Check(stranger); v.Wait != 1 {
				t.Errorf("1 ns before the end of %v: %+v", want, v)
			}
			<-time.After(1)
			if v := table.Check(stranger); v != (Verdict{}) {
				t.Errorf("after %v: %+v", want, v)
			}
		}
		until := time.Now().Add(BanFor)
		if v := table.Failed(stranger); !v.Banned || !v.Until.Equal(until) {
			t.Errorf("failure 5: %+v", v)
		}
		<-time.After(BanFor - 1)
		if v := table.Check(stranger); !v.Banned || !v.Until.Equal(until) {
			t.Errorf("1 ns before the end of the ban: %+v", v)
		}
		// A handshake that was under way when the ban began fails too: five minutes from then.
		if v := table.Failed(stranger); !v.Banned || !v.Until.Equal(time.Now().Add(BanFor)) {
			t.Errorf("failure 6: %+v", v)
		}
		<-time.After(BanFor - 1)
		if v := table.Check(stranger); !v.Banned {
			t.Errorf("1 ns before the end: %+v", v)
		}
		<-time.After(1)
		if v := table.Check(stranger); v != (Verdict{}) {
			t.Errorf("after the ban: %+v", v)
		}
		if v := table.Failed(stranger); v.Wait != 500*time.Millisecond {
			t.Errorf("after the ban it begins anew: %+v", v)
		}
		if s := table.Stats(); s.Failures != 7 || s.Bans != 1 || s.Refused != 2 || s.Addresses != 1 || s.Banned != 0 || s.Slowed != 8 {
			t.Errorf("%+v", s)
		}
	})
}

// TestFailuresAreForgotten: four failures count no more after five minutes.
func TestFailuresAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{})
		for range FailuresMax - 1 {
			table.Failed(stranger)
		}
		<-time.After(BanFor)
		if v := table.Failed(stranger); v.Banned || v.Wait != 500*time.Millisecond {
			t.Errorf("%+v", v)
		}
	})
}

func TestSuccessClears(t *testing.T) {
	table := New(Config{})
	table.Succeeded(stranger) // of an empty table
	for range FailuresMax {
		table.Failed(stranger)
	}
	table.Succeeded(v4(1)) // of another
	if v := table.Check(stranger); !v.Banned {
		t.Errorf("another's success: %+v", v)
	}
	table.Succeeded(stranger)
	if v := table.Check(stranger); v != (Verdict{}) || len(table.Ls()) != 0 || table.Stats().Cleared != 1 {
		t.Errorf("%+v, %+v", v, table.Stats())
	}
}

// TestAddresses: which addresses are one, and which are none.
func TestAddresses(t *testing.T) {
	ban := func(table *Table, a netip.Addr) {
		for range FailuresMax {
			table.Failed(a)
		}
	}
	for _, c := range []struct {
		banned, other string
		same          bool
	}{
		{"192.0.2.7", "::ffff:192.0.2.7", true},
		{"::ffff:192.0.2.7", "192.0.2.7", true},
		{"192.0.2.7", "192.0.2.8", false},
		{"2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", true},
		{"2001:db8:1:2::1", "2001:db8:1:3::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
	} {
		table := New(Config{})
		ban(table, netip.MustParseAddr(c.banned))
		if v := table.Check(netip.MustParseAddr(c.other)); v.Banned != c.same {
			t.Errorf("%s banned: %s is %+v", c.banned, c.other, v)
		}
	}
	for _, exempt := range []netip.Addr{{}, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.8.9.1"), netip.MustParseAddr("::1"), netip.MustParseAddr("::ffff:127.0.0.1")} {
		table := New(Config{})
		table.Failed(stranger)
		ban(table, exempt)
		if v := table.Check(exempt); v != (Verdict{}) || len(table.Ls()) != 1 {
			t.Errorf("%v: %+v", exempt, v)
		}
		table = New(Config{Loopback: true})
		ban(table, exempt)
		if v := table.Check(exempt); v.Banned != exempt.IsValid() {
			t.Errorf("%v, which counts: %+v", exempt, v)
		}
	}
	if a := Address(&net.TCPAddr{IP: net.ParseIP("192.0.2.7"), Port: 5}); a.Unmap() != stranger {
		t.Errorf("TCP: %v", a)
	}
	if a := Address(&net.UDPAddr{IP: net.ParseIP("192.0.2.7"), Port: 5}); a.Unmap() != stranger {
		t.Errorf("UDP: %v", a)
	}
	if a := Address(&net.UnixAddr{Name: "x", Net: "unix"}); a.IsValid() {
		t.Errorf("unix: %v", a)
	}
}

// TestBound: one address more than there is room for makes the oldest failure forgotten, and no other.
func TestBound(t *testing.T) {
	table := New(Config{})
	for n := range uint32(AddressesMax) {
		table.Failed(v4(n))
	}
	if s := table.Stats(); s.Addresses != AddressesMax || s.Forgotten != 0 {
		t.Fatalf("%+v", s)
	}
	table.Failed(v4(0)) // the oldest is number 1 now
	table.Failed(stranger)
	if s := table.Stats(); s.Addresses != AddressesMax || s.Forgotten != 1 {
		t.Errorf("%+v", s)
	}
	remembered := map[string]int{}
	for _, e := range table.Ls() {
		remembered[e.Address] = e.Failures
	}
	if remembered[v4(0).String()] != 2 || remembered[v4(1).String()] != 0 || remembered[v4(2).String()] != 1 || remembered[stranger.String()] != 1 || len(remembered) != AddressesMax {
		t.Errorf("%d, %d, %d, %d of %d", remembered[v4(0).String()], remembered[v4(1).String()], remembered[v4(2).String()], remembered[stranger.String()], len(remembered))
	}
	if n := table.ClearAll(); n != AddressesMax || len(table.Ls()) != 0 || table.Check(v4(0)) != (Verdict{}) {
		t.Errorf("%d were cleared", n)
	}
	table.Failed(stranger)
	if table.Check(stranger).Wait == 0 {
		t.Error("nothing is remembered after ClearAll")
	}
}

func TestLsAndClear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{})
		six := netip.MustParseAddr("2001:db8:1:2::7")
		for range FailuresMax {
			table.Failed(six)
		}
		table.Check(six)
		<-time.After(time.Second)
		table.Failed(stranger)
		now := time.Now()
		want := []Entry{
			{"192.0.2.7", 1, now, false, now.Add(BanFor), 0},
			{"2001:db8:1:2::/64", FailuresMax, now.Add(-time.Second), true, now.Add(BanFor - time.Second), 1},
		}
		if got := table.Ls(); !slices.Equal(got, want) {
			t.Errorf("%+v", got)
		}
		for _, bad := range []string{"", "example.com", "192.0.2.0/24", "2001:db8::/32", "192.0.2.7:80"} {
			if ok, err := table.Clear(bad); ok || err == nil {
				t.Errorf("%q: %v, %v", bad, ok, err)
			}
		}
		for _, c := range []struct {
			address string
			ok      bool
		}{{"192.0.2.8", false}, {"::ffff:192.0.2.7", true}, {"192.0.2.7/32", false}, {"2001:db8:1:2::/64", true}, {"2001:db8:1:2::9", false}} {
			if ok, err := table.Clear(c.address); ok != c.ok || err != nil {
				t.Errorf("%q: %v, %v", c.address, ok, err)
			}
		}
		if got := table.Ls(); len(got) != 0 {
			t.Errorf("left: %+v", got)
		}
	})
}

// TestNoTable: where bans are switched off nobody is slowed, and nothing is remembered.
func TestNoTable(t *testing.T) {
	var none *Table
	for range FailuresMax {
		none.Failed(stranger)
	}
	none.Succeeded(stranger)
	if v := none.Check(stranger); v != (Verdict{}) || len(none.Ls()) != 0 {
		t.Errorf("%+v", v)
	}
}

// TestExpiredAreNotListed: what is over is neither shown nor kept.
func TestExpiredAreNotListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{})
		table.Failed(stranger)
		<-time.After(BanFor)
		if s := table.Stats(); s.Addresses != 0 || len(table.Ls()) != 0 || table.size.Load() != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TestBanned: the latest failure comes first, and no more are listed than asked for; what is over is not there.
func TestBanned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{})
		ban := func(a netip.Addr) Ban {
			for range FailuresMax {
				table.Failed(a)
			}
			key, _ := keyOf(a, false)
			<-time.After(time.Second)
			return Ban{key, time.Now().Add(BanFor - time.Second)}
		}
		one, six := ban(v4(1)), ban(netip.MustParseAddr("2001:db8:1:2::7"))
		table.Failed(stranger)
		two := ban(v4(2))
		for most, want := range [][]Ban{{}, {two}, {two, six}, {two, six, one}, {two, six, one}} {
			if got := table.Banned(most); !slices.Equal(got, want) {
				t.Errorf("at most %d: %v", most, got)
			}
		}
		table.Failed(v4(1))
		one.Until = time.Now().Add(BanFor)
		if got, want := table.Banned(9), []Ban{one, two, six}; !slices.Equal(got, want) {
			t.Errorf("after one more failure: %v, want %v", got, want)
		}
		<-time.After(time.Until(six.Until))
		if got, want := table.Banned(9), []Ban{one, two}; !slices.Equal(got, want) || table.Stats().Banned != 2 {
			t.Errorf("when one is over: %v, want %v", got, want)
		}
		table.ClearAll()
		if got := table.Banned(9); len(got) != 0 || table.Stats().Banned != 0 {
			t.Errorf("after ClearAll: %v", got)
		}
	})
}

// TestChanged: who asks is told of each ban and of each end that is not in the list, and nobody ever waits for it.
func TestChanged(t *testing.T) { synctest.Test(t, testChanged) }

func testChanged(t *testing.T) {
	table := New(Config{})
	told := func() bool {
		select {
		case <-table.Changed():
			return true
		default:
			return false
		}
	}
	for i := range FailuresMax - 1 {
		if table.Failed(stranger); told() {
			t.Errorf("told of failure %d", i+1)
		}
	}
	step := func(what string, want bool, do func()) {
		if do(); told() != want {
			t.Errorf("%s: told %v, want %v", what, !want, want)
		}
		if told() {
			t.Errorf("%s: told twice", what)
		}
	}
	step("the ban", true, func() { table.Failed(stranger) })
	step("a failure of who is banned", false, func() { table.Failed(stranger) })
	step("a success", true, func() { table.Succeeded(stranger) })
	step("a success of who is not banned", false, func() {
		table.Failed(stranger)
		table.Succeeded(stranger)
	})
	step("many at once", true, func() {
		for n := range uint32(100) {
			for range FailuresMax {
				table.Failed(v4(n))
			}
		}
	})
	step("one cleared", true, func() {
		if ok, err := table.Clear(v4(5).String()); !ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
	})
	step("all cleared", true, func() { table.ClearAll() })
	for n := range uint32(FailuresMax) {
		table.Failed(stranger)
		table.Failed(v4(n))
	}
	step("the first again", true, func() {})
	step("its end", false, func() {
		<-time.After(BanFor)
		if len(table.Banned(1)) != 0 {
			t.Error("it goes on")
		}
	})
	for range FailuresMax {
		table.Failed(stranger)
	}
	step("the first once more", true, func() {})
	step("its place given to another", true, func() {
		for n := range uint32(AddressesMax) {
			table.Failed(v4(n))
		}
	})
}

func TestFailure(t *testing.T) {
	failures := []wire.Code{wire.CodeBadMagic, wire.CodeBadVersion, wire.CodeBadHandshake, wire.CodeHandshakeTimeout, wire.CodeNotAuthenticated}
	for _, code := range wire.Codes() {
		if Failure(code) != slices.Contains(failures, code) {
			t.Errorf("%s: %v", code, Failure(code))
		}
	}
}

// TestModel compares random lives with a table that is plainly written.
func TestModel(t *testing.T) {
	type past struct {
		failures int
		last     time.Time
	}
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			table, model := New(Config{}), map[netip.Addr]past{}
			for step := range 2000 {
				a := v4(rng.Uint32N(8))
				p, now := model[a], time.Now()
				if now.Sub(p.last) >= 5*time.Minute {
					p = past{}
				}
				switch rng.IntN(8) {
				case 0, 1, 2:
					p = past{p.failures + 1, now}
					table.Failed(a)
				case 3:
					if rng.IntN(4) == 0 {
						p = past{}
						table.Succeeded(a)
					}
				case 4:
					<-time.After(time.Duration(rng.Int64N(int64(2 * time.Minute))))
				default:
					want := Verdict{}
					switch {
					case p.failures >= 5:
						want = Verdict{Banned: true, Until: p.last.Add(5 * time.Minute)}
					case p.failures > 0:
						want.Wait = max(0, p.last.Add([]time.Duration{0, 500, 1000, 2000, 4000}[p.failures]*time.Millisecond).Sub(now))
					}
					if got := table.Check(a); got != want {
						t.Fatalf("seed %d, step %d, %v: %+v, want %+v", seed, step, a, got, want)
					}
				}
				model[a] = p
				banned := map[netip.Prefix]bool{}
				for _, b := range table.Banned(len(model)) {
					banned[b.Prefix] = true
				}
				for a, p := range model {
					want := p.failures >= 5 && time.Since(p.last) < 5*time.Minute
					if key, _ := keyOf(a, false); banned[key] != want {
						t.Fatalf("seed %d, step %d: %v banned: %v", seed, step, a, banned[key])
					}
				}
			}
		})
	}
}

// TestManyGoroutines is for the race detector.
func TestManyGoroutines(t *testing.T) {
	table := New(Config{})
	var all sync.WaitGroup
	for g := range uint32(4) {
		all.Go(func() {
			for i := range uint32(500) {
				a := v4((g + i) % 16)
				table.Failed(a)
				table.Check(a)
				if i%100 == 99 {
					table.Succeeded(a)
					table.Ls()
					_ = table.Stats()
				}
			}
		})
	}
	all.Wait()
	if s := table.Stats(); s.Failures != 2000 || s.Addresses > 16 {
		t.Errorf("%+v", s)
	}
}

// TestCheckAllocatesNothing: a banned address costs no memory.
func TestCheckAllocatesNothing(t *testing.T) {
	table := New(Config{})
	six := netip.MustParseAddr("2001:db8:1:2::7")
	for range FailuresMax {
		table.Failed(stranger)
		table.Failed(six)
	}
	for _, a := range []netip.Addr{stranger, six, v4(1)} {
		if n := testing.AllocsPerRun(100, func() { table.Check(a) }); n != 0 {
			t.Errorf("%v: %v allocations", a, n)
		}
	}
}

// BenchmarkCheckBanned is what a connection from a banned address costs here, beside what its accept and close cost in the kernel.
func BenchmarkCheckBanned(b *testing.B) {
	for _, others := range []uint32{0, AddressesMax - 1} {
		b.Run(fmt.Sprintf("others=%d", others), func(b *testing.B) {
			table := New(Config{})
			for n := range others {
				table.Failed(v4(n))
			}
			for range FailuresMax {
				table.Failed(stranger)
			}
			b.ReportAllocs()
			for b.Loop() {
				if !table.Check(stranger).Banned {
					b.Fatal("not banned")
				}
			}
		})
	}
	b.Run("baseline=connect-accept-close", func(b *testing.B) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		for b.Loop() {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			s, err := l.Accept()
			if err != nil {
				b.Fatal(err)
			}
			s.Close()
			c.Close()
		}
	})
}
