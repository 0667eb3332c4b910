package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// serveModel runs a daemon with a table "model" of weights.
func serveModel(t testing.TB, args ...string) *server {
	t.Helper()
	return serveWith(t, append([]string{"--table", "model", "--kind", "weights"}, args...)...)
}

// modelFile writes a safetensors file of a version of a model.
func modelFile(t testing.TB, path string, version byte, shapes ...[]int64) *tensor.Manifest {
	t.Helper()
	tensors := make([]tensor.Tensor, len(shapes))
	for i, shape := range shapes {
		tensors[i] = tensor.Tensor{Name: fmt.Sprintf("layers.%d.w", i), DType: spec.F32, Shape: shape}
	}
	m, err := tensor.NewManifest(tensors, nil)
	if err == nil {
		err = safetensors.Write(path, m, map[string]string{"version": fmt.Sprint(version)}, func(i int) []byte {
			b := make([]byte, m.EncodedBytes(i))
			for k := range b {
				b[k] = byte(k) ^ byte(k>>8) + byte(i)*13 + version
			}
			return b
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

var modelShapes = [][]int64{{100, 30}, {30}, {0, 5}, {}, {300_000}}

// sameTensors fails the test unless both files have the same tensors.
func sameTensors(t testing.TB, got, want string) {
	t.Helper()
	a, err := safetensors.Open(got)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := safetensors.Open(want)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if a.Manifest().Len() != b.Manifest().Len() {
		t.Fatalf("%d tensors, want %d", a.Manifest().Len(), b.Manifest().Len())
	}
	for i := range b.Manifest().Len() {
		k, ok := a.Manifest().Index(b.Manifest().Tensor(i).Name)
		if !ok || !bytes.Equal(a.Data(k), b.Data(i)) {
			t.Errorf("tensor %s is not the same", b.Manifest().Tensor(i).Name)
		}
	}
}

// TestWeightsRoundTrip: what publish reads from a file, get writes to one, in place, streamed and over TCP, and verify compares.
func TestWeightsRoundTrip(t *testing.T) {
	s := serveModel(t)
	folder := t.TempDir()
	for k, c := range []struct{ publish, get string }{
		{"--addr " + s.Unix, "--addr " + s.Unix},
		{"--stream --addr " + s.Unix, "--addr " + s.TCP},
		{"--addr " + s.TCP, "--addr " + s.Unix},
		{"--addr " + s.TCP, "--addr " + s.TCP},
	} {
		in, out := filepath.Join(folder, fmt.Sprint("in", k, ".safetensors")), filepath.Join(folder, fmt.Sprint("out", k, ".safetensors"))
		m := modelFile(t, in, byte(k), modelShapes...)
		run := func(flags string, args ...string) result {
			return ingestd(t, "", append(append([]string{"weights", args[0], "--table", "model"}, strings.Fields(flags)...), args[1:]...)...)
		}
		published := parse[publishResult](t, run(c.publish, "publish", "--json", in).want(t, exitOK).out)
		if published.Generation != uint64(k+1) || published.Tensors != m.Len() || published.InPlace != (c.publish == "--addr "+s.Unix) {
			t.Errorf("published %+v", published)
		}
		run(c.get, "get", "-o", out).want(t, exitOK, fmt.Sprintf("wrote generation %d", k+1), published.Digest)
		sameTensors(t, out, in)
		run(c.get, "verify", in).want(t, exitOK, "is right, and the same as")
		verified := parse[verifyResult](t, run(c.get, "verify", "--json").want(t, exitOK).out)
		if !verified.Right || verified.Digest != published.Digest || verified.Generation != published.Generation {
			t.Errorf("verified %+v", verified)
		}
	}
}

// TestWeightsSelect: get writes the tensors that match, and says so when none does; the file that is there stays.
func TestWeightsSelect(t *testing.T) {
	s := serveModel(t)
	folder := t.TempDir()
	in, out := filepath.Join(folder, "in.safetensors"), filepath.Join(folder, "out.safetensors")
	modelFile(t, in, 1, modelShapes...)
	ingestd(t, "", "weights", "publish", "--addr", s.Unix, "--table", "model", in).want(t, exitOK, "published generation 1")
	ingestd(t, "", "weights", "get", "--addr", s.Unix, "--table", "model", "--select", "layers.[13].*", "--select", "*0*", "-o", out).want(t, exitOK, "3 tensors")
	f, err := safetensors.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"layers.0.w", "layers.1.w", "layers.3.w"} {
		if _, ok := f.Manifest().Index(name); !ok || f.Manifest().Len() != 3 {
			t.Errorf("the file has not %s, or more: %s", name, f.Manifest().JSON())
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	ingestd(t, "", "weights", "verify", "--addr", s.Unix, "--table", "model", out).want(t, exitData, `"layers.2.w" is missing`)
	ingestd(t, "", "weights", "get", "--addr", s.Unix, "--table", "model", "-o", out).want(t, exitUsage, "is not replaced")
	ingestd(t, "", "weights", "get", "--addr", s.Unix, "--table", "model", "--select", "nothing*", "-o", out+"2").want(t, exitData, "ls -l shows")
	ingestd(t, "", "weights", "get", "--addr", s.Unix, "--table", "model", "--select", "[", "-o", out+"2").want(t, exitUsage, "--select")
	if _, err := os.Stat(out + "2"); err == nil {
		t.Error("a get that failed left a file")
	}
	other := filepath.Join(folder, "other.safetensors")
	modelFile(t, other, 2, modelShapes...)
	ingestd(t, "", "weights", "verify", "--addr", s.Unix, "--table", "model", other).want(t, exitData, "differs from generation 1 in 4 of 5")
}

// TestWeightsSharded: the index of a sharded file is published as one generation.
func TestWeightsSharded(t *testing.T) {
	s := serveModel(t)
	folder := t.TempDir()
	shard := map[string]string{}
	for i, shapes := range [][][]int64{modelShapes[:2], modelShapes} {
		name := fmt.Sprintf("model-%d.safetensors", i)
		if i == 1 { // of which only what the first has not
			tensors := []tensor.Tensor{{Name: "head.w", DType: spec.U8, Shape: []int64{77}}}
			m, err := tensor.NewManifest(tensors, nil)
			if err == nil {
				err = safetensors.Write(filepath.Join(folder, name), m, nil, func(int) []byte { return make([]byte, 77) })
			}
			if err != nil {
				t.Fatal(err)
			}
			shard["head.w"] = name
			continue
		}
		m := modelFile(t, filepath.Join(folder, name), 1, shapes...)
		for k := range m.Len() {
			shard[m.Tensor(k).Name] = name
		}
	}
	index, err := json.Marshal(map[string]any{"metadata": map[string]any{}, "weight_map": shard})
	if err == nil {
		err = os.WriteFile(filepath.Join(folder, "model.safetensors.index.json"), index, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(folder, "model.safetensors.index.json")
	ingestd(t, "", "weights", "publish", "--addr", s.TCP, "--table", "model", path).want(t, exitOK, "3 tensors")
	ingestd(t, "", "weights", "verify", "--addr", s.TCP, "--table", "model", path).want(t, exitOK, "the same as")
	list := parse[[]tensorResult](t, ingestd(t, "", "weights", "ls", "-l", "--json", "--addr", s.TCP, "--table", "model").want(t, exitOK).out)
	if len(list) != 3 {
		t.Errorf("%d tensors: %+v", len(list), list)
	}
	ingestd(t, "", "weights", "ls", "-l", "--addr", s.Unix, "--table", "model").want(t, exitOK, "layers.0.w", "F32[100,30]", "3 tensors")
}

// TestWeightsHeld: a publisher that finds all generations held gives up at its deadline and names who holds them; ls names them, too.
func TestWeightsHeld(t *testing.T) {
	s := serveModel(t, "--generations", "2")
	folder := t.TempDir()
	in := filepath.Join(folder, "in.safetensors")
	modelFile(t, in, 1, modelShapes...)
	publish := []string{"weights", "publish", "--addr", s.Unix, "--table", "model"}
	ingestd(t, "", append(publish, in)...).want(t, exitOK)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	sub, err := client.Subscribe(ctx, s.Unix, client.SubscribeConfig{Table: "model", Client: "the-holder"})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	held, err := sub.Latest()
	if err != nil {
		t.Fatal(err)
	}
	ingestd(t, "", append(publish, in)...).want(t, exitOK)
	for _, addr := range []string{s.Unix, s.TCP} {
		named := false
		for wait := 100 * time.Millisecond; !named; wait *= 2 { // a deadline may pass before the daemon has said a word
			r := ingestd(t, "", "weights", "publish", "--addr", addr, "--table", "model", "--deadline", wait.String(), in).want(t, exitTimeout)
			named = strings.Contains(r.err, "the-holder") || t.Failed()
		}
	}
	ingestd(t, "", "weights", "ls", "--admin", s.Admin).want(t, exitOK, "table model", "newest generation 2", "the-holder")
	tables := parse[[]struct {
		Name        string `json:"name"`
		Newest      uint64 `json:"newest"`
		Generations []struct {
			Pins []struct {
				Who string `json:"who"`
			} `json:"pins"`
		} `json:"generations"`
	}](t, ingestd(t, "", "weights", "ls", "--admin", s.Admin, "--table", "model", "--json").want(t, exitOK).out)
	if len(tables) != 1 || tables[0].Newest != 2 || len(tables[0].Generations) != 2 || len(tables[0].Generations[0].Pins) != 1 {
		t.Errorf("ls prints %+v", tables)
	}
	held.Release()
	ingestd(t, "", append(publish, "--deadline", "10s", "--generation", "9", in)...).want(t, exitOK, "published generation 9")
	ingestd(t, "", append(publish, "--generation", "9", in)...).want(t, exitRefused, "not above the newest")
}

// TestWeightsWatch: a line for each generation, from the one that is there on; it waits for the first one, too.
func TestWeightsWatch(t *testing.T) {
	s := serveModel(t)
	folder := t.TempDir()
	in := filepath.Join(folder, "in.safetensors")
	modelFile(t, in, 1, modelShapes...)
	for _, addr := range []string{s.Unix, s.TCP} {
		first := background(t, "weights", "watch", "--addr", addr, "--table", "model", "--count", "1", "--newer-than", "0")
		ingestd(t, "", "weights", "publish", "--addr", addr, "--table", "model", in).want(t, exitOK)
		first.wait(t).want(t, exitOK, "generation ", "5 tensors")
	}
	second := ingestd(t, "", "weights", "watch", "--addr", s.TCP, "--table", "model", "--count", "1", "--newer-than", "1", "--json").want(t, exitOK)
	if r := parse[generationResult](t, second.out); r.Generation != 2 || r.Tensors != 5 || r.Published == nil {
		t.Errorf("watch printed %+v", r)
	}
	ingestd(t, "", "weights", "watch", "--addr", s.Unix, "--table", "model", "--newer-than", "2", "--deadline", "30ms").want(t, exitTimeout)
	get := []string{"weights", "get", "--addr", s.TCP, "--table", "model", "--newer-than", "2", "--deadline", "30ms"}
	ingestd(t, "", append(get, "-o", filepath.Join(folder, "x"))...).want(t, exitTimeout)
	forever := background(t, "weights", "watch", "--addr", s.Unix, "--table", "model", "--newer-than", "2")
	forever.signal(t, syscall.SIGTERM)
	if r := forever.wait(t); r.code != exitInterrupted && r.code != -1 { // the signal may come before the command has begun
		t.Errorf("exit code %d\n%s", r.code, r.err)
	}
}

// TestWeightsErrors: what is wrong is said, with what to do and the documented code.
func TestWeightsErrors(t *testing.T) {
	s := serveModel(t)
	folder := t.TempDir()
	in, bad := filepath.Join(folder, "in.safetensors"), filepath.Join(folder, "bad.safetensors")
	modelFile(t, in, 1, modelShapes...)
	if err := os.WriteFile(bad, []byte("not a safetensors file"), 0o600); err != nil {
		t.Fatal(err)
	}
	here := "--table model --addr " + s.Unix
	nowhere := "--addr unix://" + filepath.Join(folder, "none.sock")
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"", exitUsage, "no command given"},
		{"fly", exitUsage, "unknown command"},
		{"publish", exitUsage, "accepts 1 arg"},
		{"publish --deadline -1s " + in, exitUsage, "negative"},
		{"publish " + here + " " + bad, exitData, "bad.safetensors"},
		{"publish " + here + " " + in + "x", exitFailure, "no such file"},
		{"publish " + nowhere + " " + in, exitUnreachable, "is the daemon running"},
		{"publish --table other --addr " + s.TCP + " " + in, exitRefused, "there is no table"},
		{"get " + here, exitUsage, "-o FILE"},
		{"get --wait -1s -o x", exitUsage, "negative"},
		{"get " + here + " -o " + in + "y", exitRefused, "publish first"},
		{"get --table model --addr " + s.TCP + " -o " + in + "y", exitRefused, "publish first"},
		{"get " + here + " --deadline 30ms -o " + in + "y", exitTimeout, "--deadline"},
		{"verify " + here, exitRefused, "publish first"},
		{"verify " + here + " " + bad, exitData, "bad.safetensors"},
		{"publish " + here + " --progress some " + in, exitUsage, "auto, always or never"},
		{"publish " + here + " --progress always " + in, exitOK, "100%"},
		{"get --table model --addr " + s.TCP + " --progress always -o " + in + "z", exitOK, "100%"},
		{"get " + here + " --progress some -o " + in + "y", exitUsage, "auto, always or never"},
		{"verify a b", exitUsage, "accepts at most 1"},
		{"watch --count -1", exitUsage, "negative"},
		{"ls --admin nowhere", exitUsage, "admin address"},
		{"ls --admin 127.0.0.1:1", exitUnreachable, "no daemon answers"},
		{"ls --table other --admin " + s.Admin, exitRefused, "no table"},
		{"ls -l " + here, exitOK, "5 tensors"},
		{"ls --admin " + s.Admin, exitOK, "table model"},
	} {
		ingestd(t, "", append([]string{"weights"}, strings.Fields(c.args)...)...).want(t, c.code, c.want)
	}
}

// TestWeightsOnePublisher: another publisher is refused, and --wait keeps trying until the first one has ended.
func TestWeightsOnePublisher(t *testing.T) {
	s := serveModel(t)
	in := filepath.Join(t.TempDir(), "in.safetensors")
	m := modelFile(t, in, 1, modelShapes...)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	p, err := client.OpenPublisher(ctx, s.TCP, client.PublisherConfig{Table: "model", Manifest: m, Client: "the-first"})
	if err != nil {
		t.Fatal(err)
	}
	publish := []string{"weights", "publish", "--addr", s.Unix, "--table", "model"}
	ingestd(t, "", append(publish, in)...).want(t, exitRefused, "the-first", "--wait keeps trying")
	waiting := background(t, append(publish, "--wait", "30s", in)...)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	waiting.wait(t).want(t, exitOK, "published generation 1")
}
