//go:build linux

package pollfd

import (
	"net"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNow sends the goroutine that asks as many signals as the kernel takes, so that poll is interrupted, and sees that the answer stays what it is.
func TestNow(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	runtime.LockOSThread() // the signals are for one thread
	defer runtime.UnlockOSThread()
	thread, stop, stopped := unix.Gettid(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Tgkill(unix.Getpid(), thread, unix.SIGURG)
			}
		}
	}()
	// Poll is interrupted only where none of the events is the case.
	for range 50_000 {
		if got := Now(uintptr(pair[0]), unix.POLLIN|unix.POLLRDHUP); got != 0 {
			t.Fatalf("an idle socket: %#x", got)
		}
	}
	if _, err := unix.Write(pair[1], []byte{1}); err != nil {
		t.Fatal(err)
	}
	unix.Close(pair[1])
	if got := Now(uintptr(pair[0]), unix.POLLIN|unix.POLLRDHUP); got != unix.POLLIN|unix.POLLRDHUP|unix.POLLHUP {
		t.Errorf("a socket whose peer wrote and closed: %#x", got)
	}
	close(stop)
	<-stopped
}

func TestConn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if got := Conn(raw, unix.POLLIN|unix.POLLOUT); got != unix.POLLOUT {
		t.Errorf("open: %#x", got)
	}
	conn.Close()
	if got := Conn(raw, unix.POLLIN); got != unix.POLLNVAL {
		t.Errorf("closed: %#x", got)
	}
}
