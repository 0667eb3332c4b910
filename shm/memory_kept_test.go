//go:build linux

package shm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Readers of memory that fillers may write get nothing that they could write through; fillers do.
func TestFillableMemory(t *testing.T) {
	for name, path := range map[string]string{"memfd": "", "named": filepath.Join(t.TempDir(), "ring")} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t, MemoryConfig{Name: "fillable", Size: 8192, Fillable: true, Path: path})
			fd := m.Descriptor()
			for what, err := range pokes(fd, path == "") {
				if err == nil {
					t.Errorf("%s by a reader went through", what)
				}
			}
			writable, ok := m.Writable()
			if !ok || writable == fd {
				t.Fatalf("writable descriptor %d, %v beside the readers' %d", writable, ok, fd)
			}
			theirs, err := unix.Mmap(writable, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			reader, err := MapReadOnly(fd, 8192)
			if err != nil {
				t.Fatal(err)
			}
			theirs[4097] = 77
			if m.Bytes()[4097] != 77 || reader.Bytes()[4097] != 77 {
				t.Error("what a filler wrote is not seen by all")
			}
			if path == "" {
				for what, err := range map[string]error{"shrinking": unix.Ftruncate(writable, 4096), "growing": unix.Ftruncate(writable, 5*4096)} {
					if !errors.Is(err, unix.EPERM) {
						t.Errorf("%s by a filler: %v, want EPERM", what, err)
					}
				}
			}
			if err := errors.Join(unix.Munmap(theirs), reader.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	if _, ok := newMemory(t, MemoryConfig{Size: 1}).Writable(); ok {
		t.Error("memory that is not for fillers has a writable descriptor")
	}
	for what, cfg := range map[string]MemoryConfig{
		"both writable and not": {Size: 1, Fillable: true, PeersWrite: true},
		"kept without a path":   {Size: 1, Keep: true},
	} {
		if m, err := NewMemory(cfg); err == nil {
			t.Errorf("%s: made", what)
			_ = m.Close()
		}
	}
}

// pokes tries all ways to write through a descriptor, and returns what each said. Through the path in /proc root comes by whatever a file's mode, so
// that is asked for only of others.
func pokes(fd int, reopen bool) map[string]error {
	said := map[string]error{
		"mapping writable": func() error {
			_, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		}(),
		"writing":    func() error { _, err := unix.Pwrite(fd, []byte("x"), 0); return err }(),
		"truncating": unix.Ftruncate(fd, 0),
		"punching":   unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096),
		"mapping readable, then making it writable": func() error {
			mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				return nil // it must be readable
			}
			defer func() { _ = unix.Munmap(mem) }()
			return unix.Mprotect(mem, unix.PROT_READ|unix.PROT_WRITE)
		}(),
	}
	if reopen && os.Geteuid() != 0 {
		for _, how := range []int{unix.O_RDWR, unix.O_WRONLY, unix.O_RDWR | unix.O_TRUNC} {
			said[fmt.Sprintf("opening anew with %#x", how)] = func() error {
				again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), how|unix.O_CLOEXEC, 0)
				if err == nil {
					_ = unix.Close(again)
				}
				return err
			}()
		}
	}
	return said
}

func TestKeptFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ring")
	first := newMemory(t, MemoryConfig{Name: "kept", Size: 5000, Path: path, Keep: true, Fillable: true})
	first.Bytes()[0], first.Bytes()[8191] = 1, 2
	var inUse *InUseError
	if _, err := OpenNamed(MemoryConfig{Path: path}); !errors.As(err, &inUse) || inUse.Path != path {
		t.Fatalf("opening what is in use: %v", err)
	}
	if _, err := NewMemory(MemoryConfig{Path: path, Size: 1}); !errors.As(err, &inUse) {
		t.Fatalf("making anew what is in use: %v", err)
	}
	writable, _ := first.Writable() // what a producer has mapped, that may outlive us
	theirs, err := unix.Mmap(writable, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer func() { must(t, unix.Munmap(theirs)) }()
	if err := errors.Join(first.Sync(), first.Close()); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{0, 4097, 8192} {
		again, err := OpenNamed(MemoryConfig{Path: path, Size: size, Keep: true, Fillable: true})
		if err != nil {
			t.Fatal(err)
		}
		if b := again.Bytes(); len(b) != 8192 || b[0] != 1 || b[8191] != 2 {
			t.Fatalf("%d bytes, first %d, last %d", len(b), b[0], b[8191])
		}
		if _, err := OpenNamed(MemoryConfig{Path: path}); !errors.As(err, &inUse) {
			t.Errorf("opening twice: %v", err)
		}
		if err := unix.Ftruncate(again.Descriptor(), 0); err == nil {
			t.Error("readers can shrink it")
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	last, err := OpenNamed(MemoryConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := last.Writable(); ok {
		t.Error("it was not opened for fillers")
	}
	if err := last.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenNamed(MemoryConfig{Path: path}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after it was closed without Keep: %v", err)
	}
}

// Whatever else lies at the path is refused, said why, and left as it is.
func TestOpenNamedRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int64, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", 8192, 0o600)
	link, pipe := filepath.Join(dir, "link"), filepath.Join(dir, "pipe")
	hard := file("hard", 8192, 0o600)
	if err := errors.Join(os.Symlink(good, link), unix.Mkfifo(pipe, 0o600), os.Link(hard, hard+"2")); err != nil {
		t.Fatal(err)
	}
	for want, cfg := range map[string]MemoryConfig{
		"symbolic link":               {Path: link},
		"folder":                      {Path: dir},
		"no regular file":             {Path: pipe},
		"its mode is 0644":            {Path: file("open", 8192, 0o644)},
		"its mode is 04600":           {Path: file("setuid", 8192, 0o600|os.ModeSetuid)},
		"2 names":                     {Path: hard},
		"0 bytes":                     {Path: file("empty", 0, 0o600)},
		"8191 bytes":                  {Path: file("short", 8191, 0o600)},
		"8192 bytes, and 12288 are":   {Path: good, Size: 8193},
		"8192 bytes, and 4096 are":    {Path: good, Size: 4096},
		"needs a path, no PeersWrite": {Path: good, PeersWrite: true},
		"and a size from 0":           {Path: good, Size: -1},
	} {
		before, err := os.Lstat(cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = OpenNamed(cfg)
		var foreign *ForeignFileError
		if err == nil || !strings.Contains(err.Error(), want) || !errors.As(err, &foreign) && !strings.Contains(want, " a ") {
			t.Errorf("%s: %v", want, err)
		}
		if after, err := os.Lstat(cfg.Path); err != nil || after.Size() != before.Size() || after.Mode() != before.Mode() {
			t.Errorf("%s: it was %v and is %v (%v)", want, before, after, err)
		}
	}
	if os.Geteuid() == 0 {
		path := file("another user's", 8192, 0o600)
		if err := os.Chown(path, 12345, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenNamed(MemoryConfig{Path: path}); err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
			t.Errorf("another user's: %v", err)
		}
	}
	m, err := OpenNamed(MemoryConfig{Path: good})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// A file system that is full says so in an error and not in a SIGBUS, whether it is known before or found out.
func TestFullFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs takes root")
	}
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	path := filepath.Join(dir, "ring")
	var short *InsufficientError
	if _, err := NewMemory(MemoryConfig{Name: "table", Size: 1<<20 + 1, Path: path}); !errors.As(err, &short) || short.Have > 1<<20 {
		t.Errorf("more than there is: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it left %v", err)
	}
	m, err := NewMemory(MemoryConfig{Name: "table", Size: 512 << 10, Path: path, Keep: true})
	must(t, err)
	m.Bytes()[5] = 5
	must(t, m.Close())
	if _, err := NewMemory(MemoryConfig{Name: "other", Size: 768 << 10, Path: path + "2"}); !errors.As(err, &short) {
		t.Errorf("the second: %v", err)
	}

	// A kept file with a hole, on a file system that others have filled since.
	must(t, os.Truncate(path, 1<<20))
	must(t, os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 300<<10), 0o600))
	_, err = OpenNamed(MemoryConfig{Name: "table", Path: path, Keep: true})
	if !errors.As(err, &short) || short.Want != 1<<20 || short.Have >= short.Want || !strings.Contains(err.Error(), path) {
		t.Errorf("a hole that cannot be filled: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "filler")))
	m, err = OpenNamed(MemoryConfig{Name: "table", Path: path, Keep: true})
	must(t, err)
	if m.Bytes()[5] != 5 {
		t.Error("its content is gone")
	}
	must(t, m.Close())
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	if st.Blocks*512 < 1<<20 {
		t.Errorf("the hole is still there: %d blocks", st.Blocks)
	}
}

func must(t testing.TB, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

// TestLockEndsWithItsDaemon: descriptors and mappings that peers still have do not keep a kept file locked when its daemon is gone.
func TestLockEndsWithItsDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ring")
	m, err := NewMemory(MemoryConfig{Name: "first", Size: 8192, Path: path, Keep: true, Fillable: true})
	check(t, err)
	writable, ok := m.Writable()
	if !ok {
		t.Fatal("no writable descriptor")
	}
	for _, fd := range []int{writable, m.Descriptor()} { // as SCM_RIGHTS hands them over
		theirs, err := unix.Dup(fd)
		check(t, err)
		defer unix.Close(theirs)
	}
	mapped, err := unix.Mmap(writable, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(t, err)
	defer func() { check(t, unix.Munmap(mapped)) }()
	var used *InUseError
	if _, err := OpenNamed(MemoryConfig{Name: "second", Path: path, Keep: true, Fillable: true}); !errors.As(err, &used) {
		t.Errorf("while it is in use: %v", err)
	}
	check(t, m.Close())
	next, err := OpenNamed(MemoryConfig{Name: "second", Path: path, Keep: true, Fillable: true})
	check(t, err)
	mapped[5000] = 9
	if next.Bytes()[5000] != 9 {
		t.Error("it is another memory")
	}
	check(t, next.Close())
}
