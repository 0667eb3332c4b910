package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"sort"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// fieldNames lists the YAML names of one of the configuration's structs.
func fieldNames(structName string) []string {
	var names []string
	for _, v := range []any{Config{}, Log{}, Limits{}, Table{}} {
		t := reflect.TypeOf(v)
		if t.Name() != structName {
			continue
		}
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
			names = append(names, name)
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
	tables    []tablePlan
}

type tablePlan struct {
	Table
	spec   *spec.Spec
	layout ring.Layout
	bytes  int64
}

// Validate checks the whole configuration and fills in what it leaves open, without opening anything but spec files. The error is a *ConfigError.
func (cfg *Config) Validate() error {
	_, err := cfg.plan()
	return err
}

func (cfg *Config) plan() (*plan, error) {
	p := &plan{Config: *cfg}
	for _, step := range []func() error{p.checkLog, p.checkLimits, p.checkTables, p.checkListeners} {
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

func (p *plan) checkTables() error {
	if len(p.Tables) == 0 {
		return configErrorf("tables", "there is none: give --table NAME --spec SPEC, or list tables in the file")
	}
	p.Tables = slices.Clone(p.Tables)
	seen := map[string]bool{}
	for i := range p.Tables {
		t := &p.Tables[i]
		where := fmt.Sprintf("tables[%d]", i)
		if t.Name != "" {
			where = fmt.Sprintf("table %q", t.Name)
		}
		if err := checkTableName(t.Name); err != nil {
			return configErrorf(where+": name", "%v", err)
		}
		if seen[t.Name] {
			return configErrorf(where, "there are two of that name")
		}
		seen[t.Name] = true
		tp, err := t.plan(where)
		if err != nil {
			return err
		}
		p.tables = append(p.tables, *tp)
	}
	return nil
}

func checkTableName(name string) error {
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
	s, err := LoadSpec(t.Spec)
	if err != nil {
		return nil, configErrorf(where+": spec", "%v", err)
	}
	t.Spec = s.Text()
	if t.BatchSize == 0 {
		t.BatchSize = DefaultBatchSize
	}
	if t.Batches != 0 && t.Capacity != 0 {
		return nil, configErrorf(where, "has both batches and capacity: give one")
	}
	layout := ring.Layout{BatchSize: t.BatchSize, Batches: ring.BatchesMin, Columns: s.LeafBytes(), Spec: s.JSON(), Fingerprint: s.Fingerprint(), Table: t.Name}
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
