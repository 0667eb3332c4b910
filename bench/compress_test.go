package bench

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestSmokeCompress(t *testing.T) {
	var out bytes.Buffer
	if err := runCompress(time.Microsecond, &out); err != nil {
		t.Fatal(err)
	}
	for _, in := range compressInputs {
		if n := strings.Count(out.String(), in.name); n != 5 {
			t.Errorf("%q has %d lines, want 5:\n%s", in.name, n, out.String())
		}
	}
}
