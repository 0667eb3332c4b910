package tensor

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

func TestCRC(t *testing.T) {
	// RFC 3720, B.4, and the check value of the catalogue of CRCs.
	ascending := make([]byte, 32)
	for i := range ascending {
		ascending[i] = byte(i)
	}
	for _, c := range []struct {
		data []byte
		want uint32
	}{
		{nil, 0}, {[]byte("123456789"), 0xE3069283}, {make([]byte, 32), 0x8A9136AA}, {bytes.Repeat([]byte{0xff}, 32), 0x62A8AB43}, {ascending, 0x46DD794E},
	} {
		if got := CRC(c.data); got != c.want {
			t.Errorf("CRC(%x) = %08x, want %08x", c.data, got, c.want)
		}
	}
}

func TestCombineCRC(t *testing.T) {
	data := pattern(70_000)
	for _, a := range []int{0, 1, 7, 256, 65_536} {
		for _, b := range []int{0, 1, 2, 3, 8, 63, 255, 256, 257, 4096, len(data) - a} {
			if a+b > len(data) {
				continue
			}
			first, second := data[:a], data[a:a+b]
			if got, want := CombineCRC(CRC(first), CRC(second), int64(b)), CRC(data[:a+b]); got != want {
				t.Errorf("%d and %d bytes: %08x, want %08x", a, b, got, want)
			}
			if got, want := UpdateCRC(CRC(first), second), CRC(data[:a+b]); got != want {
				t.Errorf("%d and %d bytes, updated: %08x, want %08x", a, b, got, want)
			}
		}
	}
	// Lengths that no test can sum: appending 2^40 zeros twice is appending 2^41.
	x := CRC([]byte("x"))
	if CombineCRC(CombineCRC(x, 0, 1<<40), 0, 1<<40) != CombineCRC(x, 0, 1<<41) || CombineCRC(x, 0, 1<<40) == x {
		t.Error("long lengths do not add up")
	}
}

// tiny has gaps, an empty tensor and every kind of place.
func tiny(t testing.TB) *Manifest {
	return made(t, u8("a", 300), u8("none", 0), u8("b", 512), f32("c", 10, Encoding{Kind: F8E4M3}), u8("d", 1))
}

func TestHeader(t *testing.T) {
	h := Header{Flags: FlagBegin | FlagNoCRC, Step: 1, Stream: 2, Producer: 0x0102030405060708, Manifest: 4, Offset: 256, Tensor: 5, Length: 6, DataCRC: 7}
	b := make([]byte, HeaderBytes+1)
	h.Put(b)
	want := "4943484b" + "0100" + "0900" + "0100000000000000" + "0200000000000000" + "0807060504030201" + "0400000000000000" + "0001000000000000" +
		"05000000" + "06000000" + "07000000"
	if got := hex.EncodeToString(b[:60]); got != want || b[HeaderBytes] != 0 {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got, err := ParseHeader(b); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	plain := bytes.Clone(b)
	MarkRefused(b)
	h.Flags |= FlagRefused
	if got, err := ParseHeader(b); err != nil || got != h {
		t.Errorf("refused: %+v, %v", got, err)
	}
	h.Put(plain)
	if !bytes.Equal(plain, b) {
		t.Error("a header that is put as refused differs from one that is marked")
	}
}

// sign gives a damaged header the sum it should have, so that what is behind the sum is reached.
func sign(b []byte) []byte {
	sum := headerSum(b)
	b[60], b[61], b[62], b[63] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
	return b
}

func TestParseHeaderRefuses(t *testing.T) {
	good := make([]byte, HeaderBytes)
	(&Header{}).Put(good)
	with := func(at int, x byte) []byte {
		b := bytes.Clone(good)
		b[at] = x
		return b
	}
	for want, b := range map[string][]byte{
		"63 bytes, not 64":       good[:63],
		"not the magic":          sign(with(0, 'i')),
		"version 2":              sign(with(4, 2)),
		"unknown flags 0x80":     sign(with(6, 0x80)),
		"unknown flags 0x100":    sign(with(7, 1)),
		"the header is damaged":  with(8, 1),
		"header is damaged: its": with(60, good[60]^1),
	} {
		_, err := ParseHeader(b)
		var typed *ChunkError
		if !errors.As(err, &typed) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestCheck(t *testing.T) {
	m := tiny(t) // a 0..300, b 512..1024, c 1024..1290, d 1536..1537, data bytes 1792
	const chunk = ChunkBytesMin
	for _, c := range []struct {
		h    Header
		want string // empty: it is right
	}{
		{Header{Tensor: 0, Length: 256}, ""},
		{Header{Tensor: 0, Length: 300}, ""},
		{Header{Tensor: 0, Length: 512}, ""},
		{Header{Tensor: 0, Length: 1290}, ""},
		{Header{Tensor: 0, Length: 1792}, ""},
		{Header{Tensor: 0, Offset: 256, Length: 44}, ""},
		{Header{Tensor: 3, Offset: 256, Length: 257}, ""},
		{Header{Tensor: 4, Length: 1}, ""},
		{Header{Tensor: 4, Length: 256, Flags: FlagBegin}, ""},
		{Header{Flags: FlagBegin}, ""},
		{Header{Flags: FlagEnd}, ""},
		{Header{Flags: FlagEnd | FlagBegin, Length: 20}, ""},
		{Header{Flags: FlagAbort}, ""},
		{Header{Flags: FlagOpened}, ""},
		{Header{Flags: FlagClosed | FlagRefused}, ""},
		{Header{Tensor: 0, Length: 256, Flags: FlagNoCRC}, ""},
		{Header{Tensor: 0, Length: 256, Flags: FlagNoCRC, DataCRC: 1}, "and there is a sum"},
		{Header{Tensor: 0, Length: 255}, "end neither"},
		{Header{Tensor: 0, Length: 301}, "end neither"},
		{Header{Tensor: 0, Length: 511}, "end neither"},
		{Header{Tensor: 0, Length: 1289}, "end neither"},
		{Header{Tensor: 0, Length: 1793}, "1 bytes beyond the last tensor"},
		{Header{Tensor: 4, Length: 257}, "1 bytes beyond the last tensor"},
		{Header{Tensor: 0, Offset: 255, Length: 45}, "multiple of 256"},
		{Header{Tensor: 0, Offset: 300, Length: 212}, "outside its tensor, which has 300 bytes"},
		{Header{Tensor: 0, Offset: 512, Length: 256}, "outside its tensor"},
		{Header{Tensor: 0, Offset: 1 << 63, Length: 256}, "outside its tensor"},
		{Header{Tensor: 1, Length: 256}, "outside its tensor, which has 0 bytes"},
		{Header{Tensor: 5, Length: 256}, "is of tensor 5; the manifest has 5"},
		{Header{Tensor: 1<<32 - 1, Length: 256}, "is of tensor 4294967295"},
		{Header{Tensor: 0, Length: chunk + 256}, "at most 65536 fit"},
		{Header{Tensor: 0, Length: 1<<32 - 256}, "at most 65536 fit"},
		{Header{}, "no flag that says why"},
		{Header{Flags: FlagNoCRC}, "no flag that says why"},
		{Header{Flags: FlagBegin, Tensor: 1}, "tensor and offset must be 0"},
		{Header{Flags: FlagBegin, Offset: 256}, "tensor and offset must be 0"},
		{Header{Flags: FlagEnd, Tensor: 1}, "has no place"},
		{Header{Flags: FlagEnd, Length: 3}, "4 per tensor"},
		{Header{Flags: FlagEnd, Length: 24}, "there are 5 tensors"},
		{Header{Flags: FlagEnd | FlagAbort}, "do not go together"},
		{Header{Flags: FlagAbort, Length: 256}, "has no data and no place"},
		{Header{Flags: FlagAbort, Offset: 256}, "has no data and no place"},
		{Header{Flags: FlagOpened | FlagClosed}, "do not go together"},
		{Header{Flags: FlagOpened | FlagBegin}, "do not go together"},
		{Header{Flags: FlagClosed, Tensor: 1}, "has no data and no place"},
		{Header{Manifest: 1, Length: 256}, "its manifest is"},
	} {
		c.h.Manifest ^= m.ID()
		err := c.h.Check(m, chunk)
		var typed *ChunkError
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%+v: %v", c.h, err)
		case c.want != "" && (!errors.As(err, &typed) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%+v: got %v, want %q", c.h, err, c.want)
		}
	}
	var typed *ChunkError
	h := Header{Manifest: m.ID(), Tensor: 3, Offset: 256, Length: 9}
	if err := h.Check(m, chunk); !errors.As(err, &typed) || typed.Tensor != "c" || typed.Offset != 256 || !strings.HasPrefix(err.Error(), `chunk of tensor "c" at byte 256: `) {
		t.Errorf("the error does not name tensor and place: %v", err)
	}
	if h := (Header{Manifest: m.ID(), Length: 256, Tensor: 4}); h.Flat(m) != 1536 || !h.HasData() {
		t.Errorf("flat %d", h.Flat(m))
	}
}

func TestCheckChunkBytes(t *testing.T) {
	for n, ok := range map[int]bool{ChunkBytesMin: true, ChunkBytesMax: true, ChunkBytesDefault: true, ChunkBytesMin - 4096: false, ChunkBytesMax + 4096: false,
		ChunkBytesMin + 1: false, ChunkBytesMin + 4096: true, 0: false, -4096: false} {
		if err := CheckChunkBytes(n); (err == nil) != ok {
			t.Errorf("%d: %v", n, err)
		}
	}
}

// receive does what a reader does with a chunk.
func receive(m *Manifest, chunk []byte) (Header, error) {
	h, err := ParseHeader(chunk)
	if err != nil {
		return h, err
	}
	if err := h.Check(m, ChunkBytesMin); err != nil {
		return h, err
	}
	return h, h.CheckData(m, chunk[HeaderBytes:HeaderBytes+int(h.Length)])
}

// TestEachFlippedByteIsSeen damages each byte of a small chunk in every way that leaves one byte wrong. The one bit that the daemon may set is not damage.
func TestEachFlippedByteIsSeen(t *testing.T) {
	m := tiny(t)
	chunk := append(make([]byte, HeaderBytes), pattern(300)...)
	h := Header{Flags: FlagBegin, Step: 7, Stream: 3, Producer: ProducerID("worker-1"), Manifest: m.ID(), Length: 300, DataCRC: CRC(chunk[HeaderBytes:])}
	h.Put(chunk)
	if got, err := receive(m, chunk); err != nil || got != h {
		t.Fatalf("%+v, %v", got, err)
	}
	damaged := make([]byte, len(chunk)+ChunkBytesMin)
	for at := range chunk {
		for x := byte(1); x != 0; x++ {
			copy(damaged, chunk)
			damaged[at] ^= x
			if at == flagsAt && x == FlagRefused {
				continue
			}
			if _, err := receive(m, damaged); err == nil {
				t.Fatalf("byte %d changed by %#02x, and nobody saw it", at, x)
			}
		}
	}
	chunk[HeaderBytes+10] ^= 1
	var typed *ChunkError
	if _, err := receive(m, chunk); !errors.As(err, &typed) || typed.Tensor != "a" || !strings.Contains(err.Error(), "the data is damaged") {
		t.Errorf("got %v", err)
	}
	if err := h.CheckData(m, chunk[HeaderBytes:HeaderBytes+299]); err == nil {
		t.Error("data of another length passed")
	}
	h.Flags |= FlagNoCRC
	if err := h.CheckData(m, chunk[HeaderBytes:]); err != nil {
		t.Errorf("data without a sum: %v", err)
	}
}

func FuzzHeader(f *testing.F) {
	m := tiny(f)
	add := func(h Header) {
		b := make([]byte, HeaderBytes)
		h.Manifest = m.ID()
		h.Put(b)
		f.Add(b, false)
	}
	add(Header{Length: 300})
	add(Header{Flags: FlagBegin | FlagEnd, Length: 8})
	add(Header{Flags: FlagOpened})
	add(Header{Tensor: 3, Offset: 256, Length: 10, Flags: FlagNoCRC})
	f.Add(make([]byte, 10), true)
	f.Fuzz(func(t *testing.T, b []byte, signed bool) {
		if signed && len(b) >= HeaderBytes {
			sign(b)
		}
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		again := make([]byte, HeaderBytes)
		if h.Put(again); !bytes.Equal(again, b[:HeaderBytes]) {
			t.Fatalf("%x was read as %+v", b, h)
		}
		if h.Check(m, ChunkBytesMin) != nil || !h.HasData() {
			return
		}
		start := h.Flat(m)
		end := start + int64(h.Length)
		if start%Align != 0 || start < 0 || end > m.DataBytes() || start < m.Offset(int(h.Tensor)) || start >= m.Offset(int(h.Tensor))+m.EncodedBytes(int(h.Tensor)) {
			t.Fatalf("%+v lies at %d to %d", h, start, end)
		}
	})
}

func BenchmarkCRC(b *testing.B) {
	src, dst := pattern(1<<20), make([]byte, 1<<20)
	rand.Shuffle(len(src), func(i, j int) { src[i], src[j] = src[j], src[i] })
	b.Run("copy", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for b.Loop() {
			copy(dst, src)
		}
	})
	b.Run("crc", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for b.Loop() {
			CRC(src)
		}
	})
	b.Run("copy and crc", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for b.Loop() {
			for at := 0; at < len(src); at += 16 << 10 {
				copy(dst[at:at+16<<10], src[at:])
				CRC(dst[at : at+16<<10])
			}
		}
	})
}
