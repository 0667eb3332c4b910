package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/spec"
)

const layout = "x:F32[3],y:U8"

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestFilesThereAndBack pushes files and raw bytes, and pulls the same samples into a file.
func TestFilesThereAndBack(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "32")
	sp, back := mustSpec(t, layout), filepath.Join(t.TempDir(), "back.npz")
	in := write(t, mustSpec(t, "y:U8,x:F32[3]"), 40) // another order of the leaves
	data := samplesOf(t, in, sp)
	pull := background(t, "pull", "-a", s.Unix, "-t", "a", "--out", back, "--samples", "100", "--json")

	pushed := parse[pushResult](t, ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--json", "--repeat", "2", in).want(t, exitOK).out)
	if pushed.Acked != 80 || pushed.Sent != 80 || pushed.Bytes != 80*13 {
		t.Errorf("%+v", pushed)
	}
	ingestd(t, string(data[:20*13]), "push", "-a", s.Unix, "-t", "a", "--spec", layout, "--ack", "committed", "--progress", "always", "-").
		want(t, exitOK, "20 acked", "standard input")

	pulled := parse[pullResult](t, pull.wait(t).want(t, exitOK).out)
	if pulled.Samples != 100 || pulled.Batches != 25 || pulled.Streams != 2 {
		t.Errorf("%+v", pulled)
	}
	want := string(data) + string(data) + string(data[:20*13])
	if got := samplesOf(t, back, sp); string(got) != want {
		t.Errorf("%d bytes came back of %d, or others", len(got), len(want))
	}
	ingestd(t, "", "pull", "-a", s.Unix, "-t", "a", "--out", back).want(t, exitUsage, "delete it")
	s.signal(t, syscall.SIGTERM)
	s.wait(t).want(t, exitOK, "settings in force", "ingestd push --addr "+s.TCP, "ingestd pull --addr "+s.Unix, "python3")
}

func TestRefusalsAndBadInput(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "2")
	ingestd(t, "", "push", "-a", s.TCP, "-t", "b", "--generate", "1").want(t, exitRefused, "unknown_table", "the tables here are: a")
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--generate", "1", "--spec", "x:I32[3],y:U8").want(t, exitRefused, `leaf "x": got I32[3], want F32[3]`, "the table's spec is "+layout)
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", write(t, mustSpec(t, "x:F32[3],z:U8"), 3)).want(t, exitRefused, "renamed?")
	ingestd(t, "", "pull", "-a", s.Unix, "-t", "b").want(t, exitRefused, "unknown_table")
	ingestd(t, "", "pull", "-a", s.Unix, "-t", "a", "--spec", "x:F32[3]").want(t, exitRefused, "spec_mismatch")
	ingestd(t, "", "pull", "-a", s.Unix, "-t", "a", "--deadline", "10ms").want(t, exitTimeout, "--deadline 10ms")
	ingestd(t, "1234567", "push", "-a", s.TCP, "-t", "a", "--spec", layout, "-").want(t, exitData, "ends inside sample 0")
	bad := filepath.Join(t.TempDir(), "bad.npy")
	if err := os.WriteFile(bad, []byte("\x93NUMPY\x01\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", bad).want(t, exitData, "cut short")
	// Nobody reads, so the ring is full after 8 samples, and the window after that.
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--generate", "1000", "--window-samples", "4", "--timeout", "200ms").want(t, exitTimeout, "the ring is full")
	// What was pushed is there, and nobody will read it.
	ingestd(t, "", "inspect", "-a", s.Unix, "-t", "a").want(t, exitOK, "published 2 batches", layout)
	ingestd(t, "", "serve", "--spec", "x:U8", "--listen", s.TCP, "--admin", "off").want(t, exitFailure, "another program listens there")
	ingestd(t, "", "serve", "--spec", "x:U8", "--listen", s.Unix, "--admin", "off").want(t, exitFailure, "stop it, or choose another path")
	ingestd(t, "", "serve", "--spec", "x:F32[16777216]", "--batch-size", "64", "--batches", "10000", "--listen", "tcp://127.0.0.1:0", "--admin", "off").
		want(t, exitFailure, "make the table smaller")
	s.signal(t, syscall.SIGTERM)
	s.wait(t).want(t, exitData, "samples that no trainer has read are lost")
}

// status returns the daemon's status, as text.
func (s *server) status(t testing.TB) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(s.Admin + "/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestSIGTERMUnderLoad: producers push without an end, one trainer verifies. After SIGTERM everything acked was read, in order, whole, none twice.
func TestSIGTERMUnderLoad(t *testing.T) {
	t.Run("trainer maps", func(t *testing.T) { testSIGTERMUnderLoad(t, func(s *server) string { return s.Unix }) })
	t.Run("trainer over TCP", func(t *testing.T) { testSIGTERMUnderLoad(t, func(s *server) string { return s.TCP }) })
}

func testSIGTERMUnderLoad(t *testing.T, trainer func(*server) string) {
	s := serveTable(t, layout, "--batch-size", "16", "--batches", "8")
	pull := background(t, "pull", "-a", trainer(s), "-t", "a", "--verify", "--gapless", "--json")
	var pushes []*process
	for i := range 3 {
		pushes = append(pushes, background(t, "push", "-a", []string{s.TCP, s.Unix}[i%2], "-t", "a", "--generate", "1000000", "--repeat", "0", "--json"))
	}
	eventually(t, func() bool { // all three are at it
		text := s.status(t)
		return strings.Contains(text, `"streams": 3,`) && strings.Contains(text, `"batches_released": 1`)
	})
	s.signal(t, syscall.SIGTERM)
	var sent, acked uint64
	for _, p := range pushes {
		r := parse[pushResult](t, p.wait(t).want(t, exitRefused, "shutting_down").out)
		sent += r.Sent
		acked += r.Acked
	}
	pulled := parse[pullResult](t, pull.wait(t).want(t, exitOK).out)
	s.wait(t).want(t, exitOK)
	if !pulled.Ended || pulled.Samples < acked || pulled.Samples > sent || acked == 0 {
		t.Errorf("%d sent, %d acked, %d read; %+v", sent, acked, pulled.Samples, pulled)
	}
}

// TestSecondSignalStopsAtOnce: a trainer that is stopped (SIGSTOP) keeps its batches, so draining would last.
func TestSecondSignalStopsAtOnce(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "4", "--drain-timeout", "1h")
	pull := background(t, "pull", "-a", s.Unix, "-t", "a")
	waits := func(what string) func() bool {
		return func() bool { return strings.Contains(s.status(t), what) }
	}
	eventually(t, waits(fmt.Sprintf(`"pid": %d`, pull.cmd.Process.Pid)))
	pull.signal(t, syscall.SIGSTOP)
	push := background(t, "push", "-a", s.TCP, "-t", "a", "--generate", "1000000")
	eventually(t, waits("the ring is full"))
	s.signal(t, syscall.SIGTERM)
	eventually(t, waits(`"state": "draining"`))
	s.signal(t, syscall.SIGTERM)
	s.wait(t).want(t, exitInterrupted, "stopped at once")
	pull.signal(t, syscall.SIGCONT)
	if r := push.wait(t); r.code != exitRefused && r.code != exitUnreachable {
		t.Errorf("push ended with %d: %s", r.code, r.err)
	}
	if r := pull.wait(t); r.code == exitOK || r.code == exitFailure {
		t.Errorf("pull ended with %d: %s", r.code, r.err)
	}
}

// TestInterruptedPush: a signal ends a push, which says how far it came.
func TestInterruptedPush(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "1000")
	push := background(t, "push", "-a", s.TCP, "-t", "a", "--generate", "1000000", "--rate", "200", "--json")
	ingestd(t, "", "pull", "-a", s.Unix, "-t", "a", "--samples", "8", "--verify").want(t, exitOK, "verified: 0 wrong")
	push.signal(t, syscall.SIGINT)
	r := parse[pushResult](t, push.wait(t).want(t, exitInterrupted, "interrupted by a signal").out)
	if r.Acked != r.Sent || r.Acked < 8 || r.Error == "" {
		t.Errorf("%+v", r)
	}
}

// TestKilledTrainer: what a killed trainer held goes to the next one; nothing is lost but what it had given back.
func TestKilledTrainer(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "16")
	first := background(t, "pull", "-a", s.Unix, "-t", "a")
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--generate", "8").want(t, exitOK)
	first.signal(t, syscall.SIGKILL)
	<-first.done
	pull := background(t, "pull", "-a", s.Unix, "-t", "a", "--verify", "--json")
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--generate", "400").want(t, exitOK)
	s.signal(t, syscall.SIGTERM)
	s.wait(t).want(t, exitOK)
	if r := parse[pullResult](t, pull.wait(t).want(t, exitOK).out); r.Samples < 400 {
		t.Errorf("%+v", r)
	}
}

// TestKilledDaemon: with a folder for its segments, a daemon that is killed loses nothing that was acked as committed, and its successor offers all of it.
func TestKilledDaemon(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	args := []string{"--batch-size", "4", "--batches", "16", "--segment-dir", dir, "--ack", "committed"}
	s := serveTable(t, layout, args...)
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--generate", "30").want(t, exitOK, "30 acked")
	s.signal(t, syscall.SIGKILL)
	<-s.done
	path := filepath.Join(dir, "a.segment")
	ingestd(t, "", "check", path).want(t, exitOK, "right")
	other := []string{"serve", "--table", "a", "--listen", "tcp://127.0.0.1:0", "--admin", "off",
		"--segment-dir", dir, "--batch-size", "4", "--batches", "16", "--spec"}
	ingestd(t, "", append(other, "x:F32[4],y:U8")...).want(t, exitData, path, `leaf "x": got F32[3], want F32[4]`, "--discard-segments")
	s = serveTable(t, layout, args...)
	if text := s.status(t); !strings.Contains(text, `"path": "`+path+`"`) {
		t.Errorf("the status does not say where the segment is kept: %s", text)
	}
	r := parse[pullResult](t, ingestd(t, "", "pull", "-a", s.Unix, "-t", "a", "--samples", "30", "--verify", "--gapless", "--json").want(t, exitOK).out)
	if r.Samples != 30 {
		t.Errorf("%+v", r)
	}
	s.signal(t, syscall.SIGTERM)
	s.wait(t).want(t, exitOK, "segment taken up")
}

func TestInspectSaveAndCheck(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "8")
	ingestd(t, "", "push", "-a", s.TCP, "-t", "a", "--generate", "10").want(t, exitOK)
	seg := filepath.Join(t.TempDir(), "a.seg")
	ingestd(t, "", "inspect", "-a", s.Unix, "-t", "a", "--json", "--save", seg).want(t, exitOK, `"published": 2`, `"dtype": "F32"`)
	ingestd(t, "", "check", seg).want(t, exitOK, "right", "2 batches published")
	ingestd(t, "", "check", "--quiet", seg).want(t, exitOK)
	ingestd(t, "", "inspect", seg).want(t, exitOK, "published 2 batches")
	ingestd(t, "", "inspect", "-a", s.Unix, "-t", "a", "--save", seg).want(t, exitFailure, "exists")
	ingestd(t, "", "inspect", "-a", s.Unix, "-t", "b").want(t, exitRefused, "unknown_table")
	whole, err := os.ReadFile(seg)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"cut":    func(b []byte) []byte { return b[:len(b)-5000] },
		"header": func(b []byte) []byte { b[24]++; return b },
		"cursor": func(b []byte) []byte { b[320] = 7; return b },
	} {
		path := filepath.Join(t.TempDir(), name+".seg")
		if err := os.WriteFile(path, damage([]byte(string(whole))), 0o600); err != nil {
			t.Fatal(err)
		}
		ingestd(t, "", "check", path).want(t, exitData, path)
	}
}

// eventually tries until it is so; in vain it ends by the test's own timeout.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal(fmt.Errorf("the test ended first: %w", t.Context().Err()))
		}
	}
}

// TestStatus: the command names who waits for whom; its exit codes tell a daemon that serves from one that does not and from none.
func TestStatus(t *testing.T) {
	s := serveTable(t, layout, "--batch-size", "4", "--batches", "4", "--drain-timeout", "1h")
	ingestd(t, "", "status", "-a", s.Admin).want(t, exitOK, "serving", "table a: "+layout, "4 batches of 4", "0 sessions known")
	pull := background(t, "pull", "-a", s.Unix, "-t", "a")
	who := fmt.Sprintf("pid %d", pull.cmd.Process.Pid)
	shows := func(what ...string) func() bool {
		return func() bool {
			out := ingestd(t, "", "status", "-a", s.Admin).out
			for _, w := range what {
				if !strings.Contains(out, w) {
					return false
				}
			}
			return true
		}
	}
	eventually(t, shows(who+`, group "default") holds no batch: has waited `, ` for a batch of table "a", on the producers`))
	pull.signal(t, syscall.SIGSTOP)
	push := background(t, "push", "-a", s.TCP, "-t", "a", "--generate", "1000000", "--session", "s 1")
	eventually(t, shows(" (127.0.0.1:", `session "s 1")`, ` for a free slot of table "a" (the ring is full), on `, who, "1 sessions known"))
	got := ingestd(t, "", "status", "-a", s.Admin, "--json").want(t, exitOK).out
	if st := parse[daemon.Status](t, got); len(st.Producers.Connections) != 1 || st.Producers.Connections[0].Waits == nil || len(st.Waits) == 0 {
		t.Errorf("%s", got)
	}
	s.signal(t, syscall.SIGTERM)
	eventually(t, func() bool { return ingestd(t, "", "status", "-a", s.Admin).code == exitRefused })
	s.signal(t, syscall.SIGTERM)
	s.wait(t).want(t, exitInterrupted)
	pull.signal(t, syscall.SIGCONT)
	_ = pull.wait(t)
	push.signal(t, syscall.SIGKILL) // its session makes it try again
	ingestd(t, "", "status", "-a", s.Admin).want(t, exitUnreachable, "no daemon answers")
	ingestd(t, "", "status", "-a", "nowhere").want(t, exitUsage, "admin address")
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ingestd(t, "", "status", "-a", silent.Addr().String(), "--timeout", "50ms").want(t, exitTimeout, "--timeout 50ms")
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	ingestd(t, "", "status", "-a", other.URL).want(t, exitUnreachable, "is this the admin address of an ingestd?")
}
