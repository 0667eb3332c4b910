package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/wire"
)

func manyLeaves(n int, dtype string) string {
	var leaves []string
	for i := range n {
		leaves = append(leaves, fmt.Sprintf("l%d:%s", i, dtype))
	}
	return strings.Join(leaves, ",")
}

// TestDelivers pushes in every way over both networks with samples on both sides of every threshold.
func TestDelivers(t *testing.T) {
	for name, c := range map[string]struct {
		spec    string
		samples int
		options
	}{
		"byte":            {"a:U8", 20000, options{}},
		"digits":          {"image:F32[8,8],label:I32", 5000, options{}},
		"digits, narrow":  {"image:F32[8,8],label:I32", 1000, options{windowSamples: 3}},
		"digits, one":     {"image:F32[8,8],label:I32", 300, options{windowSamples: 1}},
		"digits, bytes":   {"image:F32[8,8],label:I32", 1000, options{windowBytes: 2600}},
		"digits, no room": {"image:F32[8,8],label:I32", 300, options{windowBytes: 1}},
		"40 leaves":       {manyLeaves(40, "F32[25]"), 1000, options{}},
		"below direct":    {"a:U8[65535]", 60, options{}},
		"direct":          {"a:U8[65536]", 60, options{}},
		"not direct":      {manyLeaves(4096, "U8[64]"), 10, options{}},
		"1 MiB, 3 leaves": {"a:U8[1000000],b:U8[48575],c:U8", 8, options{windowBytes: 3 << 20}},
		"2000 leaves":     {manyLeaves(2000, "F32[1100]"), 3, options{}},
	} {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				c.options.network = network
				addr := fakeDaemon(t, c.options, (*fake).serveAll)
				p := dial(t, addr, Config{Spec: specOf(t, c.spec)})
				push(t, p, 0, c.samples/2)
				many := c.samples - c.samples/2 - 1
				n, err := p.PushMany(t.Context(), many, makeSamples(c.samples/2, many, int(p.sampleBytes)))
				if n != many || err != nil {
					t.Fatalf("PushMany: %d, %v", n, err)
				}
				if err := p.Flush(t.Context()); err != nil || p.Acked() != uint64(c.samples-1) {
					t.Fatalf("Flush: %d acked, %v", p.Acked(), err)
				}
				push(t, p, c.samples-1, 1)
				closeWell(t, p)
				if s := p.Stats(); s.Sent != uint64(c.samples) || s.Acked != s.Sent || s.Buffered != 0 || s.Writes == 0 {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

// TestAnyConn runs over a connection that can neither half-close nor write vectors.
func TestAnyConn(t *testing.T) {
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		acceptPush(t, options{}, theirs, func(f *fake) {
			f.take(10)
			f.ack(10)
		})
	}()
	p := dial(t, "tcp://pipe:1", Config{
		Spec:   specOf(t, "a:U8[65536],b:U8[4]"),
		Dialer: func(context.Context, string, string) (net.Conn, error) { return ours, nil },
	})
	push(t, p, 0, 10)
	closeWell(t, p)
	<-done
}

func TestWindowIsKept(t *testing.T) {
	full, goOn := make(chan struct{}), make(chan struct{})
	addr := fakeDaemon(t, options{windowSamples: 4}, func(f *fake) {
		f.take(4)
		close(full)
		<-goOn
		f.ack(4)
		f.serveAll()
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 4)
	for range 2 {
		err := p.Push(soon(t), makeSamples(4, 1, 100))
		wantIs(t, err, context.DeadlineExceeded, os.ErrDeadlineExceeded)
		if !strings.Contains(err.Error(), "4 samples sent, 0 acked, window 4") {
			t.Errorf("the error does not say what it waited for: %v", err)
		}
	}
	<-full // blocked, Push has sent what it had
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := p.PushMany(cancelled, 1, makeSamples(4, 1, 100))
	wantIs(t, err, context.Canceled)
	if errors.Is(err, os.ErrDeadlineExceeded) || p.Sent() != 4 {
		t.Errorf("%d sent, %v", p.Sent(), err)
	}
	wantIs(t, p.Flush(soon(t)), context.DeadlineExceeded)
	close(goOn)
	push(t, p, 4, 10)
	closeWell(t, p)
	if s := p.Stats(); s.Waits == 0 || s.Waited <= 0 {
		t.Errorf("%+v", s)
	}
}

// TestSmallSamplesGoTogether: the first sample is sent at once; those after it wait for its ack and go with one write.
func TestSmallSamplesGoTogether(t *testing.T) {
	first, goOn := make(chan struct{}), make(chan struct{})
	addr := fakeDaemon(t, options{}, func(f *fake) {
		f.take(1)
		close(first)
		<-goOn
		f.ack(1)
		f.take(99) // nobody flushes
		f.ack(99)
		f.serveAll()
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100]")})
	push(t, p, 0, 1)
	<-first
	push(t, p, 1, 99)
	if s := p.Stats(); s.Writes != 1 || s.Buffered != 99 {
		t.Errorf("before the ack: %+v", s)
	}
	close(goOn)
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := p.Stats(); s.Writes != 2 || s.Buffered != 0 {
		t.Errorf("after it: %+v", s)
	}
	closeWell(t, p)
}

// TestNoSampleIsStuck: the last sample reaches the daemon without a flush, whenever the acks come.
func TestNoSampleIsStuck(t *testing.T) {
	const rounds = 500
	arrived := make(chan struct{})
	addr := fakeDaemon(t, options{}, func(f *fake) {
		for range rounds {
			for range 3 {
				f.take(1)
				f.ack(1)
			}
			arrived <- struct{}{}
		}
		f.serveAll()
	})
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[10]")})
	for i := range rounds {
		push(t, p, 3*i, 3)
		<-arrived
	}
	closeWell(t, p)
}

// TestInterrupted lets contexts end while the daemon does not read, and checks that what was taken arrives whole and once.
func TestInterrupted(t *testing.T) {
	for name, text := range map[string]string{"small": "a:U8[1000]", "direct": "a:U8[300000],b:U8[100000]", "huge": "a:U8[4000000]"} {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				read := make(chan struct{})
				addr := fakeDaemon(t, options{network: network, tight: true}, func(f *fake) {
					<-read
					f.serveAll()
				})
				p := dial(t, addr, Config{Spec: specOf(t, text), Dialer: dialTight})
				samples, size := max(4, 3_000_000/int(p.sampleBytes)), int(p.sampleBytes)
				data := makeSamples(0, samples, size)
				taken := 0
				for ctx := soon(t); taken < samples; taken++ { // fills every buffer on the way
					if err := p.Push(ctx, leavesOf(p.spec, data[taken*size:][:size])...); err != nil {
						wantIs(t, err, context.DeadlineExceeded)
						break
					}
				}
				for range 3 { // what is half written must not be started anew
					n, err := p.PushMany(soon(t), samples-taken, data[taken*size:])
					if taken += n; taken < samples {
						wantIs(t, err, context.DeadlineExceeded)
					}
				}
				if taken == samples {
					t.Fatalf("the connection took all %d samples unread", samples)
				}
				if p.Sent() != uint64(taken) {
					t.Errorf("%d sent, %d taken", p.Sent(), taken)
				}
				wantIs(t, p.Flush(soon(t)), context.DeadlineExceeded)
				close(read)
				if n, err := p.PushMany(t.Context(), samples-taken, data[taken*size:]); n != samples-taken || err != nil {
					t.Fatalf("%d, %v", n, err)
				}
				push(t, p, samples, 3)
				closeWell(t, p)
			})
		}
	}
}

// TestInterruptedIsFinished: a sample that was taken half written arrives without another call.
func TestInterruptedIsFinished(t *testing.T) {
	for _, session := range []string{"", "s"} {
		begun, read, arrived := make(chan struct{}), make(chan struct{}), make(chan struct{})
		addr := fakeDaemon(t, options{tight: true}, func(f *fake) {
			sample := make([]byte, f.sampleBytes)
			if _, err := io.ReadFull(f, sample[:1000]); err != nil {
				t.Error(err)
			}
			close(begun)
			<-read
			if _, err := io.ReadFull(f, sample[1000:]); err != nil {
				t.Error(err)
			}
			f.checkSample(sample)
			close(arrived)
			f.ack(1)
			f.serveAll()
		})
		p := dial(t, addr, Config{Spec: specOf(t, "a:U8[8000000]"), Session: session, Dialer: dialTight})
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-begun
			cancel()
		}()
		err := p.Push(ctx, makeSamples(0, 1, 8000000))
		close(read)
		if err != nil {
			t.Fatal(err)
		}
		<-arrived
		closeWell(t, p)
	}
}

// TestSpuriousInterruption: the end of an earlier call's context does not disturb a later call.
func TestSpuriousInterruption(t *testing.T) {
	addr := fakeDaemon(t, options{}, (*fake).serveAll)
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[100000]")})
	for i := range 50 {
		ctx, cancel := context.WithCancel(t.Context())
		if err := p.Push(ctx, makeSamples(i, 1, 100000)); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	p.conn.SetWriteDeadline(past)
	push(t, p, 50, 5)
	closeWell(t, p)
}

func TestPushRefusesWrongSizes(t *testing.T) {
	addr := fakeDaemon(t, options{}, (*fake).serveAll)
	p := dial(t, addr, Config{Spec: specOf(t, "a:U8[4],b:I32")})
	for says, leaves := range map[string][][]byte{
		"1 leaves given, but a sample has 2": {make([]byte, 8)},
		"leaf 1 (\"b\") has 3 bytes":         {make([]byte, 4), make([]byte, 3)},
		"leaf 0 (\"a\") has 0 bytes":         {nil, make([]byte, 4)},
	} {
		if err := p.Push(t.Context(), leaves...); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
	for n, bytes := range map[int]int{1: 7, 2: 8, -1: 8, 0: 1, 1 << 62: 0} {
		if _, err := p.PushMany(t.Context(), n, make([]byte, bytes)); err == nil {
			t.Errorf("%d samples in %d bytes were taken", n, bytes)
		}
	}
	if n, err := p.PushMany(t.Context(), 0, nil); n != 0 || err != nil {
		t.Errorf("no samples: %d, %v", n, err)
	}
	closeWell(t, p)
}

// TestConfigDefaults makes sure that no field is forgotten: each has a default, or a zero that means something.
func TestConfigDefaults(t *testing.T) {
	cfg, err := Config{Table: "t", Spec: specOf(t, "a:U8")}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	zeroIsMeant := map[string]bool{"Session": true, "WindowSamples": true, "WindowBytes": true, "ContinueAfterLoss": true, "Token": true, "TLS": true, "Compression": true}
	v := reflect.ValueOf(cfg)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() != zeroIsMeant[name] {
			t.Errorf("Config.%s is %v after defaulting", name, v.Field(i))
		}
	}
	for says, cfg := range map[string]Config{
		"Table is empty": {Spec: cfg.Spec}, "Spec is nil": {Table: "t"}, "may be negative": {Table: "t", Spec: cfg.Spec, BufferBytes: -1},
		"names no Session": {Table: "t", Spec: cfg.Spec, ReconnectFor: 1}, "nor the second less": {Table: "t", Spec: cfg.Spec, Session: "s", ReconnectFrom: 2, ReconnectTo: 1},
	} {
		if _, err := Dial(t.Context(), "tcp://127.0.0.1:1", cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
}

// TestOptionsReachTheDaemon checks what the hello carries.
func TestOptionsReachTheDaemon(t *testing.T) {
	hellos := make(chan *wire.Hello, 1)
	addr := fakeDaemon(t, options{windowSamples: 5, windowBytes: 50, held: 3}, func(f *fake) { hellos <- f.hello })
	cfg := Config{Spec: specOf(t, "a:U8"), Session: "s", Ack: wire.AckCommitted, WindowSamples: 5, WindowBytes: 50, Client: "c"}
	p := dial(t, addr, cfg)
	h := <-hellos
	if h.Session != "s" || h.Ack != wire.AckCommitted || h.WindowSamples != 5 || h.WindowBytes != 50 || h.Client != "c" || !h.Notes || h.Role != wire.RolePush {
		t.Errorf("%+v", h)
	}
	if p.Held() != 3 || p.Accepted().Stream != 1 || p.Spec() != cfg.Spec {
		t.Errorf("%+v", p.Accepted())
	}
}
