//go:build linux && !race

// The race detector does not see mapped memory (it misses races there and flags correct code), so these run without it; race_test.go
// runs the same code on the heap.

package spsc

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	processCapacity = 8
	processCount    = 40000
	roleVariable    = "SPSC_TEST_ROLE"
	seedVariable    = "SPSC_TEST_SEED"
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := runPeer(role); err != nil {
		fmt.Fprintf(os.Stderr, "peer %s: %v\n", role, err)
		os.Exit(1)
	}
}

// runPeer is the other process. Its memory is descriptor 3.
func runPeer(role string) error {
	mem, err := unix.Mmap(3, 0, SharedBytes(processCapacity), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	switch role {
	case "produce":
		return produceAll(mem)
	case "consume":
		return consumeAll(mem)
	case "hostile":
		return spoil(mem)
	}
	return fmt.Errorf("no such role")
}

func produceAll(mem []byte) error {
	p, err := NewProducer(mem, processCapacity)
	if err != nil {
		return err
	}
	for i := uint64(0); i < processCount; {
		items := [3]Desc{element(i), element(i + 1), element(i + 2)}
		n, err := p.TryPush(items[:min(3, processCount-i)])
		if err != nil {
			return err
		}
		if i += uint64(n); n == 0 {
			runtime.Gosched()
		}
	}
	p.Close()
	return nil
}

func consumeAll(mem []byte) error {
	c, err := NewConsumer(mem, processCapacity)
	if err != nil {
		return err
	}
	into := make([]Desc, 5)
	for next := uint64(0); ; {
		closed := c.Closed()
		n, err := c.TryPop(into)
		if err != nil {
			return err
		}
		if next, err = expect(into[:n], next); err != nil {
			return err
		}
		if n == 0 && closed {
			if next != processCount {
				return fmt.Errorf("ended after %d descriptors, want %d", next, processCount)
			}
			return nil
		}
		if n == 0 {
			runtime.Gosched()
		}
	}
}

// spoil stores random and near-miss values into every word until it is killed.
func spoil(mem []byte) error {
	s, err := strconv.ParseUint(os.Getenv(seedVariable), 10, 64)
	if err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(s, 1))
	q, err := viewShared(mem, processCapacity)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("."); err != nil {
		return err
	}
	near := func(v uint64) uint64 {
		switch rnd.IntN(16) {
		case 0:
			return rnd.Uint64()
		case 1:
			return v - rnd.Uint64N(4)
		default:
			return v + rnd.Uint64N(processCapacity+2)
		}
	}
	for {
		q.produced.Store(near(q.produced.Load()))
		q.consumed.Store(near(q.consumed.Load()))
		q.waiting.Store(rnd.Uint32())
		q.closed.Store(rnd.Uint32())
		q.slots[rnd.IntN(processCapacity)] = Desc{rnd.Uint64(), rnd.Uint64()}
	}
}

func memfd(t *testing.T) ([]byte, *os.File) {
	fd, err := unix.MemfdCreate("spsc-test", unix.MFD_CLOEXEC)
	check(t, err)
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	size := SharedBytes(processCapacity)
	check(t, f.Truncate(int64(size)))
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(t, err)
	t.Cleanup(func() { check(t, unix.Munmap(mem)) })
	check(t, FormatShared(mem, processCapacity))
	return mem, f
}

func peer(t *testing.T, role string, f *os.File, env ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(append(os.Environ(), roleVariable+"="+role), env...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	return cmd
}

func TestTwoProcesses(t *testing.T) {
	for role, ours := range map[string]func([]byte) error{"produce": consumeAll, "consume": produceAll} {
		t.Run("peer "+role+"s", func(t *testing.T) {
			mem, f := memfd(t)
			cmd := peer(t, role, f)
			check(t, cmd.Start())
			check(t, ours(mem))
			check(t, cmd.Wait())
		})
	}
}

// A peer that writes anything anywhere can only make our calls return a *CorruptError or junk descriptors in bounded number.
func TestHostileProcess(t *testing.T) {
	rnd := modelSeed(t)
	mem, f := memfd(t)
	cmd := peer(t, "hostile", f, seedVariable+"="+strconv.FormatUint(rnd.Uint64(), 10))
	started, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	if _, err := started.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	into, caught := make([]Desc, processCapacity+1), 0
	for life := 0; life < 20000 || caught == 0; life++ { // where the peer's process gets no processor, it takes longer
		p, err := NewProducer(mem, processCapacity)
		check(t, err)
		c, err := NewConsumer(mem, processCapacity)
		check(t, err)
		for range 8 {
			n, err := c.TryPop(into)
			if err == nil {
				_, err = p.TryPush(into[:n])
			}
			p.ConsumerWaiting()
			c.Closed()
			if n > processCapacity {
				t.Fatalf("popped %d from a queue of %d", n, processCapacity)
			}
			var corrupt *CorruptError
			if errors.As(err, &corrupt) {
				caught++
				break
			}
			check(t, err)
		}
	}
	check(t, cmd.Process.Kill())
	cmd.Wait()
}
