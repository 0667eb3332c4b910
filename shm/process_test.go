//go:build linux && !race

package shm

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

const (
	roleVariable  = "SHM_TEST_ROLE"
	pathVariable  = "SHM_TEST_SOCKET"
	groupVariable = "SHM_TEST_GROUP"
)

// TestMain also is the trainer process that the tests below start.
func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	run := trainProcess
	if other, ok := processRoles[role]; ok {
		run = other
	}
	if err := run(role, os.Getenv(pathVariable)); err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
}

// processRoles are the roles of other tests.
var processRoles = map[string]func(role, path string) error{}

// trainProcess prints "read <batch>" for each batch it read and gave back, "holding <batch>" when it keeps one for ever, and "end".
func trainProcess(role, path string) error {
	ctx := context.Background()
	a, err := Attach(ctx, path, wire.Hello{Table: testTable, Group: os.Getenv(groupVariable), Prefetch: 2, Client: role})
	if err != nil {
		return err
	}
	fmt.Println("attached")
	for {
		b, err := a.Next(ctx)
		if err == io.EOF {
			fmt.Println("end")
			return a.Close()
		}
		if err != nil {
			return err
		}
		if err := verify(a.Accepted().Spec, b); err != nil {
			return err
		}
		switch role {
		case "hold":
			fmt.Println("holding", b.Number)
			select {}
		case "write":
			fmt.Println("holding", b.Number)
			b.Column(0)[0]++ // a fault: the mapping is read-only
			return errors.New("the ring was written")
		}
		a.Release(b)
		fmt.Println("read", b.Number)
	}
}

// trainer is a trainer process and what it says.
type trainerProcess struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Scanner
}

func (d *daemon) start(t *testing.T, role string) *trainerProcess {
	t.Helper()
	return d.startIn(t, "", role)
}

func (d *daemon) startIn(t *testing.T, group, role string) *trainerProcess {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role, pathVariable+"="+d.path, groupVariable+"="+group)
	p := startProcess(t, cmd)
	p.expect("attached")
	return p
}

func startProcess(t *testing.T, cmd *exec.Cmd) *trainerProcess {
	t.Helper()
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	p := &trainerProcess{t, cmd, bufio.NewScanner(out)}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return p
}

func (p *trainerProcess) line() string {
	if !p.out.Scan() {
		return "gone"
	}
	return p.out.Text()
}

func (p *trainerProcess) expect(want string) {
	p.t.Helper()
	if got := p.line(); got != want {
		p.t.Fatalf("the trainer said %q, want %q", got, want)
	}
}

// readAll notes the batches that the trainer reads until its end.
func (p *trainerProcess) readAll(times []int) {
	p.t.Helper()
	for {
		line := p.line()
		if line == "end" {
			return
		}
		number, ok := strings.CutPrefix(line, "read ")
		n, err := strconv.Atoi(number)
		if !ok || err != nil {
			p.t.Fatalf("the trainer said %q", line)
		}
		times[n]++
	}
}

func once(t *testing.T, times []int) {
	t.Helper()
	for n, k := range times {
		if k != 1 {
			t.Errorf("batch %d was read %d times, want once", n, k)
		}
	}
}

func TestKilledTrainer(t *testing.T) {
	d := startDaemon(t, 8, ServerConfig{})
	victim := d.start(t, "hold")
	check(t, d.publish(t.Context(), 4))
	victim.expect("holding 0")
	d.eventually("the victim was given another", func(s Stats) bool { return s.Delivered == 2 })
	check(t, victim.cmd.Process.Signal(unix.SIGKILL))
	check(t, <-d.served)
	other := d.start(t, "read")
	for n := range 4 {
		other.expect(fmt.Sprint("read ", n))
	}
	d.ring.Close()
	other.expect("end")
	check(t, <-d.served)
	if st := d.server.Stats(); st.Died != 1 || st.Detached != 1 || st.Returned != 2 || st.GivenBack != 4 {
		t.Errorf("stats: %+v", st)
	}
}

func TestStoppedTrainerStopsNobody(t *testing.T) {
	const batches = 100
	d := startDaemon(t, 5, ServerConfig{})
	stopped := d.start(t, "read")
	check(t, stopped.cmd.Process.Signal(unix.SIGSTOP))
	var status unix.WaitStatus
	if _, err := unix.Wait4(stopped.cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("waiting for it to stop: %v, status %#x", err, status)
	}
	check(t, d.publish(t.Context(), 2))
	d.eventually("it holds all it may", func(s Stats) bool { return s.Trainers[0].State == StateAtLimit })
	other := d.start(t, "read")
	check(t, d.publish(t.Context(), batches-2)) // many times round the ring
	d.ring.Close()
	times := make([]int, batches)
	other.readAll(times)
	check(t, <-d.served)
	check(t, stopped.cmd.Process.Signal(unix.SIGCONT))
	stopped.readAll(times)
	check(t, <-d.served)
	once(t, times)
	if times[0] != 1 || d.server.Stats().Returned != 0 {
		t.Errorf("stats: %+v", d.server.Stats())
	}
}

func TestTrainerThatWrites(t *testing.T) {
	d := startDaemon(t, 4, ServerConfig{})
	p := d.start(t, "write")
	check(t, d.publish(t.Context(), 1))
	p.expect("holding 0")
	p.expect("gone")
	var exit *exec.ExitError
	if err := p.cmd.Wait(); !errors.As(err, &exit) {
		t.Errorf("the trainer that wrote to the ring ended with %v, want a fault", err)
	}
	check(t, <-d.served)
	d.start(t, "read").expect("read 0") // and verified it: not a byte has changed
}

// Several trainer processes, one of which is killed every so often: every batch is read at least once, and more than once only if its
// reader was killed between giving it back and saying so.
func TestKillsUnderLoad(t *testing.T) {
	const batches, kills = 300, 5
	d := startDaemon(t, 6, ServerConfig{})
	times := make([]int, batches)
	steady := d.start(t, "read")
	published := make(chan error)
	go func() {
		err := d.publish(t.Context(), batches)
		d.ring.Close()
		published <- err
	}()
	lost := 0
	for range kills {
		victim := d.start(t, "read")
		first := victim.line()
		check(t, victim.cmd.Process.Kill())
		for line := first; line != "gone"; line = victim.line() {
			if n, err := strconv.Atoi(strings.TrimPrefix(line, "read ")); err == nil {
				times[n]++
			}
		}
		check(t, <-d.served)
		lost += 2 // at most its prefetch, given back without having said so
	}
	steady.readAll(times)
	check(t, <-published)
	d.start(t, "read").readAll(times) // what came back after the steady one was told of the end
	missing := 0
	for n, k := range times {
		if k == 0 {
			missing++
		}
		if k > 1 {
			t.Errorf("batch %d was read %d times", n, k)
		}
	}
	if missing > lost {
		t.Errorf("%d batches were never read; %d kills explain at most %d", missing, kills, lost)
	}
	d.eventually("nothing is out", func(s Stats) bool { return s.Delivered == s.GivenBack+s.Returned })
	if st := d.fifo.Stats(); st.Leased != 0 || st.Waiting != 0 {
		t.Errorf("leases at the end: %+v", st)
	}
}

// Whatever a peer writes into its channel or its socket, it alone is cut off, with a reason, and what it held goes to another.
func TestJunk(t *testing.T) {
	good := func(b ring.Batch) spsc.Desc { return spsc.Desc{A: b.Number, B: uint64(b.Index)} }
	give := func(descs ...spsc.Desc) func(*Attachment, ring.Batch) {
		return func(a *Attachment, _ ring.Batch) { _, _ = a.giveback.TryPush(descs); a.toDaemon.signal() }
	}
	word := func(queue string, at int, v uint64) func(*Attachment, ring.Batch) {
		return func(a *Attachment, _ ring.Batch) {
			deliver, giveback, _, err := openChannel(a.channel.Bytes())
			check(t, err)
			binary.NativeEndian.PutUint64(map[string][]byte{"deliver": deliver, "giveback": giveback}[queue][at:], v)
			a.toDaemon.signal()
		}
	}
	for what, junk := range map[string]func(*Attachment, ring.Batch){
		"a batch that never was": give(spsc.Desc{A: 12345, B: 0}),
		"a place far off":        give(spsc.Desc{A: 0, B: 1 << 31}),
		"high bits set":          func(a *Attachment, b ring.Batch) { d := good(b); d.B |= 1 << 32; give(d)(a, b) },
		"twice the same":         func(a *Attachment, b ring.Batch) { give(good(b), good(b))(a, b) },
		"produced far ahead":     word("giveback", 0, 1<<60),
		"produced one too far":   word("giveback", 0, 5),
		"a byte on the socket":   func(a *Attachment, _ ring.Batch) { _, err := a.conn.Write([]byte{1}); check(t, err) },
		"consumed ahead of all":  func(a *Attachment, b ring.Batch) { word("deliver", 64, 1<<60)(a, b); a.Release(b) },
	} {
		t.Run(what, func(t *testing.T) {
			watchLeaks(t)
			d := startDaemon(t, 8, ServerConfig{})
			check(t, d.publish(t.Context(), 6))
			a := d.raw(4)
			b := take(t, a, 0)
			d.eventually("it was given four", func(s Stats) bool { return s.Delivered == 4 })
			junk(a, b)
			err := <-d.served
			var notice *wire.Notice
			if !errors.As(err, &notice) || notice.Code != wire.CodeBadPeer {
				t.Fatalf("Serve: %v, want bad_peer", err)
			}
			a.watching.Add(1)
			a.watch()
			if err := a.Err(); !errors.As(err, &notice) || notice.Code != wire.CodeBadPeer {
				t.Errorf("the peer was told %v", err)
			}
			if st := d.server.Stats(); st.BadPeers != 1 || st.Delivered != st.GivenBack+st.Returned {
				t.Errorf("stats: %+v", st)
			}
			check(t, a.free())
			next := d.attach(4)
			got, err := next.Next(t.Context())
			check(t, err)
			check(t, verify(d.spec, got))
			next.Release(got)
			check(t, next.Close())
		})
	}
}

// A peer that scribbles over its whole channel, bells included, at random.
func TestScribbler(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 8, ServerConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	published := make(chan error)
	go func() { published <- d.publish(ctx, 1<<30) }()
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 30 {
		a := d.raw(4)
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
			a.toDaemon.signal()
		}
		check(t, a.conn.Close())
		<-d.served
		check(t, a.free())
	}
	good := d.attach(4)
	for range 20 { // and an honest one is served all the while and after
		b, err := good.Next(t.Context())
		check(t, err)
		check(t, verify(d.spec, b))
		good.Release(b)
	}
	check(t, good.Close())
	check(t, <-d.served)
	cancel()
	if err := <-published; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if st := d.server.Stats(); st.Delivered != st.GivenBack+st.Returned {
		t.Errorf("stats: %+v", st)
	}
}
