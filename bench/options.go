package bench

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// Common are the flags that bench tcp and bench shm share, kept in the record.
type Common struct {
	Case      string        `json:"case,omitempty"`
	Smoke     bool          `json:"smoke,omitempty"`
	Runs      int           `json:"runs"`
	Duration  time.Duration `json:"duration_ns"`
	Warmup    time.Duration `json:"warmup_ns"`
	ServeArgs []string      `json:"serve_args,omitempty"`

	JSON       string `json:"-"`
	CPUProfile string `json:"-"`
	Binary     string `json:"-"`
	Check      bool   `json:"-"`
	Quiet      bool   `json:"-"`
}

// Options are the flags of bench tcp and bench secure, kept in the record.
type Options struct {
	Common
	All          bool          `json:"all,omitempty"`
	OpenDuration time.Duration `json:"open_duration_ns"`
	OpenFraction float64       `json:"open_fraction"`
	Only         string        `json:"only,omitempty"`
	RingBytes    int64         `json:"ring_bytes,omitempty"`
	WriteBytes   int           `json:"write_bytes"`
	SendBuffer   int           `json:"send_buffer"`
	BareRead     int           `json:"bare_read_bytes"`
	AskSamples   int64         `json:"window_samples,omitempty"` // that the sender asks for; 0: the receiver's limit
	AskBytes     int64         `json:"window_bytes,omitempty"`
	Client       bool          `json:"client,omitempty"`
	SourceBytes  int           `json:"source_bytes,omitempty"` // memory that the sender sends from; 0: one write's
	Secure       bool          `json:"secure,omitempty"`       // the cases over TLS and QUIC

	certs certificates
	sites sites
}

// Contenders, in the order of the first run: the daemon comes first, because the bare loop is then given the window that the daemon granted.
var contenders = []string{contenderFull, contenderBare, contenderCopy}

const (
	contenderFull = "full"
	contenderBare = "bare"
	contenderCopy = "copy"
)

// settle checks what both benchmarks have and finds the program.
func (o *Common) settle() error {
	if o.Smoke {
		o.Runs, o.Duration, o.Warmup = 1, 60*time.Millisecond, 20*time.Millisecond
	}
	switch {
	case o.Runs < 1:
		return fmt.Errorf("--runs is %d, must be at least 1", o.Runs)
	case o.Duration <= 0 || o.Warmup < 0:
		return fmt.Errorf("--duration must be above 0, --warmup at least 0")
	case o.CPUProfile != "":
		if err := os.MkdirAll(o.CPUProfile, 0o755); err != nil {
			return fmt.Errorf("--cpuprofile: %w", err)
		}
	}
	if o.Binary == "" {
		path, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program's own file: %w", err)
		}
		o.Binary = path
	}
	return nil
}

// cases are all there are.
func (o *Options) cases() []Case {
	switch {
	case o.Secure && o.Smoke:
		return smokeSecureCases()
	case o.Secure:
		return secureCases()
	case o.Smoke:
		return smokeCases()
	}
	return fullCases()
}

// settle checks the options and works out what depends on others.
func (o *Options) settle() ([]Case, error) {
	cases := o.cases()
	if o.Smoke {
		o.OpenDuration = min(o.OpenDuration, 40*time.Millisecond)
	}
	switch {
	case o.OpenDuration < 0:
		return nil, fmt.Errorf("--open-duration must be at least 0")
	case !(o.OpenFraction > 0 && o.OpenFraction <= 1):
		return nil, fmt.Errorf("--open-fraction is %v, must be above 0 and at most 1", o.OpenFraction)
	case o.WriteBytes < 4*kib || o.BareRead < 4*kib:
		return nil, fmt.Errorf("--write-bytes and --bare-read-bytes must be at least 4096")
	}
	if err := o.Common.settle(); err != nil {
		return nil, err
	}
	if _, err := o.contenders(); err != nil {
		return nil, err
	}
	chosen, err := chooseCases(cases, o.Case, o.All)
	if err != nil {
		return nil, err
	}
	if o.RingBytes > 0 {
		for i, c := range chosen {
			chosen[i].Batches = int(max(2, o.RingBytes/(c.SampleBytes*int64(c.BatchSize))))
		}
	}
	return chosen, nil
}

// contenders returns who is to be measured.
func (o *Options) contenders() ([]string, error) {
	if o.Only == "" {
		return contenders, nil
	}
	var chosen []string
	for name := range strings.SplitSeq(o.Only, ",") {
		if !slices.Contains(contenders, name) {
			return nil, fmt.Errorf("--only %q: choose from %s", name, strings.Join(contenders, ", "))
		}
		chosen = append(chosen, name)
	}
	return chosen, nil
}
