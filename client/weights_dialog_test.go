//go:build linux

package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// scripted is a daemon that reads one message after the other and answers each with the next bytes of a script; nil bytes are no answer, and after the last it closes.
func scripted(t *testing.T, script ...[]byte) *dialog {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		for _, answer := range script {
			var a weights.Ask
			if wire.ReadMessage(theirs, wire.MessageBytesMax, &a) != nil {
				return
			}
			if answer == nil {
				_, _ = io.Copy(io.Discard, theirs) // says nothing any more
				return
			}
			if _, err := theirs.Write(answer); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		ours.Close()
		<-done
	})
	return &dialog{conn: ours, timeout: 200 * time.Millisecond, places: 3}
}

func answered1(t *testing.T, a weights.Answer) []byte {
	t.Helper()
	b, err := wire.AppendMessage(nil, a, wire.MessageBytesMax)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func noticed(code wire.Code) []byte {
	return wire.AppendNotice([]byte{0, 0, 0, 0}, &wire.Notice{Code: code, Reason: "so"})
}

// TestDialogAnswers: what a commit makes of everything a daemon may say, and whether the connection is of use after it.
func TestDialogAnswers(t *testing.T) {
	digest := spec.Fingerprint{7}
	for name, c := range map[string]struct {
		answer []byte
		is     error // nil: published
		says   string
		broken bool
	}{
		"published":                {answered1(t, weights.Answer{Op: weights.OpPublished, Generation: 8, Digest: digest}), nil, "", false},
		"another was published":    {answered1(t, weights.Answer{Op: weights.OpPublished, Generation: 9}), wire.ErrProtocol, `"published" out of turn`, true},
		"a place":                  {answered1(t, weights.Answer{Op: weights.OpPlace, Generation: 8}), wire.ErrProtocol, `"place" out of turn`, true},
		"nothing known":            {answered1(t, weights.Answer{Op: "x"}), wire.ErrProtocol, `"x" out of turn`, true},
		"incomplete":               {answered1(t, weights.Answer{Op: weights.OpFailed, Code: weights.FailedIncomplete, Reason: "holes"}), new(IncompleteError), "holes", false},
		"bad sum":                  {answered1(t, weights.Answer{Op: weights.OpFailed, Code: weights.FailedBadSum, Reason: "sum of w"}), errAny, "bad_sum): sum of w", false},
		"stopping":                 {noticed(wire.CodeShuttingDown), ErrShuttingDown, "so", true},
		"cut off":                  {noticed(wire.CodeBadPeer), new(wire.Notice), "so", true},
		"a chunk":                  {[]byte{1, 0, 0, 0x80}, wire.ErrProtocol, "a chunk", true},
		"too long":                 {[]byte{1, 0, 1, 0}, wire.ErrProtocol, "65537 bytes", true},
		"too short":                {[]byte{1, 0, 0, 0, '{'}, wire.ErrProtocol, "1 bytes", true},
		"no JSON":                  {[]byte("\x02\x00\x00\x00{x"), wire.ErrProtocol, "message", true},
		"no notice after length 0": {[]byte{0, 0, 0, 0, 9}, wire.ErrProtocol, "0x09", true},
		"closed":                   {[]byte{}, ErrDaemonGone, "", true},
		"closed in the middle":     {[]byte{9, 0, 0, 0, '{'}, ErrDaemonGone, "", true},
		"a notice cut short":       {noticed(wire.CodeBadPeer)[:12], ErrDaemonGone, "notice", true},
		"silence":                  {nil, os.ErrDeadlineExceeded, "did not answer in time", true},
	} {
		t.Run(name, func(t *testing.T) {
			d := scripted(t, c.answer)
			got, err := d.commit(t.Context(), 8)
			if c.is == nil {
				if err != nil || got != digest {
					t.Errorf("%v, %v", got, err)
				}
				return
			}
			if err == nil || !isKind(err, c.is) || !strings.Contains(err.Error(), c.says) || errors.Is(err, io.EOF) {
				t.Errorf("got %v, want %v with %q", err, c.is, c.says)
			}
			if (d.broken != nil) != c.broken {
				t.Errorf("of no more use: %v, want %v", d.broken, c.broken)
			}
			if c.broken {
				if err := d.abort(); err == nil {
					t.Error("an abort over a connection of no use")
				}
			}
		})
	}
}

var errAny = errors.New("any")

// isKind is errors.Is for a value, errors.As for a type.
func isKind(err, kind error) bool {
	switch kind.(type) {
	case *IncompleteError:
		return errors.As(err, new(*IncompleteError))
	case *wire.Notice:
		return errors.As(err, new(*wire.Notice))
	}
	return kind == errAny || errors.Is(err, kind)
}

// TestDialogCancelledCommit: whether it was published is not known then, and the error says so.
func TestDialogCancelledCommit(t *testing.T) {
	d := scripted(t, nil)
	d.timeout = 30 * time.Second
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.commit(ctx, 8); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "published or not") || d.broken == nil {
		t.Errorf("%v", err)
	}
}

// TestDialogBegin: waiting is taken note of, and a place that comes after the context has ended is given back.
func TestDialogBegin(t *testing.T) {
	pin := []weights.PinText{{Reader: 3, Client: "c", PID: 9, Generation: 5, Since: 1}}
	waiting := answered1(t, weights.Answer{Op: weights.OpWaiting, Pins: pin})
	place := answered1(t, weights.Answer{Op: weights.OpPlace, Generation: 6, Place: 2})
	aborted := answered1(t, weights.Answer{Op: weights.OpAborted})
	d := scripted(t, append(waiting, place...), aborted)
	if generation, place, err := d.begin(t.Context(), 0); generation != 6 || place != 2 || err != nil {
		t.Errorf("%d, %d, %v", generation, place, err)
	}
	if err := d.abort(); err != nil {
		t.Error(err)
	}

	for name, script := range map[string][][]byte{
		"while it waits":        {waiting, aborted},
		"as a place comes free": {waiting, append(place, aborted...)},
		"as it fails":           {waiting, append(answered1(t, weights.Answer{Op: weights.OpFailed, Code: weights.FailedPinned, Pins: pin}), aborted...)},
	} {
		d := scripted(t, script...)
		d.timeout = 30 * time.Second
		ctx, cancel := cancelSoon(t)
		_, _, err := d.begin(ctx, 0)
		cancel()
		var pinned *PinnedError
		if !errors.As(err, &pinned) || !errors.Is(err, context.Canceled) || len(pinned.Pins) != 1 || pinned.Pins[0].Who.PID != 9 || d.broken != nil {
			t.Errorf("%s: %v; of no more use: %v", name, err, d.broken)
		}
	}

	// A daemon that does not hear an abort, as long as it waits for a place itself: the error is that of the context all the same, and says who pins.
	for _, script := range [][][]byte{{waiting, nil}, {nil}} {
		d := scripted(t, script...)
		ctx, cancel := cancelSoon(t)
		_, _, err := d.begin(ctx, 0)
		cancel()
		var pinned *PinnedError
		if !errors.Is(err, context.Canceled) || errors.As(err, &pinned) != (len(script) > 1) || errors.Is(err, os.ErrDeadlineExceeded) || d.broken == nil {
			t.Errorf("%v; of no more use: %v", err, d.broken)
		}
	}

	d = scripted(t, answered1(t, weights.Answer{Op: weights.OpFailed, Code: weights.FailedOldGeneration, Reason: "newest is 9"}))
	var old *OldGenerationError
	if _, _, err := d.begin(t.Context(), 4); !errors.As(err, &old) || old.Wanted != 4 || !strings.Contains(err.Error(), "newest is 9") {
		t.Errorf("%v", err)
	}
}

func cancelSoon(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	timer := time.AfterFunc(100*time.Millisecond, cancel)
	return ctx, func() { timer.Stop(); cancel() }
}

func TestWeightsConfigs(t *testing.T) {
	m := vectors(t, 1)
	for _, bad := range []PublisherConfig{{Manifest: m}, {Table: "w"}, {Table: "w", Manifest: m, Timeout: -1}} {
		if _, err := OpenPublisher(t.Context(), "unix:///nowhere", bad); err == nil || !strings.Contains(err.Error(), "PublisherConfig") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	for _, bad := range []SubscribeConfig{
		{}, {Table: "w", Generations: 1}, {Table: "w", CapacityBytes: -1}, {Table: "w", StallTimeout: -1}, {Table: "w", HandshakeTimeout: -1},
		{Table: "w", ReconnectFrom: 2 * time.Second, ReconnectTo: time.Second}, {Table: "w", ReconnectFrom: -1},
	} {
		if _, err := Subscribe(t.Context(), "unix:///nowhere", bad); err == nil || !strings.Contains(err.Error(), "SubscribeConfig") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	for _, addr := range []string{"unix:///nowhere/s", "shm:///nowhere/s"} {
		if _, err := Subscribe(t.Context(), addr, SubscribeConfig{Table: "w"}); err == nil || !strings.Contains(err.Error(), "is the daemon running") {
			t.Errorf("%s: %v", addr, err)
		}
	}
}
