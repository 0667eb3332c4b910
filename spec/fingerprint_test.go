package spec

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"strings"
	"testing"
)

func TestFingerprintByHand(t *testing.T) {
	encoding := "ingestd-spec-1\n" + "\x02\x00\x00\x00" +
		"\x05\x00image" + "\x03F32" + "\x02" + "\x08\x00\x00\x00\x00\x00\x00\x00" + "\x08\x00\x00\x00\x00\x00\x00\x00" +
		"\x05\x00label" + "\x03I32" + "\x00"
	if got := canonical(digits); !bytes.Equal(got, []byte(encoding)) {
		t.Errorf("canonical encoding %q", got)
	}
	if got := must(t, digits...).Fingerprint(); got != sha256.Sum256([]byte(encoding)) {
		t.Errorf("fingerprint %v", got)
	}
}

func TestFingerprintTellsApart(t *testing.T) {
	seen := map[Fingerprint]string{}
	for _, text := range []string{
		"a:U8", "b:U8", "a:I8", "a:U8[1]", "a:U8[1,1]", "a:U8[2,3]", "a:U8[3,2]", "a:U8[6]", "a:U8,b:U8", "b:U8,a:U8", "ab:U8",
	} {
		s, err := ParseText(text)
		if err != nil {
			t.Fatal(err)
		}
		if other, dup := seen[s.Fingerprint()]; dup {
			t.Errorf("%s and %s have one fingerprint", text, other)
		}
		seen[s.Fingerprint()] = text
	}
}

func TestFingerprintText(t *testing.T) {
	f := must(t, digits...).Fingerprint()
	var raw [32]byte = f // assignable without a conversion
	back, err := ParseFingerprint(f.String())
	if err != nil || back != f || back != Fingerprint(raw) || f.IsZero() || !(Fingerprint{}).IsZero() {
		t.Errorf("%v, %v", back, err)
	}
	data, err := json.Marshal(f)
	if err != nil || string(data) != `"`+f.String()+`"` {
		t.Errorf("JSON %s, %v", data, err)
	}
	var read Fingerprint
	if err := json.Unmarshal(data, &read); err != nil || read != f {
		t.Errorf("%v, %v", read, err)
	}
	for text, says := range map[string]string{
		"": "0 characters", strings.Repeat("a", 63): "63 characters", strings.Repeat("g", 64): "must be hex digits",
	} {
		_, err := ParseFingerprint(text)
		wantError(t, err, says)
	}
}
