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

	// Fillable is for memory that some peers may write (Memory.Writable) and all others may not: they get a descriptor of its own that
	// was opened for reading, and the memory's mode lets nobody but its owner and root open it anew. An owner could change the mode back, and a
	// process of the same user can reach into this one anyhow.
	Fillable bool

	// Path, when set, makes a named file there instead of a memfd. A named file cannot be sealed, so only a descriptor opened read-only
	// leaves the process (and the writable one only to processes of its own user, who could as well open the file), and its
	// folder must be one that no other user may write to.
	Path string

	// Keep leaves a named file where it is at Close, for OpenNamed. Without it, Close removes the file.
	Keep bool
}

// Memory is memory that this process made, mapped writable, and that other processes may map through its descriptor.
type Memory struct {
	name    string
	mem     []byte
	fd      int // the memory itself
	shareFd int // what peers get; the same as fd for a memfd that none of them may write
	path    string
	keep    bool
	fillFd  int // what peers that may write get; the same as fd for a memfd; -1 where none may
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
	switch {
	case cfg.Fillable && cfg.PeersWrite:
		return nil, fmt.Errorf("%s: Fillable and PeersWrite exclude each other", cfg.Name)
	case cfg.Keep && cfg.Path == "":
		return nil, fmt.Errorf("%s: a memory without a path cannot be kept", cfg.Name)
	case cfg.Path != "":
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
	m := &Memory{name: cfg.Name, fd: fd, shareFd: fd, fillFd: -1, huge: huge}
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
	if !cfg.PeersWrite && !cfg.Fillable {
		seals |= unix.F_SEAL_FUTURE_WRITE
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("%s: sealing the memfd (F_SEAL_FUTURE_WRITE needs Linux 5.1): %w", cfg.Name, err)
	}
	if cfg.Fillable {
		return m, m.openForPeers(true)
	}
	return m, nil
}

// openForPeers makes the descriptors that peers get. Of a memfd that some of them may write, it takes from everybody the right to open it by a
// descriptor's path in /proc.
func (m *Memory) openForPeers(fillable bool) (err error) {
	again := fmt.Sprintf("/proc/self/fd/%d", m.fd)
	if m.shareFd, err = unix.Open(again, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("%s: opening it read-only for trainers: %w", m.name, err)
	}
	switch {
	case !fillable:
	case m.path != "": // one of its own, since whoever maps our own keeps the lock on it
		if m.fillFd, err = unix.Open(again, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("%s: opening it for producers: %w", m.name, err)
		}
	default:
		m.fillFd = m.fd
		if err := unix.Fchmod(m.fd, 0); err != nil {
			return fmt.Errorf("%s: taking the right to open it from everybody: %w", m.name, err)
		}
	}
	return nil
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
	return m.mapPresent(size, true)
}

// mapPresent maps the file as it is and, if asked to, makes every page present.
func (m *Memory) mapPresent(size int64, present bool) error {
	mem, err := unix.Mmap(m.fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("%s: mapping %s: %w", m.name, bytesText(size), err)
	}
	m.mem = mem
	if !present {
		return nil
	}
	if err := populate(mem); err != nil {
		if m.path != "" && (errors.Is(err, unix.EFAULT) || errors.Is(err, unix.ENOMEM)) { // what would have been a SIGBUS
			return m.noRoom(size)
		}
		return fmt.Errorf("%s: populating %s: %w", m.name, bytesText(size), err)
	}
	return nil
}

// allocate sees that the file system has a block for every byte of the file, or reports false where the file system cannot say. Content stays.
func (m *Memory) allocate(size int64) (bool, error) {
	err := unix.EINTR
	for errors.Is(err, unix.EINTR) {
		err = asErrno(unix.Fallocate(m.fd, 0, 0, size))
	}
	switch {
	case err == 0:
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP): // populate finds out
		return false, nil
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		return false, m.noRoom(size)
	}
	return false, fmt.Errorf("%s: reserving %s in %s: %w", m.name, bytesText(size), m.path, err)
}

// noRoom says that the file system is full, although a moment ago it seemed to have room.
func (m *Memory) noRoom(size int64) error {
	have := int64(0)
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Fstatfs(m.fd, &fs) == nil && unix.Fstat(m.fd, &st) == nil {
		have = int64(min(fs.Bavail, math.MaxInt64/uint64(max(fs.Bsize, 1))))*max(fs.Bsize, 1) + 512*st.Blocks
	}
	return &InsufficientError{Name: m.name, Want: size, Have: min(have, size-1), Source: "file system or quota of " + m.path}
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
				b := part[i] // the file may have content
				part[i] = b
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
	m := &Memory{name: cfg.Name, fd: fd, shareFd: -1, fillFd: -1, path: cfg.Path} // a file that could not be made is not kept
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: locking %s: %w", cfg.Name, cfg.Path, err)
	}
	if err := unix.Fchmod(fd, 0o600); err != nil { // whatever the umask took
		return nil, fmt.Errorf("%s: setting the mode of %s: %w", cfg.Name, cfg.Path, err)
	}
	size := roundUp(cfg.Size, int64(os.Getpagesize()))
	if err := checkFile(cfg.Name, cfg.Path, fd, size); err != nil {
		return nil, err
	}
	if _, err := m.allocate(size); err != nil {
		return nil, err
	}
	if err := m.mapWhole(size); err != nil {
		return nil, err
	}
	if err := m.openForPeers(cfg.Fillable); err != nil {
		return nil, err
	}
	m.keep = cfg.Keep
	return m, nil
}

// InUseError says that another process has a named file open as its memory.
type InUseError struct{ Path string }

func (e *InUseError) Error() string {
	return fmt.Sprintf("%s is in use by another process: stop that one or choose another path", e.Path)
}

// ForeignFileError says that what lies at a path is no memory that NewMemory left there.
type ForeignFileError struct {
	Path, Reason string
}

func (e *ForeignFileError) Error() string {
	return fmt.Sprintf("%s is not a file that this program left there: %s; look at it, then move it away or choose another path", e.Path, e.Reason)
}

// OpenNamed takes a named file up again that an earlier process kept, with the content it has. cfg.Size 0 takes it in whatever size it has; otherwise it
// must be that, in whole pages. HugePages is not looked at.
//
// The file must be a regular one of this process's user, with mode 0600 and one name, and not in use: *InUseError, *ForeignFileError; fs.ErrNotExist where
// there is none; *InsufficientError when there is no memory for it. It is left as it was in every case.
func OpenNamed(cfg MemoryConfig) (_ *Memory, err error) {
	if cfg.Name == "" {
		cfg.Name = "ingestd"
	}
	if cfg.Path == "" || cfg.PeersWrite || cfg.Size < 0 || cfg.Size > math.MaxInt-maxPage {
		return nil, fmt.Errorf("%s: opening a kept memory needs a path, no PeersWrite, and a size from 0: got %q, %v, %d",
			cfg.Name, cfg.Path, cfg.PeersWrite, cfg.Size)
	}
	fd, err := unix.Open(cfg.Path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, &ForeignFileError{cfg.Path, "it is a symbolic link"}
	case errors.Is(err, unix.EISDIR):
		return nil, &ForeignFileError{cfg.Path, "it is a folder"}
	case err != nil:
		return nil, fmt.Errorf("%s: opening %s: %w", cfg.Name, cfg.Path, err)
	}
	m := &Memory{name: cfg.Name, fd: fd, shareFd: -1, fillFd: -1, path: cfg.Path, keep: true}
	defer func() {
		if err != nil {
			m.keep = true
			err = errors.Join(err, m.Close())
		}
	}()
	if _, err := m.checkKept(cfg.Size); err != nil {
		return nil, err
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, &InUseError{cfg.Path}
	} else if err != nil {
		return nil, fmt.Errorf("%s: locking %s: %w", cfg.Name, cfg.Path, err)
	}
	size, err := m.checkKept(cfg.Size) // again: whoever had it locked may have removed it meanwhile
	if err != nil {
		return nil, err
	}
	reserved, err := m.allocate(size) // a hole would be a SIGBUS one day
	if err != nil {
		return nil, err
	}
	// The pages are there already, so that nothing is gained by waiting for 0.25 s per GiB until all are mapped: the first use of each maps it.
	if err := m.mapPresent(size, !reserved); err != nil {
		return nil, err
	}
	if err := m.openForPeers(cfg.Fillable); err != nil {
		return nil, err
	}
	m.keep = cfg.Keep
	return m, nil
}

// checkKept returns the size of a file that was kept, or why it is none.
func (m *Memory) checkKept(size int64) (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(m.fd, &st); err != nil {
		return 0, fmt.Errorf("%s: looking at %s: %w", m.name, m.path, err)
	}
	page := int64(os.Getpagesize())
	reason := ""
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		reason = fmt.Sprintf("it is no regular file (mode %#o)", st.Mode)
	case int(st.Uid) != os.Geteuid():
		reason = fmt.Sprintf("it belongs to user %d, this process is of user %d", st.Uid, os.Geteuid())
	case st.Mode&0o7777 != 0o600:
		reason = fmt.Sprintf("its mode is %#o, not 0600: others may have written to it", st.Mode&0o7777)
	case st.Nlink != 1:
		reason = fmt.Sprintf("it has %d names", st.Nlink)
	case st.Size < page || st.Size%page != 0:
		reason = fmt.Sprintf("it has %d bytes, which is no number of whole pages: it was cut short", st.Size)
	case size > 0 && roundUp(size, page) != st.Size:
		reason = fmt.Sprintf("it has %d bytes, and %d are wanted", st.Size, roundUp(size, page))
	}
	if reason != "" {
		return 0, &ForeignFileError{m.path, reason}
	}
	return st.Size, nil
}

// existsError tells a file in use from one that a dead process left behind.
func existsError(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("%s exists and cannot be opened (%w): choose another path", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return &InUseError{path}
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

// Kept tells whether the memory is a named file that stays where it is at Close.
func (m *Memory) Kept() bool { return m.keep && m.path != "" }

// Path returns the file's path, or "" for a memfd.
func (m *Memory) Path() string { return m.path }

// Descriptor returns the descriptor that may be given to any peer. It stays the Memory's own.
func (m *Memory) Descriptor() int { return m.shareFd }

// Writable returns the descriptor for peers that may write, and whether there is one: only memory made Fillable has it.
func (m *Memory) Writable() (int, bool) { return m.fillFd, m.fillFd >= 0 }

// Sync writes a named file's content through to its disk, and returns when it is there. For a memfd and on tmpfs it does nothing.
func (m *Memory) Sync() error {
	if m.path == "" || m.mem == nil {
		return nil
	}
	if err := unix.Msync(m.mem, unix.MS_SYNC); err != nil {
		return fmt.Errorf("%s: writing %s to its disk: %w", m.name, m.path, err)
	}
	return nil
}

// Close unmaps the memory, closes its descriptors and removes a named file, unless it is to be kept. Peers that have it mapped keep
// it; nothing in this process may touch it any more. Closing twice is no error.
func (m *Memory) Close() error {
	var errs []error
	if m.mem != nil {
		errs = append(errs, unix.Munmap(m.mem))
		m.mem = nil
	}
	for _, fd := range [...]int{m.shareFd, m.fillFd} {
		if fd >= 0 && fd != m.fd {
			errs = append(errs, unix.Close(fd))
		}
	}
	if m.fd >= 0 {
		if m.path != "" && !m.keep {
			errs = append(errs, unix.Unlink(m.path)) // while the lock is held
		}
		errs = append(errs, unix.Close(m.fd))
	}
	m.fd, m.shareFd, m.fillFd = -1, -1, -1
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s: closing: %w", m.name, err)
	}
	return nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
