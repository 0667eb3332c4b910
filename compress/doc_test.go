package compress

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"io"
	"math"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/wire"
)

const docFile = "../docs/wire-protocol.md"

var update = flag.Bool("update", false, "write the examples in "+docFile+" anew")

var fence = regexp.MustCompile("(?s)```hexdump (plainsample|shuffledsample|s2sample)\n(.*?)```")

// docExamples are the bytes of the docs' section "Compression".
func docExamples(t *testing.T) (plain, shuffled, packed []byte) {
	t.Helper()
	for _, x := range []float32{1, -2, 0.5} {
		plain = binary.LittleEndian.AppendUint32(plain, math.Float32bits(x))
	}
	plain = append(plain, 7, 8)
	s := mustSpec(t, "x:F32[3],y:U8[2]")
	var out bytes.Buffer
	if _, err := newShuffler(&out, s).Write(plain); err != nil {
		t.Fatal(err)
	}
	return plain, out.Bytes(), pack(t, wire.CompressionS2Shuffle, s, plain, len(plain))
}

func dump(b []byte) string {
	var out strings.Builder
	for line := range strings.Lines(hex.Dump(b)) {
		out.WriteString(line[4:]) // four digits of offset are enough
	}
	return out.String()
}

// TestDocs: what the docs show is what the code writes, and reads.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	plain, shuffled, packed := docExamples(t)
	want := map[string][]byte{"plainsample": plain, "shuffledsample": shuffled, "s2sample": packed}
	found := 0
	written := fence.ReplaceAllStringFunc(string(text), func(block string) string {
		found++
		m := fence.FindStringSubmatch(block)
		if m[2] != dump(want[m[1]]) && !*update {
			t.Errorf("block %q: the docs say\n%sthe code writes\n%s", m[1], m[2], dump(want[m[1]]))
		}
		return "```hexdump " + m[1] + "\n" + dump(want[m[1]]) + "```"
	})
	if found != len(want) {
		t.Errorf("%d of %d examples found", found, len(want))
	}
	if *update {
		if err := os.WriteFile(docFile, []byte(written), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := io.ReadAll(newReader(t, bytes.NewReader(packed), wire.CompressionS2Shuffle, mustSpec(t, "x:F32[3],y:U8[2]")))
	if err != nil || !bytes.Equal(got, plain) {
		t.Errorf("read %x, error %v", got, err)
	}
}
