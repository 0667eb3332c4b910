package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/inspect"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

func keptConfig(t testing.TB) Config {
	cfg := testConfig(t)
	cfg.SegmentDir = t.TempDir()
	if err := os.Chmod(cfg.SegmentDir, 0o700); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// sender is a producer in a session that speaks the protocol by hand.
type sender struct {
	net.Conn
	t        testing.TB
	accepted wire.AcceptedPush
}

func (r *running) sender(t testing.TB, session string) *sender {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(r.addr.TCP, "tcp://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s := &sender{Conn: c, t: t}
	if err := wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: "a", Spec: mustSpec(t, testSpec), Session: session, Ack: wire.AckCommitted}); err != nil {
		t.Fatal(err)
	}
	if err := wire.ReadReply(c, &s.accepted); err != nil {
		t.Fatal(err)
	}
	return s
}

// send sends samples and waits for their acks.
func (s *sender) send(first, n uint64) {
	s.t.Helper()
	sp := mustSpec(s.t, testSpec)
	b := make([]byte, sp.SampleBytes())
	for i := range n {
		proof.Sample(b, sp, s.accepted.Stream, first+i)
		if _, err := s.Write(b); err != nil {
			s.t.Fatal(err)
		}
	}
	if _, err := io.ReadFull(s, make([]byte, n)); err != nil {
		s.t.Fatal(err)
	}
}

// crashed leaves a segment as a daemon does that is killed: nothing in it is put in order.
func crashed(t testing.TB, cfg Config, samples uint64) (stream uint64) {
	t.Helper()
	r := start(t, cfg)
	s := r.sender(t, "s")
	s.send(0, samples)
	stream = s.accepted.Stream
	path := segmentPath(cfg.SegmentDir, "a")
	image, err := os.ReadFile(path) // the mapping is shared: the file has what the memory has
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	r.StopNow()
	_ = r.wait()
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return stream
}

// TestSegmentsAreKept: what no trainer read, and what sessions hold, is there again after a stop in order and after a crash, and is not said to be lost.
func TestSegmentsAreKept(t *testing.T) {
	for _, crash := range []bool{false, true} {
		t.Run(fmt.Sprint("crash ", crash), func(t *testing.T) {
			cfg := keptConfig(t)
			var stream uint64
			if crash {
				stream = crashed(t, cfg, 6)
			} else {
				r := start(t, cfg)
				s := r.sender(t, "s")
				stream = s.accepted.Stream
				s.send(0, 6)
				_ = s.Close()
				r.stop()
				if err := r.wait(); err != nil {
					t.Fatalf("unread samples that are kept are no error: %v", err)
				}
			}
			r := start(t, cfg)
			s := r.sender(t, "s")
			if s.accepted.Held != 6 || s.accepted.Stream != stream {
				t.Fatalf("stream %d holds %d, want %d and 6", s.accepted.Stream, s.accepted.Held, stream)
			}
			if found := r.tables[0].Found(); found == nil || found.Clean == crash || found.Samples != 6 {
				t.Errorf("found %+v", found)
			}
			other := r.sender(t, "")
			if other.accepted.Stream == stream {
				t.Error("a new stream got the number of an old one")
			}
			_ = other.Close()
			s.send(6, 3)
			_ = s.Close()
			a := r.trainer(t)
			r.stop()
			got, err := read(t.Context(), a)
			if err != nil || got[stream] != 9 {
				t.Errorf("%d of 9 samples came, %v", got[stream], err)
			}
			_ = a.Close()
			if err := r.wait(); err != nil {
				t.Error(err)
			}
			// Read to the end, it is empty, and still knows the session.
			r = start(t, cfg)
			if s := r.sender(t, "s"); s.accepted.Held != 9 {
				t.Errorf("%d held, want 9", s.accepted.Held)
			}
			if n := r.tables[0].unread(); n != 0 {
				t.Errorf("%d samples were offered again after they were released", n)
			}
		})
	}
}

// TestSegmentsThatAreRefused: each is told with its reason and left as it is; --discard-segments overwrites it.
func TestSegmentsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(cfg *Config)
		damage func(b []byte) []byte
		say    string
	}{
		"another spec":       {change: func(c *Config) { c.Tables[0].Spec = "x:F32[4],y:U16" }, say: `leaf "y": got U8, want U16`},
		"another batch size": {change: func(c *Config) { c.Tables[0].BatchSize = 8 }, say: "batch size 4 instead of 8"},
		"another capacity":   {change: func(c *Config) { c.Tables[0].Batches = 8 }, say: "batches 4 instead of 8"},
		"other sessions":     {change: func(c *Config) { c.Tables[0].Sessions = 8 }, say: "sessions 1024 instead of 8"},
		"another version":    {damage: func(b []byte) []byte { b[8]++; return b }, say: "version"},
		"a changed header":   {damage: func(b []byte) []byte { b[24]++; return b }, say: "segment:"},
		"a changed cursor":   {damage: func(b []byte) []byte { binary.LittleEndian.PutUint64(b[320:], 99); return b }, say: "damaged"},
		"magic wiped":        {damage: func(b []byte) []byte { copy(b, make([]byte, 8)); return b }, say: "segment:"},
		"cut by pages":       {damage: func(b []byte) []byte { return b[:len(b)-8192] }, say: "segment:"},
		"cut anywhere":       {damage: func(b []byte) []byte { return b[:len(b)-100] }, say: "cut short"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := keptConfig(t)
			crashed(t, cfg, 6)
			path := segmentPath(cfg.SegmentDir, "a")
			if c.damage != nil {
				b, err := os.ReadFile(path)
				if err == nil {
					err = os.WriteFile(path, c.damage(b), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(&cfg)
			}
			_, err = New(cfg, slog.New(slog.DiscardHandler), "test")
			var refused *SegmentError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.say) || !strings.Contains(err.Error(), "--discard-segments") ||
				!strings.Contains(err.Error(), path) {
				t.Fatalf("got %v, want it to say %q", err, c.say)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
				t.Fatalf("the refused segment was changed (%v)", err)
			}
			cfg.DiscardSegments = true
			d, err := New(cfg, slog.New(slog.DiscardHandler), "test")
			if err != nil {
				t.Fatal(err)
			}
			if d.tables[0].Found() != nil || len(d.tables[0].Ring().Sessions()) != 0 {
				t.Error("the segment was not made anew")
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if d, err = New(cfg, slog.New(slog.DiscardHandler), "test"); err != nil || d.tables[0].Found() == nil {
				t.Fatalf("with the flag a good segment is not taken up: %v", err)
			}
			_ = d.Close()
		})
	}
}

// TestFilesThatAreNoSegments: what a killed daemon left before it had made its segment is made anew; what belongs to others is never touched.
func TestFilesThatAreNoSegments(t *testing.T) {
	for name, leave := range map[string]func(path string) error{
		"empty":      func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"only sized": func(path string) error { return os.WriteFile(path, make([]byte, 4096), 0o600) },
	} {
		cfg := keptConfig(t)
		if err := leave(segmentPath(cfg.SegmentDir, "a")); err != nil {
			t.Fatal(err)
		}
		d, err := New(cfg, slog.New(slog.DiscardHandler), "test")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_ = d.Close()
	}
	for name, leave := range map[string]func(path string) error{
		"a link":   func(path string) error { return os.Symlink("/etc/hostname", path) },
		"a folder": func(path string) error { return os.Mkdir(path, 0o700) },
		"two names": func(path string) error {
			return errors.Join(os.WriteFile(path, []byte("x"), 0o600), os.Link(path, path+"2"))
		},
		"another mode":  func(path string) error { return os.WriteFile(path, make([]byte, 4096), 0o640) },
		"some document": func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("text\n", 4096)), 0o600) },
	} {
		cfg := keptConfig(t)
		path := segmentPath(cfg.SegmentDir, "a")
		if err := leave(path); err != nil {
			t.Fatal(err)
		}
		var refused *SegmentError
		if _, err := New(cfg, slog.New(slog.DiscardHandler), "test"); !errors.As(err, &refused) {
			t.Errorf("%s: got %v", name, err)
		}
		cfg.DiscardSegments = true
		d, err := New(cfg, slog.New(slog.DiscardHandler), "test")
		if mine := name == "another mode" || name == "some document"; mine != (err == nil) {
			t.Errorf("%s, with the flag: %v", name, err)
		}
		if err == nil {
			_ = d.Close()
		}
	}
}

func TestSegmentInUse(t *testing.T) {
	cfg := keptConfig(t)
	r := start(t, cfg)
	other := cfg
	other.Listen, other.Admin, other.DiscardSegments = []string{"tcp://127.0.0.1:0"}, "off", true
	var used *shm.InUseError
	if _, err := New(other, slog.New(slog.DiscardHandler), "test"); !errors.As(err, &used) || !strings.Contains(err.Error(), "stop the other daemon") {
		t.Errorf("a segment in use: %v", err)
	}
	// One table may be left out.
	none := ""
	other.Tables = []Table{{Name: "a", Spec: testSpec, SegmentDir: &none}}
	d, err := New(other, slog.New(slog.DiscardHandler), "test")
	if err != nil {
		t.Fatal(err)
	}
	if d.tables[0].memory.Path() != "" {
		t.Errorf("the table is kept in %s", d.tables[0].memory.Path())
	}
	_ = d.Close()
	r.stop()
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

// TestUncleanMachine: after the machine went down over a segment in use, it is refused; after an orderly stop it is not.
func TestUncleanMachine(t *testing.T) {
	cfg := keptConfig(t)
	crashed(t, cfg, 6)
	path := segmentPath(cfg.SegmentDir, "a")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const boot, clean = 464, 480
	b[boot]++
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var unclean *ring.UncleanError
	if _, err := New(cfg, slog.New(slog.DiscardHandler), "test"); !errors.As(err, &unclean) {
		t.Fatalf("got %v, want an *UncleanError", err)
	}
	b[clean] = 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := New(cfg, slog.New(slog.DiscardHandler), "test")
	if err != nil {
		t.Fatal(err)
	}
	_ = d.Close()
}

// TestKeptSegmentPassesCheck: ingestd check accepts what a daemon leaves, in order and killed.
func TestKeptSegmentPassesCheck(t *testing.T) {
	cfg := keptConfig(t)
	crashed(t, cfg, 7)
	for range 2 {
		b, err := os.ReadFile(segmentPath(cfg.SegmentDir, "a"))
		if err != nil {
			t.Fatal(err)
		}
		mem := ring.AlignedBytes(int64(len(b)))
		copy(mem, b)
		if _, problems, err := inspect.Check(mem); err != nil || len(problems) > 0 {
			t.Errorf("%v %q", err, problems)
		}
		r := start(t, cfg)
		r.stop()
		if err := r.wait(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSegmentPaths(t *testing.T) {
	seen := map[string]string{}
	long := strings.Repeat("ä/", 42)
	for _, name := range []string{"a", "A", ".", "..", "a/b", "a%2Fb", "a b", "tÿpe", long, long + "x", strings.Repeat("n", 128)} {
		path := segmentPath("/dir", name)
		if filepath.Dir(path) != "/dir" || len(filepath.Base(path)) > 255 || seen[path] != "" {
			t.Errorf("table %q has the file %q, which is also that of %q", name, path, seen[path])
		}
		seen[path] = name
	}
}

// TestStopNowKeepsSegments: what is kept is there after a stop at once, too.
func TestStopNowKeepsSegments(t *testing.T) {
	cfg := keptConfig(t)
	r := start(t, cfg)
	a := r.trainer(t)
	s := r.sender(t, "s")
	s.send(0, 8)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := a.Next(ctx); err != nil { // and hold it
		t.Fatal(err)
	}
	r.StopNow()
	if err := r.wait(); !errors.Is(err, ErrStoppedAtOnce) {
		t.Fatal(err)
	}
	_ = a.Close()
	r = start(t, cfg)
	if n := r.tables[0].unread(); n != 8 {
		t.Errorf("%d of 8 samples are there again", n)
	}
}
