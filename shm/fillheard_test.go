//go:build linux

package shm

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/ingestd/ingestd/wire"
)

// TestHeard: what the daemon had said before Heard is called is known when it returns, however it was cut into pieces on the way; a note half said is waited for, and not after the
// daemon's end.
func TestHeard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	check(t, err)
	defer l.Close()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	check(t, err)
	daemon, err := l.Accept()
	check(t, err)
	a := &FillAttachment{conn: conn, path: path}
	a.toUs, err = newBell()
	check(t, err)
	defer func() { check(t, a.toUs.close()) }()
	a.watching.Add(1)
	go a.watch()
	for step := range uint64(200) {
		note := wire.AppendNote(nil, &wire.Note{Code: wire.NoteStepRefused, Step: step, Reason: "too old"})
		if step%2 == 1 {
			_, err = daemon.Write(wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "full"}))
			check(t, err)
		}
		_, err = daemon.Write(note)
		check(t, err)
		check(t, a.Heard(t.Context()))
		if got := a.Refused(); got == nil || got.Step != step {
			t.Fatalf("after the note of step %d: %+v", step, got)
		}
		if got := a.Note(); (got != nil) != (step > 0) || got != nil && got.Code != wire.NoteRingFull {
			t.Fatalf("step %d: note %+v", step, got)
		}
	}
	_, err = daemon.Write([]byte{wire.NoteMark, 40})
	check(t, err)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Heard(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("half a note: %v", err)
	}
	ended := make(chan error)
	go func() { ended <- a.Heard(t.Context()) }()
	check(t, daemon.Close())
	check(t, <-ended)
	if a.Err() == nil {
		t.Error("Heard returned before the end was known")
	}
	check(t, a.Close())
	if err := a.Heard(t.Context()); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}
