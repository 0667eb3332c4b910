//go:build linux && !race

package client

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
)

const (
	daemonVariable = "CLIENT_TEST_DAEMON"
	fileVariable   = "CLIENT_TEST_FILE"
)

// TestMain also is the daemon that the tests below kill.
func TestMain(m *testing.M) {
	socket := os.Getenv(daemonVariable)
	if socket == "" {
		os.Exit(m.Run())
	}
	if err := daemonProcess(socket, os.Getenv(fileVariable)); err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
}

// daemonProcess serves a table until its standard input ends. Without a file it reads the batches itself, and throws them away.
func daemonProcess(socket, file string) error {
	d, err := newFillTable(socket, file, 256)
	if err != nil {
		return err
	}
	fmt.Println("serving")
	if file == "" {
		go func() {
			for seat := park.NewWaiter(); ; {
				b, err := d.ring.Lease(d.life, seat)
				if err != nil {
					return
				}
				d.ring.Release(b)
			}
		}()
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, d.stop())
}

// startDaemonProcess returns when the daemon serves. What it returns kills it.
func startDaemonProcess(t testing.TB, socket, file string) (kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), daemonVariable+"="+socket, fileVariable+"="+file)
	_, err := cmd.StdinPipe()
	ok(t, err)
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	kill = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(kill)
	if lines := bufio.NewScanner(out); !lines.Scan() || lines.Text() != "serving" {
		t.Fatalf("the daemon said %q", lines.Text())
	}
	return kill
}

// The daemon is killed again and again while a producer fills; it keeps its segment, so in the end every sample is there once, whole and in order.
func TestFillerOverKilledDaemons(t *testing.T) {
	kills := 12
	if testing.Short() {
		kills = 3
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	socket, file := filepath.Join(dir, "socket"), filepath.Join(dir, "ring")
	kill := startDaemonProcess(t, socket, file)
	p := attachFiller(t, "unix://"+socket, FillerConfig{Session: "s", ReconnectFrom: time.Millisecond})
	number := uint64(0)
	for range kills {
		for range 1 + rnd.IntN(12) {
			ok(t, fill(t.Context(), p, 1, &number, 1+rnd.IntN(9), 1+rnd.IntN(9)))
			if rnd.IntN(4) == 0 {
				ok(t, p.Flush(t.Context()))
			}
		}
		switch rnd.IntN(3) {
		case 0: // with slots open
			s, err := p.Reserve(t.Context(), 1+rnd.IntN(4))
			ok(t, err)
			kill()
			fillSlots(s, 1, number)
			if rnd.IntN(4) == 0 {
				s.Abandon()
			} else {
				ok(t, s.Commit())
				number += uint64(s.N())
			}
			kill = startDaemonProcess(t, socket, file)
		case 1: // while it fills
			filled := make(chan error)
			go func() { filled <- fill(t.Context(), p, 1, &number, 40, 2) }()
			kill()
			kill = startDaemonProcess(t, socket, file)
			ok(t, <-filled)
		default:
			kill()
			kill = startDaemonProcess(t, socket, file)
		}
	}
	ok(t, p.Close(t.Context()))
	st := p.Stats()
	t.Logf("%+v", st)
	if st.Committed != number || st.Filled != number || st.Lost != 0 || st.Reconnects == 0 {
		t.Errorf("%d samples; stats: %+v", number, st)
	}
	kill()
	checkKept(t, file, number)
}

// checkKept sees that a kept segment holds the samples of producer 1 from 0 to n.
func checkKept(t *testing.T, file string, n uint64) {
	t.Helper()
	m, err := shm.OpenNamed(shm.MemoryConfig{Path: file})
	ok(t, err)
	defer func() { ok(t, m.Close()) }()
	v, err := ring.OpenView(m.Bytes())
	ok(t, err)
	_, found, err := ring.Recover(m.Bytes(), v.Layout())
	ok(t, err)
	s, err := spec.ParseText(fillerSpec)
	ok(t, err)
	l := newLedger(s)
	for _, b := range found.Batches {
		ok(t, l.take(b.Batch, 1))
	}
	if l.next[1] != n {
		t.Errorf("%d of %d samples are there", l.next[1], n)
	}
}

// BenchmarkFillProcess fills in place, with the daemon in a process of its own.
func BenchmarkFillProcess(b *testing.B) {
	for _, n := range []int{1, 8} {
		b.Run(fmt.Sprintf("slots=%d", n), func(b *testing.B) {
			socket := filepath.Join(b.TempDir(), "socket")
			startDaemonProcess(b, socket, "")
			p := attachFiller(b, "unix://"+socket, FillerConfig{Prefetch: 16})
			samples := 0
			for b.Loop() {
				s, err := p.Reserve(b.Context(), n)
				if err != nil {
					b.Fatal(err)
				}
				samples += s.N()
				if err := s.Commit(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(samples)/b.Elapsed().Seconds(), "samples/s")
			b.ReportMetric(float64(p.Stats().Waits)/float64(samples), "waits/sample")
		})
	}
}
