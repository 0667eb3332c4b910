package daemon

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Size is a number of bytes, written with a unit: 64MiB, 1.5GiB, 100MB, 4096. It is a flag value and a YAML value.
type Size int64

var sizeUnits = []struct {
	suffix string
	bytes  int64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
}

// ParseSize reads a size.
func ParseSize(text string) (Size, error) {
	number, unit := strings.TrimSpace(text), int64(1)
	for _, u := range sizeUnits {
		if rest, ok := strings.CutSuffix(number, u.suffix); ok {
			number, unit = strings.TrimSpace(rest), u.bytes
			break
		}
	}
	if n, err := strconv.ParseInt(number, 10, 64); err == nil && n >= 0 && n <= math.MaxInt64/unit {
		return Size(n * unit), nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || !(f >= 0) || f*float64(unit) >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is not a size: write a number with a unit, such as 64MiB, 1.5GiB or 100MB", text)
	}
	return Size(f * float64(unit)), nil
}

// String writes it with the largest binary unit that loses nothing.
func (s Size) String() string {
	for _, u := range sizeUnits[:4] {
		if s != 0 && int64(s)%u.bytes == 0 {
			return fmt.Sprintf("%d%s", int64(s)/u.bytes, u.suffix)
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// Set is ParseSize, for flags.
func (s *Size) Set(text string) error {
	v, err := ParseSize(text)
	if err == nil {
		*s = v
	}
	return err
}

// Type names the value in the help.
func (*Size) Type() string { return "size" }

// MarshalYAML writes it as String.
func (s Size) MarshalYAML() (any, error) { return s.String(), nil }

// UnmarshalYAML reads what ParseSize reads.
func (s *Size) UnmarshalYAML(node *yaml.Node) error { return unmarshalText(node, s.Set) }

// Duration is a time.Duration as a flag and in YAML: 250ms, 10s, 1h30m.
type Duration time.Duration

// String is as time.Duration writes it.
func (d Duration) String() string { return time.Duration(d).String() }

// Set reads a duration that is not negative.
func (d *Duration) Set(text string) error {
	v, err := time.ParseDuration(text)
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a duration: write a number with a unit, such as 250ms, 10s or 1h30m", text)
	}
	*d = Duration(v)
	return nil
}

// Type names the value in the help.
func (*Duration) Type() string { return "duration" }

// MarshalYAML writes it as String.
func (d Duration) MarshalYAML() (any, error) { return d.String(), nil }

// UnmarshalYAML reads what Set reads.
func (d *Duration) UnmarshalYAML(node *yaml.Node) error { return unmarshalText(node, d.Set) }

func unmarshalText(node *yaml.Node, set func(string) error) error {
	if node.Kind != yaml.ScalarNode {
		return fmt.Errorf("line %d: one value expected", node.Line)
	}
	if err := set(node.Value); err != nil {
		return fmt.Errorf("line %d: %w", node.Line, err)
	}
	return nil
}
