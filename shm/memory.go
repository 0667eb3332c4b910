//go:build linux

package shm

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// MemoryConfig says what memory to make.
type MemoryConfig struct {
	// Name shows in /proc/<pid>/maps and in errors.
	Name string

	// Size is the least length in bytes; it is rounded up to whole pages.
	Size int64

	// HugePages asks for pages of 2 MiB (or whatever the machine's default huge page is) first. Without enough free ones ordinary
	// pages are taken, and Memory.HugePagesErr says why.
	HugePages bool

	// PeersWrite leaves out the seal that makes every later mapping read-only. For channels.
	PeersWrite bool

	// Path, when set, makes a named file there instead of a memfd, removed again by Close. A named file cannot be sealed, so
	// only a descriptor opened read-only leaves the process, and its folder must be one that no other user may write to.
	Path string
}

// Memory is memory that this process made, mapped writable, and that other processes may map through its descriptor.
type Memory struct {
	name    string
	mem     []byte
	fd      int // the memory itself
	shareFd int // what peers get; the same as fd for a memfd
	path    string
	huge    bool
	hugeErr error
}

// InsufficientError says that memory was asked for that is not there. Nothing was allocated.
type InsufficientError struct {
	Name   string
	Want   int64
	Have   int64
	Source string // what sets the limit
}

func (e *InsufficientError) Error() string {
	return fmt.Sprintf("%s needs %s, and only %s are available (%s): make the table smaller (batches, batch size) or free memory",
		e.Name, bytesText(e.Want), bytesText(e.Have), e.Source)
}

// NewMemory makes memory, sees that every page of it is there, and seals it. It returns an *InsufficientError, before it allocates
// anything, when there is less memory than asked for.
func NewMemory(cfg MemoryConfig) (*Memory, error) {
	if cfg.Name == "" {
		cfg.Name = "ingestd"
	}
	if cfg.Size < 1 || cfg.Size > math.MaxInt-maxPage {
		return nil, fmt.Errorf("%s: size %d: must be from 1 byte to %d", cfg.Name, cfg.Size, int64(math.MaxInt-maxPage))
	}
	if cfg.Path != "" {
		return newNamed(cfg)
	}
	var hugeErr error
	if cfg.HugePages {
		m, err := newMemfd(cfg, true)
		if err == nil {
			return m, nil
		}
		hugeErr = err
	}
	if err := checkAvailable(cfg.Name, cfg.Size); err != nil {
		return nil, err
	}
	m, err := newMemfd(cfg, false)
	if err != nil {
		return nil, err
	}
	m.hugeErr = hugeErr
	return m, nil
}

const maxPage = 1 << 30

// newMemfd makes, maps, populates and seals a memfd. Nobody else has its descriptor before the last seal is set.
func newMemfd(cfg MemoryConfig, huge bool) (_ *Memory, err error) {
	flags, page := unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING, int64(os.Getpagesize())
	if huge {
		flags |= unix.MFD_HUGETLB
	}
	fd, err := memfdCreate(cfg.Name, flags)
	if err != nil {
		return nil, fmt.Errorf("%s: memfd_create: %w", cfg.Name, err)
	}
	m := &Memory{name: cfg.Name, fd: fd, shareFd: fd, huge: huge}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if huge {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, fmt.Errorf("%s: fstat: %w", cfg.Name, err)
		}
		page = int64(st.Blksize)
	}
	if err := m.mapWhole(roundUp(cfg.Size, page)); err != nil {
		return nil, err
	}
	seals := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if !cfg.PeersWrite {
		seals |= unix.F_SEAL_FUTURE_WRITE
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("%s: sealing the memfd (F_SEAL_FUTURE_WRITE needs Linux 5.1): %w", cfg.Name, err)
	}
	return m, nil
}

// memfdCreate adds MFD_NOEXEC_SEAL where the kernel (6.3) knows it: the memory holds data and nothing that may be run.
func memfdCreate(name string, flags int) (int, error) {
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, flags)
	}
	return fd, err
}

// mapWhole sizes the file, maps it and makes every page present.
func (m *Memory) mapWhole(size int64) error {
	if err := unix.Ftruncate(m.fd, size); err != nil {
		return fmt.Errorf("%s: sizing to %s: %w", m.name, bytesText(size), err)
	}
	mem, err := unix.Mmap(m.fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("%s: mapping %s: %w", m.name, bytesText(size), err)
	}
	m.mem = mem
	if err := populate(mem); err != nil {
		return fmt.Errorf("%s: populating %s: %w", m.name, bytesText(size), err)
	}
	return nil
}

// populate takes the cost of first touch (0.35 s per GiB of 4 KiB pages, 0.11 s with huge ones) now instead of on the path of the
// first samples, and the lack of memory as an error instead of a SIGBUS.
func populate(mem []byte) error {
	const step = 1 << 30 // stays interruptible
	for at := 0; at < len(mem); at += step {
		part := mem[at:min(at+step, len(mem))]
		err := unix.EINTR
		for errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			err = asErrno(unix.Madvise(part, unix.MADV_POPULATE_WRITE))
		}
		switch {
		case err == 0:
		case errors.Is(err, unix.EINVAL): // before Linux 5.14
			for i := 0; i < len(part); i += os.Getpagesize() {
				part[i] = 0 // fresh memory: every byte is 0
			}
		default:
			return err
		}
	}
	return nil
}

func asErrno(err error) unix.Errno {
	var errno unix.Errno
	if err != nil && !errors.As(err, &errno) {
		return unix.EIO
	}
	return errno
}

// newNamed makes a file of its own, locked for as long as this process lives.
func newNamed(cfg MemoryConfig) (_ *Memory, err error) {
	if cfg.PeersWrite {
		return nil, fmt.Errorf("%s: a named file cannot be one that peers write to: they could shrink it; leave the path out", cfg.Name)
	}
	fd, err := unix.Open(cfg.Path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, unix.EEXIST) {
		return nil, existsError(cfg.Path)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: creating %s: %w", cfg.Name, cfg.Path, err)
	}
	m := &Memory{name: cfg.Name, fd: fd, shareFd: -1, path: cfg.Path}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: locking %s: %w", cfg.Name, cfg.Path, err)
	}
	size := roundUp(cfg.Size, int64(os.Getpagesize()))
	if err := checkFile(cfg.Name, cfg.Path, fd, size); err != nil {
		return nil, err
	}
	if err := unix.Fallocate(fd, 0, 0, size); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("%s: reserving %s in %s: %w", cfg.Name, bytesText(size), cfg.Path, err)
	}
	if err := m.mapWhole(size); err != nil {
		return nil, err
	}
	m.shareFd, err = unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: opening %s read-only for trainers: %w", cfg.Name, cfg.Path, err)
	}
	return m, nil
}

// existsError tells a file in use from one that a dead process left behind.
func existsError(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("%s exists and cannot be opened (%w): choose another path", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s is in use by another process: stop that one or choose another path", path)
	}
	return fmt.Errorf("%s exists, and no process has it locked: if a daemon that died left it, remove it", path)
}

// Bytes returns the memory. It is at least the size asked for, starts on a page, was all zero when made, and must not be touched
// after Close.
func (m *Memory) Bytes() []byte { return m.mem }

// Size returns the length in bytes.
func (m *Memory) Size() int64 { return int64(len(m.mem)) }

// HugePages reports whether the memory lies on huge pages; HugePagesErr says why not when they were asked for.
func (m *Memory) HugePages() bool { return m.huge }

// HugePagesErr returns why huge pages that were asked for could not be had, or nil.
func (m *Memory) HugePagesErr() error { return m.hugeErr }

// Path returns the file's path, or "" for a memfd.
func (m *Memory) Path() string { return m.path }

// Descriptor returns the descriptor that may be given to a peer. It stays the Memory's own.
func (m *Memory) Descriptor() int { return m.shareFd }

// Close unmaps the memory, closes its descriptors and removes a named file. Peers that have it mapped keep it; nothing in this
// process may touch it any more. Closing twice is no error.
func (m *Memory) Close() error {
	var errs []error
	if m.mem != nil {
		errs = append(errs, unix.Munmap(m.mem))
		m.mem = nil
	}
	if m.shareFd >= 0 && m.shareFd != m.fd {
		errs = append(errs, unix.Close(m.shareFd))
	}
	if m.fd >= 0 {
		if m.path != "" {
			errs = append(errs, unix.Unlink(m.path)) // while the lock is held
		}
		errs = append(errs, unix.Close(m.fd))
	}
	m.fd, m.shareFd = -1, -1
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s: closing: %w", m.name, err)
	}
	return nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
