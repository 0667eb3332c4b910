//go:build linux

package shm

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// limit is how many bytes may be had, and what says so.
type limit struct {
	bytes  int64
	source string
}

// checkAvailable returns an *InsufficientError when the machine, or the control group of this process, has less than size to give.
func checkAvailable(name string, size int64) error {
	return available("/").check(name, size)
}

func (l limit) check(name string, size int64) error {
	if size > l.bytes {
		return &InsufficientError{Name: name, Want: size, Have: l.bytes, Source: l.source}
	}
	return nil
}

// available reads the limits below root, which is "/" but in tests. What cannot be read sets no limit.
func available(root string) limit {
	least := limit{math.MaxInt64, "no limit known"}
	take := func(l limit, ok bool) {
		if ok && l.bytes < least.bytes {
			least = l
		}
	}
	take(memAvailable(filepath.Join(root, "proc/meminfo")))
	groups, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return least
	}
	for line := range strings.Lines(string(groups)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		switch {
		case parts[0] == "0":
			take(groupLimit(filepath.Join(root, "sys/fs/cgroup"), parts[2], "memory.max", "memory.current", "memory.stat"))
		case parts[1] == "memory":
			take(groupLimit(filepath.Join(root, "sys/fs/cgroup/memory"), parts[2], "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"))
		}
	}
	return least
}

func memAvailable(path string) (limit, bool) {
	kib, ok := field(path, "MemAvailable:")
	return limit{kib << 10, "MemAvailable of /proc/meminfo"}, ok
}

// groupLimit walks from the process's control group to the root: the tightest of them counts. Page cache that the kernel can drop is
// not in the way of an allocation, so it is not counted as used.
func groupLimit(base, group, maxFile, usedFile, statFile string) (limit, bool) {
	least, found := limit{bytes: math.MaxInt64}, false
	for dir := filepath.Join("/", group); ; dir = filepath.Dir(dir) {
		at := filepath.Join(base, dir)
		most, okMost := number(filepath.Join(at, maxFile))
		used, okUsed := number(filepath.Join(at, usedFile))
		if okMost && okUsed {
			cache, _ := field(filepath.Join(at, statFile), "inactive_file")
			if free := max(0, most-max(0, used-cache)); free < least.bytes {
				least, found = limit{free, fmt.Sprintf("%s of control group %s", maxFile, dir)}, true
			}
		}
		if dir == "/" {
			return least, found
		}
	}
}

// number reads a file that holds one number; "max" is none.
func number(path string) (int64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	return n, err == nil
}

// field reads the number after name at the start of a line.
func field(path, name string) (int64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		if words := strings.Fields(line); len(words) >= 2 && words[0] == name {
			n, err := strconv.ParseInt(words[1], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// checkFile is checkAvailable for a named file: its file system must have room, and if that is tmpfs, so must memory.
func checkFile(name, path string, fd int, size int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return fmt.Errorf("%s: statfs of %s: %w", name, path, err)
	}
	room := limit{math.MaxInt64, "file system of " + path}
	if block := int64(st.Bsize); block > 0 && st.Bavail < uint64(math.MaxInt64/block) {
		room.bytes = int64(st.Bavail) * block
	}
	if err := room.check(name, size); err != nil {
		return err
	}
	if st.Type == unix.TMPFS_MAGIC {
		return checkAvailable(name, size)
	}
	return nil
}

// bytesText prints a size for people, and exactly where it is small.
func bytesText(n int64) string {
	const unit = 1024
	if n < 10*unit {
		return fmt.Sprintf("%d bytes", n)
	}
	f, i := float64(n)/unit, 0
	for f >= 10*unit && i < 4 {
		f /= unit
		i++
	}
	return fmt.Sprintf("%.0f %s", math.Floor(f), [...]string{"KiB", "MiB", "GiB", "TiB", "PiB"}[i])
}
