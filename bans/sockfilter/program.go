package sockfilter

import (
	"encoding/binary"
	"maps"
	"math"
	"net/netip"
	"slices"

	"golang.org/x/net/bpf"
)

// instructionsMax is what the kernel takes (BPF_MAXINSNS).
const instructionsMax = 4096

// kind is whose packets a program judges.
type kind int

const (
	kindTCP kind = iota
	kindQUIC
	kinds
)

// frame says where in a packet a program finds its headers. The kernel has the transport's at 0, and the network's at an offset of its own.
type frame struct{ network, transport uint32 }

// inKernel is SKF_NET_OFF of linux/filter.h.
var inKernel = frame{network: 0xfff00000}

// What a program returns is how many bytes of the packet to keep.
var (
	pass = bpf.RetConstant{Val: 0xffffffff}
	drop = bpf.RetConstant{Val: 0}
)

// leafMax is how many addresses are compared one after another.
const leafMax = 8

// judge drops what comes from the first of prefixes, as many as there is room for, and returns how many that are. It stands behind begins. Prefixes are addresses of IPv4 and
// /64s of IPv6.
func judge(prefixes []netip.Prefix, room int, at frame) (code []bpf.Instruction, n int) {
	for n = min(len(prefixes), room); ; n = min(n*room/len(code), n-1) {
		if code = judgeAll(prefixes[:n], at); len(code) <= room || n == 0 {
			return code, n
		}
	}
}

func judgeAll(prefixes []netip.Prefix, at frame) []bpf.Instruction {
	var four []uint32
	six := map[uint32][]uint32{} // by the first half of the /64
	for _, p := range prefixes {
		if a := p.Addr(); a.Is4() {
			b := a.As4()
			four = append(four, binary.BigEndian.Uint32(b[:]))
		} else {
			b := a.As16()
			high := binary.BigEndian.Uint32(b[:])
			six[high] = append(six[high], binary.BigEndian.Uint32(b[4:]))
		}
	}
	searchFour := append([]bpf.Instruction{bpf.LoadAbsolute{Off: at.network + 12, Size: 4}}, search(four)...)
	return slices.Concat(
		[]bpf.Instruction{bpf.LoadAbsolute{Off: at.network, Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xf0}}, // the version
		skipIf(bpf.JumpNotEqual, 0x40, len(searchFour)), searchFour,
		[]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0x60, SkipTrue: 1}, pass, bpf.LoadAbsolute{Off: at.network + 8, Size: 4}},
		searchSix(six, at))
}

// beginsMax is how long begins may be.
const beginsMax = 6

// begins lets pass what begins no connection.
func begins(k kind, at frame) []bpf.Instruction {
	if k == kindTCP { // of the flags SYN and ACK, SYN
		return []bpf.Instruction{
			bpf.LoadAbsolute{Off: at.transport + 13, Size: 1},
			bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x12},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0x02, SkipTrue: 1},
			pass,
		}
	}
	return []bpf.Instruction{ // a load beyond the end would drop the packet
		bpf.LoadExtension{Num: bpf.ExtLen},
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: at.transport + 9, SkipTrue: 1},
		pass,
		bpf.LoadAbsolute{Off: at.transport + 8, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x80, SkipTrue: 1},
		pass,
	}
}

// skipIf skips n instructions if the value at hand passes a test. Only jumps without one go further than 255.
func skipIf(test bpf.JumpTest, v uint32, n int) []bpf.Instruction {
	if n <= math.MaxUint8 {
		return []bpf.Instruction{bpf.JumpIf{Cond: test, Val: v, SkipTrue: uint8(n)}}
	}
	return []bpf.Instruction{bpf.JumpIf{Cond: test, Val: v, SkipFalse: 1}, bpf.Jump{Skip: uint32(n)}}
}

// halves searches sorted keys for the one at hand: it goes to the half in which that must be, until a leaf takes what is left.
func halves(keys []uint32, leaf func([]uint32) []bpf.Instruction) []bpf.Instruction {
	if len(keys) <= leafMax {
		return leaf(keys)
	}
	middle := (len(keys)/2 + leafMax - 1) / leafMax * leafMax // so that leaves are full
	below := halves(keys[:middle], leaf)
	return slices.Concat(skipIf(bpf.JumpGreaterOrEqual, keys[middle], len(below)), below, halves(keys[middle:], leaf))
}

// search drops the packet if the value at hand is one of keys, else lets it pass.
func search(keys []uint32) []bpf.Instruction {
	slices.Sort(keys)
	return halves(keys, func(keys []uint32) []bpf.Instruction {
		var code []bpf.Instruction
		for i, k := range keys {
			code = append(code, bpf.JumpIf{Cond: bpf.JumpEqual, Val: k, SkipTrue: uint8(len(keys) - i)})
		}
		return append(code, pass, drop)
	})
}

// searchSix is search by the first half of a /64, which is at hand, and then by the second.
func searchSix(lows map[uint32][]uint32, at frame) []bpf.Instruction {
	highs := slices.Sorted(maps.Keys(lows))
	return halves(highs, func(highs []uint32) []bpf.Instruction {
		var code []bpf.Instruction
		for _, h := range highs {
			found := append([]bpf.Instruction{bpf.LoadAbsolute{Off: at.network + 12, Size: 4}}, search(lows[h])...)
			code = slices.Concat(code, skipIf(bpf.JumpNotEqual, h, len(found)), found)
		}
		return append(code, pass)
	})
}
