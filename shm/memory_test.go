//go:build linux

package shm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func newMemory(t testing.TB, cfg MemoryConfig) *Memory {
	t.Helper()
	m, err := NewMemory(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestMemoryIsSealed(t *testing.T) {
	const size = 3*4096 + 1
	m := newMemory(t, MemoryConfig{Name: "sealed", Size: size})
	if m.Size() != 4*4096 || len(m.Bytes()) != 4*4096 {
		t.Fatalf("size %d, want %d", m.Size(), 4*4096)
	}
	m.Bytes()[size] = 42 // ours stays writable
	fd := m.Descriptor()
	for what, err := range map[string]error{
		"shrinking": unix.Ftruncate(fd, 4096),
		"growing":   unix.Ftruncate(fd, 5*4096),
		"punching":  unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096),
		"writing":   func() error { _, err := unix.Pwrite(fd, []byte("x"), 0); return err }(),
		"mapping writable": func() error {
			_, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		}(),
		"another seal": func() error { _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); return err }(),
	} {
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v, want EPERM", what, err)
		}
	}
	reader, err := MapReadOnly(fd, size)
	if err != nil {
		t.Fatal(err)
	}
	if b := reader.Bytes(); len(b) != size || cap(b) != size {
		t.Errorf("mapped %d bytes, want %d", len(b), size)
	}
	if err := unix.Mprotect(reader.whole, unix.PROT_READ|unix.PROT_WRITE); !errors.Is(err, unix.EACCES) {
		t.Errorf("making the read-only mapping writable: %v, want EACCES", err)
	}
	if err := errors.Join(reader.Close(), reader.Close()); err != nil {
		t.Error(err)
	}
}

func TestMemoryThatPeersWrite(t *testing.T) {
	m := newMemory(t, MemoryConfig{Size: 4096, PeersWrite: true})
	other, err := mapShared(m.Descriptor(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	other.Bytes()[7] = 9
	if m.Bytes()[7] != 9 {
		t.Error("the peer's write is not seen")
	}
	if err := unix.Ftruncate(m.Descriptor(), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("shrinking: %v, want EPERM", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}

func TestMemorySizes(t *testing.T) {
	for _, size := range []int64{0, -1, 1<<63 - 1} {
		if _, err := NewMemory(MemoryConfig{Size: size}); err == nil || !strings.Contains(err.Error(), "size") {
			t.Errorf("size %d: %v", size, err)
		}
	}
	var short *InsufficientError
	if _, err := NewMemory(MemoryConfig{Name: "table", Size: 1 << 50, HugePages: true}); !errors.As(err, &short) {
		t.Fatalf("a pebibyte: %v, want *InsufficientError", err)
	} else if short.Want != 1<<50 || short.Have <= 0 || !strings.Contains(err.Error(), "table needs 1024 TiB, and only ") {
		t.Errorf("%v", err)
	}
}

func TestHugePages(t *testing.T) {
	m := newMemory(t, MemoryConfig{Size: 1 << 20, HugePages: true})
	switch {
	case m.HugePages() && m.Size()%(1<<20) != 0:
		t.Errorf("huge pages with a size of %d", m.Size())
	case !m.HugePages() && m.HugePagesErr() == nil:
		t.Error("no huge pages, and no reason why")
	}
	t.Logf("huge pages: %v (%v)", m.HugePages(), m.HugePagesErr())
	r, err := MapReadOnly(m.Descriptor(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	m.Bytes()[1<<20-1] = 5
	if r.Bytes()[1<<20-1] != 5 {
		t.Error("the mapping shows other memory")
	}
	if err := r.Close(); err != nil { // huge pages can only be unmapped whole
		t.Error(err)
	}
}

func TestNamedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ring")
	m := newMemory(t, MemoryConfig{Name: "named", Size: 5000, Path: path})
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 || st.Size() != 8192 {
		t.Fatalf("%v, %v, want mode 0600 and 8192 bytes", st, err)
	}
	if _, err := NewMemory(MemoryConfig{Size: 1, Path: path}); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("the path of a live one: %v", err)
	}
	r, err := MapReadOnly(m.Descriptor(), 5000)
	if err != nil {
		t.Fatal(err)
	}
	m.Bytes()[4999] = 7
	if r.Bytes()[4999] != 7 {
		t.Error("the mapping shows other memory")
	}
	if _, err := unix.Mmap(m.Descriptor(), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EACCES) {
		t.Errorf("mapping the peers' descriptor writable: %v, want EACCES", err)
	}
	if err := unix.Ftruncate(m.Descriptor(), 0); err == nil {
		t.Error("the peers' descriptor can shrink the file")
	}
	if err := errors.Join(r.Close(), m.Close(), m.Close()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v, want the file gone", err)
	}

	if err := os.WriteFile(path, []byte("left behind"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewMemory(MemoryConfig{Size: 1, Path: path}); err == nil || !strings.Contains(err.Error(), "no process has it locked") {
		t.Errorf("a file left behind: %v", err)
	}
	if _, err := NewMemory(MemoryConfig{Size: 1, Path: path + "2", PeersWrite: true}); err == nil {
		t.Error("a named file that peers may write was made")
	}
	var short *InsufficientError
	if _, err := NewMemory(MemoryConfig{Size: 1 << 50, Path: path + "3"}); !errors.As(err, &short) {
		t.Errorf("a pebibyte: %v", err)
	}
	if _, err := os.Stat(path + "3"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that could not be had: %v, want none left", err)
	}
}

func TestMapReadOnlyRefuses(t *testing.T) {
	sealed := newMemory(t, MemoryConfig{Size: 8192})
	bare, err := unix.MemfdCreate("bare", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(bare)
	if err := unix.Ftruncate(bare, 8192); err != nil {
		t.Fatal(err)
	}
	half, err := unix.MemfdCreate("half", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(half)
	if err := unix.Ftruncate(half, 8192); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(half), unix.F_ADD_SEALS, unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}
	writable, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer writable.Close()
	if err := writable.Truncate(8192); err != nil {
		t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	for _, test := range []struct {
		what string
		fd   int
		size int64
		want string
	}{
		{"just its size", sealed.Descriptor(), 8192, ""},
		{"more than its size", sealed.Descriptor(), 8193, "has 8192 bytes, 8193 were announced"},
		{"nothing", sealed.Descriptor(), 0, "cannot be mapped"},
		{"a negative size", sealed.Descriptor(), -1, "cannot be mapped"},
		{"not sealed", bare, 8192, "not sealed against shrinking"},
		{"half sealed", half, 8192, "not sealed against shrinking"},
		{"a file opened for writing", int(writable.Fd()), 8192, "not sealed against shrinking"},
		{"a pipe", pipe[0], 1, "is no memory"},
		{"nothing open", 1 << 20, 1, "looking at the memory received"},
	} {
		m, err := MapReadOnly(test.fd, test.size)
		if test.want == "" && err == nil {
			err = m.Close()
		}
		if (test.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.what, err, test.want)
		}
	}
}

func TestAvailable(t *testing.T) {
	const gib = 1 << 30
	for name, test := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"nothing known": {nil, 1<<63 - 1},
		"machine":       {map[string]string{"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2097152 kB\n"}, 2 * gib},
		"control group below it": {map[string]string{
			"proc/meminfo": "MemAvailable: 4194304 kB\n", "proc/self/cgroup": "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "1000\n",
			"sys/fs/cgroup/a/memory.max": "2147483648\n", "sys/fs/cgroup/a/memory.current": "1610612736\n",
			"sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 536870912\n",
		}, gib},
		"control group of version 1": {map[string]string{
			"proc/meminfo": "MemAvailable: 4194304 kB\n", "proc/self/cgroup": "9:cpu:/\n4:memory:/x\n0::/\n",
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "3221225472\n", "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1073741824\n",
		}, 2 * gib},
		"control group over its limit": {map[string]string{
			"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "5\n", "sys/fs/cgroup/a/memory.current": "6\n",
		}, 0},
		"machine below control group": {map[string]string{
			"proc/meminfo": "MemAvailable: 1 kB\n", "proc/self/cgroup": "0::/a\n",
			"sys/fs/cgroup/a/memory.max": "5000\n", "sys/fs/cgroup/a/memory.current": "6\n",
		}, 1024},
	} {
		root := t.TempDir()
		for path, text := range test.files {
			path = filepath.Join(root, path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		got := available(root)
		if got.bytes != test.want {
			t.Errorf("%s: %d bytes (%s), want %d", name, got.bytes, got.source, test.want)
		}
		if err := got.check("x", test.want); err != nil {
			t.Errorf("%s: all of it: %v", name, err)
		}
		if test.want < 1<<63-1 && got.check("x", test.want+1) == nil {
			t.Errorf("%s: one byte too many was granted", name)
		}
	}
	if got := available("/"); got.bytes <= 0 || got.bytes == 1<<63-1 {
		t.Errorf("this machine: %+v", got)
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 10239: "10239 bytes", 10240: "10 KiB", 5 << 20: "5120 KiB", 10 << 20: "10 MiB", 1 << 50: "1024 TiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
