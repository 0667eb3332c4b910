package sockfilter

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
)

// inTest has a packet from its network header on, with 40 bytes for that.
var inTest = frame{network: 0, transport: 40}

// packet is one of a kind from an address, with so much behind its header.
func packet(k kind, from netip.Addr, flags byte, payload ...byte) []byte {
	p := make([]byte, 40)
	if b := from.AsSlice(); from.Is4() {
		p[0] = 0x45
		copy(p[12:], b)
	} else {
		p[0] = 0x6b // with a class of traffic
		copy(p[8:], b)
	}
	if k == kindTCP {
		header := make([]byte, 20)
		header[13] = flags
		p = append(p, header...)
	} else {
		p = append(p, make([]byte, 8)...)
	}
	return append(p, payload...)
}

// beginning is a packet that begins a connection.
func beginning(k kind, from netip.Addr) []byte {
	if k == kindTCP {
		return packet(k, from, 0x02)
	}
	return packet(k, from, 0, 0xc3, 0, 0, 0, 1)
}

// machine runs what the kernel would be given.
func machine(t *testing.T, code []bpf.Instruction) func(packet []byte) (passed bool) {
	t.Helper()
	if _, err := bpf.Assemble(code); err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(code)
	if err != nil {
		t.Fatal(err)
	}
	return func(packet []byte) bool {
		n, err := vm.Run(packet)
		if err != nil {
			t.Fatal(err)
		}
		if n != 0 && n < len(packet) {
			t.Fatalf("a packet of %d bytes is cut to %d", len(packet), n)
		}
		return n != 0
	}
}

// prefix is how package bans remembers an address.
func prefix(t *testing.T, a netip.Addr) netip.Prefix {
	t.Helper()
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// someAddress is of few, so that neighbours and equal halves come.
func someAddress(rng *rand.Rand) netip.Addr {
	few := func() uint32 {
		return []uint32{0, 1, 0x7fffffff, 0x80000000, 0xffffffff, rng.Uint32N(64), rng.Uint32()}[rng.IntN(7)]
	}
	if rng.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, few())))
	}
	var b [16]byte
	for i := range 4 {
		binary.BigEndian.PutUint32(b[4*i:], few())
	}
	b[0] |= 0x20 // else some are mapped from IPv4
	return netip.AddrFrom16(b)
}

// program is a whole one.
func program(k kind, list []netip.Prefix, room int, at frame) ([]bpf.Instruction, int) {
	code, n := judge(list, room-beginsMax, at)
	return slices.Concat(begins(k, at), code), n
}

// TestModel compares programs with a plain search, for sets of any size that fits.
func TestModel(t *testing.T) {
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 0))
		banned := map[netip.Prefix]bool{}
		var list []netip.Prefix
		for range rng.IntN([]int{3, 20, 400}[seed%3]) {
			if p := prefix(t, someAddress(rng)); !banned[p] {
				banned[p] = true
				list = append(list, p)
			}
		}
		for k := range kinds {
			code, n := program(k, list, instructionsMax, inTest)
			if n != len(list) {
				t.Fatalf("seed %d: %d of %d fit", seed, n, len(list))
			}
			passes := machine(t, code)
			check := func(a netip.Addr) {
				if got, want := passes(beginning(k, a)), !banned[prefix(t, a)]; got != want {
					t.Fatalf("seed %d, kind %d: %v passed: %v, want %v", seed, k, a, got, want)
				}
			}
			for _, p := range list {
				check(p.Addr())
				check(p.Addr().Next())
				if before := p.Addr().Prev(); before.IsValid() {
					check(before)
				}
			}
			for range 300 {
				check(someAddress(rng))
			}
		}
	}
}

// TestOnlyBeginnings: what a banned address sends on connections that are there passes.
func TestOnlyBeginnings(t *testing.T) {
	four, six := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8:1:2::7")
	for k := range kinds {
		code, _ := program(k, []netip.Prefix{prefix(t, four), prefix(t, six)}, instructionsMax, inTest)
		passes := machine(t, code)
		for _, a := range []netip.Addr{four, six} {
			type sent struct {
				what   string
				packet []byte
				passes bool
			}
			var all []sent
			if k == kindTCP {
				for flags, want := range map[byte]bool{0x02: false, 0xc2: false, 0x06: false, 0x12: true, 0x10: true, 0x18: true, 0x11: true, 0x04: true, 0: true} {
					all = append(all, sent{fmt.Sprintf("flags %#x", flags), packet(k, a, flags), want})
				}
				all = append(all, sent{"a SYN with data", packet(k, a, 0x02, 1, 2, 3), false})
			} else {
				all = []sent{
					{"nothing", packet(k, a, 0), true}, {"one byte of a long header", packet(k, a, 0, 0x80), false}, {"an Initial", packet(k, a, 0, 0xc0, 0, 0, 0, 1), false},
					{"a packet of a connection", packet(k, a, 0, 0x41, 2, 3), true},
				}
			}
			for _, s := range all {
				if got := passes(s.packet); got != s.passes {
					t.Errorf("%v, %s: passed %v", a, s.what, got)
				}
			}
		}
		for _, version := range []byte{0x05, 0xf5} {
			p := beginning(k, four)
			p[0] = version
			if !passes(p) {
				t.Errorf("version %#x is dropped", version)
			}
		}
	}
}

// TestRoom: the first of the list are in the program that are as many as fit, and none is dropped for another.
func TestRoom(t *testing.T) {
	for _, c := range []struct {
		name    string
		address func(i uint32) netip.Addr
		atLeast int // addresses in a full program
	}{
		{"IPv4", func(i uint32) netip.Addr {
			return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, i*2654435761)))
		}, 2900},
		{"one /32 of IPv6", func(i uint32) netip.Addr { return six64(0x20010db8, i*2654435761) }, 2900},
		{"all of IPv6", func(i uint32) netip.Addr { return six64(0x20000000|i*2654435761>>4, i) }, 700},
	} {
		t.Run(c.name, func(t *testing.T) {
			var list []netip.Prefix
			for i := range uint32(5000) {
				list = append(list, prefix(t, c.address(i)))
			}
			for k := range kinds {
				_, most := program(k, list, instructionsMax, inTest)
				if most < c.atLeast {
					t.Errorf("kind %d: room for %d", k, most)
				}
				for _, many := range []int{0, 1, leafMax, leafMax + 1, most, most + 1, len(list)} {
					code, n := program(k, list[:many], instructionsMax, inTest)
					if len(code) > instructionsMax || n > many || many <= most && n != many || many > most && n < most*9/10 {
						t.Fatalf("kind %d: %d of %d in %d instructions", k, n, many, len(code))
					}
					passes := machine(t, code)
					for i := range uint32(5000) {
						if passes(beginning(k, c.address(i))) != (int(i) >= n) {
							t.Fatalf("kind %d, %d of %d: number %d is on the wrong side", k, n, many, i)
						}
					}
				}
				if code, n := program(k, list, 10, inTest); n != 0 || len(code) > 20 {
					t.Errorf("kind %d: %d addresses in 10 instructions, %d", k, n, len(code))
				}
			}
		})
	}
}

// six64 is an address of a /64.
func six64(high, low uint32) netip.Addr {
	b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, high), low)
	return netip.AddrFrom16([16]byte(append(b, 0, 0, 0, 0, 0, 0, 0, 9)))
}

func BenchmarkProgram(b *testing.B) {
	var list []netip.Prefix
	for i := range uint32(5000) {
		list = append(list, netip.PrefixFrom(netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, i*2654435761))), 32))
	}
	for b.Loop() {
		program(kindTCP, list, instructionsMax, inKernel)
	}
}
