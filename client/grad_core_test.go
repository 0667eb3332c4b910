//go:build linux

package client

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

// TestNames: a name that cannot be had is asked for again, and nothing is lost of its chunk.
func TestNames(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	p := ring.producer("p", 1, m)
	ring.rows = append([]gradRow{p.opened()}, p.send(newRand(), 1, ones(m, 1))...)
	r := ring.reader()
	ring.nameErr = io.ErrUnexpectedEOF
	for range 2 {
		if _, err := r.Step(t.Context(), 1, StepOptions{}); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "stream 1") {
			t.Fatal(err)
		}
	}
	ring.nameErr = nil
	wantHave(t, r, 1, 1, "p").Release()
	if s := r.Stats(); s.BadChunks+s.Duplicates+s.DroppedIncomplete != 0 {
		t.Errorf("%+v", s)
	}
}

// TestSaidAgain: of batches that come again, what the daemon said of producers does not count: it may have changed since.
func TestSaidAgain(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	p, q := ring.producer("p", 1, m), ring.producer("q", 2, m)
	first := []gradRow{p.opened(), q.opened()}
	ring.rows = slices.Concat(first, p.send(newRand(), 1, ones(m, 1)), []gradRow{q.closed()})
	r := ring.reader()
	wantHave(t, r, 1, 1, "p").Release()
	ring.heralds = 0 // the first of them again
	ring.rows = slices.Concat(first, p.send(newRand(), 2, ones(m, 1)))
	s, err := r.Step(t.Context(), 2, StepOptions{}) // which would wait for q, if it were there
	if err != nil || !slices.Equal(s.Have, []string{"p"}) || len(s.Missing) != 1 || s.Missing[0].Reason != "connection ended" {
		t.Fatalf("%+v, %v", s, err)
	}
	s.Release()
	if n := r.Stats().Duplicates; n != 2 {
		t.Errorf("%d came again", n)
	}
}

// TestRingMadeAnew: when the daemon has another ring, numbers and streams are others; what is complete stays, and what is not begins again.
func TestRingMadeAnew(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	ring.created = 100
	p, q := ring.producer("p", 1, m), ring.producer("q", 2, m)
	ring.rows = slices.Concat([]gradRow{p.opened(), q.opened()}, p.send(newRand(), 1, ones(m, 1)), q.send(newRand(), 1, ones(m, 2))[:1])
	r := ring.reader()
	wantReason(t, r, 1, "q", "incomplete")
	ring.created, ring.heralds = 200, 0
	ring.names = map[uint64]string{}
	q, p = ring.producer("q", 1, m), ring.producer("p", 2, m)
	ring.rows = append([]gradRow{q.opened(), p.opened()}, q.send(newRand(), 1, ones(m, 4))...)
	s, err := r.Step(t.Context(), 1, StepOptions{Quorum: 2})
	if err != nil || !slices.Equal(s.Have, []string{"p", "q"}) {
		t.Fatalf("%+v, %v", s, err)
	}
	out := map[string][]float32{"w": make([]float32, 100), "b": make([]float32, 10), "empty": nil}
	if err := s.Sum(out); err != nil || out["w"][99] != 5 || out["b"][0] != 5 {
		t.Errorf("%v, %v", err, out)
	}
	s.Release()
	ring.rows = slices.Concat(p.send(newRand(), 2, ones(m, 1)), q.send(newRand(), 2, ones(m, 2)), []gradRow{p.closed(), q.closed()})
	wantHave(t, r, 2, 2, "p", "q").Release()
	if s := r.Stats(); s.CompletedSteps != 4 || s.DroppedIncomplete != 1 || s.BadChunks+s.Duplicates != 0 {
		t.Errorf("%+v", s)
	}
}
