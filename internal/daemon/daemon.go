package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/certfile"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/remote"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// Daemon is tables with listeners before them.
type Daemon struct {
	plan    *plan
	log     *slog.Logger
	version string
	started time.Time
	state   atomic.Int32

	pool      *drainer.Pool
	tables    []*table
	stores    map[string]*weights.Store
	ingest    *tcpingest.Server
	quic      *quicingest.Server // nil: no such listener
	trainers  *shm.Server
	remote    *remote.Server
	weights   *weights.Server
	listeners []listener
	admin     *admin // nil: off
	access    access
	certs     *certfile.Source // nil: no TLS

	transports []ingest.Transport

	now     context.Context // ends with StopNow: no more waiting
	stopNow context.CancelFunc
	cutOff  context.Context // ends when trainers are cut off
	cut     context.CancelFunc

	mu          sync.Mutex
	leaving     bool // no more attachments; under mu
	attachments sync.WaitGroup
}

// table is an engine.Table whose segment other processes may map.
type table struct {
	*engine.Table
	plan     *tablePlan
	memory   *shm.Memory
	attached atomic.Int32 // trainers of other processes; its end wakes the ring's Space, too
	left     uint64       // of tensors: chunks that no reader was given when the daemon stopped; Run's own
}

// The states of a daemon.
const (
	stateStarting = iota
	stateServing
	stateDraining
)

var stateNames = [...]string{"starting", "serving", "draining"}

// ErrStoppedAtOnce is what Run returns after StopNow.
var ErrStoppedAtOnce = errors.New("stopped at once, without draining: samples that were not read are lost, unless their table is kept")

// New opens everything that the configuration names. Run serves; Close gives back what was opened if Run is not called.
func New(cfg Config, log *slog.Logger, version string) (*Daemon, error) {
	p, err := cfg.plan()
	if err != nil {
		return nil, err
	}
	d := &Daemon{plan: p, log: log.With("component", "daemon"), version: version, started: time.Now(), pool: drainer.NewPool(p.Drainers)}
	d.now, d.stopNow = context.WithCancel(context.Background())
	d.cutOff, d.cut = context.WithCancel(context.Background())
	if err := d.open(log); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Daemon) open(log *slog.Logger) error {
	var err error
	if d.access, err = newAccess(d.plan, log); err != nil {
		return err
	}
	if err := d.openCertificates(log); err != nil {
		return err
	}
	for _, a := range d.plan.listeners {
		l, err := listenAt(a, log)
		if err != nil {
			return err
		}
		d.listeners = append(d.listeners, d.access.guard(l, log))
	}
	if d.plan.admin != nil {
		l, err := listen(context.Background(), *d.plan.admin)
		if err != nil {
			return err
		}
		d.admin = newAdmin(d, l, log)
	}
	for i := range d.plan.tables {
		t, err := newTable(&d.plan.tables[i], d.pool, d.plan.DiscardSegments, d.log)
		if err != nil {
			return err
		}
		d.tables = append(d.tables, t)
		if err := t.memory.HugePagesErr(); err != nil {
			d.log.Warn("no huge pages; ordinary ones are used", "table", t.Name(), "err", err)
		}
	}
	if err := d.openStores(log); err != nil {
		return err
	}
	if d.trainers, err = shm.NewServer(shm.ServerConfig{
		Tables: d.registry(), Prefetch: d.plan.Limits.Prefetch, TrainersMax: d.plan.Limits.MaxTrainers, Log: log, Fill: d.fillConfig(),
	}); err != nil {
		return err
	}
	if d.remote, err = remote.NewServer(remote.Config{Trainers: d.trainers, StallTimeout: time.Duration(d.plan.Limits.StallTimeout), Log: log}); err != nil {
		return err
	}
	return d.openTransports(log)
}

// fillConfig says who may write in place.
func (d *Daemon) fillConfig() shm.FillConfig {
	local := &d.plan.LocalProducers
	return shm.FillConfig{
		Users: d.plan.users, Groups: d.plan.groups, Prefetch: local.Prefetch, FillersMax: local.Max,
		SettleAfter: time.Duration(local.SettleAfter), Poll: time.Duration(local.Poll),
	}
}

// openStores makes the tables of weights. They take memory when the first publisher comes.
func (d *Daemon) openStores(log *slog.Logger) (err error) {
	d.stores = map[string]*weights.Store{}
	for i := range d.plan.weights {
		t := &d.plan.weights[i]
		d.stores[t.Name], err = weights.NewStore(weights.StoreConfig{
			Table: t.Name, Generations: t.Generations, Capacity: int64(t.Capacity), HugePages: t.HugePages, ReadersMax: d.plan.Limits.MaxTrainers,
		})
		if err != nil {
			return fmt.Errorf("table %q: %w", t.Name, err)
		}
	}
	d.weights, err = weights.NewServer(weights.ServerConfig{Stores: d.stores, Fill: d.fillConfig(), Log: log})
	return err
}

// newTable makes a table, or takes it up from a segment that was kept.
func newTable(p *tablePlan, pool *drainer.Pool, discard bool, log *slog.Logger) (*table, error) {
	if p.path == "" {
		m, err := shm.NewMemory(shm.MemoryConfig{Name: "ingestd " + p.Name, Size: p.bytes, HugePages: p.HugePages, Fillable: p.fill})
		if err != nil {
			return nil, fmt.Errorf("table %q: %w", p.Name, err)
		}
		return makeTable(p, pool, m, false, log)
	}
	began := time.Now()
	m, found, err := openSegment(p, discard)
	if err != nil {
		return nil, err
	}
	t, err := makeTable(p, pool, m, found, log) // which closes m where it fails
	if err == nil && found {
		// That it is in use must be on its disk before the first new sample is: else, if the machine goes down, it would still pass for left in order.
		if err := m.Sync(); err != nil {
			return nil, errors.Join(fmt.Errorf("table %q: %w", p.Name, err), t.Free())
		}
		r := t.Found()
		log.Info("segment taken up", "table", p.Name, "path", p.path, "samples", r.Samples, "batches", len(r.Batches), "published_short", r.Closed,
			"discarded", r.Discarded, "sessions", len(t.Ring().Sessions()), "clean", r.Clean, "dur", time.Since(began))
	}
	if !found || err == nil || !refused(err) {
		return t, err
	}
	err = &SegmentError{p.Name, p.path, errors.Unwrap(err)}
	if !discard {
		return nil, err
	}
	log.Warn("segment overwritten", "table", p.Name, "path", p.path, "err", err)
	if m, err = shm.OpenNamed(shm.MemoryConfig{Name: "ingestd " + p.Name, Path: p.path, Keep: true}); err != nil {
		return nil, &SegmentError{p.Name, p.path, err}
	}
	if m, err = replaceSegment(p, m); err != nil {
		return nil, err
	}
	return makeTable(p, pool, m, false, log)
}

func makeTable(p *tablePlan, pool *drainer.Pool, m *shm.Memory, recover bool, log *slog.Logger) (*table, error) {
	t := &table{plan: p, memory: m}
	var err error
	t.Table, err = engine.New(engine.Config{
		Name: p.Name, Spec: p.spec, BatchSize: p.BatchSize, Batches: p.Batches, Linger: time.Duration(p.Linger), Drainers: pool,
		Sessions: p.Sessions, SessionTTL: time.Duration(p.SessionTTL), CommittedAcks: p.Ack == string(wire.AckCommitted),
		Groups: p.samplerGroups(), DefaultGroup: p.OtherGroups.sampler(""), GroupKeep: time.Duration(p.GroupKeep),
		Memory: func(int64) (engine.Memory, error) { return m, nil }, Recover: recover, Boot: bootID(), Steps: p.steps(log),
	})
	return t, err
}

// registry finds tables for both servers.
func (d *Daemon) registry() registry { return registry{d} }

type registry struct{ d *Daemon }

func (r registry) find(name string) *table {
	for _, t := range r.d.tables {
		if t.Name() == name {
			return t
		}
	}
	return nil
}

// Names implements ingest.Tables and shm.Tables.
func (r registry) Names() []string {
	var names []string
	for i := range r.d.plan.Tables {
		names = append(names, r.d.plan.Tables[i].Name)
	}
	return names
}

// Kind implements ingest.Tables.
func (r registry) Kind(name string) ingest.Kind {
	for i := range r.d.plan.Tables {
		if t := &r.d.plan.Tables[i]; t.Name == name {
			return t.kind()
		}
	}
	return ""
}

// Table implements shm.Tables.
func (r registry) Table(name string) (shm.Table, bool) {
	t := r.find(name)
	if t == nil {
		return shm.Table{}, false
	}
	st := shm.Table{
		Name: name, Spec: t.Spec(), View: &t.Ring().View, Memory: t.memory, Source: t.Sampler(), Linger: time.Duration(t.plan.Linger),
		Holder: func() (wire.Note, bool) {
			_, ok := t.Holder()
			return *ingest.RingFull(t, time.Time{}, time.Now()), ok
		},
	}
	if t.plan.fill {
		st.Fill = r.d.fill(t)
	}
	if t.Steps() != nil {
		st.PrefetchMax = stepsPrefetchMax
	}
	return st, true
}

// stepsPrefetchMax is the most chunks that a reader of tensors may hold, if the ring has so many: it keeps those of the steps that are not complete.
const stepsPrefetchMax = 1 << 15

// fill opens streams of producers that fill places of a table in place.
func (d *Daemon) fill(t *table) func(context.Context, *wire.Hello, func()) (*drainer.Lender, error) {
	return func(ctx context.Context, hello *wire.Hello, taken func()) (*drainer.Lender, error) {
		m, refusal := ingest.ReadManifest(hello)
		if refusal != nil {
			return nil, refusal
		}
		opening, cancel := context.WithTimeout(ctx, time.Duration(d.plan.Limits.HandshakeTimeout))
		defer cancel()
		l, err := t.OpenLender(opening, engine.StreamConfig{Session: hello.Session, Manifest: m, Taken: taken})
		if err != nil && ctx.Err() == nil {
			return nil, ingest.RefuseStream(hello, err)
		}
		return l, err
	}
}

type ingestTables struct{ registry }

// Lookup implements ingest.Tables.
func (r ingestTables) Lookup(name string) (ingest.Table, bool) {
	t := r.find(name)
	return t, t != nil
}

// attach serves who attaches, or publishes or reads weights, until it ends or is cut off.
func (d *Daemon) attach(conn net.Conn, hello *wire.Hello) error {
	if !d.enter() {
		told := d.trainers.Refused(wire.CodeShuttingDown)
		if told == nil {
			return errors.Join(wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping, and too many are told so"), conn.Close())
		}
		defer told()
		return refuse(conn, wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping"))
	}
	defer d.attachments.Done()
	if t := d.registry().find(hello.Table); t != nil && hello.Role == wire.RoleTrain {
		t.attached.Add(1)
		defer func() {
			t.attached.Add(-1)
			t.Ring().Space.Wake() // where the draining waits
		}()
	}
	if hello.Role == wire.RolePublish || hello.Role == wire.RoleSubscribe {
		if hello.InPlace && !d.mayPublishInPlace(hello.Table) {
			return refuse(conn, wire.Refuse(wire.CodeNotPermitted,
				"the configuration (local_producers) lets nobody write weights of table %q in place; publish without in_place", hello.Table))
		}
		return d.weights.Serve(d.cutOff, conn, hello)
	}
	local, ok := conn.(*net.UnixConn)
	if hello.Role == wire.RoleTrain && (!ok || hello.Stream) {
		return d.remote.Serve(d.cutOff, conn, hello)
	}
	if !ok { // tcpingest has refused it
		return errors.Join(fmt.Errorf("role %q came over %T", hello.Role, conn), conn.Close())
	}
	return d.trainers.Serve(d.cutOff, local, hello)
}

// refuse tells a peer why it cannot attach, and closes; first its own side, since the end of a stream of QUIC would else take the reason along.
func refuse(conn net.Conn, r *wire.Refusal) error {
	_ = conn.SetDeadline(time.Now().Add(farewellTimeout))
	err := wire.WriteRefusal(conn, r)
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		err = errors.Join(err, c.CloseWrite())
	}
	return errors.Join(err, conn.Close())
}

// mayPublishInPlace tells whether the configuration offers that at all; who may, package weights judges.
func (d *Daemon) mayPublishInPlace(table string) bool {
	for i := range d.plan.weights {
		if t := &d.plan.weights[i]; t.Name == table && t.LocalProducers != nil && !*t.LocalProducers {
			return false
		}
	}
	return d.plan.LocalProducers.Enabled
}

// enter counts an attachment, unless none may begin any more because the segments are going away.
func (d *Daemon) enter() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.leaving {
		d.attachments.Add(1)
	}
	return !d.leaving
}

// Addresses is where the daemon really listens, by scheme; the first of each. It is what ReadyFile holds.
type Addresses struct {
	TCP   string `json:"tcp"`
	TLS   string `json:"tls"`
	QUIC  string `json:"quic"`
	Unix  string `json:"unix"`
	Echo  string `json:"echo"`
	Admin string `json:"admin"`
}

// Addresses returns where the daemon listens, with real ports.
func (d *Daemon) Addresses() Addresses {
	var a Addresses
	for _, l := range d.listeners {
		switch {
		case l.scheme == "tcp" && a.TCP == "":
			a.TCP = l.url()
		case l.scheme == "tls" && a.TLS == "":
			a.TLS = l.url()
		case l.scheme == "quic" && a.QUIC == "":
			a.QUIC = l.url()
		case l.scheme == "unix" && a.Unix == "":
			a.Unix = l.url()
		case l.scheme == "echo" && a.Echo == "":
			a.Echo = l.url()
		}
	}
	if d.admin != nil {
		a.Admin = d.admin.url()
	}
	return a
}

// Run serves until ctx ends or a listener fails, and then stops in order. It may be called once.
func (d *Daemon) Run(ctx context.Context) error {
	running, halt := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() { _ = d.pool.Run(running) })
	for _, t := range d.tables {
		group.Go(func() { _ = t.Run(running) })
	}
	if d.access.tokens != nil {
		group.Go(func() { _ = d.access.tokens.Run(running) })
	}
	if d.access.filter != nil {
		group.Go(func() { _ = d.access.filter.Run(running) })
	}
	failed := make(chan error, len(d.listeners)+1)
	for _, l := range d.listeners {
		group.Go(func() { failed <- d.serve(running, l) })
	}
	if d.admin != nil {
		group.Go(func() { failed <- d.admin.serve() })
	}
	err := d.announce()
	if err == nil {
		d.state.CompareAndSwap(stateStarting, stateServing)
		d.log.Info("serving", "tables", len(d.tables), "addresses", d.Addresses())
		select {
		case <-ctx.Done():
		case <-d.now.Done():
		case err = <-failed:
		}
	}
	err = errors.Join(err, d.stop())
	halt()
	err = errors.Join(err, d.closeDoors())
	group.Wait() // before the memory goes that they work in
	if d.now.Err() == nil {
		err = errors.Join(err, d.leaveClean())
	}
	err = errors.Join(err, d.Close())
	if d.plan.ReadyFile != "" {
		_ = os.Remove(d.plan.ReadyFile)
	}
	return err
}

// announce writes ReadyFile, whole or not at all.
func (d *Daemon) announce() error {
	path := d.plan.ReadyFile
	if path == "" {
		return nil
	}
	text, err := json.Marshal(d.Addresses())
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".ready-*")
	if err != nil {
		return fmt.Errorf("write --ready-file: %w", err)
	}
	_, err = f.Write(append(text, '\n'))
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write --ready-file: %w", err)
	}
	return nil
}

// StopNow makes Run return without waiting for producers and trainers.
func (d *Daemon) StopNow() { d.stopNow() }

// closeDoors closes listeners and admin endpoint.
func (d *Daemon) closeDoors() error {
	var errs []error
	if d.quic != nil { // before its sockets
		errs = append(errs, d.quic.Close())
	}
	for _, l := range d.listeners {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if d.admin != nil {
		errs = append(errs, d.admin.close())
	}
	return errors.Join(errs...)
}

// Close gives back what New opened. Run does so itself.
func (d *Daemon) Close() error {
	errs := []error{d.closeDoors()}
	for _, t := range d.tables {
		errs = append(errs, t.Free())
	}
	for _, s := range d.stores {
		errs = append(errs, s.Close())
	}
	d.tables, d.stores = nil, nil
	d.stopNow()
	d.cut()
	return errors.Join(errs...)
}
