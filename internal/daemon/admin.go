package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/metrics"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/weights"
)

// admin is the HTTP endpoint for people and machines that watch the daemon. It changes nothing but bans.
type admin struct {
	daemon   *Daemon
	listener net.Listener
	server   *http.Server
	log      *slog.Logger

	door    *bans.Door   // nil on loopback and on a unix socket, so that bans can always be cleared from there
	open    atomic.Int64 // connections
	refused ingest.Reasons

	mu     sync.RWMutex // held for reading by handlers that look into the tables
	closed bool         // the tables are going away; under mu
}

const (
	adminHeaderTimeout = 5 * time.Second
	adminReadTimeout   = 10 * time.Second
	adminWriteTimeout  = 2 * time.Minute // a CPU profile takes 30 s unless asked for longer
	adminIdleTimeout   = 30 * time.Second
	adminCloseTimeout  = time.Second
	adminHeaderMax     = 16 << 10
)

func newAdmin(d *Daemon, l net.Listener, log *slog.Logger) *admin {
	a := &admin{daemon: d, listener: l, log: log.With("component", "admin")}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", a.index)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { say(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", a.ready)
	mux.HandleFunc("GET /status", a.guard(a.status))
	mux.HandleFunc("GET /metrics", a.guard(a.metrics(log)))
	mux.HandleFunc("GET /bans", a.bans)
	mux.HandleFunc("DELETE /bans", a.clearBans)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	if at := d.plan.admin; at.scheme != "unix" && !at.loopback() {
		a.door = d.access.door
		a.listener = d.access.guard(listener{address: *at, Listener: l}, log).Listener
	}
	if a.door != nil && d.access.gate != nil {
		a.log.Warn("the admin endpoint asks for tokens, and their secrets reach it in the clear: let it be asked over a tunnel only, or keep it on 127.0.0.1", "address", l.Addr().String())
	}
	a.server = &http.Server{
		Handler:           a.authorized(local(mux)),
		ReadHeaderTimeout: adminHeaderTimeout,
		ReadTimeout:       adminReadTimeout,
		WriteTimeout:      adminWriteTimeout,
		IdleTimeout:       adminIdleTimeout,
		MaxHeaderBytes:    adminHeaderMax,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
		ConnContext:       withConn,
	}
	return a
}

// local refuses requests that a web page on another site has made a browser send: their Host is a name (DNS rebinding).
func local(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if host != "localhost" && net.ParseIP(host) == nil {
			say(w, http.StatusForbidden, "ask by IP address or as localhost, not as "+host)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func say(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(text + "\n"))
}

func (a *admin) index(w http.ResponseWriter, _ *http.Request) {
	say(w, http.StatusOK, "ingestd "+a.daemon.version+"\n\n/healthz\n/readyz\n/status\n/metrics\n/bans\n/debug/pprof/")
}

func (a *admin) ready(w http.ResponseWriter, _ *http.Request) {
	state := a.daemon.state.Load()
	code := http.StatusOK
	if state != stateServing {
		code = http.StatusServiceUnavailable
	}
	say(w, code, stateNames[state])
}

// guard keeps the tables there while a handler looks at them.
func (a *admin) guard(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		a.mu.RLock()
		defer a.mu.RUnlock()
		if a.closed {
			say(w, http.StatusServiceUnavailable, "stopped")
			return
		}
		next(w, r)
	}
}

func (a *admin) status(w http.ResponseWriter, _ *http.Request) {
	answer(w, a.daemon.Status())
}

func (a *admin) metrics(log *slog.Logger) http.HandlerFunc {
	d := a.daemon
	access := d.access.sources()
	access.Admin = a.refused.Snapshot
	segments := map[string]int64{}
	for _, t := range d.plan.tables {
		segments[t.Name] = t.bytes
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		metrics.New(metrics.Sources{
			Version:    d.version,
			Ready:      func() bool { return d.state.Load() == stateServing },
			Tables:     d.tableStats,
			Transports: d.transportStats,
			Trainers:   func() shm.Stats { return d.trainers.Stats() },
			Weights:    d.weightsStats,
			Access:     access,
			Segments:   segments,
		}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError), MaxRequestsInFlight: 4,
	}).ServeHTTP
}

func (d *Daemon) tableStats() []engine.Stats {
	all := make([]engine.Stats, len(d.tables))
	for i, t := range d.tables {
		all[i] = t.Stats()
	}
	return all
}

func (d *Daemon) weightsStats() (all []weights.Stats, served weights.ServerStats) {
	for i := range d.plan.weights {
		all = append(all, d.stores[d.plan.weights[i].Name].Stats())
	}
	return all, d.weights.Stats()
}

// url is where it really listens.
func (a *admin) url() string {
	return listener{address: *a.daemon.plan.admin, Listener: a.listener}.url()
}

func (a *admin) serve() error {
	err := a.server.Serve(&adminListener{a.listener, a})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return &ListenError{a.url(), "the admin endpoint failed", err}
}

// close ends the endpoint; when it returns no handler looks into a table any more.
func (a *admin) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), adminCloseTimeout)
	defer cancel()
	err := a.server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = a.server.Close()
	}
	if lerr := a.listener.Close(); !errors.Is(lerr, net.ErrClosed) { // of a server that never served
		err = errors.Join(err, lerr)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	return err
}
