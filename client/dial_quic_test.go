//go:build linux

package client

import (
	"os"
	"testing"
)

// TestQuietQUIC: a client does not let quic-go write to its program's log, unless the program wants it to.
func TestQuietQUIC(t *testing.T) {
	s := newSecured(t, nil)
	t.Setenv(quietVariable, "") // is put back
	for _, was := range []string{"unset", "false"} {
		if was == "unset" {
			noError(t, os.Unsetenv(quietVariable))
		} else {
			noError(t, os.Setenv(quietVariable, was))
		}
		p, err := Dial(t.Context(), s.addr["quic"], Config{Table: "t", Spec: s.table.Spec(), TLS: s.files})
		noError(t, err)
		p.Abort()
		if got, want := os.Getenv(quietVariable), map[string]string{"unset": "true", "false": "false"}[was]; got != want {
			t.Errorf("%s was %s, and is %q", quietVariable, was, got)
		}
	}
}
