package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// TestServeKinds: tables of tensors and of weights are made by flags and file, say how they are used, and show in the status who is at which step and who
// publishes.
func TestServeKinds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte("tables: [{name: model, kind: weights, capacity: 64MiB}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serveWith(t, "--config", path, "--table", "grads", "--kind", "tensors", "--chunk-bytes", "64KiB", "--max-lag", "2", "--batches", "32")
	m, err := tensor.NewManifest([]tensor.Tensor{{Name: "w", DType: spec.F32, Shape: []int64{16}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := client.DialSteps(t.Context(), s.TCP, client.StepsConfig{Table: "grads", Name: "worker-0", Manifest: m})
	if err != nil {
		t.Fatal(err)
	}
	tx, err := p.Step(t.Context(), 41)
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.Put("w", make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	pub, err := client.OpenPublisher(t.Context(), s.Unix, client.PublisherConfig{Table: "model", Manifest: m, Client: "the publisher"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pub.Publish(t.Context(), func(int) []byte { return make([]byte, 64) }); err != nil {
		t.Fatal(err)
	}
	sub, err := client.Subscribe(t.Context(), s.Unix, client.SubscribeConfig{Table: "model", Client: "the reader"})
	if err != nil {
		t.Fatal(err)
	}
	held, err := sub.Latest()
	if err != nil {
		t.Fatal(err)
	}
	ingestd(t, "", "status", "-a", s.Admin).want(t, exitOK, "table grads", "newest step 41", `producer "worker-0"`, "step 41 complete, 64 of 64 bytes",
		"table model: weights, newest generation 1", "the publisher", "held by reader", "the reader")
	st := parse[daemon.Status](t, ingestd(t, "", "status", "-a", s.Admin, "--json").want(t, exitOK).out)
	if len(st.Weights) != 1 || len(st.Weights[0].Generations) != 1 || len(st.Weights[0].Generations[0].Pins) != 1 || st.Tables[0].Kind != "tensors" {
		t.Errorf("%+v", st)
	}
	held.Release()
	if err := sub.Close(); err != nil {
		t.Error(err)
	}
	if err := pub.Close(); err != nil {
		t.Error(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	r, err := client.OpenGrads(t.Context(), s.Unix, client.GradConfig{Table: "grads"})
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Step(t.Context(), 41, client.StepOptions{Quorum: 1})
	if err != nil {
		t.Fatal(err)
	}
	g.Release()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	s.signal(t, syscall.SIGTERM)
	out := s.wait(t).want(t, exitOK, "kind: tensors", "max_lag: 2", "table grads: tensors in chunks of 64KiB", "ingestd.StepProducer(", "ingestd.GradReader(",
		"kind: weights", "table model: weights, 3 generations in at most 64MiB", "ingestd weights publish --addr "+s.TCP).out
	if strings.Contains(out, "ingestd push") {
		t.Errorf("nobody can push samples here:\n%s", out)
	}
}
