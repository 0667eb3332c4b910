//go:build linux

package sendfile

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pair returns both ends of a connection.
func pair(t *testing.T, network string) (ours, theirs net.Conn) {
	t.Helper()
	if network == "pipe" {
		ours, theirs = net.Pipe()
	} else {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = filepath.Join(t.TempDir(), "s")
		}
		l, err := net.Listen(network, address)
		check(t, err)
		defer l.Close()
		ours, err = net.Dial(network, l.Addr().String())
		check(t, err)
		theirs, err = l.Accept()
		check(t, err)
	}
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	return ours, theirs
}

// memfd returns a file of random bytes, and the bytes.
func memfd(t *testing.T, n int) (int, []byte) {
	t.Helper()
	fd, err := unix.MemfdCreate("t", unix.MFD_CLOEXEC)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	_, err = unix.Write(fd, b)
	check(t, err)
	return fd, b
}

// TestSender: what is written from memory and from a file arrives in order, over sockets; what is none takes no files.
func TestSender(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "pipe"} {
		ours, theirs := pair(t, network)
		fd, data := memfd(t, 3<<20)
		s := &Sender{Conn: ours, Stall: 10 * time.Second}
		sent := make(chan error, 1)
		told := int64(0)
		go func() {
			err := errors.Join(s.Write(t.Context(), data[:700000]), s.WriteMore(t.Context(), data[:5]))
			if s.Socket() {
				err = errors.Join(err, s.File(t.Context(), fd, 1, int64(len(data)-1), func(n int64) { told += n }))
			} else if s.File(t.Context(), fd, 1, 1, nil) == nil {
				err = errors.Join(err, errors.New("a file was sent over what is no socket"))
			}
			sent <- errors.Join(err, ours.Close())
		}()
		got, err := io.ReadAll(theirs)
		check(t, err)
		check(t, <-sent)
		want := append(bytes.Clone(data[:700000]), data[:5]...)
		if network != "pipe" {
			want = append(want, data[1:]...)
		}
		if !bytes.Equal(got, want) || network != "pipe" && told != int64(len(data)-1) {
			t.Errorf("%s: %d bytes came of %d, and %d of the file were told", network, len(got), len(want), told)
		}
	}
}

// TestStall: a peer that takes nothing is an os.ErrDeadlineExceeded, and so is a context that has ended.
func TestStall(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "pipe"} {
		ours, _ := pair(t, network)
		fd, data := memfd(t, 32<<20)
		s := &Sender{Conn: ours, Stall: 20 * time.Millisecond}
		if err := s.Write(t.Context(), data); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: memory: %v", network, err)
		}
		if s.Socket() {
			if err := s.File(t.Context(), fd, 0, int64(len(data)), nil); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: a file: %v", network, err)
			}
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		other, _ := pair(t, network)
		s = &Sender{Conn: other, Stall: time.Hour}
		if err := s.Write(ended, data); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a context that has ended: %v", network, err)
		}
	}
}

// TestFileEnds: a file that is too short is an error, and no endless loop.
func TestFileEnds(t *testing.T) {
	ours, _ := pair(t, "tcp")
	fd, _ := memfd(t, 100)
	s := &Sender{Conn: ours, Stall: time.Second}
	if err := s.File(t.Context(), fd, 50, 51, nil); !errors.Is(err, unix.EIO) {
		t.Errorf("%v", err)
	}
}
