package ingesttest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/wire"
)

// helloFields are all that a hello may have, and one that it may not.
var helloFields = []string{
	"role", "table", "spec", "fingerprint", "session", "ack", "window_samples", "window_bytes", "prefetch", "group", "notes", "manifest", "manifest_id", "in_place", "wait", "stream",
	"delta", "have", "resume", "resume_offset", "have_digest", "resume_digest", "compression", "token", "nonce", "client", "no_such_field",
}

// oddValues are what none of them is meant to hold, or only some.
var oddValues = []any{
	nil, true, -1, 0, 1, uint64(1) << 63, 1e300, 0.5, "", "push", "train", "publish", "committed", "s2", strings.Repeat("a", 129), strings.Repeat("a", 100_000), "\x00", "\u202e", "not\nplain",
	strings.Repeat("0", 64), strings.Repeat("f", 64), strings.Repeat("g", 64), []any{}, []any{[]any{[]any{}}}, map[string]any{}, map[string]any{"tensors": []any{}}, "a:U8", "x:F32[0]",
}

// randomHello is a good hello with one to three things changed: fields, or bytes.
func randomHello(rng *rand.Rand, good []byte) []byte {
	const header = 16
	var fields map[string]any
	if err := json.Unmarshal(good[header:], &fields); err != nil {
		panic(err)
	}
	for range 1 + rng.IntN(3) {
		field := helloFields[rng.IntN(len(helloFields))]
		if rng.IntN(8) == 0 {
			delete(fields, field)
		} else {
			fields[field] = oddValues[rng.IntN(len(oddValues))]
		}
	}
	body, err := json.Marshal(fields)
	if err != nil {
		panic(err)
	}
	b := append(append([]byte(nil), good[:header]...), body...)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(body)))
	switch rng.IntN(8) {
	case 0:
		b = b[:1+rng.IntN(len(b)-1)]
	case 1:
		b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
	case 2:
		b[rng.IntN(header)] = byte(rng.Uint32())
	case 3:
		b = append(b, b[:40]...) // less than a sample
	}
	return b
}

// randomHellos: whatever a hello says, its connection ends, is counted, and harms nobody.
func randomHellos(t *testing.T, start Start) {
	const hellos = 300
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	r := newRig(t, start, "a:U8[64]", 4, 16, Limits{})
	r.train()
	good, err := wire.AppendHello(nil, r.hello())
	if err != nil {
		t.Fatal(err)
	}
	for i := range hellos {
		b := randomHello(rng, good)
		c := r.connect()
		if _, err := c.Write(b); err == nil { // else it was refused before all of it was sent
			_ = c.CloseWrite()
		}
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("seed %#x, hello %d: the connection did not end: %q", seed, i, b)
		}
		_ = c.Close()
	}
	for r.transport.Stats().Open > 0 {
		pause(t)
	}
	st, counted := r.transport.Stats(), uint64(0)
	for _, n := range st.Ended {
		counted += n
	}
	for _, n := range st.Refused {
		counted += n
	}
	if counted != hellos || len(st.Refused) < 2 {
		t.Errorf("seed %#x: %d of %d counted: refused %v, ended %v", seed, counted, hellos, st.Refused, st.Ended)
	}
	c := r.join(1, nil)
	if err := c.send(5, 0); err != nil {
		t.Fatal(err)
	}
	c.wantAcks(5)
	_ = c.Close()
	r.finish()
}
