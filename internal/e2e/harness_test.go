//go:build linux && !race

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/spec"
)

// The exit codes of docs/cli.md.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitRefused     = 3
	exitUnreachable = 4
	exitData        = 6
	exitInterrupted = 7
)

// ingestd is the binary, built by TestMain.
var ingestd string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "ingestd-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		ingestd = filepath.Join(dir, "ingestd")
		if out, err := exec.Command("go", "build", "-o", ingestd, "github.com/ingestd/ingestd/cmd/ingestd").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building ingestd: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is how long a test waits for something before it fails instead of hanging.
const patience = time.Minute

// eventually waits until cond holds. After patience, or a little before the deadline of the run, it fails and says what it waited for.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	until := time.Now().Add(patience)
	if d, ok := t.Deadline(); ok && d.Add(-5*time.Second).Before(until) {
		until = d.Add(-5 * time.Second)
	}
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if (<-tick.C).After(until) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// says fails the test unless text holds every word.
func says(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("it does not say %q; it says:\n%s", w, text)
		}
	}
}

// process is a running ingestd.
type process struct {
	t        *testing.T
	args     []string
	cmd      *exec.Cmd
	out, err output
	done     chan struct{}
}

// output is what a process writes, readable meanwhile.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// start runs the binary. It is killed with the test at the latest.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	return startWith(t, nil, args...)
}

// startWith is start with more variables in the environment.
func startWith(t *testing.T, environment []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, args: args, cmd: exec.Command(ingestd, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), environment...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, p.cmd.Start())
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("%v: %v\n%s%s", p.args, p.cmd.ProcessState, p.out.String(), lastLines(p.err.String(), 60))
		}
	})
	return p
}

func lastLines(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// run runs the binary to its end, which must have the code, and returns what it wrote to standard error.
func run(t *testing.T, code int, args ...string) string {
	t.Helper()
	p := start(t, args...)
	p.ends(code)
	return p.err.String()
}

// ends waits for the end of the process, which must have the code.
func (p *process) ends(code int) {
	p.t.Helper()
	<-p.done
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("%v: %v, want exit code %d; it wrote:\n%s", p.args, p.cmd.ProcessState, code, lastLines(p.err.String(), 20))
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	check(p.t, p.cmd.Process.Signal(sig))
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stop sends SIGSTOP and waits until the kernel has stopped the process.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	eventually(p.t, "the process is stopped", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid()))
		check(p.t, err)
		_, after, _ := bytes.Cut(text, []byte(") "))
		return bytes.HasPrefix(after, []byte("T"))
	})
}

// descriptors counts the open descriptors of the process.
func (p *process) descriptors() int {
	p.t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid()))
	check(p.t, err)
	return len(list)
}

// memory returns a field of /proc/PID/status in bytes.
func (p *process) memory(field string) int64 {
	p.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid()))
	check(p.t, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			check(p.t, err)
			return kib << 10
		}
	}
	p.t.Fatalf("/proc/%d/status has no %s", p.pid(), field)
	return 0
}

// table is a table of a daemon.
type table struct {
	name, spec         string
	batchSize, batches int
}

func (tb table) layout(t *testing.T) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(tb.spec)
	check(t, err)
	return s
}

// server is a running `ingestd serve`.
type server struct {
	*process
	t *testing.T // of the test or subtest that uses it
	daemon.Addresses
	http http.Client
}

// in is the same daemon, used by a subtest.
func (d *server) in(t *testing.T) *server {
	sub := *d
	sub.t = t
	return &sub
}

// serve starts a daemon on free ports and waits until it serves.
func serve(t *testing.T, tables []table, flags ...string) *server {
	t.Helper()
	return serveIn(t, t.TempDir(), tables, flags...)
}

func serveIn(t *testing.T, dir string, tables []table, flags ...string) *server {
	t.Helper()
	cfg := daemon.DefaultConfig()
	for _, tb := range tables {
		cfg.Tables = append(cfg.Tables, daemon.Table{Name: tb.name, Spec: tb.spec, BatchSize: tb.batchSize, Batches: tb.batches})
	}
	file, ready := filepath.Join(dir, "ingestd.yaml"), filepath.Join(dir, "ready.json")
	check(t, os.WriteFile(file, []byte(cfg.YAML()), 0o600))
	check(t, os.RemoveAll(ready)) // of a daemon that was killed
	args := []string{"serve", "--config", file, "--listen", "tcp://127.0.0.1:0", "--listen", "unix://" + filepath.Join(dir, "s"), "--admin", "127.0.0.1:0", "--ready-file", ready}
	d := &server{process: start(t, append(args, flags...)...), t: t}
	d.http.Transport = &http.Transport{MaxIdleConnsPerHost: 1}
	t.Cleanup(d.http.CloseIdleConnections)
	eventually(t, "the daemon serves", func() bool {
		if !d.running() {
			t.Fatal("the daemon did not start")
		}
		text, err := os.ReadFile(ready)
		return err == nil && json.Unmarshal(text, &d.Addresses) == nil
	})
	return d
}

type status = daemon.Status

// get asks the admin endpoint, over one connection that stays open.
func (d *server) get(path string) []byte {
	d.t.Helper()
	answer, err := d.http.Get(d.Admin + path)
	check(d.t, err)
	text, err := io.ReadAll(answer.Body)
	check(d.t, errors.Join(err, answer.Body.Close()))
	if answer.StatusCode != http.StatusOK {
		d.t.Fatalf("GET %s: %s: %s", path, answer.Status, text)
	}
	return text
}

func (d *server) status() *status {
	d.t.Helper()
	var s daemon.Status
	check(d.t, json.Unmarshal(d.get("/status"), &s))
	return &s
}

// await waits until the status is as wanted.
func (d *server) await(what string, cond func(*status) bool) {
	d.t.Helper()
	eventually(d.t, what, func() bool { return cond(d.status()) })
}

// metric returns one metric, written with its labels as /metrics does.
func (d *server) metric(name string) float64 {
	d.t.Helper()
	for line := range strings.Lines(string(d.get("/metrics"))) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			check(d.t, err)
			return v
		}
	}
	d.t.Fatalf("there is no metric %s", name)
	return 0
}

// awaitMetric waits until a metric is v.
func (d *server) awaitMetric(name string, v float64) {
	d.t.Helper()
	eventually(d.t, fmt.Sprintf("%s is %v", name, v), func() bool { return d.metric(name) == v })
}

// logs waits until the daemon has logged the words.
func (d *server) logs(words ...string) {
	d.t.Helper()
	for _, w := range words {
		eventually(d.t, fmt.Sprintf("the daemon logs %q", w), func() bool { return strings.Contains(d.err.String(), w) })
	}
}

// tableOf returns the status of a table.
func tableOf(s *status, name string) *daemon.TableStatus {
	for i := range s.Tables {
		if s.Tables[i].Name == name {
			return &s.Tables[i]
		}
	}
	return &daemon.TableStatus{}
}

// released is how many batches of a table trainers have given back.
func (d *server) released(name string) uint64 {
	d.t.Helper()
	return tableOf(d.status(), name).Released
}

// moves waits until trainers have read n more batches of a table.
func (d *server) moves(name string, n uint64) {
	d.t.Helper()
	goal := d.released(name) + n
	d.await("trainers read on", func(s *status) bool { return tableOf(s, name).Released >= goal })
}
