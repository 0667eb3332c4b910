//go:build linux && !race

package killtest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
)

// kind is a kind of process that is killed.
type kind string

const (
	tcpProducer kind = "tcp producer"
	shmProducer kind = "shm producer"
	trainer     kind = "trainer"
	theDaemon   kind = "daemon"
	scribbler   kind = "scribbler" // a hostile trainer or shm producer
)

// table is a table of the daemon, and the oracle of it.
type table struct {
	daemon.Table
	groups  []string
	history *History
}

// world is a daemon and its peers, who come back when they are killed.
type world struct {
	t        *testing.T
	seed     uint64
	dir      string
	config   string
	segments string // folder; empty: none are kept
	tables   []*table
	tcp      string
	unix     string
	admin    string
	client   http.Client

	running context.Context // ends when peers and the daemon no longer come back
	rest    context.CancelFunc
	peers   []*peer
	keepers sync.WaitGroup
	killing context.Context // ends when nobody is killed any more
	spare   context.CancelFunc
	killers sync.WaitGroup

	mu       sync.Mutex
	daemon   *process
	kills    map[kind]int
	points   map[string]int // kills by failpoint
	stops    map[kind]int
	restarts int
	sessions uint64 // last number given
	failed   atomic.Bool
}

// fail notes a failure; the first one ends the run.
func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.failed.Store(true)
	w.t.Errorf(format, args...)
	w.rest()
}

// newSeed is that of the flag, or a random one. A test that fails prints it with the command that replays it.
func newSeed(t *testing.T) uint64 {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			name, more := t.Name(), ""
			if *soakFor > 0 {
				more = " -soak " + soakFor.String()
			}
			t.Logf("seed %d; replay with: go test ./internal/killtest -count 1 -run '^%s$' -seed %d%s", seed, name, seed, more)
		}
	})
	return seed
}

// memoryDir is a folder on tmpfs, removed with the test.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ingestd-kill-")
	if err != nil {
		t.Skipf("no tmpfs to test on: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// ports counts the ports that were tried.
var ports atomic.Int64

// freePort finds a port that the kernel gives to no connection, so that it is still free after a restart.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		addr := "127.0.0.1:" + strconv.FormatInt(20000+(61*int64(os.Getpid())+ports.Add(1))%10000, 10)
		if l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr); err == nil {
			check(t, l.Close())
			return addr
		}
	}
	t.Fatal("no free port")
	return ""
}

// newWorld starts a daemon with these tables.
func newWorld(t *testing.T, seed uint64, tables []*table, change func(*daemon.Config)) *world {
	t.Helper()
	w := &world{t: t, seed: seed, dir: memoryDir(t), tables: tables, kills: map[kind]int{}, points: map[string]int{}, stops: map[kind]int{}}
	w.running, w.rest = context.WithCancel(t.Context())
	w.killing, w.spare = context.WithCancel(w.running)
	w.tcp, w.unix = freePort(t), filepath.Join(w.dir, "s")
	w.client.Transport = &http.Transport{MaxIdleConnsPerHost: 1}
	cfg := daemon.DefaultConfig()
	cfg.Listen = []string{"tcp://" + w.tcp, "unix://" + w.unix}
	cfg.Admin = "127.0.0.1:0"
	cfg.ReadyFile = filepath.Join(w.dir, "ready.json")
	cfg.DrainTimeout = daemon.Duration(2 * time.Second)
	for _, tb := range tables {
		cfg.Tables = append(cfg.Tables, tb.Table)
		tb.history = NewHistory(tb.groups...)
		tb.history.KeepsStreams = true
	}
	if change != nil {
		change(&cfg)
	}
	if cfg.SegmentDir != "" {
		if !filepath.IsAbs(cfg.SegmentDir) {
			cfg.SegmentDir = filepath.Join(w.dir, cfg.SegmentDir)
			check(t, os.Mkdir(cfg.SegmentDir, 0o700))
		}
		w.segments = cfg.SegmentDir
	}
	w.config = filepath.Join(w.dir, "ingestd.yaml")
	check(t, os.WriteFile(w.config, []byte(cfg.YAML()), 0o600))
	t.Cleanup(func() {
		w.rest()
		w.mu.Lock()
		d := w.daemon
		w.mu.Unlock()
		if d != nil {
			d.kill()
			if t.Failed() {
				t.Logf("the daemon's last words:\n%s", d.said.String())
			}
		}
		for _, p := range w.peers {
			if q := p.current(); q != nil {
				q.kill()
			}
		}
		w.killers.Wait()
		w.keepers.Wait()
		w.client.CloseIdleConnections()
	})
	if !w.serve("") {
		t.FailNow()
	}
	return w
}

// rand is a source of random choices of its own for each purpose, so that a seed gives the same ones whoever is first.
func (w *world) rand(purpose string) *rand.Rand {
	h := uint64(14695981039346656037)
	for _, b := range []byte(purpose) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return rand.New(rand.NewPCG(w.seed, h))
}

// serve starts the daemon and waits until it serves, or has struck its failpoint. It returns false if it ended in another way.
func (w *world) serve(point string) bool {
	ready := filepath.Join(w.dir, "ready.json")
	_ = os.Remove(ready)
	d, err := spawn(ingestdPath, point, nil, "serve", "--config", w.config)
	if err != nil {
		w.fail("starting the daemon: %v", err)
		return false
	}
	w.mu.Lock()
	w.daemon = d
	w.mu.Unlock()
	var addresses daemon.Addresses
	if !within(patience, func() bool {
		text, err := os.ReadFile(ready)
		return err == nil && json.Unmarshal(text, &addresses) == nil || !d.running()
	}) {
		w.fail("the daemon does not come up: %s", d.said.String())
		return false
	}
	if !d.running() && (point == "" || !d.struck()) {
		w.fail("the daemon did not start: %s", d.ending())
		return false
	}
	w.mu.Lock()
	w.admin = addresses.Admin
	w.mu.Unlock()
	return true
}

func (w *world) theDaemon() *process {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.daemon
}

func (w *world) count(k kind, point string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kills[k]++
	if point != "" {
		name, _, _ := strings.Cut(point, ":")
		w.points[name]++
	}
}

func (w *world) killed(k kind) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.kills[k]
}

// peer is the place of a producer or a trainer: one process after another.
type peer struct {
	w      *world
	kind   kind
	table  *table
	group  string // of a trainer
	role   string // of a scribbler
	addr   string
	lasts  bool // a producer whose session goes on with the next process
	most   int
	pause  time.Duration
	either bool                    // a shm producer whose next process may push over the socket, in the same session
	points func(*rand.Rand) string // chooses the failpoint of the next process

	rnd *rand.Rand

	mu      sync.Mutex
	now     *process
	session uint64
	ledger  *Ledger
}

func (p *peer) current() *process {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// add puts a peer in its place and keeps it there.
func (w *world) add(p *peer) {
	w.t.Helper()
	p.w, p.rnd = w, w.rand(fmt.Sprintf("peer %d", len(w.peers)))
	w.peers = append(w.peers, p)
	if err := p.start(""); err != nil {
		w.t.Fatal(err)
	}
	w.keepers.Go(p.keep)
}

// start starts the next process.
func (p *peer) start(point string) error {
	args := []string{"--addr", p.addr, "--table", p.table.Name, "--spec", p.table.Spec, "--most", strconv.Itoa(p.most), "--pause", p.pause.String(),
		"--seed", strconv.FormatUint(p.rnd.Uint64(), 10)}
	var line func(string)
	switch p.kind {
	case trainer:
		args = append([]string{"train", "--group", p.group}, args...)
		line = p.delivered
	case scribbler:
		args = append([]string{"scribble", "--role", p.role, "--group", p.group}, args...)
		line = func(string) {} // counted
	default:
		role, name := "produce", ""
		if p.kind == shmProducer && !(p.either && p.w.killing.Err() == nil && p.rnd.IntN(3) == 0) {
			role = "fill"
		}
		if p.session == 0 || !p.lasts {
			if err := p.begin(); err != nil {
				return err
			}
		}
		if p.lasts {
			name = fmt.Sprintf("session-%d", p.session)
		}
		args = append([]string{role, "--session", strconv.FormatUint(p.session, 10), "--name", name, "--ledger", p.ledger.Path()}, args...)
	}
	q, err := spawn(peerPath, point, line, args...)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.now = q
	p.mu.Unlock()
	return nil
}

// begin gives a producer a session.
func (p *peer) begin() (err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.w.mu.Lock()
	p.w.sessions++
	p.session = p.w.sessions
	p.w.mu.Unlock()
	if p.ledger != nil {
		_ = p.ledger.Close()
	}
	p.ledger, err = OpenLedger(filepath.Join(p.w.dir, fmt.Sprintf("ledger-%d", p.session)))
	return err
}

// delivered takes a line that a trainer wrote.
func (p *peer) delivered(line string) {
	d, err := ParseDelivery(line)
	if err != nil {
		p.w.fail("a trainer wrote: %v", err)
		return
	}
	p.table.history.Deliver(p.group, d)
}

// account reads the ledger into the history.
func (p *peer) account() (acked uint64) {
	if !p.produces() {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	sent, acked, err := p.ledger.Read()
	if err != nil {
		p.w.fail("ledger of session %d: %v", p.session, err)
		return 0
	}
	p.table.history.Sent(p.session, sent, acked)
	return acked
}

// keep starts a next process whenever one was killed.
func (p *peer) keep() {
	for {
		q := p.current()
		<-q.done
		p.account()
		switch {
		case p.w.running.Err() != nil:
			return
		case q.struck():
			p.w.count(p.kind, map[bool]string{false: q.point}[q.killed.Load()])
		case q.cmd.ProcessState.ExitCode() == 0 && p.produces() && !p.lasts: // a producer without a session does not come back
		default:
			p.w.fail("%s ended: %s", p.kind, q.ending())
			return
		}
		point := ""
		if p.points != nil {
			point = p.points(p.rnd)
		}
		if err := p.start(point); err != nil {
			p.w.fail("%v", err)
			return
		}
	}
}

func (p *peer) produces() bool { return p.kind == tcpProducer || p.kind == shmProducer }

// progress counts what the current process has done: samples acked, or batches read, or channels spoiled.
func (p *peer) progress(q *process) uint64 {
	if !p.produces() {
		return q.lines.Load()
	}
	return p.account()
}

// status asks the daemon.
func (w *world) status() (*daemon.Status, error) {
	w.mu.Lock()
	admin := w.admin
	w.mu.Unlock()
	var s daemon.Status
	return &s, w.get(admin+"/status", func(r io.Reader) error { return json.NewDecoder(r).Decode(&s) })
}

func (w *world) get(url string, read func(io.Reader) error) error {
	answer, err := w.client.Get(url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, answer.Status)
	}
	return read(answer.Body)
}

// finish ends the world in order and judges. The daemon that runs now must go on to the end.
func (w *world) finish() {
	w.t.Helper()
	w.spare()
	w.killers.Wait()
	// Places that a session had filled before a restart are kept until it fills again, or for half a minute: those that push now end with a process that fills.
	for _, p := range w.peers {
		if q := p.current(); p.either && q.cmd.Args[1] == "produce" {
			q.kill()
			within(patience, func() bool { return p.current() != q || w.running.Err() != nil })
		}
	}
	if !within(patience, func() bool {
		return w.running.Err() != nil || !slices.ContainsFunc(w.peers, func(p *peer) bool { return !p.current().running() })
	}) {
		w.fail("those that were killed do not come back")
	}
	w.rest()
	if w.failed.Load() {
		return
	}
	var producers, trainers, scribblers []*process
	for _, p := range w.peers {
		switch q := p.current(); p.kind {
		case trainer:
			trainers = append(trainers, q)
		case scribbler:
			scribblers = append(scribblers, q)
		default:
			producers = append(producers, q)
		}
	}
	end := func(what string, list []*process) {
		for _, p := range list {
			p.signal(termination)
		}
		for _, p := range list {
			err := p.ends(0)
			begun, struck := p.endedBy(termination), p.point != "" && p.struck() // had only begun; came to its point at last
			if err != nil && !begun && !struck {
				w.t.Errorf("%s: %v", what, err)
			}
		}
	}
	end("scribbler", scribblers)
	end("producer", producers)
	for _, p := range w.peers {
		p.account()
	}
	for _, tb := range w.tables {
		if !within(patience, func() bool { return len(tb.history.Missing()) == 0 }) {
			w.t.Errorf("table %q: these samples do not come: %s", tb.Name, strings.Join(tb.history.Missing(), "\n"))
		}
	}
	if w.t.Failed() {
		if s, err := w.status(); err == nil {
			text, _ := json.MarshalIndent(s, "", " ")
			w.t.Logf("status: %s", text)
		}
		return
	}
	end("trainer", trainers)
	w.returned()
	d := w.theDaemon()
	d.signal(termination)
	if err := d.ends(0); err != nil {
		w.t.Errorf("the daemon: %v", err)
	}
	w.checked()
	for _, tb := range w.tables {
		for _, fault := range tb.history.Finish() {
			w.t.Errorf("table %q: %s", tb.Name, fault)
		}
	}
}

// returned checks that everything has come back: places, leases, connections.
func (w *world) returned() {
	w.t.Helper()
	var last string
	if !within(patience, func() bool {
		s, err := w.status()
		if err != nil {
			last = err.Error()
			return false
		}
		ok := len(s.Trainers) == 0 && s.Producers.Open == 0
		for i := range s.Tables {
			tb := &s.Tables[i]
			// An open batch in which no slot is taken may stay.
			ok = ok && tb.Streams == 0 && tb.Places["free"]+tb.Places["open"] == tb.Batches && tb.Places["open"] <= 1
		}
		text, _ := json.Marshal(s)
		last = string(text)
		return ok
	}) {
		w.t.Errorf("not everything came back: %s", last)
	}
}

// checked has `ingestd check` look at the segments that were kept.
func (w *world) checked() {
	w.t.Helper()
	files, err := filepath.Glob(filepath.Join(w.segments, "*.segment"))
	if w.segments == "" || err != nil || len(files) != len(w.tables) {
		if w.segments != "" {
			w.t.Errorf("segments of %d tables: %q, %v", len(w.tables), files, err)
		}
		return
	}
	p, err := spawn(ingestdPath, "", nil, append([]string{"check"}, files...)...)
	check(w.t, err)
	if err := p.ends(0); err != nil {
		w.t.Errorf("ingestd check: %v", err)
	}
}

// report logs what the run amounted to.
func (w *world) report() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, tb := range w.tables {
		n := tb.history.Totals()
		w.t.Logf("table %q: %d samples of %d sessions acked, %d in the ring in %d batches; %d second deliveries; acked samples that are missing to a group: %d",
			tb.Name, n.Acked, n.Sessions, n.InRing, n.Batches, n.Again, n.Lost)
	}
	w.t.Logf("seed %d; killed: %v; stopped for a while: %v; restarts of the daemon: %d", w.seed, w.kills, w.stops, w.restarts)
	for _, name := range slices.Sorted(maps.Keys(w.points)) {
		w.t.Logf("  at %s: %d", name, w.points[name])
	}
}

// hostileRoles are those that share a channel with the daemon.
var hostileRoles = []string{"train", "fill"}
