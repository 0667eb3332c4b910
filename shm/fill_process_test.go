//go:build linux && !race

package shm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

func init() {
	processRoles["fill"] = fillProcess
	processRoles["fill-idle"] = fillProcess
	processRoles["fill-foreign"] = fillProcess
	processRoles["poke"] = pokeProcess
}

const seedVariable = "SHM_TEST_SEED"

// fillProcess fills places for ever, in steps of any size, and prints how many samples the daemon has taken. An idle one stops half-way through a place.
func fillProcess(role, path string) error {
	if role == "fill-foreign" {
		if err := syscall.Setuid(54321); err != nil {
			return err
		}
	}
	a, err := AttachFill(context.Background(), path, wire.Hello{Table: testTable, Client: role}, nil)
	var refusal *wire.Refusal
	if errors.As(err, &refusal) {
		fmt.Println("refused", refusal.Code, refusal.Reason)
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Println("attached")
	seed, err := strconv.ParseUint(os.Getenv(seedVariable), 10, 64)
	if err != nil {
		return err
	}
	p, rnd := newAuthor(a), rand.New(rand.NewPCG(seed, 0))
	for {
		if _, err := p.write(context.Background(), 1+rnd.IntN(12)); err != nil {
			return err
		}
		if role == "fill-idle" && p.next > 20 && p.row > 0 && p.row < 8 {
			if err := p.await(context.Background()); err != nil {
				return err
			}
			fmt.Println("idle", p.next)
			select {}
		}
		taken, _, err := p.Taken()
		if err != nil {
			return err
		}
		fmt.Println("taken", taken)
	}
}

func (h *fillHost) start(t *testing.T, role string) *trainerProcess {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role, pathVariable+"="+h.path, seedVariable+"="+fmt.Sprint(rand.Uint64()))
	return startProcess(t, cmd)
}

// Producers are killed at any moment: each sample that one was told to be taken is in, none is torn, none twice, and every place comes back.
func TestKilledFillers(t *testing.T) {
	kills := 25
	if testing.Short() {
		kills = 5
	}
	h := startHost(t, hostConfig{batchSize: 8, batches: 8, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Millisecond}}})
	r := newReader(h)
	read := make(chan error)
	go func() { read <- r.all() }()
	taken := make([]uint64, kills+1)
	for i := range kills {
		p := h.start(t, "fill")
		p.expect("attached")
		for range rand.IntN(30) {
			p.line()
		}
		check(t, p.cmd.Process.Signal(unix.SIGKILL))
		for line := p.line(); line != "gone"; line = p.line() {
			n, err := strconv.ParseUint(strings.TrimPrefix(line, "taken "), 10, 64)
			if err == nil { // else cut short
				taken[i+1] = n
			}
		}
		check(t, <-h.served)
	}
	h.ring.Flush()
	h.ring.Close()
	check(t, <-read)
	for stream, n := range taken {
		if r.next[uint64(stream)] < n {
			t.Errorf("stream %d: %d samples came, it was told of %d", stream, r.next[uint64(stream)], n)
		}
	}
	if s := h.server.Stats().Fill; s.Detached != uint64(kills) || s.Stranded != 0 || s.BadPeers != 0 {
		t.Errorf("stats: %+v", s)
	}
	h.free()
}

// A producer that is stopped keeps its places, and holds up nobody: what it has complete is read, and others go on.
func TestStoppedFillerStopsNobody(t *testing.T) {
	h := startHost(t, hostConfig{batchSize: 8, batches: 6, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Millisecond}}})
	r := newReader(h)
	stopped := h.start(t, "fill-idle")
	stopped.expect("attached")
	done := make(chan error)
	go func() { done <- r.all() }()
	line := stopped.line()
	for strings.HasPrefix(line, "taken") {
		line = stopped.line()
	}
	count, err := strconv.ParseUint(strings.TrimPrefix(line, "idle "), 10, 64)
	check(t, err)
	check(t, stopped.cmd.Process.Signal(unix.SIGSTOP))
	other := newAuthor(h.attach(wire.Hello{}))
	check(t, other.writeAll(t.Context(), 1000)) // many times round the ring
	check(t, other.Close())
	check(t, <-h.served)
	h.eventually("its rows are copied", func(s FillStats) bool { return s.Committed == count+1000 && s.Fillers[0].State == FillHasRoom })
	check(t, stopped.cmd.Process.Kill())
	check(t, <-h.served)
	h.ring.Flush()
	h.ring.Close()
	check(t, <-done)
	if r.next[1] != count || r.next[2] != 1000 {
		t.Errorf("%v, want %d of stream 1 and 1000 of stream 2", r.next, count)
	}
	h.free()
}

// A process of another user is refused by what the kernel says of it, and admitted where the configuration lists it.
func TestFillersOfOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user takes root")
	}
	open := func(h *fillHost) { // the socket, to everybody
		check(t, os.Chmod(h.path, 0o777))
		for dir := h.path; dir != "/"; dir = dir[:max(strings.LastIndexByte(dir, '/'), 1)] {
			if dir != h.path {
				check(t, os.Chmod(dir, 0o777|os.ModeSticky))
			}
			if strings.LastIndexByte(dir, '/') <= len(os.TempDir()) {
				break
			}
		}
	}
	h := startHost(t, hostConfig{batchSize: 8, batches: 6})
	open(h)
	if line := h.start(t, "fill-foreign").line(); !strings.HasPrefix(line, "refused not_permitted user 54321") {
		t.Errorf("it said %q", line)
	}
	var refusal *wire.Refusal
	if err := <-h.served; !errors.As(err, &refusal) || refusal.Code != wire.CodeNotPermitted {
		t.Errorf("Serve: %v", err)
	}
	h = startHost(t, hostConfig{batchSize: 8, batches: 6, server: ServerConfig{Fill: FillConfig{Users: []uint32{54321}}}})
	open(h)
	p := h.start(t, "fill-foreign")
	p.expect("attached")
	h.eventually("it fills", func(s FillStats) bool { return s.Committed > 0 && s.Fillers[0].UID == 54321 })
	check(t, p.cmd.Process.Kill())
	check(t, <-h.served)
}

// pokeProcess gets what a reader gets, becomes another user if it can, and tries all ways to write with it.
func pokeProcess(_, path string) error {
	hello := wire.Hello{Role: wire.RoleObserve, VersionMin: wire.Version, VersionMax: wire.Version, Table: testTable}
	_, r, err := say(context.Background(), path, &hello, &wire.AcceptedObserve{})
	if err != nil {
		return err
	}
	root := os.Geteuid() == 0
	if root {
		if err := syscall.Setuid(54321); err != nil {
			return err
		}
	}
	fd := r.fds[0]
	said := pokes(fd, true)
	said["changing its mode"] = unix.Fchmod(fd, 0o666)
	if !root {
		delete(said, "changing its mode") // the owner may
	}
	for what, err := range said {
		if err == nil {
			fmt.Println(what, "went through")
		}
	}
	fmt.Println("tried", len(said))
	return nil
}

// A trainer process cannot write to memory that producers fill.
func TestReaderCannotWriteToFillableMemory(t *testing.T) {
	h := startHost(t, hostConfig{batchSize: 8, batches: 6})
	before := string(h.memory.Bytes())
	p := h.start(t, "poke")
	want := "tried 8"
	if os.Geteuid() == 0 {
		want = "tried 9"
	}
	p.expect(want)
	check(t, <-h.served)
	if string(h.memory.Bytes()) != before {
		t.Error("the memory has changed")
	}
}

// Whatever a filler writes into its channel or its socket, it alone is cut off, with a reason, and its places come back.
func TestFillJunk(t *testing.T) {
	give := func(descs ...spsc.Desc) func(*author) {
		return func(p *author) { _, _ = p.giveback.TryPush(descs); p.toDaemon.signal() }
	}
	word := func(queue string, at int, v uint64) func(*author) {
		return func(p *author) {
			deliver, giveback, _, err := openChannel(p.channel.Bytes())
			check(t, err)
			binary.NativeEndian.PutUint64(map[string][]byte{"deliver": deliver, "giveback": giveback}[queue][at:], v)
			p.toDaemon.signal()
		}
	}
	rows := func(lease, n uint64) spsc.Desc { return spsc.Desc{A: lease, B: verbComplete<<verbBits | n} }
	for what, junk := range map[string]func(*author){
		"no rows":                  give(rows(1, 0)),
		"more than a place has":    give(rows(1, 9)),
		"more than are left":       give(rows(1, 5), rows(1, 4)),
		"as many as can be said":   give(rows(1, 1<<32-1), rows(1, 1<<32-1)),
		"a lease that comes later": give(rows(2, 1)),
		"a lease that never was":   give(rows(77, 1)),
		"lease 0":                  give(rows(0, 1)),
		"a lease that is over":     give(rows(1, 8), rows(1, 1)),
		"no verb":                  give(spsc.Desc{A: 1, B: 1}),
		"an unknown verb":          give(spsc.Desc{A: 1, B: 4 << verbBits}),
		"a high verb":              give(spsc.Desc{A: 1, B: 1<<63 | 1}),
		"settle with a count":      give(spsc.Desc{A: 1, B: verbSettle<<verbBits | 1}),
		"settle what comes later":  give(spsc.Desc{A: 2, B: verbSettle << verbBits}),
		"settle lease 0":           give(spsc.Desc{A: 0, B: verbSettle << verbBits}),
		"resumed with a lease":     give(spsc.Desc{A: 1, B: verbResumed << verbBits}),
		"resumed with a count":     give(spsc.Desc{A: 0, B: verbResumed<<verbBits | 1}),
		"produced far ahead":       word("giveback", 0, 1<<60),
		"produced one too far":     word("giveback", 0, linkCapacity+1),
		"a byte on the socket":     func(p *author) { _, err := p.conn.Write([]byte{1}); check(t, err) },
	} {
		t.Run(what, func(t *testing.T) {
			watchLeaks(t)
			h := startHost(t, hostConfig{batchSize: 8, batches: 6, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Hour}}})
			p, r := newAuthor(h.attach(wire.Hello{Session: "bad"})), newReader(h)
			check(t, p.need(t.Context()))
			h.eventually("it has two places", func(s FillStats) bool { return s.Fillers[0].Lent == 2 })
			junk(p)
			err := <-h.served
			var notice *wire.Notice
			if !errors.As(err, &notice) || notice.Code != wire.CodeBadPeer || notice.Reason == "" {
				t.Fatalf("Serve: %v, want bad_peer", err)
			}
			if err := p.Wait(t.Context(), func() bool { return false }); err != nil || !errors.As(p.Err(), &notice) || notice.Code != wire.CodeBadPeer {
				t.Errorf("the peer was told %v, %v", err, p.Err())
			}
			if st := h.server.Stats().Fill; st.BadPeers != 1 {
				t.Errorf("stats: %+v", st)
			}
			h.sessions["bad"].session.Close(time.Now())
			delete(h.sessions, "bad")
			good := newAuthor(h.attach(wire.Hello{}))
			r.next[1] = 0
			check(t, good.writeAll(t.Context(), 20))
			check(t, good.Close())
			check(t, <-h.served)
			h.ring.Flush()
			h.ring.Close()
			got := uint64(0)
			for { // what the bad one called complete may be junk
				b, ok := h.ring.TryLease()
				if !ok {
					break
				}
				for i, stream := range b.Streams() {
					if stream == good.Accepted().Stream && b.Numbers()[i] == got {
						got++
					}
				}
				h.ring.Release(b)
			}
			if got != 20 {
				t.Errorf("%d of 20 samples of an honest producer came", got)
			}
			h.free()
		})
	}
}

// What is not junk is no reason to be cut off.
func TestFillHarmless(t *testing.T) {
	h := startHost(t, hostConfig{batchSize: 8, batches: 6})
	p := newAuthor(h.attach(wire.Hello{}))
	check(t, p.need(t.Context()))
	over := p.place
	check(t, p.Settle(over)) // nothing is complete
	check(t, p.writeAll(t.Context(), 8))
	check(t, p.Settle(over)) // it is over
	check(t, p.Resumed())    // nobody waits for it
	check(t, p.writeAll(t.Context(), 1))
	check(t, p.await(t.Context()))
	check(t, p.Close())
	check(t, <-h.served)
}

// raw attaches without the client's care and returns the channel, to be misused.
func (h *fillHost) raw() *FillAttachment {
	h.t.Helper()
	a := &FillAttachment{path: h.path}
	hello := wire.Hello{Role: wire.RoleFill, VersionMin: wire.Version, VersionMax: wire.Version, Table: testTable}
	conn, r, err := say(h.t.Context(), h.path, &hello, &a.accepted)
	check(h.t, err)
	a.conn = conn
	check(h.t, a.open(r))
	check(h.t, r.close())
	return a
}

// A peer that scribbles over its whole channel, bells included, at random: an honest one is served all the while, and every place comes back.
func TestFillScribbler(t *testing.T) {
	watchLeaks(t)
	h := startHost(t, hostConfig{batchSize: 8, batches: 10, server: ServerConfig{Fill: FillConfig{SettleAfter: time.Millisecond}}})
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	rnd := rand.New(rand.NewPCG(seed, 0))
	good := newAuthor(h.attach(wire.Hello{}))
	ctx, cancel := context.WithCancel(t.Context())
	wrote, read := make(chan error), make(chan error)
	go func() {
		for ctx.Err() == nil {
			if _, err := good.write(t.Context(), 5); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- good.Close()
	}()
	next := uint64(0)
	go func() {
		seat := newReader(h).seat
		for {
			b, err := h.ring.Lease(context.Background(), seat)
			if err != nil {
				read <- nil
				return
			}
			for i, stream := range b.Streams() {
				if stream == good.Accepted().Stream && b.Numbers()[i] == next {
					next++
				}
			}
			h.ring.Release(b)
		}
	}()
	for range 30 {
		a := h.raw()
		check(t, a.toDaemon.descriptor(func(fd int) { _ = unix.SetNonblock(fd, false) }))
		check(t, a.toUs.descriptor(func(fd int) {
			var full [8]byte
			binary.NativeEndian.PutUint64(full[:], ^uint64(0)-1)
			_, _ = unix.Write(fd, full[:])
			_ = unix.SetNonblock(fd, false)
		}))
		mem := a.channel.Bytes()
		for range 200 {
			binary.NativeEndian.PutUint64(mem[rnd.IntN(len(mem)/8)*8:], rnd.Uint64()>>rnd.IntN(64))
			binary.NativeEndian.PutUint64(mem[rnd.IntN(64)*8:], rnd.Uint64()>>rnd.IntN(64)) // the words of the deliver queue
			a.toDaemon.signal()
		}
		check(t, a.conn.Close())
		<-h.served
		check(t, a.Unmap())
	}
	cancel()
	check(t, <-wrote)
	check(t, <-h.served)
	h.ring.Flush()
	h.ring.Close()
	check(t, <-read)
	if next != good.next {
		t.Errorf("%d of %d samples of the honest one came", next, good.next)
	}
	h.free()
}
