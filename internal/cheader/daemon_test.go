//go:build linux && !race

package cheader

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/spec"
)

const (
	testTable = "numbers"
	testSpec  = `x:F32[3,5],"a \"leaf\"":I64,flag:BOOL[7],half:BF16[2]`
)

// running is a daemon in this process.
type running struct {
	*daemon.Daemon
	socket string
	spec   *spec.Spec
	end    context.CancelFunc // in order: what is there is still delivered
	done   chan error
}

func startDaemon(t *testing.T, change ...func(*daemon.Config)) *running {
	t.Helper()
	s, err := spec.ParseText(testSpec)
	if err != nil {
		t.Fatal(err)
	}
	cfg := daemon.DefaultConfig()
	r := &running{socket: filepath.Join(t.TempDir(), "d.sock"), spec: s, done: make(chan error, 1)}
	cfg.Listen, cfg.Admin = []string{"unix://" + r.socket}, "off"
	cfg.DrainTimeout = daemon.Duration(time.Minute)
	cfg.Tables = []daemon.Table{{Name: testTable, Spec: testSpec, BatchSize: 16, Batches: 128}}
	for _, f := range change {
		f(&cfg)
	}
	if r.Daemon, err = daemon.New(cfg, slog.New(slog.DiscardHandler), "test"); err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, r.end = context.WithCancel(context.Background())
	go func() { r.done <- r.Run(ctx) }()
	t.Cleanup(func() {
		r.StopNow()
		r.end()
		<-r.done
	})
	return r
}

// eventually waits until cond holds, by looking again.
func (r *running) eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	until := time.Now().Add(patience * time.Millisecond)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if (<-tick.C).After(until) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// push sends n samples that prove themselves and waits for their acks.
func (r *running) push(t *testing.T, n int) {
	t.Helper()
	p, err := client.Dial(t.Context(), "unix://"+r.socket, client.Config{Table: testTable, Spec: r.spec})
	if err != nil {
		t.Fatal(err)
	}
	sample := make([]byte, r.spec.SampleBytes())
	for i := range uint64(n) {
		proof.Sample(sample, r.spec, p.Accepted().Stream, i)
		if _, err := p.PushMany(t.Context(), 1, sample); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (r *running) options() options { return options{path: r.socket, table: testTable} }

func TestTrainerReadsToTheEnd(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		p := start(t, b)
		before := p.fds()
		p.want(`numbers batch_size=16 batches=128 prefetch=3 sample_bytes=79 x:F32[3,5]=60@0 a "leaf":I64[]=8@1 flag:BOOL[7]=7@2 half:BF16[2]=4@3`,
			"%s", options{
				path: "unix://" + d.socket, table: testTable, prefetch: 3, client: `a "C" client`,
				spec: string(d.spec.JSON()), fingerprint: d.spec.Fingerprint().String(),
			}.attach())
		d.push(t, 1000) // 62 batches and a half
		d.push(t, 1000)
		p.send("pull %d", patience)
		d.end()
		if got := p.isOK("pull"); got != "2000" {
			t.Errorf("%s samples came, want 2000", got)
		}
		p.fails("end", "all batches were delivered", "next 0")
		p.ok("detach")
		if after := p.fds(); after != before {
			t.Errorf("%d descriptors are open after detaching, %d before attaching", after, before)
		}
	})
}

func TestTrainerHoldsItsBatches(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		p := start(t, b)
		o := d.options()
		o.prefetch, o.path = 2, "shm://"+d.socket
		p.ok("%s", o.attach())
		p.fails("timeout", "none was published", "next 0")
		p.fails("timeout", "no batch in 20 ms: none was published", "next 20")
		d.push(t, 64)
		for _, want := range []string{"0", "1"} {
			if got := strings.Fields(p.ok("next %d", patience)); got[0] != want || got[2] != "16" {
				t.Fatalf("batch %v, want %s with 16 rows", got, want)
			}
		}
		p.fails("timeout", "all 2 that this trainer may hold are held; release one", "next 20")
		p.ok("release 0")
		p.ok("next %d", patience)
		p.fails("misuse", "no such leaf", "column 4")
		p.fails("misuse", "no such leaf", "column -1")
		p.fails("misuse", "no such leaf", "column-named y")
		p.ok("column-named x")
		p.ok("release 2")
		p.fails("misuse", "released before", "column-stale")
		p.fails("misuse", "released before", "release-stale")
		p.fails("misuse", "deadline_ms is negative", "next -1")
		p.fails("misuse", "batch is NULL", "next-nowhere")
		p.ok("release 1")
		p.ok("next %d", patience)
		p.ok("detach")
	})
}

// TestTrainerDies: what a trainer held when it was killed comes to another one.
func TestTrainerDies(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		victim, other := start(t, b), start(t, b)
		victim.ok("%s", d.options().attach())
		d.push(t, 64)
		victim.ok("next %d", patience)
		victim.kill()
		other.ok("%s", d.options().attach())
		for _, want := range []string{"0", "1", "2", "3"} {
			if got := strings.Fields(other.ok("next %d", patience)); got[0] != want {
				t.Fatalf("batch %v, want %s", got, want)
			}
			other.ok("release %s", want)
		}
	})
}

// TestTrainerCannotWrite: the mapping is read-only.
func TestTrainerCannotWrite(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		p := start(t, b)
		p.ok("%s", d.options().attach())
		d.push(t, 16)
		p.ok("next %d", patience)
		p.send("write")
		err := p.wait()
		status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
		if err == nil || !ok || (status.Signal() != syscall.SIGSEGV && !strings.Contains(p.said.String(), "SEGV")) {
			t.Errorf("a trainer that writes: %v\n%s", err, p.said.String())
		}
	})
}

func TestRefusals(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		p := start(t, b)
		before := p.fds()
		for _, test := range map[string]struct {
			change func(*options)
			words  string
		}{
			"no such table": {func(o *options) { o.table = "nobody's" }, "daemon=unknown_table|this daemon has numbers"},
			"another spec": {func(o *options) {
				o.spec = `{"leaves":[{"name":"x","dtype":"F32","shape":[3,6]},` +
					`{"name":"a \"leaf\"","dtype":"I64","shape":[]},{"name":"half","dtype":"BF16","shape":[2]}]}`
			}, "daemon=spec_mismatch|leaf x is F32[3,6] here and F32[3,5] in the table|leaf flag is missing here and BOOL[7]"},
			"a spec that is none": {func(o *options) { o.spec = `{"leafs":[]}` }, "daemon=bad_option|unknown field \"leafs\""},
			"another fingerprint": {func(o *options) { o.fingerprint = strings.Repeat("ab", 32) }, "daemon=spec_mismatch|stands for x:F32[3,5]"},
			"a fingerprint like none": {
				func(o *options) { o.spec, o.fingerprint = string(d.spec.JSON()), strings.Repeat("ab", 32) },
				"daemon=bad_handshake|is not that of the spec",
			},
		} {
			o := d.options()
			test.change(&o)
			p.fails("refused", test.words, "%s", o.attach())
		}
		if after := p.fds(); after != before {
			t.Errorf("%d descriptors are open after refusals, %d before", after, before)
		}
	})
}

func TestMisuse(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		p := start(t, b)
		for _, test := range map[string]struct {
			o     options
			words string
		}{
			"no path":               {options{table: "t"}, "path is NULL"},
			"no table":              {options{path: "/x"}, "table is NULL"},
			"a long path":           {options{path: "/" + strings.Repeat("x", 107), table: "t"}, "has 108 bytes: 1 to 107 are allowed"},
			"a long table":          {options{path: "/x", table: strings.Repeat("x", 129)}, "table has 129 bytes: at most 128"},
			"a table not in UTF-8":  {options{path: "/x", table: "\xff"}, "table is not UTF-8"},
			"a group with a break":  {options{path: "/x", table: "t", group: "a\nb"}, "group has a control character"},
			"a client with a C1":    {options{path: "/x", table: "t", client: "a\u0085b"}, "client has a control character"},
			"a short fingerprint":   {options{path: "/x", table: "t", fingerprint: "abcd"}, "fingerprint must be 64 hex digits"},
			"a fingerprint of text": {options{path: "/x", table: "t", fingerprint: strings.Repeat("x", 64)}, "fingerprint must be 64 hex digits"},
			"a spec as text":        {options{path: "/x", table: "t", spec: "x:F32"}, "spec must be one JSON object"},
			"a spec cut short":      {options{path: "/x", table: "t", spec: `{"leaves":[`}, "spec must be one JSON object"},
			"two specs":             {options{path: "/x", table: "t", spec: `{}{}`}, "something follows"},
			"no deadline":           {options{path: "/x", table: "t", deadline: -1}, "deadline_ms is negative"},
		} {
			p.fails("misuse", test.words, "%s", test.o.attach())
			if test.o.group == "" {
				p.fails("misuse", test.words, "%s", test.o.open())
			}
		}
		p.fails("misuse", "session has 200 bytes", "%s", options{path: "/x", table: "t", session: strings.Repeat("s", 200)}.open())
		p.fails("misuse", "group is empty", "attach /x t '' 0 - - - 0")
		p.want("0 12 12 12 12 12 12 12", "nobody")
		// One character less is no misuse: there is only nobody at these paths.
		p.fails("system", "system=2", "%s",
			options{path: "/" + strings.Repeat("x", 106), table: strings.Repeat("x", 128), client: strings.Repeat("\x7e", 128)}.attach())
	})
}

func TestNobodyThere(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		p := start(t, b)
		path := filepath.Join(t.TempDir(), "socket")
		p.fails("system", "system=2|No such file|is the daemon running", "%s", options{path: path, table: "t"}.attach())
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		p.fails("system", "system=111|refused", "%s", options{path: path, table: "t"}.open())
	})
}
