package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// daemon is a running `ingestd serve` with one table.
type daemon struct {
	*process
	launch launch
	folder string  // holds its socket and ready file
	Unix   string  `json:"unix"`
	TCP    string  `json:"tcp"`
	TLS    string  `json:"tls"`
	QUIC   string  `json:"quic"`
	Admin  string  `json:"admin"`
	asking float64 // objects allocated by one look at mallocs
	http   http.Client
}

// startTimeout is long because a large ring is populated before the daemon is ready.
const startTimeout = 3 * time.Minute

// readyPoll is how often the ready file is looked for; a restart's time is exact to it.
const readyPoll = time.Millisecond

const tableName = "bench"

func startDaemon(ctx context.Context, opt *Options, c Case, extra ...string) (*daemon, error) {
	layout, err := c.spec()
	if err != nil {
		return nil, err
	}
	folder, err := os.MkdirTemp("", "ingestd-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for the daemon's socket: %w", err)
	}
	return beginDaemon(ctx, opt, folder, append([]string{
		"--table", tableName, "--spec", layout.Text(), "--batch-size", strconv.Itoa(c.BatchSize), "--batches", strconv.Itoa(c.Batches),
	}, extra...))
}

// startConfigured starts a daemon with the configuration in this YAML text.
func startConfigured(ctx context.Context, opt *Options, config string) (*daemon, error) {
	folder, err := os.MkdirTemp("", "ingestd-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for the daemon's socket: %w", err)
	}
	file := filepath.Join(folder, "ingestd.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(folder))
	}
	return beginDaemon(ctx, opt, folder, []string{"--config", file})
}

// beginDaemon starts it with its socket in the folder, which is its own from now on.
func beginDaemon(ctx context.Context, opt *Options, folder string, tables []string) (*daemon, error) {
	d := &daemon{folder: folder, http: http.Client{Transport: opt.sites.transport()}}
	args := slices.Concat([]string{"serve"}, tables, opt.sites.listen(), []string{
		"--listen", "unix://" + filepath.Join(folder, "ingestd.sock"),
		"--admin", "127.0.0.1:0", "--ready-file", d.readyFile(),
	}, opt.ServeArgs)
	d.launch = launch{name: "daemon", binary: opt.Binary, args: args, side: opt.sites.server}
	if err := d.begin(ctx); err != nil {
		return nil, errors.Join(err, os.RemoveAll(folder))
	}
	return d, nil
}

const anyPort = "tcp://127.0.0.1:0"

func (d *daemon) readyFile() string { return filepath.Join(d.folder, "ready.json") }

// begin starts it and waits until it is ready. After an error it does not run.
func (d *daemon) begin(ctx context.Context) error {
	var err error
	if d.process, err = d.launch.start(); err != nil {
		return err
	}
	d.logOutput()
	if err := d.awaitReady(ctx, d.readyFile()); err != nil {
		d.kill()
		return err
	}
	return nil
}

// restart kills it and starts it again at the same addresses. between is called while none runs. It returns when it was killed and when the new one was
// started and was ready, in monotonic nanoseconds.
func (d *daemon) restart(ctx context.Context, between func() error) (killed, started, ready int64, err error) {
	for i, arg := range d.launch.args {
		if arg == anyPort {
			d.launch.args[i] = d.TCP
		}
	}
	killed = monotonic()
	d.kill()
	if err := errors.Join(os.Remove(d.readyFile()), between()); err != nil {
		return 0, 0, 0, err
	}
	d.http.CloseIdleConnections()
	started = monotonic()
	err = d.begin(ctx)
	return killed, started, monotonic(), err
}

// awaitReady waits until the daemon has written its addresses.
func (d *daemon) awaitReady(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		text, err := os.ReadFile(file)
		if err == nil && json.Unmarshal(text, d) == nil {
			break
		}
		select {
		case <-d.done:
			return d.fail(errors.New("did not start"))
		case <-ctx.Done():
			return d.fail(fmt.Errorf("wrote no %s: %w", file, ctx.Err()))
		case <-time.After(readyPoll):
		}
	}
	d.TCP, d.Unix = withScheme("tcp://", d.TCP), withScheme("unix://", d.Unix)
	d.Admin = withScheme("http://", d.Admin)
	return nil
}

// address is where it listens for a transport.
func (d *daemon) address(transport string) string {
	switch transport {
	case transportTLS:
		return withScheme("tls://", d.TLS)
	case transportQUIC:
		return withScheme("quic://", d.QUIC)
	}
	return d.TCP
}

func withScheme(scheme, address string) string {
	if address == "" || strings.Contains(address, "://") {
		return address
	}
	return scheme + address
}

// cleanUp removes what is left of it when it has ended.
func (d *daemon) cleanUp() error {
	d.http.CloseIdleConnections()
	return os.RemoveAll(d.folder)
}

func (d *daemon) get(ctx context.Context, path string) (io.ReadCloser, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, d.Admin+path, nil)
	if err != nil {
		return nil, err
	}
	answer, err := d.http.Do(r)
	if err != nil {
		return nil, d.fail(fmt.Errorf("ask its admin endpoint: %w", err))
	}
	if answer.StatusCode != http.StatusOK {
		return nil, d.fail(errors.Join(fmt.Errorf("GET %s: %s", path, answer.Status), answer.Body.Close()))
	}
	return answer.Body, nil
}

// mallocs returns how many objects the daemon has allocated in its life, as runtime.ReadMemStats counts them, which is the text form of the heap
// profile's last part. The metrics' go_memstats_mallocs_total will not do: it leaves out what the processors have not handed in yet, some thousand objects.
func (d *daemon) mallocs(ctx context.Context) (float64, error) {
	body, err := d.get(ctx, "/debug/pprof/heap?debug=1")
	if err != nil {
		return 0, err
	}
	defer body.Close()
	found := -1.0
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "# Mallocs = "); ok {
			found, err = strconv.ParseFloat(text, 64)
		}
	}
	switch err := errors.Join(err, lines.Err()); {
	case err != nil:
		return 0, d.fail(fmt.Errorf("read its heap profile: %w", err))
	case found < 0:
		return 0, d.fail(errors.New("its heap profile does not say how many objects were allocated"))
	}
	return found, nil
}

// weighAsking finds out what being asked for mallocs itself allocates; before there is load.
func (d *daemon) weighAsking(ctx context.Context) error {
	var seen [6]float64
	for i := range seen {
		n, err := d.mallocs(ctx)
		if err != nil {
			return err
		}
		seen[i] = n
	}
	// The first ones also open the connection and warm pools.
	d.asking = median([]float64{seen[3] - seen[2], seen[4] - seen[3], seen[5] - seen[4]})
	return nil
}

// profile fetches a CPU profile of the given length into a file.
func (d *daemon) profile(ctx context.Context, file string, length time.Duration) error {
	seconds := max(1, int(length.Seconds()))
	body, err := d.get(ctx, "/debug/pprof/profile?seconds="+strconv.Itoa(seconds))
	if err != nil {
		return err
	}
	defer body.Close()
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, body)
	return errors.Join(err, out.Close())
}

// Memory is what a process held at most.
type Memory struct {
	PeakBytes  int64   `json:"peak_bytes"` // VmHWM, and huge pages, which it leaves out
	AnonBytes  int64   `json:"anon_bytes"` // RssAnon: its own heap and stacks
	ShmemBytes int64   `json:"shmem_bytes"`
	FileBytes  int64   `json:"file_bytes"` // its program text
	HugeBytes  int64   `json:"huge_bytes"`
	RingBytes  int64   `json:"ring_bytes"`
	BoundBytes int64   `json:"bound_bytes"` // ring + 64 MiB + 512 KiB per connection
	Ratio      float64 `json:"ratio"`       // peak to bound
}

// statusBytes reads what /proc/PID/status says in kB.
func statusBytes(pid int) (map[string]int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	bytesOf := map[string]int64{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if fields := strings.Fields(value); len(fields) == 2 && fields[1] == "kB" {
			n, err := strconv.ParseInt(fields[0], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("line %q of /proc/%d/status: %w", line, pid, err)
			}
			bytesOf[name] = n * kib
		}
	}
	return bytesOf, nil
}

// readMemory reads what a daemon with a ring holds.
func readMemory(pid int, c Case) (*Memory, error) {
	of, err := statusBytes(pid)
	if err != nil {
		return nil, err
	}
	segment, err := c.segmentBytes()
	if err != nil {
		return nil, err
	}
	m := &Memory{
		PeakBytes: of["VmHWM"] + of["HugetlbPages"], AnonBytes: of["RssAnon"], ShmemBytes: of["RssShmem"], FileBytes: of["RssFile"],
		HugeBytes: of["HugetlbPages"], RingBytes: segment, BoundBytes: segment + 64*mib + int64(c.Connections)*512*kib,
	}
	m.Ratio = float64(m.PeakBytes) / float64(m.BoundBytes)
	return m, nil
}
