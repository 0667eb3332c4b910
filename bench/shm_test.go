package bench

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSmokeShm(t *testing.T) {
	record, out := runSmokeShm(t, ShmOptions{})
	if len(record.Cases) != len(smokeShmCases()) {
		t.Fatalf("%d cases in the record, want %d", len(record.Cases), len(smokeShmCases()))
	}
	for i := range record.Cases {
		checkShmCase(t, &record.Cases[i])
	}
	for _, want := range []string{"Rates", "full/this", "Latency", "this/eventfd", "Faults", "end of file", "Targets", "64KiB/written", "make bench-shmipc"} {
		if !strings.Contains(out, want) {
			t.Errorf("the tables lack %q:\n%s", want, out)
		}
	}
}

func runSmokeShm(t *testing.T, opt ShmOptions) (*ShmRecord, string) {
	t.Helper()
	opt.Common.Smoke, opt.Binary, opt.JSON = true, buildBinary(t), filepath.Join(t.TempDir(), "record.json")
	var out, log bytes.Buffer
	if err := runShm(t.Context(), opt, &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	record := new(ShmRecord)
	if err := json.Unmarshal(text, record); err != nil {
		t.Fatal(err)
	}
	return record, out.String()
}

// checkShmCase wants every figure there, and says nothing of its size: the machine may be busy.
func checkShmCase(t *testing.T, c *ShmResult) {
	t.Helper()
	rates, times := []string{}, []string{}
	switch c.Kind {
	case kindPlace:
		rates = []string{contenderFull, contenderBare}
	case kindWrite:
		rates = []string{contenderFull, contenderMemory}
	case kindLatency:
		times = []string{contenderFull, contenderPoll, contenderWake}
	case kindRestart:
		times = []string{figureRestart, figureStall}
	case kindRecovery:
		times = []string{figureReady, figureMap}
	case kindDeath:
		times = []string{figureEOF, figureBack}
	}
	for _, name := range rates {
		r := c.Rates[name]
		if r == nil || len(r.Runs) != 1 {
			t.Fatalf("%s: no run of %s", c.Name, name)
		}
		if m := &r.Median; !(m.SamplesPerSecond > 0 && m.ServerCPU > 0) {
			t.Errorf("%s: %s measured %+v", c.Name, name, m)
		}
	}
	for _, name := range times {
		one := c.Times[name]
		if one == nil || len(one.Runs) != 1 || one.Median <= 0 || one.Median != one.Runs[0] {
			t.Fatalf("%s: %s took %+v", c.Name, name, one)
		}
		if c.Kind == kindLatency && (one.Latency == nil || one.Latency.Count == 0 || one.Latency.P99 < one.Latency.P50) {
			t.Errorf("%s: latencies of %s: %+v", c.Name, name, one.Latency)
		}
	}
}

// TestShmipcPeer measures the shmipc-go baseline where its module has been fetched: `make bench-shmipc` does.
func TestShmipcPeer(t *testing.T) {
	peer := filepath.Join(t.TempDir(), "shmipc-peer")
	build := exec.Command("go", "build", "-o", peer, ".")
	build.Dir, build.Env = "shmipc", append(os.Environ(), "GOPROXY=off", "GOFLAGS=-mod=readonly", "GOWORK=off")
	if text, err := build.CombinedOutput(); err != nil {
		t.Skipf("the shmipc-go baseline does not build without fetching its module, `make bench-shmipc` does that: %v\n%s", err, text)
	}
	record, out := runSmokeShm(t, ShmOptions{Common: Common{Case: "64kib"}, Shmipc: peer})
	c := &record.Cases[0]
	if len(record.Cases) != 1 || c.Rates[contenderShmipc] == nil || c.Rates[contenderShmipc].Median.SamplesPerSecond <= 0 {
		t.Fatalf("got %+v", record.Cases)
	}
	if !slices.ContainsFunc(record.Targets, func(one Target) bool { return strings.Contains(one.Figure, "shmipc-go") }) {
		t.Errorf("no target compares with it:\n%s", out)
	}
}

func TestShmOptionsRefused(t *testing.T) {
	for name, change := range map[string]func(*ShmOptions){
		"no runs":        func(o *ShmOptions) { o.Runs = 0 },
		"no duration":    func(o *ShmOptions) { o.Duration = 0 },
		"negative":       func(o *ShmOptions) { o.Batches = -1 },
		"unknown case":   func(o *ShmOptions) { o.Case = "3KiB" },
		"no such shmipc": func(o *ShmOptions) { o.Shmipc = filepath.Join(t.TempDir(), "none") },
	} {
		opt := ShmOptions{Common: defaultCommon()}
		change(&opt)
		if _, err := opt.settle(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	opt := ShmOptions{Common: defaultCommon(), BatchSize: 3, Batches: 5}
	opt.Case = "1mib, death"
	cases, err := opt.settle()
	if err != nil || len(cases) != 2 || cases[0].BatchSize != 3 || cases[0].Batches != 5 || cases[1].BatchSize == 3 {
		t.Errorf("got %+v, %v", cases, err)
	}
}

func TestShmCases(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range append(smokeShmCases(), shmCases()...) {
		s, err := c.spec()
		if err != nil {
			t.Fatal(err)
		}
		if s.SampleBytes() != c.SampleBytes || s.NumLeaves() != 1 || c.Batches < 3 || c.SampleBytes < stampBytes {
			t.Errorf("case %s: spec %v, %d batches", c.Name, s, c.Batches)
		}
		seen[c.Name] = true
	}
	for _, want := range []string{"64B/written", "64KiB", "1MiB", "16MiB", "64KiB/written", "1MiB/written", "16MiB/written", "latency", "restart", "recovery", "death"} {
		if !seen[want] {
			t.Errorf("no case %s", want)
		}
	}
	for _, c := range shmCases() {
		if c.Kind == kindRecovery && c.dataBytes() != 4<<30 {
			t.Errorf("the ring to recover has %d bytes of samples, want 4 GiB", c.dataBytes())
		}
	}
}

func TestShmTargets(t *testing.T) {
	rate := func(million float64) *Result { return &Result{Median: Measurement{SamplesPerSecond: million * 1e6}} }
	times := func(of map[string]float64) map[string]*Times {
		out := map[string]*Times{}
		for name, v := range of {
			out[name] = &Times{Median: v}
		}
		return out
	}
	cases := []ShmResult{
		{ShmCase: shmCase(kindPlace, 64*kib, 4, 4), Rates: map[string]*Result{contenderFull: rate(2), contenderBare: rate(20), contenderShmipc: rate(2)}},
		{ShmCase: shmCase(kindPlace, mib, 4, 4), Rates: map[string]*Result{contenderFull: rate(1.59), contenderShmipc: rate(1.6)}},
		{ShmCase: shmCase(kindWrite, mib, 4, 4), Rates: map[string]*Result{contenderFull: rate(9), contenderMemory: rate(10)}},
		{ShmCase: shmCase(kindWrite, 2*mib, 4, 4), Rates: map[string]*Result{contenderFull: rate(8.9), contenderMemory: rate(10)}},
		{ShmCase: shmCase(kindWrite, 64, 4, 4), Rates: map[string]*Result{contenderFull: rate(4.9), contenderMemory: rate(10)}},
		{ShmCase: shmCase(kindLatency, 64, 1, 4), Times: times(map[string]float64{contenderFull: 101, contenderPoll: 60, contenderWake: 40})},
		{ShmCase: shmCase(kindRestart, 64, 4, 4), Times: times(map[string]float64{figureCost: 100})},
		{ShmCase: shmCase(kindRecovery, 64, 4, 4), Times: times(map[string]float64{figureReady: 1001})},
		{ShmCase: shmCase(kindDeath, 64, 4, 4), Times: times(map[string]float64{figureAfter: 5})},
	}
	var got []string
	for _, one := range shmTargets(cases) {
		verdict := "pass"
		if !one.Pass {
			verdict = "fail"
		}
		got = append(got, one.Case+" "+one.Figure+": "+verdict)
	}
	want := []string{
		"64KiB million samples/s: pass",
		"64KiB samples/s to shmipc-go's: pass",
		"1MiB million samples/s: fail",
		"1MiB samples/s to shmipc-go's: fail",
		"1MiB/written rate to that of memory writes: pass",
		"2MiB/written rate to that of memory writes: fail",
		"64B/written million samples/s: fail",
		"latency p50 to a bare wake-up's, blocking: fail",
		"latency p50 to a bare wake-up's, daemon polls: pass",
		"restart ms without acks beyond the restart's: pass",
		"recovery ms from start to ready: fail",
		"death ms from end of file to the last lease back: pass",
		"in place slowest size to fastest: fail",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPattern(t *testing.T) {
	for _, size := range []int64{stampBytes, 64, patternBytes - 8, patternBytes, patternBytes + 8, 3*patternBytes + 16} {
		sample := make([]byte, size+1)
		writePattern(sample[:size], newPattern(size))
		if readStamp(sample) != closedStamp || bytes.IndexByte(sample, 0) != int(size) {
			t.Errorf("a sample of %d bytes: stamp %#x, first zero byte at %d", size, readStamp(sample), bytes.IndexByte(sample, 0))
		}
	}
}
