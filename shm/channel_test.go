//go:build linux

package shm

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/spsc"
)

func TestChannelCapacity(t *testing.T) {
	for held, want := range map[int]int{1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 64: 64, 65: 128, 2 * prefetchLimit: spsc.SharedCapacityMax} {
		if got := channelCapacity(held); got != want {
			t.Errorf("%d held: capacity %d, want %d", held, got, want)
		}
	}
	if n := channelBytes(spsc.SharedCapacityMax); n > channelBytesMax {
		t.Errorf("the largest channel has %d bytes, more than the limit of %d", n, channelBytesMax)
	}
}

// The offsets of docs/segment-format.md.
func TestChannelLayout(t *testing.T) {
	mem := make([]byte, channelBytes(4))
	deliver, giveback, err := formatChannel(mem, 4)
	if err != nil {
		t.Fatal(err)
	}
	if string(mem[:8]) != "INGDCHN1" || binary.LittleEndian.Uint32(mem[8:]) != 1 || binary.LittleEndian.Uint32(mem[12:]) != 4 ||
		binary.LittleEndian.Uint64(mem[16:]) != 64 || binary.LittleEndian.Uint64(mem[24:]) != 384 || binary.LittleEndian.Uint64(mem[32:]) != 704 {
		t.Errorf("header % x", mem[:64])
	}
	if len(mem) != 704 {
		t.Errorf("%d bytes, want 704", len(mem))
	}
	deliver[0], giveback[0] = 1, 2
	if mem[64] != 1 || mem[384] != 2 {
		t.Error("the queues do not lie where the header says")
	}
	d, g, capacity, err := openChannel(mem)
	if err != nil || capacity != 4 || &d[0] != &mem[64] || &g[0] != &mem[384] {
		t.Errorf("opened with capacity %d, %v", capacity, err)
	}
	if want := spsc.SharedBytes(4); len(d) != want || len(g) != want {
		t.Errorf("queues of %d and %d bytes, want %d", len(d), len(g), want)
	}
}

func TestOpenChannelRefuses(t *testing.T) {
	put32 := func(off int, v uint32) func([]byte) []byte {
		return func(m []byte) []byte { binary.LittleEndian.PutUint32(m[off:], v); return m }
	}
	put64 := func(off int, v uint64) func([]byte) []byte {
		return func(m []byte) []byte { binary.LittleEndian.PutUint64(m[off:], v); return m }
	}
	for what, test := range map[string]struct {
		spoil func([]byte) []byte
		want  string
	}{
		"nothing":             {func([]byte) []byte { return nil }, "shorter than its header"},
		"half a header":       {func(m []byte) []byte { return m[:63] }, "shorter than its header"},
		"magic":               {put32(0, 7), "starts with"},
		"version":             {put32(offChanVersion, 2), "version 2"},
		"length":              {put64(offChanBytes, 705), "announced with 704"},
		"cut short":           {func(m []byte) []byte { return m[:640] }, "announced with 640"},
		"capacity 0":          {put32(offChanCapacity, 0), "power of two"},
		"capacity 3":          {put32(offChanCapacity, 3), "power of two"},
		"capacity 2^31":       {put32(offChanCapacity, 1<<31), "power of two"},
		"capacity 8":          {put32(offChanCapacity, 8), "cannot start"},
		"deliver in header":   {put64(offChanDeliver, 0), "cannot start at byte 0"},
		"deliver unaligned":   {put64(offChanDeliver, 72), "cannot start at byte 72"},
		"giveback too late":   {put64(offChanGiveback, 448), "cannot start at byte 448"},
		"giveback far off":    {put64(offChanGiveback, 1<<63), "cannot start"},
		"giveback at the end": {put64(offChanGiveback, ^uint64(63)), "cannot start"},
		"overlap":             {put64(offChanGiveback, 64), "overlap"},
		"overlap by a line":   {put64(offChanGiveback, 320), "overlap"},
	} {
		mem := make([]byte, channelBytes(4))
		if _, _, err := formatChannel(mem, 4); err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := openChannel(test.spoil(mem)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", what, err, test.want)
		}
	}
}

func TestBell(t *testing.T) {
	b, err := newBell()
	if err != nil {
		t.Fatal(err)
	}
	b.signal()
	b.signal()
	if err := b.wait(); err != nil {
		t.Fatal(err)
	}
	// A peer that clears O_NONBLOCK must not make a wait block its thread: it still ends with close.
	if err := b.descriptor(func(fd int) { err = unix.SetNonblock(fd, false) }); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error)
	go func() { waited <- b.wait() }()
	b.signal()
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	go func() { waited <- b.wait() }()
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; !errors.Is(err, os.ErrClosed) {
		t.Errorf("a wait at close: %v, want os.ErrClosed", err)
	}
	b.signal() // does nothing
}

func TestBellLetsABlockedWriteGo(t *testing.T) {
	b, err := newBell()
	if err != nil {
		t.Fatal(err)
	}
	full := make([]byte, 8)
	binary.NativeEndian.PutUint64(full, ^uint64(0)-1)
	if err := b.descriptor(func(fd int) {
		_, werr := unix.Write(fd, full)
		err = errors.Join(werr, unix.SetNonblock(fd, false))
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { b.signal(); close(done) }()
	for { // the write may not have started yet
		b.unstick()
		select {
		case <-done:
			if err := b.close(); err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

func TestOpenBellRefusesWhatIsNone(t *testing.T) {
	fd, err := unix.MemfdCreate("no bell", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openBell(fd); err == nil || !strings.Contains(err.Error(), "no eventfd") {
		t.Errorf("a memfd as a bell: %v", err)
	}
}

func TestBellDoesNotAllocate(t *testing.T) {
	b, err := newBell()
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if n := testing.AllocsPerRun(1000, func() {
		b.signal()
		if err := b.wait(); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations per wait, want 0", n)
	}
}
