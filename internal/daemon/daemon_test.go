package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

const testSpec = "x:F32[4],y:U8"

// running is a daemon in this process.
type running struct {
	*Daemon
	stop context.CancelFunc
	done chan error
	addr Addresses
}

func testConfig(t testing.TB) Config {
	cfg := DefaultConfig()
	cfg.Listen = []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(t.TempDir(), "d.sock"), "echo://127.0.0.1:0"}
	cfg.Admin = "127.0.0.1:0"
	cfg.DrainTimeout = Duration(time.Minute) // far longer than any test: what waits for it hangs visibly
	cfg.Tables = []Table{{Name: "a", Spec: testSpec, BatchSize: 4, Batches: 4}}
	return cfg
}

func start(t testing.TB, cfg Config) *running {
	t.Helper()
	d, err := New(cfg, slog.New(slog.DiscardHandler), "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{Daemon: d, stop: stop, done: make(chan error, 1), addr: d.Addresses()}
	go func() { r.done <- d.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		d.StopNow()
		r.done <- <-r.done // it has ended, and others may ask again
	})
	return r
}

// wait returns what Run returned.
func (r *running) wait() error {
	err := <-r.done
	r.done <- err
	return err
}

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (r *running) producer(t testing.TB, addr string) *client.Producer {
	t.Helper()
	p, err := client.Dial(t.Context(), addr, client.Config{Table: "a", Spec: mustSpec(t, testSpec)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Abort)
	return p
}

// push sends samples until ctx ends or the daemon ends the stream.
func push(ctx context.Context, p *client.Producer, from, n uint64) error {
	b := make([]byte, p.Spec().SampleBytes())
	for i := from; i < from+n; i++ {
		proof.Sample(b, p.Spec(), p.Accepted().Stream, i)
		if _, err := p.PushMany(ctx, 1, b); err != nil {
			return err
		}
	}
	return nil
}

func (r *running) trainer(t testing.TB) *shm.Attachment {
	t.Helper()
	a, err := shm.Attach(t.Context(), strings.TrimPrefix(r.addr.Unix, "unix://"), wire.Hello{Table: "a", Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// read reads to the end of the stream, checks every byte, and returns how many samples of each stream came.
func read(ctx context.Context, a *shm.Attachment) (map[uint64]uint64, error) {
	next := map[uint64]uint64{}
	s := a.Accepted().Spec
	for {
		b, err := a.Next(ctx)
		if err == io.EOF {
			return next, nil
		}
		if err != nil {
			return next, err
		}
		for row, stream := range b.Streams() {
			if n := b.Numbers()[row]; n != next[stream] {
				return next, fmt.Errorf("stream %d: sample %d, due %d", stream, n, next[stream])
			}
			next[stream]++
		}
		for leaf := range s.NumLeaves() {
			if row, at := proof.CheckColumn(b.Column(leaf), s.Leaf(leaf), leaf, b.Streams(), b.Numbers()); row >= 0 {
				return next, fmt.Errorf("batch %d row %d leaf %d is wrong at byte %d", b.Number, row, leaf, at)
			}
		}
		a.Release(b)
	}
}

// TestStopUnderLoadLosesNothingAcked: producers push without an end over both kinds of socket, a trainer reads, and the daemon is told to stop. Every
// sample that was acked must be read, and no more than were sent.
func TestStopUnderLoadLosesNothingAcked(t *testing.T) {
	r := start(t, testConfig(t))
	var producers []*client.Producer
	var pushing, reading sync.WaitGroup
	enough := make(chan struct{}, 100)
	for i := range 4 {
		p := r.producer(t, []string{r.addr.TCP, r.addr.Unix}[i%2])
		producers = append(producers, p)
		pushing.Go(func() {
			var notice *wire.Notice
			err := push(t.Context(), p, 0, 100)
			if err == nil {
				err = p.Flush(t.Context())
			}
			enough <- struct{}{}
			if err == nil {
				err = push(t.Context(), p, 100, 1<<40)
			}
			if !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
				t.Errorf("the producer was not told why: %v", err)
			}
		})
	}
	var got map[uint64]uint64
	a := r.trainer(t)
	reading.Go(func() {
		var err error
		if got, err = read(t.Context(), a); err != nil {
			t.Error(err)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	for range producers {
		<-enough
	}
	r.stop()
	pushing.Wait()
	reading.Wait()
	if err := r.wait(); err != nil {
		t.Fatal(err)
	}
	for _, p := range producers {
		id := p.Accepted().Stream
		if got[id] < p.Acked() || got[id] > p.Sent() {
			t.Errorf("stream %d: %d sent, %d acked, %d read", id, p.Sent(), p.Acked(), got[id])
		}
	}
	if _, err := os.Stat(strings.TrimPrefix(r.addr.Unix, "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestUnreadSamplesAreSaid(t *testing.T) {
	r := start(t, testConfig(t))
	p := r.producer(t, r.addr.TCP)
	if err := push(t.Context(), p, 0, 6); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.stop()
	var unread *UnreadError
	if err := r.wait(); !errors.As(err, &unread) || unread.Samples["a"] != 6 {
		t.Errorf("got %v, want 6 unread samples", err)
	}
}

// TestTrainerThatHoldsOnIsCutOff: one trainer reads nothing. With a full ring and producers waiting, only the drain timeout can end this.
func TestTrainerThatHoldsOnIsCutOff(t *testing.T) {
	cfg := testConfig(t)
	cfg.DrainTimeout = Duration(50 * time.Millisecond)
	r := start(t, cfg)
	a := r.trainer(t)
	defer a.Close()
	p := r.producer(t, r.addr.TCP)
	pushed := make(chan error, 1)
	go func() { pushed <- push(t.Context(), p, 0, 1<<40) }()
	b, err := a.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	var unread *UnreadError
	if err := r.wait(); !errors.As(err, &unread) || unread.Samples["a"] < 4 {
		t.Errorf("got %v", err)
	}
	if err := <-pushed; err == nil {
		t.Error("the producer was not ended")
	}
	if acked, have := p.Acked(), unread.Samples["a"]; acked > have {
		t.Errorf("%d acked, %d said to be unread", acked, have)
	}
	a.Release(b)
}

func TestStopNow(t *testing.T) {
	r := start(t, testConfig(t))
	a := r.trainer(t)
	defer a.Close()
	p := r.producer(t, r.addr.TCP)
	go func() { _ = push(t.Context(), p, 0, 1<<40) }()
	if _, err := a.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.stop()
	r.StopNow()
	if err := r.wait(); !errors.Is(err, ErrStoppedAtOnce) {
		t.Errorf("got %v", err)
	}
	p.Abort()
}

// TestIdleTrainerEndsWithTheDaemon: a trainer that waits is told of the end and the daemon does not wait for the drain timeout.
func TestIdleTrainerEndsWithTheDaemon(t *testing.T) {
	r := start(t, testConfig(t))
	a := r.trainer(t)
	defer a.Close()
	ended := make(chan error, 1)
	go func() {
		_, err := a.Next(t.Context())
		ended <- errors.Join(err, a.Close())
	}()
	r.stop()
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the end of the stream", err)
	}
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

func TestReadyFileAndAddresses(t *testing.T) {
	cfg := testConfig(t)
	cfg.ReadyFile = filepath.Join(t.TempDir(), "ready.json")
	r := start(t, cfg)
	p := r.producer(t, r.addr.TCP) // answered, so it serves
	defer p.Abort()
	eventually(t, func() bool { _, err := os.Stat(cfg.ReadyFile); return err == nil })
	text, err := os.ReadFile(cfg.ReadyFile)
	if err != nil {
		t.Fatal(err)
	}
	var a Addresses
	if err := json.Unmarshal(text, &a); err != nil || a != r.addr || strings.HasSuffix(a.TCP, ":0") || !strings.HasSuffix(a.Echo, "/a") {
		t.Errorf("%v: %s, want %+v", err, text, r.addr)
	}
	r.stop()
	p.Abort()
	if err := r.wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(cfg.ReadyFile); !errors.Is(err, os.ErrNotExist) {
		t.Error("the ready file outlives the daemon")
	}
}

// eventually yields until the condition holds; a test that waits in vain ends by the test's own timeout.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the test ended first")
		}
	}
}

func TestEchoListener(t *testing.T) {
	r := start(t, testConfig(t))
	addr, _, _ := strings.Cut(strings.TrimPrefix(r.addr.Echo, "echo://"), "/")
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	hello := make([]byte, 4)
	if _, err := io.ReadFull(c, hello); err != nil || string(hello) != "ECHO" {
		t.Errorf("%v, %q", err, hello)
	}
	_ = c.Close()
	r.stop()
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

func TestCannotOpen(t *testing.T) {
	r := start(t, testConfig(t))
	var busy *ListenError
	var memory *shm.InsufficientError
	for name, c := range map[string]struct {
		change func(*Config)
		want   any
	}{
		"port in use":   {func(c *Config) { c.Listen = []string{r.addr.TCP} }, &busy},
		"socket in use": {func(c *Config) { c.Listen = []string{r.addr.Unix} }, &busy},
		"admin in use":  {func(c *Config) { c.Admin = strings.TrimPrefix(r.addr.Admin, "http://") }, &busy},
		"ring larger than memory": {func(c *Config) {
			c.Tables = []Table{{Name: "big", Spec: "x:F32[16777216]", BatchSize: 64, Batches: 10000}}
		}, &memory},
	} {
		cfg := testConfig(t)
		c.change(&cfg)
		if d, err := New(cfg, slog.New(slog.DiscardHandler), "test"); !errors.As(err, c.want) {
			t.Errorf("%s: got %v", name, err)
			if d != nil {
				_ = d.Close()
			}
		}
	}
	cfg := testConfig(t)
	cfg.ReadyFile = filepath.Join(t.TempDir(), "no", "ready.json")
	if err := start(t, cfg).wait(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ready file that cannot be written: %v", err)
	}
}

func get(t *testing.T, url string, host string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if host != "" {
		req.Host = host
	}
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestAdmin(t *testing.T) {
	r := start(t, testConfig(t))
	a := r.trainer(t)
	p := r.producer(t, r.addr.TCP)
	if err := push(t.Context(), p, 0, 9); err != nil {
		t.Fatal(err)
	}
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, err := a.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/healthz":              "ok",
		"/readyz":               "serving",
		"/":                     "/metrics",
		"/metrics":              `ingestd_table_samples_pushed_total{table="a"} 9`,
		"/debug/pprof/cmdline":  "",
		"/debug/pprof/heap":     "",
		"/debug/pprof/?debug=1": "goroutine",
	} {
		if code, body := get(t, r.addr.Admin+path, ""); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: %d %.300s", path, code, body)
		}
	}
	if code, _ := get(t, r.addr.Admin+"/nothing", ""); code != http.StatusNotFound {
		t.Errorf("a path that is not there: %d", code)
	}
	if code, _ := get(t, r.addr.Admin+"/status", "evil.example"); code != http.StatusForbidden {
		t.Errorf("a foreign Host: %d", code)
	}
	var s Status
	_, body := get(t, r.addr.Admin+"/status", "")
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatal(err)
	}
	if s.State != "serving" || len(s.Tables) != 1 || s.Tables[0].Pushed != 9 || s.Tables[0].Streams != 1 || len(s.Trainers) != 1 || len(s.Producers.Connections) != 1 {
		t.Errorf("%s", body)
	}
	if len(s.Trainers) == 1 && (len(s.Trainers[0].Held) == 0 || s.Trainers[0].Held[0].Batch != b.Number || s.Trainers[0].PID != os.Getpid()) {
		t.Errorf("%+v", s.Trainers[0])
	}
	a.Release(b)
	_ = a.Close()
	p.Abort()
	r.stop()
	_ = r.wait()
}

// TestStatusSaysWhoWaitsForWhom: a trainer that keeps its batches stops producers, and the status says so.
func TestStatusSaysWhoWaitsForWhom(t *testing.T) {
	r := start(t, testConfig(t))
	a := r.trainer(t)
	p := r.producer(t, r.addr.TCP)
	ctx, cancel := context.WithCancel(t.Context())
	pushed := make(chan error, 1)
	go func() { pushed <- push(ctx, p, 0, 1<<40) }()
	said := func(what string) bool {
		_, body := get(t, r.addr.Admin+"/status", "")
		var s Status
		if err := json.Unmarshal([]byte(body), &s); err != nil {
			t.Fatal(err)
		}
		for _, w := range s.Waits {
			if strings.Contains(w.Who+" waits for "+w.For+", on "+w.On, what) && !w.Since.IsZero() {
				return true
			}
		}
		return false
	}
	eventually(t, func() bool { return said(`waits for a free slot of table "a" (the ring is full), on `) })
	eventually(t, func() bool { return said(`table "a" waits for batch 0 to be given back, on trainer 1 (test, pid `) })
	cancel()
	<-pushed
	p.Abort()
	_ = a.Close()
	r.StopNow()
	_ = r.wait()
}

// unix connects to the daemon's socket and says hello.
func (r *running) unix(t testing.TB, hello *wire.Hello) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", strings.TrimPrefix(r.addr.Unix, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := wire.WriteHello(c, hello); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestLocalProducers: who may write in place is served, shown and stopped as the configuration says; its session is one with that of producers that push.
func TestLocalProducers(t *testing.T) {
	r := start(t, testConfig(t))
	hello := &wire.Hello{Role: wire.RoleFill, Table: "a", Session: "s", Client: "local"}
	local := r.unix(t, hello)
	var accepted wire.AcceptedFill
	if err := wire.ReadReply(local, &accepted); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { s := r.Status(); return len(s.Local.Producers) == 1 && s.Local.Producers[0].Lent > 0 })
	if f := r.Status().Local.Producers[0]; f.PID != os.Getpid() || f.Session != "s" || f.Client != "local" || f.Stream != accepted.Stream || f.Name() == "" {
		t.Errorf("%+v", f)
	}
	push := r.sender(t, "s") // takes the session
	if push.accepted.Stream != accepted.Stream {
		t.Errorf("one session has the streams %d and %d", push.accepted.Stream, accepted.Stream)
	}
	mark := make([]byte, 1)
	if _, err := io.ReadFull(local, mark); err != nil || mark[0] != wire.NoticeMark {
		t.Fatalf("got %#x, %v, want a notice", mark, err)
	}
	if n, err := wire.ReadNotice(local); err != nil || n.Code != wire.CodeSessionTaken {
		t.Fatalf("got %v, %v, want %s", n, err, wire.CodeSessionTaken)
	}
	push.send(0, 3)
	again := r.unix(t, hello) // and takes it back
	if err := wire.ReadReply(again, &accepted); err != nil || accepted.Held != 3 {
		t.Errorf("%v; %d held, want 3", err, accepted.Held)
	}
	a := r.trainer(t)
	r.stop()
	if got, err := read(t.Context(), a); err != nil || got[accepted.Stream] != 3 {
		t.Errorf("%v, %v", got, err)
	}
	_ = a.Close()
	if err := r.wait(); err != nil {
		t.Error(err)
	}

	cfg := testConfig(t)
	cfg.LocalProducers.Enabled = false
	r = start(t, cfg)
	var refusal *wire.Refusal
	if err := wire.ReadReply(r.unix(t, hello), &accepted); !errors.As(err, &refusal) || refusal.Code != wire.CodeWrongRole {
		t.Errorf("while that is switched off: %v", err)
	}
}

// TestGroups: every group gets every batch; those of the configuration are there from the start, and the status says for whom nobody reads.
func TestGroups(t *testing.T) {
	cfg := testConfig(t)
	cfg.Tables[0].Groups = []Group{{Name: "eval", Policy: Policy{OnDeath: "drop", OnLag: "lose"}}}
	r := start(t, cfg)
	s := r.sender(t, "")
	s.send(0, 8)
	st := r.Status()
	if g := st.Tables[0].Groups; len(g) != 1 || g[0].Name != "eval" || !g[0].Listed || g[0].OnDeath != "drop" || g[0].OnLag != "lose" ||
		g[0].Unread != 2 || g[0].Waits == nil {
		t.Fatalf("%+v", g)
	}
	if len(st.Waits) != 1 || st.Waits[0].Who != `group "eval" of table "a"` {
		t.Errorf("%+v", st.Waits)
	}
	attach := func(group string) *shm.Attachment {
		a, err := shm.Attach(t.Context(), strings.TrimPrefix(r.addr.Unix, "unix://"), wire.Hello{Table: "a", Group: group, Client: group})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	eval, train := attach("eval"), attach("train")
	r.stop()
	var reading sync.WaitGroup
	for want, a := range map[uint64]*shm.Attachment{8: eval, 0: train} { // train came after they were published
		reading.Go(func() {
			if got, err := read(t.Context(), a); err != nil || got[s.accepted.Stream] != want {
				t.Errorf("group %s: %v, %v", a.Accepted().Group, got, err)
			}
			_ = a.Close()
		})
	}
	reading.Wait()
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

// TestNotesNameTheTrainer: a producer that waits is told which trainer holds the ring up.
func TestNotesNameTheTrainer(t *testing.T) {
	r := start(t, testConfig(t))
	a := r.trainer(t)
	c := r.unix(t, &wire.Hello{Role: wire.RolePush, Table: "a", Spec: mustSpec(t, testSpec), Notes: true})
	var accepted wire.AcceptedPush
	if err := wire.ReadReply(c, &accepted); err != nil {
		t.Fatal(err)
	}
	sp := mustSpec(t, testSpec)
	if _, err := c.Write(make([]byte, 40*sp.SampleBytes())); err != nil {
		t.Fatal(err)
	}
	b, err := a.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	one := make([]byte, 1)
	for one[0] != wire.NoteMark {
		if _, err := io.ReadFull(c, one); err != nil || one[0] != wire.Ack && one[0] != wire.NoteMark {
			t.Fatalf("got %#x, %v", one, err)
		}
	}
	n, err := wire.ReadNote(c)
	if err != nil {
		t.Fatal(err)
	}
	if n.Code != wire.NoteRingFull || n.Trainer != a.Accepted().Trainer || n.Batch != b.Number || n.Group != "default" || n.Client != "test" ||
		n.PID != os.Getpid() || n.Since == 0 ||
		!strings.Contains(n.Reason, fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("%+v", n)
	}
	_ = a.Close()
	r.StopNow()
	_ = r.wait()
}
