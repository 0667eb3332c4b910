package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// network is a Config.Dialer in memory: each dial gets the next of its answers, and the last one again and again.
type network struct {
	t       testing.TB
	answers []answer

	mu    sync.Mutex
	dials []time.Time
	wg    sync.WaitGroup
}

// answer is the daemon's side of a connection, closed when it returns; nil is none: the dial is refused.
type answer func(conn net.Conn)

func (n *network) dial(context.Context, string, string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	serve := n.answers[min(len(n.dials), len(n.answers)-1)]
	n.dials = append(n.dials, time.Now())
	if serve == nil {
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	ours, theirs := net.Pipe()
	n.wg.Go(func() {
		defer theirs.Close()
		serve(theirs)
	})
	return ours, nil
}

func (n *network) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.dials)
}

// accept takes the producer, says how many samples it holds, and runs script, which finds the number of the next sample in received.
func (n *network) accept(held int, script func(f *fake)) answer {
	return func(conn net.Conn) {
		acceptPush(n.t, options{windowSamples: 4, held: held}, conn, func(f *fake) {
			f.received = held
			script(f)
		})
	}
}

// refuse answers every hello with a refusal.
func (n *network) refuse(code wire.Code) answer {
	return func(conn net.Conn) {
		if _, err := wire.ReadHello(conn); err == nil {
			wire.WriteRefusal(conn, wire.Refuse(code, "no"))
		}
	}
}

// inBubble runs a test with a Producer with a session and samples of 100 bytes, in fake time.
func inBubble(t *testing.T, cfg Config, answers func(n *network) []answer, test func(t *testing.T, n *network, p *Producer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &network{t: t}
		n.answers = answers(n)
		cfg.Spec, cfg.Session, cfg.Dialer = specOf(t, "a:U8[100]"), "s", n.dial
		p := dial(t, "tcp://pipe:1", cfg)
		test(t, n, p)
		p.Abort()
		n.wg.Wait()
	})
}

// takeAnd takes some samples, acks some of them and is gone.
func takeAnd(take, ack int) func(f *fake) {
	return func(f *fake) {
		f.take(take)
		f.ack(ack)
	}
}

func one(first int) []byte { return makeSamples(first, 1, 100) }

// within is a context that ends after some time.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// wantOnly checks that err is each of the targets and no other of the errors that callers tell apart.
func wantOnly(t *testing.T, err error, targets ...error) {
	t.Helper()
	wantIs(t, err, targets...)
	for _, other := range []error{
		ErrDaemonGone, ErrShuttingDown, ErrSessionTaken, ErrFull, os.ErrClosed, os.ErrDeadlineExceeded, context.Canceled, wire.ErrProtocol,
	} {
		if !slices.Contains(targets, other) && errors.Is(err, other) {
			t.Errorf("%v is also %v", err, other)
		}
	}
}

func TestPauses(t *testing.T) {
	const from, to = DefaultReconnectFrom, DefaultReconnectTo
	for down, want := range map[time.Duration]time.Duration{
		0: from, 16 * from: from, 16*from + 160: from + 10,
		1600 * time.Millisecond: 100 * time.Millisecond, // so a restart costs little more than it takes
		16*to - 160:             to - 10, 16 * to: to, time.Hour: to,
	} {
		if got := new(outage).upTo(down, from, to); got != want {
			t.Errorf("after %v: up to %v, want %v", down, got, want)
		}
	}
}

// TestPatience: tries go on, further and further apart and at random, until ReconnectFor has passed.
func TestPatience(t *testing.T) {
	answers := func(n *network) []answer { return []answer{n.accept(0, takeAnd(1, 0)), nil} }
	inBubble(t, Config{ReconnectFor: time.Minute}, answers, func(t *testing.T, n *network, p *Producer) {
		push(t, p, 0, 1)
		began := time.Now()
		err := p.Flush(t.Context())
		if took := time.Since(began); took != time.Minute {
			t.Errorf("gave up after %v", took)
		}
		wantOnly(t, err, ErrDaemonGone)
		if !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "no connection for 1m0s") {
			t.Errorf("%v", err)
		}
		wantOnly(t, p.Push(t.Context(), one(1)), ErrDaemonGone)
		last, sum := began, 0.0
		for _, at := range n.dials[1 : len(n.dials)-1] { // the last comes when the time is up
			most := new(outage).upTo(last.Sub(began), DefaultReconnectFrom, DefaultReconnectTo)
			if at.Sub(last) >= most {
				t.Errorf("a pause of %v, %v after the end, is more than %v", at.Sub(last), last.Sub(began), most)
			}
			sum += float64(at.Sub(last)) / float64(most)
			last = at
		}
		if mean := sum / float64(len(n.dials)-2); mean < 0.35 || mean > 0.65 {
			t.Errorf("%d pauses are on average %v of what they may be", len(n.dials)-2, mean)
		}
	})
}

// TestPatienceIsForOutages: what counts is the time without a connection since the last ack, over several outages.
func TestPatienceIsForOutages(t *testing.T) {
	outage := func(n *network, end answer) []answer { // of between 1 and 2.5 seconds
		return []answer{end, func(net.Conn) { <-time.After(time.Second) }}
	}
	cfg := Config{ReconnectFor: 10 * time.Second}
	t.Run("no acks", func(t *testing.T) {
		answers := func(n *network) (all []answer) {
			for range 100 {
				all = append(all, outage(n, n.accept(0, takeAnd(1, 0)))...)
			}
			return all
		}
		inBubble(t, cfg, answers, func(t *testing.T, n *network, p *Producer) {
			push(t, p, 0, 1)
			wantOnly(t, p.Flush(t.Context()), ErrDaemonGone)
			if s := p.Stats(); s.Reconnects < 4 || s.Reconnects > 10 || s.Resent != s.Reconnects {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("acks", func(t *testing.T) {
		answers := func(n *network) (all []answer) {
			for i := range 100 {
				all = append(all, outage(n, n.accept(i, takeAnd(2, 1)))...)
			}
			return append(all, n.accept(100, (*fake).serveAll))
		}
		inBubble(t, cfg, answers, func(t *testing.T, n *network, p *Producer) {
			push(t, p, 0, 102)
			if err := p.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := p.Stats(); s.Reconnects != 100 || s.Resent < 100 || s.Acked != 102 {
				t.Errorf("%+v", s)
			}
		})
	})
}

// TestIdleOutlivesPatience: with nothing unacked there is nothing to give up; the next sample starts new tries.
func TestIdleOutlivesPatience(t *testing.T) {
	answers := func(n *network) []answer { return []answer{n.accept(0, takeAnd(1, 1)), nil} }
	inBubble(t, Config{ReconnectFor: 10 * time.Second}, answers, func(t *testing.T, n *network, p *Producer) {
		push(t, p, 0, 1)
		<-time.After(time.Minute)
		tries := n.count()
		<-time.After(time.Hour)
		if n.count() != tries || tries < 10 {
			t.Errorf("%d tries, then %d", tries, n.count())
		}
		if err := p.Flush(t.Context()); err != nil {
			t.Errorf("all is acked, yet Flush: %v", err)
		}
		n.mu.Lock()
		n.answers = []answer{n.accept(1, (*fake).serveAll)}
		n.mu.Unlock()
		push(t, p, 1, 10)
		if err := p.Flush(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestDeadlineWithoutConnection: a call says what it could not do, since when, and why; what fits is taken all the same, and no more.
func TestDeadlineWithoutConnection(t *testing.T) {
	answers := func(n *network) []answer { return []answer{n.accept(0, takeAnd(1, 0)), nil} }
	inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
		began := time.Now()
		push(t, p, 0, 4)
		if s := p.Stats(); s.UnackedBytes != 400 || s.KeptBytes != 400 {
			t.Errorf("%+v", s)
		}
		for _, call := range []func(context.Context) error{
			func(ctx context.Context) error { return p.Push(ctx, one(4)) }, p.Flush,
			func(ctx context.Context) error { _, err := p.PushMany(ctx, 1, one(4)); return err }, p.Close,
		} {
			err := call(within(t, time.Second))
			wantOnly(t, err, os.ErrDeadlineExceeded, context.DeadlineExceeded)
			var e *ReconnectingError
			if !errors.As(err, &e) || !e.Since.Equal(began) || e.Tries < 2 || !errors.Is(e.Last, syscall.ECONNREFUSED) || !e.Timeout() {
				t.Errorf("%+v", err)
			}
		}
		if s := p.Stats(); s.Sent != 4 || s.UnackedBytes != 400 {
			t.Errorf("%+v", s)
		}
		wantOnly(t, p.Push(t.Context(), one(4)), os.ErrClosed)
	})
	inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
		push(t, p, 0, 4)
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantOnly(t, p.Flush(ctx), context.Canceled)
	})
}

// TestAbortWithoutConnection ends pauses, dials and handshakes.
func TestAbortWithoutConnection(t *testing.T) {
	for name, again := range map[string]answer{
		"pause": nil, "handshake": func(conn net.Conn) { io.Copy(io.Discard, conn) },
	} {
		t.Run(name, func(t *testing.T) {
			answers := func(n *network) []answer { return []answer{n.accept(0, takeAnd(1, 0)), again} }
			inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
				push(t, p, 0, 4)
				failed := make(chan error)
				go func() { failed <- p.Push(t.Context(), one(4)) }()
				<-time.After(3 * time.Second)
				began := time.Now()
				p.Abort()
				wantOnly(t, <-failed, os.ErrClosed)
				if time.Since(began) != 0 {
					t.Errorf("it took %v", time.Since(began))
				}
			})
		})
	}
}

// TestWhatIsFinal: which words of the daemon end a session's Producer, and which it tries again after.
func TestWhatIsFinal(t *testing.T) {
	again := []wire.Code{wire.CodeShuttingDown, wire.CodeTooManyConnections, wire.CodeHandshakeTimeout, wire.CodeBanned, wire.CodeInternal}
	for _, code := range wire.Codes() {
		t.Run("refusal/"+string(code), func(t *testing.T) {
			answers := func(n *network) []answer {
				return []answer{n.accept(0, takeAnd(1, 0)), n.refuse(code), n.accept(0, (*fake).serveAll)}
			}
			inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
				push(t, p, 0, 1)
				err := p.Flush(t.Context())
				if slices.Contains(again, code) {
					if err != nil {
						t.Error(err)
					}
					return
				}
				var refusal *wire.Refusal
				if !errors.As(err, &refusal) || refusal.Code != code || errors.Is(err, ErrDaemonGone) || n.count() != 2 {
					t.Errorf("%d dials, %v", n.count(), err)
				}
			})
		})
		t.Run("notice/"+string(code), func(t *testing.T) {
			answers := func(n *network) []answer {
				return []answer{n.accept(0, func(f *fake) {
					f.take(1)
					f.notice(code, "enough")
				}), n.accept(0, (*fake).serveAll)}
			}
			inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
				push(t, p, 0, 1)
				err := p.Flush(t.Context())
				if code != wire.CodeSessionTaken {
					if err != nil {
						t.Error(err)
					}
					return
				}
				wantOnly(t, err, ErrSessionTaken)
				var notice *wire.Notice
				if !errors.As(err, &notice) || n.count() != 1 {
					t.Errorf("%d dials, %v", n.count(), err)
				}
			})
		})
	}
}

// TestPatienceEndsWithTheDaemonsWords: where the last try was answered, that is the error.
func TestPatienceEndsWithTheDaemonsWords(t *testing.T) {
	answers := func(n *network) []answer {
		return []answer{n.accept(0, takeAnd(1, 0)), n.refuse(wire.CodeShuttingDown)}
	}
	inBubble(t, Config{ReconnectFor: time.Second}, answers, func(t *testing.T, n *network, p *Producer) {
		push(t, p, 0, 1)
		wantOnly(t, p.Flush(t.Context()), ErrShuttingDown)
	})
}

// TestUsedByAnother: the daemon holds more than this producer has sent. What it holds exactly is fine.
func TestUsedByAnother(t *testing.T) {
	for held := 10; held <= 14; held++ {
		answers := func(n *network) []answer {
			return []answer{n.accept(10, func(f *fake) {
				f.take(1)
				f.ack(1)
				f.take(2)
			}), n.accept(held, (*fake).serveAll)}
		}
		inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
			if p.Held() != 10 {
				t.Fatalf("held %d", p.Held())
			}
			push(t, p, 10, 3)
			err := p.Flush(t.Context())
			var lost *LostError
			switch s := p.Stats(); {
			case held == 10:
				wantOnly(t, err)
				if !errors.As(err, &lost) || *lost != (LostError{10, 11}) || s.Lost != 1 || n.count() != 2 {
					t.Errorf("%v, %+v", err, s)
				}
			case held == 14:
				wantOnly(t, err, ErrSessionTaken)
			case err != nil || s.Acked != 3 || s.Resent != uint64(13-held) || s.Lost != 0 || s.Reconnects != 1:
				t.Errorf("held %d: %v, %+v", held, err, s)
			}
		})
	}
}

// TestHoldsWhatWasNeverSent: neither does a daemon hold samples that lie here and were not begun to be written.
func TestHoldsWhatWasNeverSent(t *testing.T) {
	for held, want := range map[int]error{2: nil, 3: ErrSessionTaken} {
		answers := func(n *network) []answer {
			return []answer{n.accept(0, func(f *fake) {
				f.take(1)
				<-time.After(time.Second) // the second is being written; the others are taken after the end
			}), n.accept(held, (*fake).serveAll)}
		}
		inBubble(t, Config{}, answers, func(t *testing.T, n *network, p *Producer) {
			push(t, p, 0, 4)
			switch err := p.Flush(t.Context()); {
			case want != nil:
				wantOnly(t, err, want)
			case err != nil:
				t.Error(err)
			}
		})
	}
}

// TestContinueAfterLoss: after a loss the daemon counts on from what it holds, and the producer from what it has sent.
func TestContinueAfterLoss(t *testing.T) {
	serve := func(n *network, held, next int, script func(f *fake)) answer {
		return n.accept(held, func(f *fake) {
			f.received = next // not what its count says
			script(f)
		})
	}
	answers := func(n *network) []answer {
		return []answer{
			serve(n, 5, 5, takeAnd(4, 3)),  // 5, 6 and 7 are acked
			serve(n, 6, 8, takeAnd(3, 2)),  // 6 and 7 are lost; 8 and 9 acked
			serve(n, 8, 10, takeAnd(1, 1)), // all is well
			serve(n, 2, 11, (*fake).serveAll),
		}
	}
	inBubble(t, Config{ContinueAfterLoss: true}, answers, func(t *testing.T, n *network, p *Producer) {
		push(t, p, 5, 20)
		if err := p.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		// It held 0 to 5 and 8 to 10, which is 9 samples, of which two are left.
		if s := p.Stats(); s.Lost != 2+7 || s.Acked != 20 || s.Reconnects != 3 {
			t.Errorf("%+v", s)
		}
		if want := []LostError{{2, 11}}; !slices.Equal(p.gaps, want) {
			t.Errorf("%+v, want %+v", p.gaps, want)
		}
	})
}

// TestKeptMemory: what is kept is the window, whatever the daemon offers, and no more is taken while nothing is acked.
func TestKeptMemory(t *testing.T) {
	for name, c := range map[string]struct {
		spec          string
		samples, want int64 // window_samples of the daemon; samples kept
		cfg           Config
	}{
		"the daemon's window":  {"a:U8[100]", 4, 4, Config{}},
		"no more than 64 MiB":  {"a:U8[1048576]", 1 << 20, 64, Config{}},
		"but two samples":      {"a:U8[100000000]", 1 << 20, 2, Config{}},
		"or what is asked for": {"a:U8[1048576]", 66, 66, Config{WindowBytes: 66 << 20, WindowSamples: 66}},
		"one at least":         {"a:U8[1048576]", 1, 1, Config{WindowBytes: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			defer close(release)
			o := options{windowSamples: c.samples, windowBytes: 1 << 40}
			if c.cfg.WindowBytes > 0 {
				o.windowBytes = c.cfg.WindowBytes
			}
			c.cfg.Spec, c.cfg.Session = specOf(t, c.spec), "s"
			p := dial(t, fakeDaemon(t, o, func(*fake) { <-release }), c.cfg)
			s := p.Stats()
			if s.KeptBytes != c.want*s.SampleBytes || s.Window != uint64(c.want) {
				t.Fatalf("%+v, want %d samples", s, c.want)
			}
			if s.SampleBytes > 100 {
				return
			}
			push(t, p, 0, int(c.want))
			wantOnly(t, p.Push(soon(t), makeSamples(int(c.want), 1, int(s.SampleBytes))), os.ErrDeadlineExceeded, context.DeadlineExceeded)
			if s := p.Stats(); s.UnackedBytes != s.KeptBytes {
				t.Errorf("%+v", s)
			}
		})
	}
	p := dial(t, fakeDaemon(t, options{}, (*fake).serveAll), Config{Spec: specOf(t, "a:U8[100]"), Session: "s", ReconnectFor: -1})
	push(t, p, 0, 3)
	closeWell(t, p)
	if s := p.Stats(); s.KeptBytes != 0 {
		t.Errorf("without reconnects: %+v", s)
	}
}
