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
					if errors.Is(err, ErrDaemonGone) || errors.Is(err, os.ErrClosed) {
						t.Errorf("%v is another error too", err)
					}
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
					wantIs(t, err, ErrDaemonGone)
					if errors.Is(err, os.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("%v is another error too", err)
					}
				}
			})
		}
	}
}

func TestDaemonBreaksTheProtocol(t *testing.T) {
	for says, bytes := range map[string]string{
		"acked 2 samples more": "\x01\x01\x01", "the byte 0x03": "\x03", "closing notice has 1 bytes": "\x00\x01\x00\x00\x00{",
	} {
		addr := fakeDaemon(t, options{}, func(f *fake) {
			f.take(1)
			f.Write([]byte(bytes))
			io.Copy(io.Discard, f)
		})
		p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
		push(t, p, 0, 1)
		<-p.ended
		err := pushUntilError(t, p)
		wantIs(t, err, wire.ErrProtocol)
		if !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
		p.Abort()
	}
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
	} {
		t.Run(name, func(t *testing.T) {
			addr := listen(t, "tcp", serve)
			_, err := Dial(t.Context(), addr, Config{Table: "digits", Spec: s})
			var refusal *wire.Refusal
			if !errors.As(err, &refusal) {
				t.Fatalf("got %v, want a refusal", err)
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
		"localhost:7420": "write tcp://", "tcp://localhost": "missing port", "unix://": "has no path", "echo://h:1": "echo protocol", "quic://h:1": "is not known",
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
			wire.WriteAccepted(conn, &wire.AcceptedPush{Fingerprint: s.Fingerprint(), Ack: wire.AckCommitted, WindowSamples: 1, WindowBytes: 1})
		},
	}
	for name, serve := range replies {
		t.Run(name, func(t *testing.T) {
			want := wire.ErrProtocol
			if name == "gone" {
				want = ErrDaemonGone
			}
			_, err := Dial(t.Context(), listen(t, "tcp", serve), Config{Table: "t", Spec: s, WindowSamples: 2})
			wantIs(t, err, want)
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
