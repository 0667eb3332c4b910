package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if built.folder != "" {
			os.RemoveAll(built.folder)
		}
		os.Exit(code)
	}))
}

var built struct {
	once   sync.Once
	folder string
	err    error
}

// buildBinary builds the real program, once: the processes of the bench are its subcommands.
func buildBinary(t *testing.T) string {
	t.Helper()
	built.once.Do(func() {
		if built.folder, built.err = os.MkdirTemp("", "ingestd-bench-test-"); built.err != nil {
			return
		}
		out, err := exec.Command("go", "build", "-o", filepath.Join(built.folder, "ingestd"), "../cmd/ingestd").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("build the binary: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.folder, "ingestd")
}

func TestSmokeTCP(t *testing.T) {
	opt := defaultOptions()
	opt.Smoke = true
	opt.Binary = buildBinary(t)
	opt.JSON = filepath.Join(t.TempDir(), "record.json")
	var out, log bytes.Buffer
	if err := runTCP(t.Context(), opt, &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	var record Record
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	if len(record.Cases) != len(smokeCases()) {
		t.Fatalf("%d cases in the record, want %d", len(record.Cases), len(smokeCases()))
	}
	for i := range record.Cases {
		checkCase(t, &record.Cases[i], contenders...)
	}
	for _, want := range []string{"Throughput", "Latency", "Daemon", "Targets", "rate/bare", "1KiB/1x4"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the tables lack %q:\n%s", want, out.String())
		}
	}
}

// checkCase wants every figure of those there, and says nothing of its size: the machine may be busy.
func checkCase(t *testing.T, c *CaseResult, who ...string) {
	t.Helper()
	all := map[string]*Result{contenderFull: c.Full, contenderBare: c.Bare, contenderCopy: c.Copy}
	for _, name := range who {
		r := all[name]
		if r == nil || len(r.Runs) != 1 {
			t.Fatalf("%s: no run of %s", c.Name, name)
		}
		if m := &r.Median; !(m.SamplesPerSecond > 0 && m.GBPerSecond > 0 && m.ServerCPU > 0) {
			t.Errorf("%s: %s measured %+v", c.Name, name, m)
		}
	}
	if m := c.Full.Median.Memory; m == nil || m.PeakBytes <= m.RingBytes || m.RingBytes <= 0 {
		t.Errorf("%s: memory %+v", c.Name, m)
	}
	if c.WindowSamples < 1 || c.WindowBytes < 1 {
		t.Errorf("%s: window of %d samples and %d bytes", c.Name, c.WindowSamples, c.WindowBytes)
	}
	if c.Connections > 1 && (c.Full.Median.MinShare < 0 || c.Full.Median.MinShare > 1) {
		t.Errorf("%s: the slowest stream has %v of its fair share", c.Name, c.Full.Median.MinShare)
	}
}

// TestClientSender runs a case with the client library, and the case filter with it.
func TestClientSender(t *testing.T) {
	opt := defaultOptions()
	opt.Smoke, opt.Client, opt.Quiet = true, true, true
	opt.Case, opt.Only = "1kib/8", contenderFull
	opt.Binary = buildBinary(t)
	opt.JSON = "-"
	var out bytes.Buffer
	if err := runTCP(t.Context(), opt, &out, os.Stderr); err != nil {
		t.Fatal(err)
	}
	var record Record
	if err := json.Unmarshal(out.Bytes(), &record); err != nil {
		t.Fatal(err)
	}
	if len(record.Cases) != 1 || record.Cases[0].Bare != nil || record.Cases[0].Full.Median.SamplesPerSecond <= 0 {
		t.Fatalf("got %+v", record.Cases)
	}
}

// TestChildThatFails wants the reason in the error, and no process left.
func TestChildThatFails(t *testing.T) {
	opt := defaultOptions()
	opt.Smoke, opt.Quiet = true, true
	opt.Binary = buildBinary(t)
	opt.ServeArgs = []string{"--no-such-flag"}
	err := runTCP(t.Context(), opt, os.Stdout, os.Stderr)
	if err == nil || !strings.Contains(err.Error(), "no-such-flag") || !strings.Contains(err.Error(), "daemon") {
		t.Fatalf("the error does not say what the daemon said: %v", err)
	}
}

func TestSmokeMicro(t *testing.T) {
	var out bytes.Buffer
	if err := runMicro(microOptions{smoke: true}, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"spsc single", "spsc batch 32", "ring 1KiB by 64", "plain copy", "mutex ring", "channel"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
	if err := runMicro(microOptions{smoke: true, filter: "no such contest"}, &out); err == nil {
		t.Error("a filter that matches nothing was accepted")
	}
}

func TestOptionsRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no runs":         func(o *Options) { o.Runs = 0 },
		"no duration":     func(o *Options) { o.Duration = 0 },
		"fraction 0":      func(o *Options) { o.OpenFraction = 0 },
		"fraction 1.1":    func(o *Options) { o.OpenFraction = 1.1 },
		"NaN":             func(o *Options) { o.OpenFraction = math.NaN() },
		"tiny writes":     func(o *Options) { o.WriteBytes = 1 },
		"unknown case":    func(o *Options) { o.Case = "3KiB/1" },
		"unknown one":     func(o *Options) { o.Only = "full,slow" },
		"profile to file": func(o *Options) { o.CPUProfile = "bench_test.go" },
	} {
		opt := defaultOptions()
		change(&opt)
		if _, err := opt.settle(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	opt := defaultOptions()
	opt.RingBytes = 64 * mib
	cases, err := opt.settle()
	if err != nil || cases[0].Batches*cases[0].BatchSize*kib != 64*mib {
		t.Errorf("a ring of 64 MiB became %+v, %v", cases, err)
	}
}

func TestCases(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range append(fullCases(), smokeCases()...) {
		s, err := c.spec()
		if err != nil {
			t.Fatal(err)
		}
		if s.SampleBytes() != c.SampleBytes || s.NumLeaves() != c.Leaves || s.Leaf(0).Bytes() < stampBytes {
			t.Errorf("case %s: spec %v of %d bytes", c.Name, s, s.SampleBytes())
		}
		segment, err := c.segmentBytes()
		if err != nil || segment < c.dataBytes() {
			t.Errorf("case %s: segment of %d bytes for %d of samples: %v", c.Name, segment, c.dataBytes(), err)
		}
		seen[c.Name] = true
	}
	for _, want := range []string{"1KiB/1", "1KiB/8", "1KiB/40", "16KiB/1", "256KiB/1", "4MiB/1", "64MiB/1", "1KiB/1x64", "256KiB/1x64"} {
		if !seen[want] {
			t.Errorf("no case %s", want)
		}
	}
	if c, ok := findCase(fullCases(), "1KiB/1x64"); !ok || c.single() != "1KiB/1" {
		t.Error("a case of many connections does not find its single one")
	}
}

func TestTargets(t *testing.T) {
	result := func(rate, cpu float64) *Result {
		return &Result{Median: Measurement{SamplesPerSecond: rate, ServerCPU: cpu, MinShare: 0.4, Memory: &Memory{Ratio: 1.01}}}
	}
	cases := []CaseResult{
		{Case: makeCase(256*kib, 1, 1, 8, 4).want(0.85, 1.25), Full: result(85, 1.26), Bare: result(100, 1)},
		{Case: makeCase(256*kib, 1, 64, 8, 4), Full: result(67, 1)},
	}
	var got []string
	for _, one := range targets(cases) {
		verdict := "pass"
		if !one.Pass {
			verdict = "fail"
		}
		got = append(got, one.Case+" "+one.Figure+": "+verdict)
	}
	want := []string{
		"256KiB/1 samples/s to the bare loop's: pass",
		"256KiB/1 daemon's CPU-s/GB to the bare loop's: fail",
		"256KiB/1 daemon's memory to its bound: fail",
		"256KiB/1 daemon's allocations per batch, beyond 200/s: pass",
		"256KiB/1x64 samples/s to one connection's: fail",
		"256KiB/1x64 slowest stream to its fair share: fail",
		"256KiB/1x64 daemon's memory to its bound: fail",
		"256KiB/1x64 daemon's allocations per batch, beyond 200/s: pass",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAllocationTarget(t *testing.T) {
	for _, tc := range []struct {
		perSecond, perBatch float64
		pass                bool
	}{{0, 0, true}, {200, 5, true}, {201, 5, false}, {1000, 0.01, true}, {1000, 1, false}} {
		c := CaseResult{Case: makeCase(256*kib, 1, 1, 8, 4), Full: &Result{Median: Measurement{MallocsPerSecond: tc.perSecond, MallocsPerBatch: tc.perBatch}}}
		all := targets([]CaseResult{c})
		if got := all[len(all)-1]; got.Pass != tc.pass {
			t.Errorf("%+v: %+v", tc, got)
		}
	}
}

func TestSchedule(t *testing.T) {
	start := time.Now()
	s := &schedule{start: start, interval: 250}
	for _, tc := range []struct {
		after time.Duration
		due   uint64
	}{{-1, 0}, {0, 1}, {249, 1}, {250, 2}, {999, 4}, {1000, 5}, {time.Second, 4e6 + 1}} {
		if got := s.dueBy(start.Add(tc.after)); got != tc.due {
			t.Errorf("%v after the start %d samples are due, want %d", tc.after, got, tc.due)
		}
	}
	if got := s.offset(4e6); got != int64(time.Second) {
		t.Errorf("sample 4e6 is due after %d ns", got)
	}
}

func TestMinShare(t *testing.T) {
	if got := minShare([]uint64{10, 10}, []uint64{20, 40}); got != 0.5 {
		t.Errorf("10 of 10 and 30: %v of the fair share, want 0.5", got)
	}
}

func TestRecorderMerges(t *testing.T) {
	a, b := newRecorder(), newRecorder()
	for _, r := range []*recorder{a, b} {
		record(r.intended, 1000, 98)
		record(r.intended, int64(time.Millisecond), 2)
		record(r.arrival, -5, 1) // a clock that stepped
		record(r.arrival, math.MaxInt64, 1)
	}
	encoded, err := b.encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.merge(encoded); err != nil {
		t.Fatal(err)
	}
	l := latencyOf(a.intended)
	if l.Count != 200 || math.Abs(l.P50-1) > 0.01 || math.Abs(l.P99-1000) > 2 {
		t.Errorf("got %+v", l)
	}
	if n := a.arrival.TotalCount(); n != 4 {
		t.Errorf("%d values outside the range were kept, want 4", n)
	}
	if err := a.merge(&histograms{Intended: []byte("junk"), Arrival: nil}); err == nil {
		t.Error("junk was taken for a histogram")
	}
}

func TestMedian(t *testing.T) {
	if median([]float64{3, 1, 2}) != 2 || median([]float64{4, 1, 2, 3}) != 2.5 {
		t.Error("median is wrong")
	}
}

func TestMachine(t *testing.T) {
	m := readMachine()
	if m.Cores < 1 || m.Kernel == "" || m.Go == "" || m.MemoryBytes <= 0 {
		t.Errorf("got %+v", m)
	}
}
