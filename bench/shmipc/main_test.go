package main

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

// side is a running reader or writer.
type side struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func start(t *testing.T, binary string, args ...string) *side {
	t.Helper()
	s := &side{cmd: exec.Command(binary, args...)}
	s.cmd.Stderr = os.Stderr
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.cmd.Process.Kill() })
	if answer := s.receive(t); answer.Ready == nil {
		t.Fatalf("%v answered %+v", args, answer)
	}
	return s
}

func (s *side) receive(t *testing.T) reply {
	t.Helper()
	line, err := s.out.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	var answer reply
	if err := json.Unmarshal(line, &answer); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return answer
}

func (s *side) ask(t *testing.T, do string) reply {
	t.Helper()
	if _, err := io.WriteString(s.in, `{"do":"`+do+"\"}\n"); err != nil {
		t.Fatal(err)
	}
	return s.receive(t)
}

// TestPeers hands samples over until the memory has been used several times.
func TestPeers(t *testing.T) {
	folder := t.TempDir()
	binary := filepath.Join(folder, "peer")
	if text, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	args := []string{
		"--socket", filepath.Join(folder, "socket"), "--counter", filepath.Join(folder, "counter"), "--sample-bytes", strconv.Itoa(1 << 20), "--samples", "32",
		"--batch", "8",
	}
	reader := start(t, binary, append([]string{"reader"}, args...)...)
	writer := start(t, binary, append([]string{"writer"}, args...)...)
	for got := uint64(0); got < 1000; {
		answer := reader.ask(t, "snapshot")
		if answer.Error != "" || answer.Snapshot == nil || answer.Snapshot.Samples < got {
			t.Fatalf("after %d samples the reader answered %+v", got, answer)
		}
		got = answer.Snapshot.Samples
	}
	if answer := writer.ask(t, "snapshot"); answer.Snapshot == nil || answer.Snapshot.Samples < 1000 {
		t.Errorf("the writer answered %+v", answer)
	}
	if answer := writer.ask(t, "sing"); answer.Error == "" {
		t.Error("an unknown request was answered")
	}
	for _, s := range []*side{writer, reader} {
		if answer := s.ask(t, "stop"); answer.Error != "" {
			t.Errorf("stop: %s", answer.Error)
		}
		if err := s.cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestOptionsRefused(t *testing.T) {
	for _, args := range [][]string{nil, {"server"}, {"reader"}, {"writer", "--socket", "s", "--counter", "c", "--sample-bytes", "8", "--samples", "3"}} {
		if err := run(args); err == nil {
			t.Errorf("%v: accepted", args)
		}
	}
}

// TestConfig wants the library's memory below what 32 bits count, and room for every sample but the last.
func TestConfig(t *testing.T) {
	for _, tc := range []struct{ sample, samples, room int }{{64, 256, 255}, {1 << 20, 256, 255}, {16 << 20, 255, 254}, {16 << 20, 1000, 254}} {
		cfg, room := options{socket: "s", sampleBytes: tc.sample, samples: tc.samples}.config()
		if room != tc.room || int(cfg.ShareMemoryBufferCap) < (room+1)*tc.sample {
			t.Errorf("%d samples of %d: room for %d in %d bytes, want %d", tc.samples, tc.sample, room, cfg.ShareMemoryBufferCap, tc.room)
		}
	}
}
