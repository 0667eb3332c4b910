package lossynet

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrUnavailable says that this process cannot make networks: it lacks a right or a device.
var ErrUnavailable = errors.New("network namespaces with TUN devices need CAP_SYS_ADMIN and CAP_NET_ADMIN, and /dev/net/tun")

// Side is one host: a namespace with a loopback device and its end of the link.
type Side struct {
	Addr netip.Addr

	namespace *os.File
	tun       *os.File

	mu     sync.Mutex
	closed bool
	asking sync.WaitGroup // calls under way
}

func startSide(addr netip.Addr) (*Side, error) {
	s := &Side{Addr: addr}
	err := onThread(func() (err error) {
		s.namespace, s.tun, err = newHost(addr)
		return err
	})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err != nil {
		return nil, fmt.Errorf("lossynet: %w", err)
	}
	return s, nil
}

// onThread calls f on a thread that ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- f()
			return // locked: the runtime ends the thread
		}
		// The program's first thread does not end. While this goroutine holds it, the next one gets another.
		defer runtime.UnlockOSThread()
		done <- onThread(f)
	}()
	return <-done
}

// Do calls f on a thread in the side's namespace, which ends with it, and returns its error. What f starts in goroutines runs elsewhere. f must return: after a test's Fatal, Do would wait for ever.
func (s *Side) Do(f func() error) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return fmt.Errorf("lossynet: %w", os.ErrClosed)
	}
	s.asking.Add(1)
	s.mu.Unlock()
	defer s.asking.Done()
	return onThread(func() error {
		if err := unix.Setns(int(s.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("lossynet: enter the namespace of %v: %w", s.Addr, err)
		}
		return f()
	})
}

// In returns what f makes on a thread in the side's namespace: a socket.
func In[T any](s *Side, f func() (T, error)) (T, error) {
	var made T
	err := s.Do(func() (err error) {
		made, err = f()
		return err
	})
	return made, err
}

// HostPort is a port of the side's address, 0 for any.
func (s *Side) HostPort(port int) string {
	return net.JoinHostPort(s.Addr.String(), strconv.Itoa(port))
}

// refused returns how many packets the side's device had no room for.
func (s *Side) refused() (uint64, error) {
	text, err := In(s, func() ([]byte, error) { return os.ReadFile("/proc/thread-self/net/dev") })
	if err != nil {
		return 0, err
	}
	const dropped = 11 // column of what could not be sent, after those of what was received
	lines := bufio.NewScanner(strings.NewReader(string(text)))
	for lines.Scan() {
		name, counts, _ := strings.Cut(lines.Text(), ":")
		if columns := strings.Fields(counts); strings.TrimSpace(name) == deviceName && len(columns) > dropped {
			return strconv.ParseUint(columns[dropped], 10, 64)
		}
	}
	return 0, fmt.Errorf("lossynet: no device %s among %q", deviceName, text)
}

// close waits for calls under way.
func (s *Side) close() error {
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	if again {
		return fmt.Errorf("lossynet: %w", os.ErrClosed)
	}
	s.asking.Wait()
	return errors.Join(s.namespace.Close(), s.tun.Close())
}
