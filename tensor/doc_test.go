package tensor

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"
)

const docFile = "../docs/tensors.md"

var update = flag.Bool("update", false, "write the examples in "+docFile+" anew")

var (
	hexFence      = regexp.MustCompile("(?s)```hex ([a-z]+)\n(.*?)```")
	manifestFence = regexp.MustCompile("(?s)```manifest\n(.*?)\n```")
)

func docText(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// docExamples returns the bytes of every hex block of the docs by its name.
func docExamples(t *testing.T) map[string][]byte {
	t.Helper()
	examples := map[string][]byte{}
	for _, block := range hexFence.FindAllStringSubmatch(string(docText(t)), -1) {
		var digits strings.Builder
		for line := range strings.Lines(block[2]) {
			_, line, _ = strings.Cut(line, "  ") // the offset
			line, _, _ = strings.Cut(line, "|")  // the characters
			digits.WriteString(strings.Join(strings.Fields(line), ""))
		}
		var err error
		if examples[block[1]], err = hex.DecodeString(digits.String()); err != nil {
			t.Fatalf("%s, block %q: %v", docFile, block[1], err)
		}
	}
	return examples
}

func docManifest(t *testing.T) (*Manifest, string) {
	t.Helper()
	block := manifestFence.FindSubmatch(docText(t))
	if block == nil {
		t.Fatalf("%s has no manifest block", docFile)
	}
	return parsed(t, string(block[1])), string(block[1])
}

// docHeader is the header that the docs describe in words.
func docHeader(m *Manifest) (Header, []byte) {
	data := make([]byte, 1024)
	return Header{
		Flags: FlagBegin, Step: 1234, Stream: 7, Producer: ProducerID("worker-3"), Manifest: m.ID(), Tensor: 1, Length: uint32(len(data)), DataCRC: CRC(data),
	}, data
}

func dump(b []byte) string {
	var out strings.Builder
	for line := range strings.Lines(hex.Dump(b)) {
		out.WriteString(line[4:]) // four digits of offset are enough
	}
	return out.String()
}

func TestDocsWrite(t *testing.T) {
	m, text := docManifest(t)
	if string(m.JSON()) != text {
		t.Errorf("the code writes the manifest as %s", m.JSON())
	}
	if text != mlp || m.Offset(1) != 131_072 || m.DataBytes() != 132_096 {
		t.Errorf("%s does not lie as the docs say", text)
	}
	f := m.Fingerprint()
	h, _ := docHeader(m)
	header := make([]byte, HeaderBytes)
	h.Put(header)
	refused := bytes.Clone(header)
	MarkRefused(refused)
	encoded := map[string][]byte{"fingerprint": f[:], "header": header, "refused": refused}
	if *update {
		text := hexFence.ReplaceAllFunc(docText(t), func(block []byte) []byte {
			name := string(hexFence.FindSubmatch(block)[1])
			return []byte("```hex " + name + "\n" + dump(encoded[name]) + "```")
		})
		if err := os.WriteFile(docFile, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	examples := docExamples(t)
	for name, want := range encoded {
		if !bytes.Equal(examples[name], want) {
			t.Errorf("%s, block %q is not what the code writes; if the change is meant, run: go test ./tensor -run TestDocsWrite -update\ncode:\n%s", docFile, name, dump(want))
		}
	}
	for name := range examples {
		if encoded[name] == nil {
			t.Errorf("%s, block %q is checked by nothing", docFile, name)
		}
	}
}

func TestDocsRead(t *testing.T) {
	m, _ := docManifest(t)
	examples := docExamples(t)
	if f := m.Fingerprint(); !bytes.Equal(f[:], examples["fingerprint"]) {
		t.Errorf("fingerprint %v", f)
	}
	want, data := docHeader(m)
	for name, flags := range map[string]uint16{"header": FlagBegin, "refused": FlagBegin | FlagRefused} {
		want.Flags = flags
		h, err := ParseHeader(examples[name])
		if err != nil || h != want {
			t.Errorf("%s: %+v, %v", name, h, err)
			continue
		}
		if err := h.Check(m, ChunkBytesDefault); err != nil || h.Flat(m) != 131_072 {
			t.Errorf("%s: %v, at %d", name, err, h.Flat(m))
		}
		if err := h.CheckData(m, data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
