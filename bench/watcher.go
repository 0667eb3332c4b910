package bench

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// watcher sees a process end: it accepts one connection on a unix socket, sleeps in read(2) and notes when the connection ends.
type watcher struct {
	samples atomic.Uint64 // connections that have ended
	last    atomic.Int64
	failed  chan error
}

func watcherCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:    "_watcher",
		Short:  "The bare watcher of bench shm; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return runWatcher(socket) },
	}
	cmd.Flags().StringVar(&socket, "socket", "", "unix socket to listen on")
	return cmd
}

// runWatcher ends with its parent's word; the goroutine that sleeps ends with the process.
func runWatcher(socket string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: socket}), unix.Listen(fd, 1)); err != nil {
		return fmt.Errorf("listen on %s: %w", socket, err)
	}
	w := &watcher{failed: make(chan error, 1)}
	go func() {
		if err := w.watch(fd); err != nil {
			w.failed <- err
		}
	}()
	return serveControl(os.Stdin, os.Stdout, &ready{Address: socket}, w.handle)
}

func (w *watcher) watch(listener int) error {
	fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	var one [1]byte
	for {
		n, err := unix.Read(fd, one[:])
		now := monotonic()
		switch {
		case errors.Is(err, unix.EINTR) || n > 0:
			continue
		case err != nil && !errors.Is(err, unix.ECONNRESET):
			return fmt.Errorf("read: %w", err)
		}
		w.last.Store(now)
		w.samples.Add(1)
		return nil
	}
}

func (w *watcher) handle(ask request) (reply, error) {
	select {
	case err := <-w.failed:
		return reply{}, err
	default:
	}
	if ask.Do != doSnapshot {
		return reply{}, unknownRequest(ask)
	}
	snap, err := takeSnapshot(ask.Pids)
	if err != nil {
		return reply{}, err
	}
	snap.Samples, snap.Last = w.samples.Load(), w.last.Load()
	return reply{Snapshot: snap}, nil
}
