package steps

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/tensor"
)

// TestOneManifest: whoever is connected has the same one; when all are gone another may come.
func TestOneManifest(t *testing.T) {
	k := newKeeper(t, Config{})
	m, small := manifest(t), other(t, 4)
	first, second := open(t, k, "w1", 1, m), open(t, k, "w0", 2, manifest(t, "with metadata"))
	if second.manifest != first.manifest {
		t.Error("two producers have two copies of one manifest")
	}
	var mismatch *MismatchError
	if err := k.Admit("w2", small); !errors.As(err, &mismatch) || mismatch.Connected != 2 || mismatch.Name != "w0" || mismatch.Got != small.ID() || mismatch.Want != m.ID() ||
		len(mismatch.Diff) != 2 || !strings.Contains(err.Error(), "2 producers") {
		t.Fatalf("%v", err)
	}
	// The one that is there may be replaced by itself.
	second.Close()
	second.Close() // twice is once
	if err := k.Admit("w1", small); err != nil {
		t.Error(err)
	}
	if _, err := k.Open("w2", 3, small); !errors.As(err, &mismatch) || !strings.Contains(err.Error(), `producer "w1" is connected`) {
		t.Errorf("one that came too late: %v", err)
	}
	first.Close()
	open(t, k, "w1", 1, small)
	if got := k.Stats(); len(got.Producers) != 1 || got.Producers[0].Manifest != small.ID() {
		t.Errorf("%+v", got)
	}
}

// TestKnownManifests: those in use are known, and the last 16 others; those used last stay.
func TestKnownManifests(t *testing.T) {
	k := newKeeper(t, Config{})
	used := open(t, k, "w0", 1, other(t, 1))
	used.Close()
	_ = open(t, k, "w0", 1, other(t, 1))
	know := func(elements int64) bool {
		text, ok := k.Manifest(other(t, elements).ID())
		if ok {
			if m, err := tensor.ParseManifest(text); err != nil || !m.Equal(other(t, elements)) {
				t.Errorf("manifest %d is known as %s: %v", elements, text, err)
			}
		}
		return ok
	}
	for n := int64(2); n < 2+KeptManifests; n++ {
		k.known.use(other(t, n))
	}
	k.known.use(other(t, 2)) // again
	k.known.use(other(t, 100))
	for n := int64(1); n < 2+KeptManifests; n++ {
		if know(n) != (n != 3) {
			t.Errorf("manifest %d is known: %v", n, know(n))
		}
	}
	if !know(100) || know(101) {
		t.Error("the newest is not known, or one that never came is")
	}
}

// TestManifestFile: another process knows the manifests of the one before, in the same order. A file that makes no sense is left out.
func TestManifestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "grads.manifests")
	k := newKeeper(t, Config{Path: path})
	var want []string
	for n := range int64(KeptManifests + 3) {
		p := open(t, k, "w<&>0", 1, other(t, n+1))
		p.Close()
		want = append(want, fmt.Sprintf("%016x", other(t, n+1).ID()))
	}
	list := func(k *Keeper) (got []string) {
		for _, m := range k.known.all {
			got = append(got, fmt.Sprintf("%016x", m.id))
		}
		return got
	}
	next := newKeeper(t, Config{Path: path})
	if got := list(next); fmt.Sprint(got) != fmt.Sprint(want[3:]) {
		t.Errorf("got %v, want %v", got, want[3:])
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); err != nil || len(left) != 1 {
		t.Errorf("files %v, %v", left, err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, damaged := range map[string]string{
		"cut short": string(text[:len(text)/2]), "empty": "", "another version": `{"version":2,"manifests":[]}`, "no manifest": `{"version":1,"manifests":[{}]}`,
		"endless": strings.Repeat(" ", (KeptManifests+1)*manifestTextMax+1),
	} {
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		k := newKeeper(t, Config{Path: path})
		if got := list(k); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
		open(t, k, "w0", 1, other(t, 7))
		if got := list(newKeeper(t, Config{Path: path})); len(got) != 1 {
			t.Errorf("%s: after it %v", name, got)
		}
	}
	// A folder that is gone costs the file, and nothing else.
	gone := newKeeper(t, Config{Path: filepath.Join(path, "x")})
	open(t, gone, "w0", 1, other(t, 7))
	if _, ok := gone.Manifest(other(t, 7).ID()); !ok {
		t.Error("a manifest that could not be kept is not known")
	}
}

// TestFoundInASegment: producers whose chunks an earlier process left unread, and that do not come back, are said to be gone, once; others are not mentioned.
func TestFoundInASegment(t *testing.T) {
	r, mem := newRingIn(t, 16, 1)
	cfg := Config{ChunkBytes: chunkBytes}
	k := New(r, cfg, nil)
	m := manifest(t)
	streams := map[string]uint64{}
	for _, name := range []string{"left", "closed", "read"} {
		s, err := r.OpenSession(name, testTime, 0)
		if err != nil {
			t.Fatal(err)
		}
		streams[name] = s.Stream()
		p := open(t, k, name, s.Stream(), m)
		push(t, r, p, p.whole(1)[0])
		if name == "closed" {
			p.Close()
		}
		if name == "read" {
			p.Close()
			for { // what came of it, and all before, is read
				b, ok := r.TryLease()
				if !ok {
					break
				}
				h, _ := tensor.ParseHeader(b.Column(headerColumn))
				if h.Stream == s.Stream() {
					r.Release(b)
				}
			}
		}
	}
	left := ring.AlignedBytes(int64(len(mem))) // as a process that dies now leaves it
	copy(left, mem)
	again, found, err := ring.Recover(left, r.Layout())
	if err != nil {
		t.Fatal(err)
	}
	next := New(again, cfg, found)
	if err := next.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, ok := again.TryLease()
	if !ok {
		t.Fatal("nothing is said")
	}
	h, err := tensor.ParseHeader(b.Column(headerColumn))
	if err != nil || h.Flags != tensor.FlagClosed || h.Stream != streams["left"] || h.Producer != tensor.ProducerID("left") || h.Manifest != m.ID() {
		t.Errorf("%+v, %v", h, err)
	}
	if b.Streams()[0] == h.Stream || b.Streams()[0] == streams["closed"] {
		t.Errorf("it is said under the number %d of a producer", b.Streams()[0])
	}
	if _, ok := again.TryLease(); ok {
		t.Error("more is said")
	}
}
