package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// pushUntilError pushes until the connection's end shows.
func pushUntilError(t *testing.T, p *Producer) error {
	t.Helper()
	sample := makeSamples(0, 1, int(p.sampleBytes))
	for range 1_000_000 {
		if err := p.Push(t.Context(), sample); err != nil {
			return err
		}
	}
	t.Fatal("no error after a million samples")
	return nil
}

// endErrors adds to the error of a Push those of Flush and Close, which fail only if a sample that was taken is not acked.
func endErrors(t *testing.T, p *Producer, err error) []error {
	if p.Acked() < p.Sent() {
		return []error{err, p.Flush(t.Context()), p.Close(t.Context())}
	}
	closeWell(t, p)
	return []error{err}
}

// TestNotice: the daemon's reason is found whatever the producer is doing when the connection ends, also when its own
// write fails because the daemon closed with bytes unread.
func TestNotice(t *testing.T) {
	for name, c := range map[string]struct {
		spec   string
		window int64
	}{"small": {"a:U8[100]", 0}, "direct": {"a:U8[1000000]", 0}, "window closed": {"a:U8[100]", 2}} {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				addr := fakeDaemon(t, options{network: network, windowSamples: c.window}, func(f *fake) {
					io.ReadFull(f, make([]byte, f.sampleBytes/2)) // something is on its way
					f.notice(wire.CodeShuttingDown, "come back later")
				})
				p := dial(t, addr, Config{Spec: specOf(t, c.spec)})
				err := pushUntilError(t, p)
				for _, err := range endErrors(t, p, err) {
					var notice *wire.Notice
					if !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown || notice.Reason != "come back later" {
						t.Errorf("got %v, want the daemon's notice", err)
					}
					wantOnly(t, err, ErrShuttingDown)
				}
			})
		}
	}
}

// TestNoticeAfterAllAcks: nothing was lost, so Flush and Close have nothing to complain of, but no more can be pushed.
func TestNoticeAfterAllAcks(t *testing.T) {
	addr := fakeDaemon(t, options{}, func(f *fake) {
		f.take(5)
		f.Write(append([]byte{1, 1, 1, 1, 1}, wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeIdleTimeout, Reason: "idle"})...))
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 5)
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	var notice *wire.Notice
	if err := p.Push(t.Context(), makeSamples(5, 1, 100)); !errors.As(err, &notice) || notice.Code != wire.CodeIdleTimeout {
		t.Errorf("%v", err)
	}
	closeWell(t, p)
}

func TestDaemonGone(t *testing.T) {
	for name, text := range map[string]string{"small": "a:U8[100]", "direct": "a:U8[1000000]"} {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				addr := fakeDaemon(t, options{network: network}, func(f *fake) { io.ReadFull(f, make([]byte, f.sampleBytes/2)) })
				p := dial(t, addr, Config{Spec: specOf(t, text)})
				err := pushUntilError(t, p)
				for _, err := range endErrors(t, p, err) {
					wantOnly(t, err, ErrDaemonGone)
				}
			})
		}
	}
}

func TestDaemonBreaksTheProtocol(t *testing.T) {
	for says, bytes := range map[string]string{
		"acked 2 samples more": "\x01\x01\x01", "the byte 0x03": "\x03", "closing notice has 1 bytes": "\x00\x01\x00\x00\x00{",
		"the note has 0 bytes": "\x02\x00\x00\x00\x00", "the note has no code": "\x02\x02\x00\x00\x00{}",
	} {
		for _, session := range []string{"", "s"} { // with a session there is no second try either
			addr := fakeDaemon(t, options{}, func(f *fake) {
				f.take(1)
				f.Write([]byte(bytes))
				io.Copy(io.Discard, f)
			})
			p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]"), Session: session})
			push(t, p, 0, 1)
			<-p.ended
			err := pushUntilError(t, p)
			wantOnly(t, err, wire.ErrProtocol)
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%v; want %q", err, says)
			}
			p.Abort()
		}
	}
}

// TestAckAheadOfSample: the daemon acks a sample of which it cannot have all. With a session its memory is not used anew.
func TestAckAheadOfSample(t *testing.T) {
	release := make(chan struct{})
	addr := fakeDaemon(t, options{tight: true}, func(f *fake) {
		io.ReadFull(f, make([]byte, 1000)) // the write has begun
		f.ack(1)
		<-release
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[8000000]"), Session: "s", Dialer: dialTight})
	ctx, cancel := context.WithCancel(t.Context())
	pushed := make(chan error)
	go func() { pushed <- p.Push(ctx, make([]byte, 8000000)) }()
	for p.Acked() == 0 { // it is acked while it is being written
		runtime.Gosched()
	}
	cancel()
	if err := <-pushed; err != nil {
		t.Errorf("the sample was not taken: %v", err)
	}
	<-p.ended
	wantOnly(t, p.Push(t.Context(), make([]byte, 8000000)), wire.ErrProtocol)
	close(release)
}

func TestClosed(t *testing.T) {
	addr := fakeDaemon(t, options{}, (*fake).serveAll)
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 3)
	closeWell(t, p)
	closeWell(t, p)
	wantIs(t, p.Push(t.Context(), makeSamples(3, 1, 100)), os.ErrClosed)
	if err := p.Flush(t.Context()); err != nil {
		t.Errorf("all is acked, yet Flush: %v", err)
	}
}

// TestAbort ends calls that block for each reason.
func TestAbort(t *testing.T) {
	for name, c := range map[string]struct {
		spec   string
		window int64
	}{"window closed": {"a:U8[100]", 1}, "half written": {"a:U8[4000000]", 0}} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			addr := fakeDaemon(t, options{windowSamples: c.window, tight: true}, func(*fake) { <-release })
			p := dial(t, addr, Config{Spec: specOf(t, c.spec), Dialer: dialTight})
			failed := make(chan error)
			go func() { failed <- pushUntilError(t, p) }()
			for p.Sent() == 0 { // blocked now or soon
				runtime.Gosched()
			}
			p.Abort()
			wantIs(t, <-failed, os.ErrClosed)
			wantIs(t, p.Push(t.Context(), make([]byte, p.sampleBytes)), os.ErrClosed)
			if err := p.Close(t.Context()); err != nil {
				t.Errorf("Close after Abort: %v", err)
			}
			close(release)
		})
	}
}

// TestCloseWithoutAcks: Close gives up with its context, says so and frees the connection.
func TestCloseWithoutAcks(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	addr := fakeDaemon(t, options{}, func(*fake) { <-release })
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 3)
	err := p.Close(soon(t))
	wantIs(t, err, context.DeadlineExceeded, os.ErrDeadlineExceeded)
	if !strings.Contains(err.Error(), "3 samples sent, 0 acked") {
		t.Errorf("%v", err)
	}
	wantIs(t, p.Push(t.Context(), make([]byte, 100)), os.ErrClosed)
}

// TestCloseWithoutEnd: all acked, but the daemon does not close its side.
func TestCloseWithoutEnd(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	addr := fakeDaemon(t, options{}, func(f *fake) {
		f.serveAll()
		<-release
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 3)
	err := p.Close(soon(t))
	wantIs(t, err, context.DeadlineExceeded)
	if !strings.Contains(err.Error(), "all samples are acked") {
		t.Errorf("%v", err)
	}
}

func TestRefused(t *testing.T) {
	s := specOf(t, "image:F32[8,8],label:I32")
	for name, serve := range map[string]func(net.Conn){
		"after the hello": func(conn net.Conn) {
			h, err := wire.ReadHello(conn)
			if err != nil {
				t.Error(err)
				return
			}
			wire.WriteRefusal(conn, h.CheckSpec(specOf(t, "image:F64[8,8],label:I32")))
		},
		"before it": func(conn net.Conn) {
			wire.WriteRefusal(conn, wire.Refuse(wire.CodeTooManyConnections, "the limit is 1"))
		},
		"stopping": func(conn net.Conn) {
			wire.WriteRefusal(conn, wire.Refuse(wire.CodeShuttingDown, "later"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			addr := listen(t, "tcp", serve)
			_, err := Dial(t.Context(), addr, Config{Table: "digits", Spec: s})
			var refusal *wire.Refusal
			if !errors.As(err, &refusal) {
				t.Fatalf("got %v, want a refusal", err)
			}
			if refusal.Code == wire.CodeShuttingDown {
				wantOnly(t, err, ErrShuttingDown)
			}
			if refusal.Code == wire.CodeSpecMismatch && !strings.Contains(err.Error(), `leaf "image": got F32[8,8], want F64[8,8]`) {
				t.Errorf("the difference is not shown: %v", err)
			}
		})
	}
}

func TestDialFails(t *testing.T) {
	s := specOf(t, "a:U8")
	for addr, says := range map[string]string{
		"localhost:7420": "write tcp://", "tcp://localhost": "missing port", "unix://": "has no path", "echo://h:1": "echo protocol", "quic://h": "missing port", "sctp://h:1": "is not known",
		"unix://" + filepath.Join(t.TempDir(), "none"): "is the daemon running",
	} {
		if _, err := Dial(t.Context(), addr, Config{Table: "t", Spec: s}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want %q", addr, err, says)
		}
	}
	replies := map[string]func(net.Conn){
		"gone":    func(conn net.Conn) { io.ReadFull(conn, make([]byte, 30)) },
		"foreign": func(conn net.Conn) { io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n") },
		"other spec": func(conn net.Conn) {
			wire.ReadHello(conn)
			wire.WriteAccepted(conn, &wire.AcceptedPush{Fingerprint: specOf(t, "b:U8").Fingerprint(), Ack: wire.AckQueued, WindowSamples: 1, WindowBytes: 1})
		},
		"larger window": func(conn net.Conn) {
			wire.ReadHello(conn)
			wire.WriteAccepted(conn, &wire.AcceptedPush{Fingerprint: s.Fingerprint(), Ack: wire.AckQueued, WindowSamples: 9, WindowBytes: 1})
		},
		"other acks": func(conn net.Conn) {
			wire.ReadHello(conn)
			wire.WriteAccepted(conn, &wire.AcceptedPush{Fingerprint: s.Fingerprint(), Ack: wire.AckQueued, WindowSamples: 1, WindowBytes: 1})
		},
	}
	for name, serve := range replies {
		t.Run(name, func(t *testing.T) {
			want := wire.ErrProtocol
			if name == "gone" {
				want = ErrDaemonGone
			}
			cfg := Config{Table: "t", Spec: s, WindowSamples: 2}
			if name == "other acks" {
				cfg.Ack = wire.AckCommitted // the daemon may give it unasked, but not less
			}
			_, err := Dial(t.Context(), listen(t, "tcp", serve), cfg)
			wantOnly(t, err, want)
		})
	}
}

func TestDialNeverHangs(t *testing.T) {
	s := specOf(t, "a:U8")
	for name, dial := range map[string]func(addr string) error{
		"handshake timeout": func(addr string) error {
			_, err := Dial(t.Context(), addr, Config{Table: "t", Spec: s, HandshakeTimeout: 30 * time.Millisecond})
			return err
		},
		"context": func(addr string) error {
			_, err := Dial(soon(t), addr, Config{Table: "t", Spec: s})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := dial(listen(t, "tcp", func(conn net.Conn) { io.Copy(io.Discard, conn) }))
			wantIs(t, err, context.DeadlineExceeded, os.ErrDeadlineExceeded)
			if !strings.Contains(err.Error(), "no reply in time") {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestFull: while the daemon says that the ring is full, a deadline is a FullError that names who is waited for; after the next ack it is a
// plain one again, and a cancellation is never one.
func TestFull(t *testing.T) {
	since := time.Date(2026, 11, 21, 9, 30, 0, 5, time.UTC)
	notes := []wire.Note{
		{Code: wire.NoteRingFull, Reason: "nobody reads", Group: "eval"},
		{Code: wire.NoteRingFull, Reason: "it holds a batch", Trainer: 7, Group: "g", Client: "train.py", PID: 4711, Batch: 0, Since: since.UnixNano()},
	}
	for _, session := range []string{"", "s"} {
		said, acked, go1, go2 := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
		addr := fakeDaemon(t, options{windowSamples: 4}, func(f *fake) {
			f.take(4)
			b := append(wire.AppendNote(nil, &notes[0]), wire.Ack) // the ack ends the first
			b = wire.AppendNote(b, &notes[0])
			for i, c := range wire.AppendNote(b, &notes[1]) {
				f.Write([]byte{c}) // it comes in pieces
				if i == 0 {
					runtime.Gosched()
				}
			}
			close(said)
			<-go1
			f.ack(1)
			close(acked)
			<-go2
			f.ack(2)
			f.serveAll()
		})
		p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]"), Session: session})
		push(t, p, 0, 4)
		<-said
		inForce := func() *wire.Note {
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.note
		}
		for note := inForce(); note == nil || note.Trainer != 7; note = inForce() {
			runtime.Gosched()
		}
		push(t, p, 4, 1)
		for name, call := range map[string]func(context.Context) error{
			"push": func(ctx context.Context) error { return p.Push(ctx, makeSamples(5, 1, 100)) }, "flush": p.Flush,
			"many": func(ctx context.Context) error { _, err := p.PushMany(ctx, 1, makeSamples(5, 1, 100)); return err },
		} {
			err := call(soon(t))
			wantOnly(t, err, ErrFull, os.ErrDeadlineExceeded, context.DeadlineExceeded)
			var e *FullError
			if !errors.As(err, &e) {
				t.Fatalf("%s: %v", name, err)
			}
			if e.Trainer != 7 || e.Group != "g" || e.Client != "train.py" || e.PID != 4711 || e.Batch != 0 || !e.Since.Equal(since) || !e.Timeout() {
				t.Errorf("%s: %+v", name, e)
			}
			for _, says := range []string{"trainer 7", `"train.py"`, `group "g"`, "pid 4711", "batch 0", "2026-11-21T09:30:00", "it holds a batch", "1 acked"} {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("%s: %v; want %q", name, err, says)
				}
			}
			cancelled, cancel := context.WithCancel(t.Context())
			cancel()
			wantOnly(t, call(cancelled), context.Canceled)
		}
		close(go1)
		<-acked
		for inForce() != nil {
			runtime.Gosched()
		}
		wantOnly(t, p.Flush(soon(t)), os.ErrDeadlineExceeded, context.DeadlineExceeded)
		close(go2)
		push(t, p, 5, 5)
		closeWell(t, p)
	}
	if err := newFullError(soon(t), &notes[0], "x"); !err.Since.IsZero() || !strings.Contains(err.Error(), "nobody reads") || strings.Contains(err.Error(), "trainer") {
		t.Errorf("%v", err)
	}
}

// TestFullCloses: Close has the same error, and frees the connection.
func TestFullCloses(t *testing.T) {
	addr := fakeDaemon(t, options{}, func(f *fake) {
		f.Write(wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "busy"}))
		io.Copy(io.Discard, f)
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 1)
	for {
		p.mu.Lock()
		note := p.note
		p.mu.Unlock()
		if note != nil {
			break
		}
		runtime.Gosched()
	}
	wantOnly(t, p.Close(soon(t)), ErrFull, os.ErrDeadlineExceeded, context.DeadlineExceeded)
	wantOnly(t, p.Push(t.Context(), make([]byte, 100)), os.ErrClosed)
}
