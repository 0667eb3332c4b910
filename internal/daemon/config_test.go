package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestUnits(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "17": 17, "64KiB": 64 << 10, "1.5GiB": 3 << 29, "100MB": 1e8, " 2 TiB ": 2 << 40, "5B": 5} {
		got, err := ParseSize(text)
		if err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
		if back, err := ParseSize(got.String()); err != nil || back != got {
			t.Errorf("%v does not come back: %v, %v", got, back, err)
		}
	}
	for _, text := range []string{"", "x", "-1", "-1KiB", "1 apple", "9223372036854775807KiB", "NaN", "1e300GiB", "Inf"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q is taken for %d bytes", text, got)
		}
	}
	var d Duration
	for _, text := range []string{"", "5", "-1s", "soon"} {
		if err := d.Set(text); err == nil {
			t.Errorf("%q is taken for %v", text, d)
		}
	}
}

const goodFile = `
listen: [tcp://127.0.0.1:0, "unix:///tmp/x.sock", "echo://127.0.0.1:0/b"]
admin: off
drain_timeout: 5s
limits: {window_bytes: 1MiB, stall_timeout: 3s}
local_producers: {users: [root, 1000], groups: [0], poll: 20us}
tables:
  - {name: a, spec: "x:F32[4]", batch_size: 8, batches: 16}
  - {name: b, spec: "y:U8", capacity: 64MiB, linger: 20ms, ack: committed, sessions: 65536, session_ttl: 1h, segment_dir: "", local_producers: false,
     groups: [{name: eval, on_death: drop, on_lag: lose}, {name: default}], other_groups: {on_lag: lose}, group_keep: 1ms}
  - {name: c, spec: "y:F32[1048576]"}
`

func load(text string) (Config, error) {
	cfg := DefaultConfig()
	if err := cfg.load("test.yaml", []byte(text)); err != nil {
		return cfg, err
	}
	return cfg, cfg.Validate()
}

func TestConfigFile(t *testing.T) {
	cfg, err := load(goodFile)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.DrainTimeout != Duration(5*time.Second) || cfg.Limits.WindowBytes != 1<<20 || cfg.Limits.MaxConnections != DefaultConfig().Limits.MaxConnections {
		t.Errorf("%+v", cfg)
	}
	if b := cfg.Tables[1]; b.BatchSize != DefaultBatchSize || b.Batches < 100 || b.Capacity != 0 || b.Linger != Duration(20*time.Millisecond) {
		t.Errorf("capacity was not turned into batches: %+v", b)
	}
	if b := cfg.Tables[1]; len(b.Groups) != 2 || b.Groups[0] != (Group{"eval", Policy{"drop", "lose"}}) || b.Groups[1] != (Group{"default", Policy{"offer", "hold"}}) ||
		b.OtherGroups != (Policy{"offer", "lose"}) || b.Ack != "committed" || *b.SegmentDir != "" || *b.LocalProducers {
		t.Errorf("%+v", b)
	}
	if c := cfg.Tables[2]; c.Ack != "queued" || c.Sessions != 1024 || c.SessionTTL != DefaultSessionTTL || c.GroupKeep != DefaultGroupKeep || c.OtherGroups != (Policy{"offer", "hold"}) {
		t.Errorf("defaults: %+v", c)
	}
	if c := cfg.Tables[2]; c.Batches != 4 {
		t.Errorf("a large batch gets %d batches by default, want 4", c.Batches)
	}
	// What is printed is a file that means the same.
	again, err := load(cfg.YAML())
	if err != nil || !reflect.DeepEqual(again, cfg) {
		t.Errorf("%v\n%+v\n%+v", err, again, cfg)
	}
}

// TestKinds: what each kind of table gets that does not say, and the limits of what it may say.
func TestKinds(t *testing.T) {
	cfg, err := load("tables: [{name: g, kind: tensors}, {name: w, kind: weights}, {name: h, kind: tensors, chunk_bytes: 64MiB, max_lag: 5, batch_size: 2, linger: 1ms}," +
		"{name: v, kind: weights, generations: 64, capacity: 64KiB}, {name: i, kind: tensors, chunk_bytes: 64KiB, capacity: 1MiB}, {name: u, kind: weights, generations: 2}]")
	if err != nil {
		t.Fatal(err)
	}
	if g := cfg.Tables[0]; g.ChunkBytes != 1<<20 || g.BatchSize != 1 || g.Batches < 250 || g.Batches > 256 || g.MaxLag != 0 || g.Spec != "" || g.Sessions == 0 {
		t.Errorf("tensors: %+v", g)
	}
	if w := cfg.Tables[1]; w.Generations != 3 || w.Capacity != 4<<30 || w.Batches != 0 || w.BatchSize != 0 || w.Ack != "" {
		t.Errorf("weights: %+v", w)
	}
	if h := cfg.Tables[2]; h.Batches != 4 || h.MaxLag != 5 {
		t.Errorf("large chunks: %+v", h)
	}
	if i := cfg.Tables[4]; i.Batches < 8 || i.Batches > 16 {
		t.Errorf("small chunks: %+v", i)
	}
	again, err := load(cfg.YAML())
	if err != nil || !reflect.DeepEqual(again.Tables, cfg.Tables) {
		t.Errorf("%v\n%+v\n%+v", err, again.Tables, cfg.Tables)
	}
	// Kept: the manifests have a file beside the segment's.
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg, err = load("tables: [{name: g/h, kind: tensors}, {name: w, kind: weights}]\nsegment_dir: " + dir)
	if err != nil {
		t.Fatal(err)
	}
	p, err := cfg.plan()
	if err != nil {
		t.Fatal(err)
	}
	if of := p.tables[0].steps(slog.New(slog.DiscardHandler)); of.Path != filepath.Join(dir, "g%2Fh.manifests") || of.ChunkBytes != 1<<20 {
		t.Errorf("%+v", of)
	}
}

// TestEveryFieldIsNamed: no field may be forgotten in the file format, and none may be named twice.
func TestEveryFieldIsNamed(t *testing.T) {
	for _, v := range []any{Config{}, Log{}, Limits{}, LocalProducers{}, Table{}, Group{}, Policy{}} {
		ty := reflect.TypeOf(v)
		seen := map[string]bool{}
		for i, name := range fieldNames(ty.Name()) {
			if name == "" || seen[name] {
				t.Errorf("%s.%s has the name %q in YAML", ty.Name(), ty.Field(i).Name, name)
			}
			seen[name] = true
		}
	}
	// Every limit of the defaults is legal and not zero, but for that of prefetch, where 0 goes by the table.
	l := reflect.ValueOf(DefaultConfig().Limits)
	for i := range l.NumField() {
		if name := l.Type().Field(i).Name; name != "Prefetch" && l.Field(i).IsZero() {
			t.Errorf("Limits.%s has no default", name)
		}
	}
}

func TestBadConfig(t *testing.T) {
	table := "tables: [{name: a, spec: 'x:F32[4]'}]\n"
	for name, c := range map[string]struct{ text, want string }{
		"not yaml":             {"tables: [", "line 1"},
		"unknown field":        {"tables:\n  - name: a\n    sepc: x", "line 3: unknown field sepc; there are name, kind, spec"},
		"unknown at top":       {"listeners: []", "line 1: unknown field listeners; there are listen, admin"},
		"wrong type":           {table + "drainers: many", "`many` is not a whole number"},
		"wrong bool":           {table + "insecure: 7", "true or false"},
		"size":                 {"tables: [{name: a, capacity: lots}]", "line 1: \"lots\" is not a size"},
		"duration":             {table + "drain_timeout: 5", "not a duration"},
		"two documents":        {table + "---\n" + table, "second document"},
		"no table":             {"admin: off", "--table"},
		"no name":              {"tables: [{spec: 'x:U8'}]", "tables[0]: name: is missing"},
		"name twice":           {"tables: [{name: a, spec: 'x:U8'}, {name: a, spec: 'x:U8'}]", "two of that name"},
		"long name":            {"tables: [{spec: 'x:U8', name: " + strings.Repeat("n", 129) + "}]", "at most 128"},
		"no spec":              {"tables: [{name: a}]", "say what one sample is"},
		"bad spec":             {"tables: [{name: a, spec: 'x:F31'}]", "F31"},
		"missing spec file":    {"tables: [{name: a, spec: '@/nonexistent/spec'}]", "/nonexistent/spec"},
		"both sizes":           {"tables: [{name: a, spec: 'x:U8', batches: 4, capacity: 1GiB}]", "give one"},
		"one batch":            {"tables: [{name: a, spec: 'x:U8', batches: 1}]", "2 to"},
		"capacity too small":   {"tables: [{name: a, spec: 'x:F32[4096]', capacity: 64KiB}]", "holds no two batches"},
		"negative batch":       {"tables: [{name: a, spec: 'x:U8', batch_size: -1}]", "batch size is -1"},
		"too large":            {"tables: [{name: a, spec: 'x:F32[1073741824]', batch_size: 100000, batches: 60000}]", "must stay below"},
		"log level":            {table + "log: {level: loud}", "debug, info"},
		"log format":           {table + "log: {format: xml}", "text nor json"},
		"no listener":          {table + "listen: []", "give at least one"},
		"bad scheme":           {table + "listen: ['udp://127.0.0.1:1']", "is none of tcp://"},
		"no port":              {table + "listen: ['tcp://127.0.0.1']", "not host:port"},
		"port range":           {table + "listen: ['tcp://127.0.0.1:99999']", "0 to 65535"},
		"relative socket":      {table + "listen: ['unix://x.sock']", "absolute"},
		"long socket":          {table + "listen: ['unix:///" + strings.Repeat("x", 200) + "']", "107"},
		"open to all":          {table + "listen: ['tcp://0.0.0.0:7420']", "--insecure"},
		"open by empty host":   {table + "listen: ['tcp://:7420']", "--insecure"},
		"open to a name":       {table + "listen: ['tcp://host.example:7420']", "--insecure"},
		"echo open":            {table + "listen: ['echo://192.0.2.1:7420']", "--insecure"},
		"admin open":           {table + "admin: 0.0.0.0:7421", "--insecure"},
		"admin bad":            {table + "admin: nowhere", "or off"},
		"same twice":           {table + "listen: ['tcp://127.0.0.1:7420', 'tcp://127.0.0.1:7420']", "twice"},
		"echo unknown table":   {table + "listen: ['echo://127.0.0.1:0/b']", `no table "b"`},
		"echo which table":     {"tables: [{name: a, spec: 'x:U8'}, {name: b, spec: 'x:U8'}]\nlisten: ['echo://127.0.0.1:0']", "which of the tables"},
		"no connections":       {table + "limits: {max_connections: 0}", "must be 1 to"},
		"ack":                  {"tables: [{name: a, spec: 'x:U8', ack: never}]", "neither queued nor committed"},
		"sessions":             {"tables: [{name: a, spec: 'x:U8', sessions: 65537}]", "must be 1 to 65536"},
		"negative sessions":    {"tables: [{name: a, spec: 'x:U8', sessions: -1}]", "must be 1 to 65536"},
		"group without name":   {"tables: [{name: a, spec: 'x:U8', groups: [{on_lag: lose}]}]", "groups[0]: name: is missing"},
		"group twice":          {"tables: [{name: a, spec: 'x:U8', groups: [{name: g}, {name: g}]}]", "two of the name \"g\""},
		"group policy":         {"tables: [{name: a, spec: 'x:U8', groups: [{name: g, on_death: cry}]}]", "neither offer nor drop"},
		"other groups":         {"tables: [{name: a, spec: 'x:U8', other_groups: {on_lag: wait}}]", "neither hold nor lose"},
		"group field":          {"tables: [{name: a, spec: 'x:U8', groups: [{nam: g}]}]", "unknown field nam; there are name, on_death, on_lag"},
		"too many groups":      {"tables: [{name: a, spec: 'x:U8', groups: [" + strings.Repeat("{name: g}, ", 65) + "]}]", "are 65, may be 64"},
		"group keep":           {"tables: [{name: a, spec: 'x:U8', group_keep: 10us}]", "at least 1ms"},
		"segment dir":          {table + "segment_dir: somewhere", "absolute"},
		"no segment dir":       {table + "segment_dir: /nonexistent/dir", "mkdir -m 700"},
		"foreign segment dir":  {table + "segment_dir: /tmp", "others may write"},
		"segment dir is file":  {table + "segment_dir: /etc/passwd", "is no folder"},
		"huge pages on disk":   {"tables: [{name: a, spec: 'x:U8', huge_pages: true, segment_dir: /tmp}]", "both huge_pages and"},
		"no such user":         {table + "local_producers: {users: [nobody-of-that-name]}", "no user"},
		"no such group":        {table + "local_producers: {groups: [nobody-of-that-name]}", "no group"},
		"settle after":         {table + "local_producers: {settle_after: 1us}", "at least 1ms"},
		"poll":                 {table + "local_producers: {poll: 2s}", "busy"},
		"local producers":      {table + "local_producers: {max: 0}", "must be 1 to"},
		"local prefetch":       {table + "local_producers: {prefetch: 65}", "must be 1 to 64"},
		"kind":                 {"tables: [{name: a, kind: things}]", "none of samples, tensors and weights"},
		"spec of tensors":      {"tables: [{name: a, kind: tensors, spec: 'x:U8'}]", "spec: a table of kind tensors has none; take it out: whoever sends"},
		"spec of weights":      {"tables: [{name: a, kind: weights, spec: 'x:U8'}]", "spec: a table of kind weights has none"},
		"chunks of samples":    {"tables: [{name: a, spec: 'x:U8', chunk_bytes: 64KiB}]", "that is for tables of kind tensors"},
		"lag of samples":       {"tables: [{name: a, spec: 'x:U8', max_lag: 3}]", "that is for tables of kind tensors"},
		"generations, samples": {"tables: [{name: a, spec: 'x:U8', generations: 3}]", "that is for tables of kind weights"},
		"small chunks":         {"tables: [{name: a, kind: tensors, chunk_bytes: 61440}]", "is 60KiB, must be 64KiB to 64MiB"},
		"large chunks":         {"tables: [{name: a, kind: tensors, chunk_bytes: 67112960}]", "must be 64KiB to 64MiB"},
		"odd chunks":           {"tables: [{name: a, kind: tensors, chunk_bytes: 65537}]", "multiple of 4096"},
		"chunks that wait":     {"tables: [{name: a, kind: tensors, batch_size: 2}]", "give a linger"},
		"lag is no number":     {"tables: [{name: a, kind: tensors, max_lag: -1}]", "is not a whole number"},
		"one generation":       {"tables: [{name: a, kind: weights, generations: 1}]", "must be 2 to 64"},
		"many generations":     {"tables: [{name: a, kind: weights, generations: 65}]", "must be 2 to 64"},
		"little weights":       {"tables: [{name: a, kind: weights, capacity: 4KiB}]", "must be 64KiB to"},
		"batches of weights":   {"tables: [{name: a, kind: weights, batches: 4}]", "generations"},
		"kept weights":         {"tables: [{name: a, kind: weights, segment_dir: /var}]", "lie in memory"},
		"groups of weights":    {"tables: [{name: a, kind: weights, groups: [{name: g}]}]", "that is for tables of kind samples"},
		"sessions of weights":  {"tables: [{name: a, kind: weights, sessions: 4}]", "that is for tables of kind samples"},
		"echo to tensors":      {"tables: [{name: a, kind: tensors}]\nlisten: ['echo://127.0.0.1:0']", "samples only"},
		"no handshake timeout": {table + "limits: {handshake_timeout: 0s}", "above 0"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(c.text)
			var typed *ConfigError
			if !errors.As(err, &typed) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "daemon.") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	if _, err := load(table + "listen: ['tcp://0.0.0.0:7420']\ninsecure: true"); err != nil {
		t.Errorf("--insecure does not help: %v", err)
	}
	cfg := DefaultConfig()
	if err := cfg.LoadFile(filepath.Join(t.TempDir(), "none.yaml")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}

func TestSpecFromFile(t *testing.T) {
	for _, text := range []string{"x:F32[4],y:U8\n", `{"leaves":[{"name":"x","dtype":"F32","shape":[4]},{"name":"y","dtype":"U8","shape":[]}]}`} {
		path := filepath.Join(t.TempDir(), "spec")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := LoadSpec("@" + path); err != nil || s.Text() != "x:F32[4],y:U8" {
			t.Errorf("%v, %v", s, err)
		}
	}
	path := filepath.Join(t.TempDir(), "spec")
	if err := os.WriteFile(path, []byte(`{"leaves": 7`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSpec("@" + path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a spec file that is not JSON: %v", err)
	}
}
