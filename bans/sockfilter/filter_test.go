package sockfilter

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/bans"
)

// fake is a socket that runs its program in a machine of x/net/bpf.
type fake struct {
	mu      sync.Mutex
	code    []bpf.RawInstruction
	times   []time.Time // of attach
	counter uint32
	memory  int   // instructions there is memory for, 0 any number; those of the old program count until the new one is there
	err     error // of everything
}

func (f *fake) attach(code []bpf.RawInstruction) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.err != nil:
		return f.err
	case f.memory > 0 && len(f.code)+len(code) > f.memory:
		return os.NewSyscallError("setsockopt", unix.ENOMEM)
	}
	f.code, f.times = code, append(f.times, time.Now())
	return nil
}

func (f *fake) detach() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.code = nil
	return f.err
}

func (f *fake) drops() (uint32, error) { return f.counter, f.err }

// dropped are those of some addresses from which a connection does not begin.
func (f *fake) dropped(t *testing.T, k kind, from []netip.Addr) (list []netip.Addr) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.code == nil {
		return nil
	}
	code, ok := bpf.Disassemble(f.code)
	if !ok {
		t.Fatal("the program is none")
	}
	passes := machine(t, code)
	for _, a := range from {
		if !passes(beginning(k, a)) {
			list = append(list, a)
		}
	}
	return list
}

// site is a filter for one fake of each kind.
type site struct {
	*testing.T
	*Filter
	log       bytes.Buffer
	table     *bans.Table
	tcp, quic fake
	strangers []netip.Addr
}

func newSite(t *testing.T) *site {
	s := &site{T: t, table: bans.New(bans.Config{})}
	for n := range uint32(4) {
		s.strangers = append(s.strangers, v4(n))
	}
	s.strangers = append(s.strangers, netip.MustParseAddr("2001:db8:1:2::7"))
	s.Filter = New(Config{Table: s.table, Log: slog.New(slog.NewTextHandler(&s.log, nil))})
	s.at = inTest
	s.add(&s.tcp, kindTCP)
	s.add(&s.quic, kindQUIC)
	return s
}

func (s *site) ban(number int) {
	for range bans.FailuresMax {
		s.table.Failed(s.strangers[number])
	}
}

// drops says that packets of these strangers are dropped, and of no others.
func (s *site) drops(when string, numbers ...int) {
	s.Helper()
	var want []netip.Addr
	for _, n := range numbers {
		want = append(want, s.strangers[n])
	}
	for k, f := range []*fake{&s.tcp, &s.quic} {
		if got := f.dropped(s.T, kind(k), s.strangers); !slices.Equal(got, want) {
			s.Errorf("%s, kind %d: %v are dropped, want %v", when, k, got, want)
		}
	}
	if got := s.Stats().Addresses; got != len(numbers) {
		s.Errorf("%s: Stats says %d addresses, want %d", when, got, len(numbers))
	}
}

func v4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x0a000000|n)))
}

// TestRenewal: a ban is in force at once, the next a little later, and all of them end when they are over or cleared, and with the filter.
func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		ctx, stop := context.WithCancel(t.Context())
		over := make(chan struct{})
		s.ban(3) // before it runs
		go func() {
			defer close(over)
			_ = s.Filter.Run(ctx)
		}()
		synctest.Wait()
		s.drops("who was banned before", 3)
		<-time.After(time.Second)
		began := time.Now()
		s.ban(0)
		synctest.Wait()
		s.drops("at once", 0, 3)
		s.ban(4)
		synctest.Wait()
		s.drops("not so often", 0, 3)
		<-time.After(interval + 1)
		synctest.Wait()
		s.drops("a little later", 0, 3, 4)

		<-time.After(time.Second)
		if ok, err := s.table.Clear(s.strangers[0].String()); !ok || err != nil {
			t.Fatal(ok, err)
		}
		synctest.Wait()
		s.drops("one was cleared", 3, 4)
		<-time.After(time.Until(began.Add(bans.BanFor - time.Second - 1)))
		synctest.Wait()
		s.drops("1 ns before the first is over", 3, 4)
		<-time.After(1)
		synctest.Wait()
		s.drops("the first is over", 4)
		s.table.Failed(s.strangers[4]) // a handshake that was under way: five minutes more
		<-time.After(bans.BanFor - 1)
		synctest.Wait()
		s.drops("1 ns before the last is over", 4)
		<-time.After(1)
		synctest.Wait()
		s.drops("all are over")

		<-time.After(interval + 1)
		s.ban(1)
		synctest.Wait()
		s.drops("one more", 1)
		s.table.Succeeded(s.strangers[1])
		<-time.After(interval + 1)
		synctest.Wait()
		s.drops("a success")
		<-time.After(interval + 1)
		s.ban(2)
		synctest.Wait()
		s.drops("the last", 2)
		stop()
		<-over
		s.drops("the filter ended")
		if s.tcp.code != nil || s.Stats().Failures != 0 || s.log.Len() > 0 {
			t.Errorf("%v\n%s", s.Stats(), s.log.String())
		}
	})
}

// TestRate: however many are banned one after another, programs come no faster than allowed, and the last has all.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go func() { _ = s.Filter.Run(ctx) }()
		const many = 1000
		s.strangers = nil
		var all []int
		for n := range many {
			s.strangers, all = append(s.strangers, v4(uint32(n))), append(all, n)
			s.ban(n)
			<-time.After(time.Millisecond)
		}
		<-time.After(interval + 1)
		synctest.Wait()
		s.drops("at the end", all...)
		for i, at := range s.tcp.times[1:] {
			if d := at.Sub(s.tcp.times[i]); d < interval {
				t.Errorf("%v between two programs", d)
			}
		}
		if n := len(s.tcp.times); n < many/100 {
			t.Errorf("%d programs in %d ms", n, many)
		}
		before := len(s.tcp.times)
		s.table.Failed(v4(5000)) // which is no ban
		<-time.After(time.Second)
		synctest.Wait()
		if len(s.tcp.times) != before {
			t.Error("a program for nothing new")
		}
	})
}

// TestMemory: a program takes the place of another where there is no memory for both, and has half as many addresses, the newest, where there is none for it.
func TestMemory(t *testing.T) {
	s := newSite(t)
	const many = 2000
	s.strangers = nil
	for n := range many {
		s.strangers = append(s.strangers, v4(uint32(n)))
		s.ban(n)
	}
	s.quic.memory = 3500 // enough for one
	s.renew()
	if st := s.Stats(); st.Addresses != many || st.Failures != 0 || s.log.Len() != 0 {
		t.Fatalf("%+v\n%s", st, s.log.String())
	}
	s.table.Succeeded(s.strangers[0])
	s.renew()
	if st := s.Stats(); st.Addresses != many-1 || st.Failures != 0 || s.log.Len() != 0 {
		t.Errorf("another program: %+v\n%s", st, s.log.String())
	}
	if got := s.quic.dropped(t, kindQUIC, s.strangers); !slices.Equal(got, s.strangers[1:]) {
		t.Errorf("%d are dropped", len(got))
	}

	s.quic.memory = 1500
	s.table.Succeeded(s.strangers[1])
	s.renew()
	st := s.Stats()
	if st.Addresses < 600 || st.Addresses > 1000 || st.Failures != 0 || strings.Count(s.log.String(), "optmem_max") != 2 {
		t.Errorf("little memory: %+v\n%s", st, s.log.String())
	}
	for k, f := range []*fake{&s.tcp, &s.quic} {
		if got := f.dropped(t, kind(k), s.strangers); !slices.Equal(got, s.strangers[many-st.Addresses:]) {
			t.Errorf("kind %d: %d are dropped, want the newest %d", k, len(got), st.Addresses)
		}
	}

	s.quic.memory = 1 // for no program at all
	s.table.Succeeded(s.strangers[many-1])
	s.renew()
	if st := s.Stats(); st.Failures == 0 || s.quic.code != nil || len(s.tcp.code) >= 2*roomMin+beginsMax {
		t.Errorf("no memory: %+v, %d instructions on the other", st, len(s.tcp.code))
	}
}

// TestRefused: where the kernel takes no program, nothing else happens, it is said once, and tried again.
func TestRefused(t *testing.T) {
	s := newSite(t)
	s.tcp.err, s.quic.err = unix.EPERM, net.ErrClosed
	s.ban(0)
	s.renew()
	s.ban(1)
	s.renew()
	if st := s.Stats(); st != (Stats{Failures: 2}) || strings.Count(s.log.String(), "level=WARN") != 1 {
		t.Errorf("%+v\n%s", st, s.log.String())
	}
	s.tcp.err = nil
	s.ban(2)
	s.renew()
	if got := s.tcp.dropped(t, kindTCP, s.strangers); !slices.Equal(got, s.strangers[:3]) || s.Stats().Addresses != 3 {
		t.Errorf("%v are dropped, %+v", got, s.Stats())
	}
	// What cannot be renewed is taken away, or a ban that is over would last.
	s.tcp.err = unix.EPERM
	s.table.ClearAll()
	s.ban(3)
	s.renew()
	if s.tcp.code != nil || s.Stats().Addresses != 0 {
		t.Errorf("an old program stays: %+v", s.Stats())
	}
}

// TestDrops: the kernel's counts wrap, ours do not.
func TestDrops(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct {
		tcp, quic uint32
		want      Stats
	}{
		{0, 0, Stats{}},
		{7, 0, Stats{DroppedTCP: 7}},
		{7, 9, Stats{DroppedTCP: 7, DroppedQUIC: 9}},
		{0xfffffff0, 9, Stats{DroppedTCP: 0xfffffff0, DroppedQUIC: 9}},
		{5, 10, Stats{DroppedTCP: 0x100000005, DroppedQUIC: 10}},
	} {
		s.tcp.counter, s.quic.counter = c.tcp, c.quic
		if got := s.Stats(); got != c.want {
			t.Errorf("%d, %d: %+v", c.tcp, c.quic, got)
		}
	}
	s.tcp.err = net.ErrClosed
	if got := s.Stats(); got.DroppedTCP != 0x100000005 {
		t.Errorf("of a closed socket: %+v", got)
	}
}
