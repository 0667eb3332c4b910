package bench

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func secureOptions(t *testing.T) Options {
	t.Helper()
	opt := defaultOptions()
	opt.Secure, opt.OpenDuration, opt.Smoke, opt.Binary = true, 0, true, buildBinary(t)
	return opt
}

func TestSmokeSecure(t *testing.T) {
	opt := secureOptions(t)
	opt.Only, opt.JSON = contenderFull+","+contenderBare, filepath.Join(t.TempDir(), "record.json")
	var out, log bytes.Buffer
	if err := runSecure(t.Context(), opt, &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	var record Record
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	rates := 0
	for _, one := range record.Targets {
		if strings.Contains(one.Figure, "the bare loop's") && one.Limit == 0.9 && !one.AtMost {
			rates++
		}
	}
	if len(record.Cases) != 4 || rates != 4 {
		t.Fatalf("%d cases, %d targets of their rates:\n%s", len(record.Cases), rates, out.String())
	}
	for i := range record.Cases {
		c := &record.Cases[i]
		checkCase(t, c, contenderFull, contenderBare)
		if !strings.Contains(out.String(), c.Name) {
			t.Errorf("the tables lack %q:\n%s", c.Name, out.String())
		}
	}
}

// TestSecureClientSender sends with the client library over each.
func TestSecureClientSender(t *testing.T) {
	opt := secureOptions(t)
	opt.Client, opt.Quiet, opt.Only, opt.Case = true, true, contenderFull, "tls/64KiB/1,quic/64KiB/1"
	opt.JSON = "-"
	var out bytes.Buffer
	if err := runSecure(t.Context(), opt, &out, os.Stderr); err != nil {
		t.Fatal(err)
	}
	var record Record
	if err := json.Unmarshal(out.Bytes(), &record); err != nil {
		t.Fatal(err)
	}
	if len(record.Cases) != 2 {
		t.Fatalf("got %+v", record.Cases)
	}
	for i := range record.Cases {
		checkCase(t, &record.Cases[i], contenderFull)
	}
}

func TestSecureCases(t *testing.T) {
	var got []string
	for _, c := range secureCases() {
		got = append(got, c.Name)
		if c.RateMin != 0.9 {
			t.Errorf("case %s: the target is %v", c.Name, c.RateMin)
		}
	}
	if want := []string{"tls/64KiB/1", "tls/4MiB/1", "quic/64KiB/1", "quic/4MiB/1"}; !slices.Equal(got, want) {
		t.Errorf("cases %v, want %v", got, want)
	}
	// What is allocated by crypto/tls and quic-go is no target.
	for _, c := range secureCases() {
		all := targets([]CaseResult{{Case: c, Full: &Result{Median: Measurement{SamplesPerSecond: 89, MallocsPerSecond: 1e6, MallocsPerBatch: 1e3}},
			Bare: &Result{Median: Measurement{SamplesPerSecond: 100}}}})
		if len(all) != 1 || all[0].Pass {
			t.Errorf("case %s: targets %+v", c.Name, all)
		}
	}
}

// TestNobodyListensWithoutCertificates: the bare loop says what it lacks.
func TestNobodyListensWithoutCertificates(t *testing.T) {
	for _, transport := range []string{transportTLS, transportQUIC} {
		if l, err := listenBare(t.Context(), transport, "127.0.0.1", certificates(t.TempDir())); err == nil {
			t.Errorf("%s: listening on %v", transport, l.Addr())
		}
	}
	if _, err := dialPeer(t.Context(), "smoke://127.0.0.1:1", "", 0); err == nil || !strings.Contains(err.Error(), "smoke://") {
		t.Errorf("dialled a scheme that there is not: %v", err)
	}
}
