package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/engine"
)

// Config is everything that can be set about a daemon. Its YAML form is the configuration file and what serve prints; the names are those of the flags.
type Config struct {
	Listen       []string `yaml:"listen"`        // tcp://host:port, tls://host:port, quic://host:port, unix:///path, echo://host:port/table
	Admin        string   `yaml:"admin"`         // host:port of the admin HTTP server, or "off"
	Insecure     bool     `yaml:"insecure"`      // allow listeners that other machines can reach, without credentials
	Drainers     int      `yaml:"drainers"`      // goroutines that move samples from queues to rings
	DrainTimeout Duration `yaml:"drain_timeout"` // how long a stopping daemon waits for producers and trainers
	ReadyFile    string   `yaml:"ready_file,omitempty"`

	SegmentDir      string `yaml:"segment_dir"`      // folder in which the tables' segments are kept over restarts; empty: they lie in memory and end with the daemon
	DiscardSegments bool   `yaml:"discard_segments"` // overwrite kept segments that cannot be taken up, instead of not starting

	Tokens string `yaml:"tokens"` // file of tokens, one of which peers must prove to have; empty: everybody is let in
	Bans   Bans   `yaml:"bans,flow"`
	TLS    TLS    `yaml:"tls,flow"`

	Compression []string `yaml:"compression,flow,omitempty"` // offered to producers: s2, zstd, s2+shuffle, zstd+shuffle

	LocalProducers LocalProducers `yaml:"local_producers"`
	Log            Log            `yaml:"log"`
	Limits         Limits         `yaml:"limits"`
	Tables         []Table        `yaml:"tables"`
}

// LocalProducers says who may write samples in place, over the unix socket. Whoever may has the tables' memory mapped writable.
type LocalProducers struct {
	Enabled     bool     `yaml:"enabled"`
	Users       []string `yaml:"users,flow"`   // names or numbers, beside the daemon's own user
	Groups      []string `yaml:"groups,flow"`  // names or numbers
	Max         int      `yaml:"max"`          // at once
	Prefetch    int      `yaml:"prefetch"`     // places lent at once to one that asks for no number
	SettleAfter Duration `yaml:"settle_after"` // how long complete samples wait for the rest of their place before they are copied; a table's shorter linger comes first
	Poll        Duration `yaml:"poll"`         // how long the daemon looks at a producer's queue before it sleeps: costs processor time, saves wake-ups
}

// Log says what is logged, and how.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn, error
	Format string `yaml:"format"` // text, json
}

// Limits bounds what peers may take.
type Limits struct {
	MaxConnections   int      `yaml:"max_connections"`
	WindowSamples    int      `yaml:"window_samples"`    // most samples of one producer without an ack
	WindowBytes      Size     `yaml:"window_bytes"`      // bytes without an ack of a producer that asks for no number, unless two samples are more
	WindowBytesMax   Size     `yaml:"window_bytes_max"`  // most bytes of one producer without an ack
	HandshakeTimeout Duration `yaml:"handshake_timeout"` // for the whole hello
	IdleTimeout      Duration `yaml:"idle_timeout"`      // without a byte between samples
	StallTimeout     Duration `yaml:"stall_timeout"`     // without a byte inside a sample that holds a slot
	AckTimeout       Duration `yaml:"ack_timeout"`       // for a client to read its acks
	MaxTrainers      int      `yaml:"max_trainers"`      // in other processes
	Prefetch         int      `yaml:"prefetch"`          // batches a trainer holds at once, unless it asks for another number; 0: as many as 8 MiB are, at least 4

	HalfOpen           int `yaml:"half_open"`             // handshakes under way of all that bans concern
	HalfOpenPerAddress int `yaml:"half_open_per_address"` // of one address of those, or /64 of IPv6
}

// Table is one table, of a kind. Of samples and tensors it is a ring: either Batches or Capacity says how large it is; with neither it gets 256 MiB, or 4 batches if
// that is more. Of weights, Capacity bounds what the first publisher's manifest may ask for.
type Table struct {
	Name        string   `yaml:"name"`
	Kind        string   `yaml:"kind"`                  // samples, tensors, weights
	Spec        string   `yaml:"spec,omitempty"`        // of samples: text form, JSON, or @file with either
	ChunkBytes  Size     `yaml:"chunk_bytes,omitempty"` // of tensors: most data bytes of a chunk
	MaxLag      uint64   `yaml:"max_lag,omitempty"`     // of tensors: how many steps a chunk may be behind the newest one; 0: any number
	Generations int      `yaml:"generations,omitempty"` // of weights: how many it holds
	BatchSize   int      `yaml:"batch_size,omitempty"`
	Batches     int      `yaml:"batches,omitempty"`
	Capacity    Size     `yaml:"capacity,omitempty"`
	Linger      Duration `yaml:"linger"`     // publish a batch that waits longer, short; 0 is off
	HugePages   bool     `yaml:"huge_pages"` // try them; ordinary pages are the fallback

	SegmentDir     *string  `yaml:"segment_dir,omitempty"`       // instead of the daemon's; empty: this table is not kept
	LocalProducers *bool    `yaml:"local_producers,omitempty"`   // false: nobody may write samples of this table in place
	Ack            string   `yaml:"ack,omitempty"`               // queued: producers choose; committed: no sample is acked before it is in the ring
	Sessions       int      `yaml:"sessions,omitempty"`          // most sessions it knows
	SessionTTL     Duration `yaml:"session_ttl,omitempty"`       // a session that has had no connection for so long may be forgotten
	Groups         []Group  `yaml:"groups,omitempty"`            // groups of trainers that are there from the start and never end
	OtherGroups    Policy   `yaml:"other_groups,flow,omitempty"` // of groups that are not listed
	GroupKeep      Duration `yaml:"group_keep,omitempty"`        // how long a group that is not listed lasts without a trainer
}

// Group is a group of trainers.
type Group struct {
	Name   string `yaml:"name"`
	Policy `yaml:",inline"`
}

// Policy is what becomes of batches that a group does not read.
type Policy struct {
	OnDeath string `yaml:"on_death"` // offer: a batch whose trainer died goes to another; drop: to none
	OnLag   string `yaml:"on_lag"`   // hold: producers wait for the group; lose: it loses its oldest batches
}

// DefaultConfig is the configuration before the file and the flags.
func DefaultConfig() Config {
	return Config{
		Listen:       []string{"tcp://" + DefaultTCP, "unix://" + DefaultSocket()},
		Admin:        DefaultAdmin,
		Drainers:     min(max(runtime.GOMAXPROCS(0)/2, 1), 8),
		DrainTimeout: Duration(30 * time.Second),
		LocalProducers: LocalProducers{
			Enabled: true, Max: 256, Prefetch: 2, SettleAfter: Duration(100 * time.Millisecond),
		},
		Log: Log{Level: "info", Format: "text"},
		Limits: Limits{
			MaxConnections:   1024,
			WindowSamples:    65536,
			WindowBytes:      1 << 20,
			WindowBytesMax:   16 << 20,
			HandshakeTimeout: Duration(10 * time.Second),
			IdleTimeout:      Duration(5 * time.Minute),
			StallTimeout:     Duration(10 * time.Second),
			AckTimeout:       Duration(30 * time.Second),
			MaxTrainers:      256,

			HalfOpen: bans.DefaultHalfOpen, HalfOpenPerAddress: bans.DefaultHalfOpenPerAddress,
		},
		Bans: Bans{Enabled: true, Kernel: true},
	}
}

// What a table gets that does not say.
const (
	DefaultSessionTTL = Duration(engine.SessionTTLDefault)
	DefaultGroupKeep  = Duration(time.Minute)
)

// DefaultBatchSize and DefaultTable serve where a table is given without them.
const (
	DefaultBatchSize = 32
	DefaultTable     = "default"
)

// ConfigError says what is wrong with the configuration and what to do. Where names the field or flag.
type ConfigError struct {
	Where  string
	Reason string
}

func (e *ConfigError) Error() string {
	if e.Where == "" {
		return "configuration: " + e.Reason
	}
	return "configuration: " + e.Where + ": " + e.Reason
}

func configErrorf(where, format string, args ...any) error {
	return &ConfigError{Where: where, Reason: fmt.Sprintf(format, args...)}
}

const configBytesMax = 4 << 20

// LoadFile reads a YAML file over cfg: what the file does not name stays. A field that is not known is an error, with its line.
func (cfg *Config) LoadFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return configErrorf("--config", "%v", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, configBytesMax+1))
	if err != nil {
		return configErrorf(path, "%v", err)
	}
	if len(text) > configBytesMax {
		return configErrorf(path, "larger than %d bytes: not a configuration file", configBytesMax)
	}
	return cfg.load(path, text)
}

func (cfg *Config) load(name string, text []byte) error {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(cfg); err != nil && !errors.Is(err, io.EOF) {
		return configErrorf(name, "%s", plainYAML(err))
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return configErrorf(name, "holds a second document: keep one, without a --- between")
	}
	return nil
}

var (
	unknownField = regexp.MustCompile(`field (\S+) not found in type daemon\.(\w+)`)
	wrongType    = regexp.MustCompile("cannot unmarshal !!(\\w+) (`.*?` )?into (.*)$")
)

// plainYAML takes Go's type names out of the decoder's errors and says which fields there are.
func plainYAML(err error) string {
	var typed *yaml.TypeError
	if !errors.As(err, &typed) {
		return strings.TrimPrefix(err.Error(), "yaml: ")
	}
	var out []string
	for _, line := range typed.Errors {
		line = unknownField.ReplaceAllStringFunc(line, func(m string) string {
			part := unknownField.FindStringSubmatch(m)
			return fmt.Sprintf("unknown field %s; there are %s", part[1], strings.Join(fieldNames(part[2]), ", "))
		})
		if part := wrongType.FindStringSubmatch(line); part != nil {
			line = wrongType.ReplaceAllString(line, part[2]+"is not "+plainType(part[3]))
		}
		out = append(out, line)
	}
	return strings.Join(out, "; ")
}

func plainType(name string) string {
	switch {
	case strings.HasPrefix(name, "[]"):
		return "a list"
	case strings.HasPrefix(name, "int"), strings.HasPrefix(name, "uint"):
		return "a whole number"
	case name == "bool":
		return "true or false"
	case strings.HasPrefix(name, "daemon."):
		return "a group of fields"
	}
	return "a text"
}

// YAML is the effective configuration as a file that LoadFile reads.
func (cfg *Config) YAML() string {
	text, err := yaml.Marshal(cfg)
	if err != nil {
		panic("daemon: configuration does not marshal: " + err.Error())
	}
	return string(text)
}
