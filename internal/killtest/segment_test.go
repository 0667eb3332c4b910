//go:build linux && !race

package killtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/daemon"
)

// smallMemory mounts a tmpfs of that size, and skips the test where this process may not.
func smallMemory(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("ingestd", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Skipf("cannot mount a small tmpfs (%v): full memory is tested where root runs the tests", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// serveOnce runs a daemon with a configuration until it ends by itself, which must be with the code, or serves and is asked to end. It returns whether it served,
// and what it said.
func serveOnce(t *testing.T, cfg daemon.Config, code int, flags ...string) (served bool, said string) {
	t.Helper()
	dir := t.TempDir()
	cfg.Listen, cfg.Admin, cfg.ReadyFile = []string{"unix://" + filepath.Join(dir, "s")}, "off", filepath.Join(dir, "ready")
	file := filepath.Join(dir, "ingestd.yaml")
	check(t, os.WriteFile(file, []byte(cfg.YAML()), 0o600))
	d, err := spawn(ingestdPath, "", nil, append([]string{"serve", "--config", file}, flags...)...)
	check(t, err)
	ready := func() bool { _, err := os.Stat(cfg.ReadyFile); return err == nil }
	within(patience, func() bool { return ready() || !d.running() })
	if served = ready(); served {
		d.signal(termination)
	}
	err = d.ends(code)
	if got := d.cmd.ProcessState.ExitCode(); served && (got == 0 || got == exitData) {
		err = nil // also if samples were left, that nobody was there to read
	}
	if err != nil {
		t.Errorf("served: %v; %v", served, err)
	}
	said = d.said.String()
	if strings.Contains(said, "goroutine ") || strings.Contains(said, "SIGBUS") {
		t.Errorf("not an error for people: %s", said)
	}
	return served, said
}

// The exit codes of docs/cli.md.
const (
	exitFailure = 1
	exitData    = 6 // also of a daemon that ended in order with samples that nobody had read
)

// TestFullMemory: a segment for which the file system has no room is refused before anything is served, and nothing is left of it; one that fits is not touched by
// what fills the file system up afterwards, nor are restarts.
func TestFullMemory(t *testing.T) {
	t.Parallel()
	seed := newSeed(t)
	dir := smallMemory(t, "16m")
	tooLarge := daemon.DefaultConfig()
	tooLarge.SegmentDir = dir
	tooLarge.Tables = []daemon.Table{{Name: "t", Spec: SpecText("a:U8[65536]"), BatchSize: 32, Batches: 12}} // 25 MiB
	if served, said := serveOnce(t, tooLarge, exitFailure); served || !strings.Contains(said, "available") || !strings.Contains(said, "make the table smaller") {
		t.Errorf("served: %v; it said: %s", served, said)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	w := newWorld(t, seed, tables("a", "b"), func(cfg *daemon.Config) { cfg.SegmentDir = dir })
	f, err := os.Create(filepath.Join(dir, "filler"))
	check(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	check(t, f.Close())
	w.populate(true)
	w.daemonKiller(func() bool { return w.killed(theDaemon) >= 10 }, 0)
	w.finish()
	w.report()
}

// TestDamagedFile: the real daemon with kept segments that are not what it left: it refuses those that it cannot take up, in one sentence and without touching them, and
// takes up the others; `ingestd check` says the same of each.
func TestDamagedFile(t *testing.T) {
	t.Parallel()
	seed := newSeed(t)
	rnd := rand.New(rand.NewPCG(seed, 4))
	list := tables("a", "b")[:1]
	w := newWorld(t, seed, list, func(cfg *daemon.Config) { cfg.SegmentDir = "segments" })
	w.populate(true)
	if !within(patience, func() bool { return w.delivered() > 5000 || w.running.Err() != nil }) {
		w.fail("nothing is delivered")
	}
	w.spare()
	w.rest()
	w.theDaemon().kill()
	kept, err := os.ReadFile(filepath.Join(w.segments, list[0].Name+".segment"))
	check(t, err)

	dir := memoryDir(t)
	path := filepath.Join(dir, list[0].Name+".segment")
	cfg := daemon.DefaultConfig()
	cfg.DrainTimeout = 1
	cfg.SegmentDir = dir
	cfg.Tables = []daemon.Table{list[0].Table}
	groups := binary.LittleEndian.Uint64(kept[216:]) // docs/segment-format.md, "Header"
	type change struct {
		name  string
		apply func([]byte) []byte
		words []string // what it must say; none: it may be taken up or not
	}
	changes := []change{
		{"version 1", func(b []byte) []byte { b[8] = 1; return b }, []string{"version 1"}},
		{"version 3", func(b []byte) []byte { b[8] = 3; return b }, []string{"version 3"}},
		{"empty but for its size", func(b []byte) []byte { clear(b); return b }, nil},
		{"a text", func([]byte) []byte { return []byte("not a segment\n") }, []string{"--discard-segments"}},
	}
	for _, n := range []int{1, 511, 4096, len(kept) / 2, len(kept) - 4096, len(kept) - 1} {
		changes = append(changes, change{"truncated", func(b []byte) []byte { return b[:n] }, []string{"--discard-segments"}})
	}
	for range 24 {
		at, flip := rnd.Uint64N(groups+1024), byte(1)<<rnd.IntN(8)
		changes = append(changes, change{"a bit", func(b []byte) []byte { b[at] ^= flip; return b }, nil})
	}
	took := 0
	for _, c := range changes {
		damaged := c.apply(bytes.Clone(kept))
		check(t, os.WriteFile(path, damaged, 0o600))
		p, err := spawn(ingestdPath, "", nil, "check", path)
		check(t, err)
		<-p.done
		right := p.cmd.ProcessState.ExitCode() == 0
		served, said := serveOnce(t, cfg, exitData)
		switch {
		case served && len(c.words) > 0:
			t.Errorf("%s: it was taken up", c.name)
		case served && !right && c.apply(bytes.Clone(kept))[0] != 0:
			t.Errorf("%s: it was taken up, and the check says: %v", c.name, p.ending())
		case !served:
			for _, word := range append(c.words, path) {
				if !strings.Contains(said, word) {
					t.Errorf("%s: it does not say %q; it says: %s", c.name, word, said)
				}
			}
			after, err := os.ReadFile(path)
			check(t, err)
			if sha256.Sum256(after) != sha256.Sum256(damaged) {
				t.Errorf("%s: it was refused, and changed", c.name)
			}
		default:
			took++
		}
	}
	// Another spec: refused with the difference; overwritten only when asked to.
	check(t, os.WriteFile(path, kept, 0o600))
	cfg.Tables[0].Spec = strings.Replace(cfg.Tables[0].Spec, "a:U8[40]", "a:U8[41]", 1)
	if served, said := serveOnce(t, cfg, exitData); served || !strings.Contains(said, "U8[40]") || !strings.Contains(said, "U8[41]") {
		t.Errorf("another spec: served: %v; it said: %s", served, said)
	}
	if served, said := serveOnce(t, cfg, 0, "--discard-segments"); !served {
		t.Errorf("another spec, to be discarded: %s", said)
	}
	t.Logf("seed %d; %d changed files, %d of them taken up", seed, len(changes), took)
}

// TestSegmentsOnDisk: segments in files of a disk instead of tmpfs.
func TestSegmentsOnDisk(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "segments")
	check(t, os.Mkdir(dir, 0o700))
	w := newWorld(t, newSeed(t), tables("a", "b"), func(cfg *daemon.Config) { cfg.SegmentDir = dir })
	w.populate(true)
	w.daemonKiller(func() bool { return w.killed(theDaemon) >= 10 }, 0)
	w.finish()
	w.report()
}
