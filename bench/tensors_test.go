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
	"testing/synctest"
)

func TestSmokeTensors(t *testing.T) {
	record, out := runSmokeTensors(t, TensorOptions{})
	if len(record.Cases) != len(smokeTensorCases()) {
		t.Fatalf("%d cases in the record, want %d", len(record.Cases), len(smokeTensorCases()))
	}
	for i := range record.Cases {
		checkTensorCase(t, &record.Cases[i], figureSumPython, figureNumpy)
	}
	for _, want := range []string{"Gradients:", "Reduction:", "Weights in shared memory:", "Weights over TCP", "CRC-32C", "Targets", "Python was not measured"} {
		if !strings.Contains(out, want) {
			t.Errorf("the tables lack %q:\n%s", want, out)
		}
	}
}

func runSmokeTensors(t *testing.T, opt TensorOptions) (*TensorRecord, string) {
	t.Helper()
	opt.Common.Smoke, opt.Binary, opt.JSON = true, buildBinary(t), filepath.Join(t.TempDir(), "record.json")
	var out, log bytes.Buffer
	if err := runTensors(t.Context(), opt, &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	record := new(TensorRecord)
	if err := json.Unmarshal(text, record); err != nil {
		t.Fatal(err)
	}
	return record, out.String()
}

// checkTensorCase wants every figure of the table there but those named, and says nothing of its size: the machine may be busy.
func checkTensorCase(t *testing.T, c *TensorResult, but ...string) {
	t.Helper()
	for _, row := range c.kind().rows {
		figure := c.Figures[row.figure]
		baseline := strings.HasPrefix(row.figure, contenderBare) && strings.HasSuffix(row.figure, figureReaderCPU)
		switch {
		case slices.Contains(but, row.figure) || baseline:
		case figure == nil || len(figure.Runs) != 1:
			t.Errorf("%s: no run of %q", c.Name, row.figure)
		case figure.Median != figure.Runs[0]:
			t.Errorf("%s: the median of %q is %v of %v", c.Name, row.figure, figure.Median, figure.Runs)
		case figure.Median <= 0 && figure.Unit != "%": // a share may be less than the noise
			t.Errorf("%s: %q is %v", c.Name, row.figure, figure.Median)
		}
	}
}

// TestSmokeTensorsPython sums in Python where `make test-python` has made the virtual environment with the package.
func TestSmokeTensorsPython(t *testing.T) {
	python, err := filepath.Abs("../.venv/bin/python")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command(python, "-c", "import ingestd; ingestd.GradReader").CombinedOutput(); err != nil {
		t.Skipf("no Python with the package ingestd, `make test-python` makes one: %v\n%s", err, text)
	}
	record, out := runSmokeTensors(t, TensorOptions{Common: Common{Case: "reduce"}, Python: python})
	if len(record.Cases) != 1 {
		t.Fatalf("got %+v", record.Cases)
	}
	checkTensorCase(t, &record.Cases[0])
	if !slices.ContainsFunc(record.Targets, func(one Target) bool { return strings.Contains(one.Figure, "Python") }) {
		t.Errorf("no target compares with it:\n%s", out)
	}
}

func TestTensorOptionsRefused(t *testing.T) {
	for name, change := range map[string]func(*TensorOptions){
		"no runs":        func(o *TensorOptions) { o.Runs = 0 },
		"no duration":    func(o *TensorOptions) { o.Duration = 0 },
		"unknown case":   func(o *TensorOptions) { o.Case = "gradient" },
		"no such python": func(o *TensorOptions) { o.Python = filepath.Join(t.TempDir(), "none") },
	} {
		opt := TensorOptions{Common: defaultCommon()}
		change(&opt)
		if _, err := opt.settle(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	opt := TensorOptions{Common: defaultCommon()}
	opt.Case = "crc, Stream"
	cases, err := opt.settle()
	if err != nil || len(cases) != 2 || cases[0].Kind != kindCRC || cases[1].Kind != kindStream {
		t.Errorf("got %+v, %v", cases, err)
	}
}

func TestTensorCases(t *testing.T) {
	for _, c := range append(tensorCases(), smokeTensorCases()...) {
		if c.Kind == kindCRC {
			continue
		}
		m, err := benchManifest(c.Bytes, c.Tensors)
		if err != nil {
			t.Fatal(err)
		}
		elements := int64(0)
		for i := range m.Len() {
			tensor := m.Tensor(i)
			elements += tensor.Elements()
		}
		if missing := c.Bytes - 4*elements; missing < 0 || missing >= 4*int64(c.Tensors) {
			t.Errorf("case %s: %d tensors have %d elements, %d bytes are asked for", c.Name, c.Tensors, elements, c.Bytes)
		}
		if c.Kind == kindReduce && 2*c.Bytes*int64(c.Peers) > c.RingBytes {
			t.Errorf("case %s: a reader may hold half of the ring, %d bytes, and the step has %d", c.Name, c.RingBytes/2, c.Bytes*int64(c.Peers))
		}
	}
	full := tensorCases()
	want := []TensorCase{
		{Kind: kindGradients, Peers: 4, ChunkBytes: mib}, {Kind: kindReduce, Peers: 8, Bytes: 64 * mib}, {Kind: kindPublish, Peers: 4, Bytes: 512 * mib},
		{Kind: kindStream, Peers: 1, Bytes: 512 * mib}, {Kind: kindCRC, Bytes: 64 * mib, HotBytes: 256 * kib},
	}
	for i, w := range want {
		got := full[i]
		if got.Kind != w.Kind || got.Peers != w.Peers || w.Bytes != 0 && got.Bytes != w.Bytes || w.HotBytes != got.HotBytes ||
			w.ChunkBytes != 0 && got.ChunkBytes != w.ChunkBytes {
			t.Errorf("case %d is %+v, the issue wants %+v", i, got, w)
		}
	}
}

func TestTensorTargets(t *testing.T) {
	result := func(kind string, figures map[string]float64) TensorResult {
		r := TensorResult{TensorCase: TensorCase{Name: kind, Kind: kind, Peers: 4}, Figures: map[string]*Times{}}
		for name, v := range figures {
			r.Figures[name] = &Times{Median: v, Runs: []float64{v}}
		}
		return r
	}
	cases := []TensorResult{
		result(kindGradients, map[string]float64{contenderFull: 1, contenderVerify: 4, contenderBare: 5}),
		result(kindGradients, map[string]float64{contenderFull: 5, contenderVerify: 3.9, contenderBare: 5, contenderNoCRC: 5}),
		result(kindReduce, map[string]float64{figureSum: 7, figureLoop: 10, figureSumPython: 6.9, figureNumpy: 10}),
		result(kindReduce, map[string]float64{figureSum: 6.9, figureLoop: 10}),
		result(kindPublish, map[string]float64{figurePublish: 115, figureCopy: 100, figureView: 50, oneReader + figureView: 51, figureMemory: 10, figureBound: 10}),
		result(kindPublish, map[string]float64{figurePublish: 116, figureCopy: 100, figureMemory: 11, figureBound: 10}),
		result(kindStream, map[string]float64{figureStream: 9, figureSendfile: 10}),
		result(kindStream, map[string]float64{figureStream: 8.9, figureSendfile: 10, figureMemory: 11, figureBound: 10}),
		result(kindCRC, map[string]float64{figureCRCHot: 10, figureCRCCold: 9.9}),
		result(kindCRC, map[string]float64{}),
	}
	var got []string
	for _, one := range tensorTargets(cases) {
		verdict := "pass"
		if !one.Pass {
			verdict = "fail"
		}
		got = append(got, one.Case+" "+one.Figure+": "+verdict)
	}
	want := []string{
		"gradients GB/s over TCP with CRC, verified, to the bare loop's: pass",
		"gradients GB/s over TCP with CRC, verified, to the bare loop's: fail",
		"reduce GB/s to a plain loop's in Go: pass",
		"reduce GB/s to np.add's in Python: fail",
		"reduce GB/s to a plain loop's in Go: fail",
		"publish time to all 4 readers to one copy's: pass",
		"publish us from awake to the first view: pass",
		"publish 1 reader: us from awake to the first view: fail",
		"publish daemon's memory to its bound: pass",
		"publish time to all 4 readers to one copy's: fail",
		"publish daemon's memory to its bound: fail",
		"stream GB/s to the bare sendfile loop's: pass",
		"stream GB/s to the bare sendfile loop's: fail",
		"stream daemon's memory to its bound: fail",
		"crc GB/s of crc, hot: pass",
		"crc GB/s of crc, cold: fail",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestStepPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newStepPace(2, 2)
		for _, step := range []uint64{0, 1} {
			if !p.await(step) {
				t.Fatalf("step %d is not allowed", step)
			}
		}
		p.raise(1) // never lower
		p.await(1)
		allowedAfter := func(step uint64, release func()) {
			t.Helper()
			done := make(chan bool, 1)
			go func() { done <- p.await(step) }()
			synctest.Wait()
			if len(done) > 0 {
				t.Fatalf("step %d was allowed", step)
			}
			release()
			if !<-done {
				t.Fatalf("step %d was not allowed in the end", step)
			}
		}
		p.commit(0)
		p.commit(1)
		allowedAfter(2, func() { p.raise(100) })
		p.commit(0)
		allowedAfter(3, func() { p.commit(1) }) // nobody is more than aheadMax steps beyond the slowest
		go p.close()
		if p.await(4) {
			t.Error("a step was allowed after the end")
		}
	})
}
