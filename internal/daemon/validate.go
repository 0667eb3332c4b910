package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"reflect"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/wire"
)

// fieldNames lists the YAML names of one of the configuration's structs.
func fieldNames(structName string) []string {
	var names []string
	for _, v := range []any{Config{}, Bans{}, TLS{}, Log{}, Limits{}, LocalProducers{}, Table{}, Group{}, Policy{}} {
		t := reflect.TypeOf(v)
		if t.Name() != structName {
			continue
		}
		for i := range t.NumField() {
			if f := t.Field(i); f.Anonymous {
				names = append(names, fieldNames(f.Name)...)
			} else {
				name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
				names = append(names, name)
			}
		}
	}
	return names
}

// plan is a validated configuration: everything parsed, every size worked out.
type plan struct {
	Config
	level     slog.Level
	listeners []address
	admin     *address // nil: off
	users     []uint32 // who may write in place
	groups    []uint32
	tables    []tablePlan // rings
	weights   []Table
}

type tablePlan struct {
	Table
	spec   *spec.Spec
	layout ring.Layout
	bytes  int64
	path   string // where the segment is kept; empty: nowhere
	fill   bool   // samples may be written in place
}

// Validate checks the whole configuration and fills in what it leaves open, without opening anything but spec files. The error is a *ConfigError.
func (cfg *Config) Validate() error {
	_, err := cfg.plan()
	return err
}

func (cfg *Config) plan() (*plan, error) {
	p := &plan{Config: *cfg}
	for _, step := range []func() error{p.checkLog, p.checkLimits, p.checkCompression, p.checkLocalProducers, p.checkTables, p.checkTLS, p.checkListeners} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	*cfg = p.Config
	return p, nil
}

func (p *plan) checkLog() error {
	if err := p.level.UnmarshalText([]byte(p.Log.Level)); err != nil {
		return configErrorf("log.level", "%q is none of debug, info, warn and error", p.Log.Level)
	}
	if p.Log.Format != "text" && p.Log.Format != "json" {
		return configErrorf("log.format", "%q is neither text nor json", p.Log.Format)
	}
	return nil
}

func (p *plan) checkLimits() error {
	l := &p.Limits
	for _, f := range []struct {
		name            string
		value, min, max int64
	}{
		{"drainers", int64(p.Drainers), 1, drainer.DrainersMax},
		{"limits.max_connections", int64(l.MaxConnections), 1, 1 << 20},
		{"limits.window_samples", int64(l.WindowSamples), 1, 1 << 24},
		{"limits.window_bytes_max", int64(l.WindowBytesMax), 1, 1 << 40},
		{"limits.window_bytes", int64(l.WindowBytes), 1, int64(l.WindowBytesMax)},
		{"limits.handshake_timeout", int64(l.HandshakeTimeout), 1, 1 << 62},
		{"limits.idle_timeout", int64(l.IdleTimeout), 1, 1 << 62},
		{"limits.stall_timeout", int64(l.StallTimeout), 1, 1 << 62},
		{"limits.ack_timeout", int64(l.AckTimeout), 1, 1 << 62},
		{"limits.max_trainers", int64(l.MaxTrainers), 1, 1 << 16},
		{"limits.prefetch", int64(l.Prefetch), 0, 64},
		{"limits.half_open", int64(l.HalfOpen), 1, 1 << 16},
		{"limits.half_open_per_address", int64(l.HalfOpenPerAddress), 1, int64(l.HalfOpen)},
	} {
		if f.value < f.min || f.value > f.max {
			if strings.HasSuffix(f.name, "timeout") {
				return configErrorf(f.name, "must be above 0")
			}
			return configErrorf(f.name, "is %d, must be %d to %d", f.value, f.min, f.max)
		}
	}
	return nil
}

func (p *plan) checkCompression() error {
	for _, kind := range p.Compression {
		if c := wire.Compression(kind); c == wire.CompressionNone || !c.Known() {
			return configErrorf("compression", "%q is none of s2, zstd, s2+shuffle and zstd+shuffle", kind)
		}
	}
	return nil
}

// compressions is what producers are offered.
func (p *plan) compressions() []wire.Compression {
	kinds := make([]wire.Compression, len(p.Compression))
	for i, kind := range p.Compression {
		kinds[i] = wire.Compression(kind)
	}
	return kinds
}

func (p *plan) checkTables() error {
	if len(p.Tables) == 0 {
		return configErrorf("tables", "there is none: give --table NAME --spec SPEC (or --kind tensors, or --kind weights), or list tables in the file")
	}
	p.Tables = slices.Clone(p.Tables)
	seen := map[string]bool{}
	for i := range p.Tables {
		t := &p.Tables[i]
		where := fmt.Sprintf("tables[%d]", i)
		if t.Name != "" {
			where = fmt.Sprintf("table %q", t.Name)
		}
		if err := checkName(t.Name); err != nil {
			return configErrorf(where+": name", "%v", err)
		}
		if seen[t.Name] {
			return configErrorf(where, "there are two of that name")
		}
		seen[t.Name] = true
		if err := t.checkKind(where); err != nil {
			return err
		}
		if t.kind() == ingest.KindWeights {
			p.weights = append(p.weights, *t)
			continue
		}
		tp, err := t.plan(where)
		if err != nil {
			return err
		}
		tp.fill = p.LocalProducers.Enabled && (t.LocalProducers == nil || *t.LocalProducers)
		if err := tp.keep(p.SegmentDir, where); err != nil {
			return err
		}
		p.tables = append(p.tables, *tp)
	}
	return nil
}

// checkName says what is wrong with the name of a table or a group.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("is missing")
	case len(name) > wire.NameBytesMax:
		return fmt.Errorf("has %d bytes, at most %d are allowed", len(name), wire.NameBytesMax)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("holds control characters or bytes that are not UTF-8")
	}
	return nil
}

// plan fills in batch size and batches and works out the layout.
func (t *Table) plan(where string) (*tablePlan, error) {
	s, err := t.loadSpec(where)
	if err != nil {
		return nil, err
	}
	if t.BatchSize == 0 {
		t.BatchSize = DefaultBatchSize
	}
	if err := t.checkPolicies(where); err != nil {
		return nil, err
	}
	if t.Batches != 0 && t.Capacity != 0 {
		return nil, configErrorf(where, "has both batches and capacity: give one")
	}
	layout := ring.Layout{BatchSize: t.BatchSize, Batches: ring.BatchesMin, Columns: s.LeafBytes(), Spec: s.JSON(),
		Fingerprint: s.Fingerprint(), Table: t.Name, Sessions: t.Sessions}
	least, err := layout.Bytes()
	if err != nil {
		return nil, configErrorf(where, "%v", err)
	}
	fits := func(n int) bool {
		l := layout
		l.Batches = n
		size, err := l.Bytes()
		return err == nil && size <= int64(t.Capacity)
	}
	switch {
	case t.Capacity != 0:
		if int64(t.Capacity) < least {
			return nil, configErrorf(where, "capacity %v holds no two batches of %d samples: they need %d bytes; raise capacity or lower batch_size", t.Capacity, t.BatchSize, least)
		}
		t.Batches = mostBatches(fits)
	case t.Batches == 0:
		t.Capacity = 256 << 20
		t.Batches = max(mostBatches(fits), 4)
	}
	t.Capacity = 0 // said by batches from here on
	layout.Batches = t.Batches
	size, err := layout.Bytes()
	if err != nil {
		return nil, configErrorf(where, "%v", err)
	}
	return &tablePlan{Table: *t, spec: s, layout: layout, bytes: size}, nil
}

// loadSpec returns the layout of the table's samples, or chunks.
func (t *Table) loadSpec(where string) (*spec.Spec, error) {
	if t.kind() == ingest.KindTensors {
		s, err := steps.Spec(int(t.ChunkBytes))
		if err != nil {
			return nil, configErrorf(where+": chunk_bytes", "%v", err)
		}
		return s, nil
	}
	s, err := LoadSpec(t.Spec)
	if err != nil {
		return nil, configErrorf(where+": spec", "%v", err)
	}
	t.Spec = s.Text()
	return s, nil
}

// mostBatches returns the largest capacity in batches that fits, 0 if not even the least does.
func mostBatches(fits func(int) bool) int {
	n := sort.Search(ring.BatchesMax-ring.BatchesMin+1, func(i int) bool { return !fits(ring.BatchesMin + i) })
	if n == 0 {
		return 0
	}
	return ring.BatchesMin + n - 1
}

// LoadSpec reads a spec: its text form, JSON, or @file with either.
func LoadSpec(text string) (*spec.Spec, error) {
	if text == "" {
		return nil, fmt.Errorf("is missing: say what one sample is, such as image:F32[8,8],label:I32")
	}
	data := []byte(text)
	if path, ok := strings.CutPrefix(text, "@"); ok {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if info.Size() > spec.TextBytesMax {
			return nil, fmt.Errorf("%s has %d bytes, a spec at most %d", path, info.Size(), spec.TextBytesMax)
		}
		if data, err = os.ReadFile(path); err != nil {
			return nil, err
		}
		s, err := spec.Parse([]byte(strings.TrimSpace(string(data))))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return s, nil
	}
	return spec.Parse(data)
}

// keep works out where the segment is kept.
func (t *tablePlan) keep(dir, where string) error {
	if t.SegmentDir != nil {
		dir = *t.SegmentDir
	}
	if dir == "" {
		return nil
	}
	if !filepath.IsAbs(dir) {
		return configErrorf(where+": segment_dir", "%q is not absolute: say it from / on", dir)
	}
	if t.HugePages {
		return configErrorf(where,
			"has both huge_pages and a segment_dir: a file is kept on ordinary pages; take one of them out (segment_dir: %q for this table)", "")
	}
	if err := checkSegmentDir(dir); err != nil {
		return configErrorf(where+": segment_dir", "%v", err)
	}
	t.path = segmentPath(dir, t.Name)
	return nil
}

// checkPolicies fills in and checks all that is not about the size.
func (t *Table) checkPolicies(where string) error {
	if t.Ack == "" {
		t.Ack = string(wire.AckQueued)
	}
	if t.Ack != string(wire.AckQueued) && t.Ack != string(wire.AckCommitted) {
		return configErrorf(where+": ack", "%q is neither queued nor committed", t.Ack)
	}
	if t.Sessions == 0 {
		t.Sessions = ring.SessionsDefault
	}
	if t.Sessions < 1 || t.Sessions > ring.SessionsMax {
		return configErrorf(where+": sessions", "is %d, must be 1 to %d", t.Sessions, ring.SessionsMax)
	}
	if t.SessionTTL == 0 {
		t.SessionTTL = DefaultSessionTTL
	}
	if t.GroupKeep == 0 {
		t.GroupKeep = DefaultGroupKeep
	}
	if t.GroupKeep < Duration(sampler.LingerMin) {
		return configErrorf(where+": group_keep", "is %v, must be at least %v", t.GroupKeep, sampler.LingerMin)
	}
	if len(t.Groups) > ring.GroupsMax {
		return configErrorf(where+": groups", "are %d, may be %d", len(t.Groups), ring.GroupsMax)
	}
	t.Groups = slices.Clone(t.Groups)
	for i := range t.Groups {
		g := &t.Groups[i]
		at := fmt.Sprintf("%s: groups[%d]", where, i)
		if err := checkName(g.Name); err != nil {
			return configErrorf(at+": name", "%v", err)
		}
		if slices.ContainsFunc(t.Groups[:i], func(other Group) bool { return other.Name == g.Name }) {
			return configErrorf(at, "there are two of the name %q", g.Name)
		}
		if err := g.Policy.check(at); err != nil {
			return err
		}
	}
	return t.OtherGroups.check(where + ": other_groups")
}

// sampler is the group as package sampler knows it. The policy was checked.
func (p *Policy) sampler(name string) sampler.GroupConfig {
	g := sampler.GroupConfig{Name: name}
	_ = g.OnDeath.UnmarshalText([]byte(p.OnDeath))
	_ = g.OnLag.UnmarshalText([]byte(p.OnLag))
	return g
}

func (t *Table) samplerGroups() (all []sampler.GroupConfig) {
	for _, g := range t.Groups {
		all = append(all, g.Policy.sampler(g.Name))
	}
	return all
}

func (p *Policy) check(where string) error {
	if p.OnDeath == "" {
		p.OnDeath = "offer"
	}
	if p.OnLag == "" {
		p.OnLag = "hold"
	}
	if p.OnDeath != "offer" && p.OnDeath != "drop" {
		return configErrorf(where+": on_death", "%q is neither offer nor drop", p.OnDeath)
	}
	if p.OnLag != "hold" && p.OnLag != "lose" {
		return configErrorf(where+": on_lag", "%q is neither hold nor lose", p.OnLag)
	}
	return nil
}

// Limits of local_producers.
const (
	settleAfterMin = time.Millisecond
	pollMax        = time.Second
)

func (p *plan) checkLocalProducers() error {
	l := &p.LocalProducers
	switch {
	case l.Max < 1 || l.Max > 1<<16:
		return configErrorf("local_producers.max", "is %d, must be 1 to %d", l.Max, 1<<16)
	case l.Prefetch < 1 || l.Prefetch > 64:
		return configErrorf("local_producers.prefetch", "is %d, must be 1 to 64", l.Prefetch)
	case time.Duration(l.SettleAfter) < settleAfterMin:
		return configErrorf("local_producers.settle_after", "is %v, must be at least %v", l.SettleAfter, settleAfterMin)
	case time.Duration(l.Poll) > pollMax:
		return configErrorf("local_producers.poll", "is %v, may be %v: it keeps a processor busy", l.Poll, pollMax)
	}
	var err error
	if p.users, err = numbers(l.Users, userNumber); err != nil {
		return configErrorf("local_producers.users", "%v", err)
	}
	if p.groups, err = numbers(l.Groups, groupNumber); err != nil {
		return configErrorf("local_producers.groups", "%v", err)
	}
	return nil
}

// numbers turns names of users or groups, or their numbers, into numbers.
func numbers(names []string, lookup func(string) (string, error)) ([]uint32, error) {
	var all []uint32
	for _, name := range names {
		n, err := strconv.ParseUint(name, 10, 32)
		if err != nil {
			text, err := lookup(name)
			if err != nil {
				return nil, err
			}
			if n, err = strconv.ParseUint(text, 10, 32); err != nil {
				return nil, fmt.Errorf("%q has the number %s, which is none here", name, text)
			}
		}
		all = append(all, uint32(n))
	}
	return all, nil
}

func userNumber(name string) (string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", fmt.Errorf("there is no user %q on this machine: give a name or a number that there is", name)
	}
	return u.Uid, nil
}

func groupNumber(name string) (string, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", fmt.Errorf("there is no group %q on this machine: give a name or a number that there is", name)
	}
	return g.Gid, nil
}
