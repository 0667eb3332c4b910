package crc32c

import (
	"bytes"
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// want is the sum by hash/crc32.
func want(sum uint32, b []byte) uint32 { return crc32.Update(sum, table, b) }

// eachWay runs a test with the kernels, where the machine has them, and without.
func eachWay(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	was := accelerated
	defer func() { accelerated = was }()
	if was {
		t.Run("kernels", test)
	}
	accelerated = false
	t.Run("plain", test)
}

func random(n int) []byte {
	b, source := make([]byte, n), rand.NewChaCha8([32]byte{byte(n)})
	_, _ = source.Read(b) // never fails
	return b
}

// TestKnown: the vectors of RFC 3720 B.4, and the check value of the catalogues.
func TestKnown(t *testing.T) {
	up, down := make([]byte, 32), make([]byte, 32)
	for i := range up {
		up[i], down[i] = byte(i), byte(31-i)
	}
	read := make([]byte, 48)
	for _, at := range []struct{ offset, value byte }{{0, 1}, {1, 0xC0}, {16, 0x14}, {22, 4}, {27, 0x14}, {31, 0x18}, {32, 0x28}, {40, 2}} {
		read[at.offset] = at.value
	}
	eachWay(t, func(t *testing.T) {
		for _, c := range []struct {
			name string
			in   []byte
			want uint32
		}{
			{"zeros", make([]byte, 32), 0x8A9136AA},
			{"ones", bytes.Repeat([]byte{0xFF}, 32), 0x62A8AB43},
			{"up", up, 0x46DD794E},
			{"down", down, 0x113FDB5C},
			{"SCSI read", read, 0xD9963A56},
			{"digits", []byte("123456789"), 0xE3069283},
			{"nothing", nil, 0},
		} {
			if got := Update(0, c.in); got != c.want {
				t.Errorf("%s: %08x, want %08x", c.name, got, c.want)
			}
		}
	})
}

// TestLengths: every length up to 8 KiB, begun anew and continued, is summed and copied as by hash/crc32; nothing is written
// beside the copy.
func TestLengths(t *testing.T) {
	src := random(8<<10 + 64)
	eachWay(t, func(t *testing.T) {
		dst := make([]byte, len(src)+128)
		for n := range 8<<10 + 1 {
			from, sum := src[n%64:][:n], uint32(n)*0x9E3779B1
			check(t, sum, from, dst, n*7%64)
		}
	})
}

// TestAhead: what is asked for ahead where there are no kernels changes nothing, on both sides of each block.
func TestAhead(t *testing.T) {
	src := random(5*aheadBytes + 100)
	eachWay(t, func(t *testing.T) {
		for blocks := range 6 {
			for off := -70; off <= 70; off++ {
				n := blocks*aheadBytes + off
				if n < 0 || n+3 > len(src) {
					continue
				}
				if got, want := Update(7, src[3:3+n]), want(7, src[3:3+n]); got != want {
					t.Fatalf("%d bytes: %08x, want %08x", n, got, want)
				}
			}
		}
	})
}

// TestAlignments: sources and destinations may begin anywhere.
func TestAlignments(t *testing.T) {
	src := random(8 << 10)
	eachWay(t, func(t *testing.T) {
		dst := make([]byte, 8<<10)
		for _, n := range []int{255, 256, 320, 383, 512, 1025, 5000} {
			for at := range 64 {
				check(t, 1, src[at:][:n], dst, 5)
				check(t, 1, src[5:][:n], dst, at)
			}
		}
	})
}

// TestLarge: random large lengths, summed in one go and in pieces of random lengths.
func TestLarge(t *testing.T) {
	src := random(3 << 20)
	dst := make([]byte, len(src)+128)
	eachWay(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 2))
		for range 16 {
			from := src[r.IntN(1000):][:1<<20+r.IntN(1<<20)]
			check(t, 0, from, dst, r.IntN(64))
			sum := uint32(0)
			for left := from; len(left) > 0; {
				n := min(len(left), r.IntN(100_000))
				if r.IntN(2) == 0 {
					sum = Update(sum, left[:n])
				} else {
					sum = Copy(sum, dst, left[:n])
				}
				left = left[n:]
			}
			if sum != want(0, from) {
				t.Fatalf("%d bytes in pieces: %08x, want %08x", len(from), sum, want(0, from))
			}
		}
	})
}

// check sums and copies from, to dst from at on. dst has 64 bytes more than that.
func check(t *testing.T, sum uint32, from, dst []byte, at int) {
	t.Helper()
	want := want(sum, from)
	if got := Update(sum, from); got != want {
		t.Fatalf("%d bytes from %08x: %08x, want %08x", len(from), sum, got, want)
	}
	n := len(from)
	for _, way := range []struct {
		name string
		copy func(uint32, []byte, []byte) uint32
	}{{"Copy", Copy}, {"CopyPast", CopyPast}} {
		all := dst[:at+n+64]
		for i := range all {
			all[i] = 0xA5
		}
		if got := way.copy(sum, all[at:], from); got != want {
			t.Fatalf("%s of %d bytes from %08x: %08x, want %08x", way.name, n, sum, got, want)
		}
		if !bytes.Equal(all[at:at+n], from) {
			t.Fatalf("%s of %d bytes to %d: the copy differs", way.name, n, at)
		}
		for i, b := range all {
			if (i < at || i >= at+n) && b != 0xA5 {
				t.Fatalf("%s of %d bytes to %d wrote %02x at %d", way.name, n, at, b, i)
			}
		}
	}
}

// TestShort: a destination that is too short is the caller's mistake, and nothing is written.
func TestShort(t *testing.T) {
	eachWay(t, func(t *testing.T) {
		for _, copying := range []func(uint32, []byte, []byte) uint32{Copy, CopyPast} {
			dst := make([]byte, 999)
			func() {
				defer func() {
					if recover() == nil {
						t.Error("999 bytes took 1000")
					}
				}()
				copying(0, dst[:999:999], random(1000))
			}()
			if !bytes.Equal(dst, make([]byte, 999)) {
				t.Error("something was written")
			}
		}
	})
}

func FuzzSum(f *testing.F) {
	f.Add([]byte("123456789"), uint16(3), uint32(0))
	f.Add(random(5000), uint16(300), uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, cut uint16, sum uint32) {
		n := min(int(cut), len(b))
		if got := Update(Update(sum, b[:n]), b[n:]); got != want(sum, b) {
			t.Fatalf("%d and %d bytes: %08x, want %08x", n, len(b)-n, got, want(sum, b))
		}
		dst := make([]byte, len(b)+128)
		check(t, sum, b, dst, n%64)
	})
}
