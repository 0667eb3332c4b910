package bench

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// stamp is the first 8 bytes of every sample: closedStamp at full speed, the intended send time in Unix nanoseconds in the open loop. A time has
// the top bit clear until the year 2262.
const (
	stampBytes  = 8
	closedStamp = uint64(0xA5A5_5A5A_C3C3_3C3C)
	timeMax     = uint64(1) << 63
)

func putStamp(sample []byte, v uint64) { binary.LittleEndian.PutUint64(sample, v) }
func readStamp(sample []byte) uint64   { return binary.LittleEndian.Uint64(sample) }

// Latencies are kept from 1 ns to 100 s with three digits.
const (
	latencyMin = int64(1)
	latencyMax = int64(100 * time.Second)
)

// recorder notes latencies in one goroutine, and gives copies of them to another.
type recorder struct {
	mu       sync.Mutex
	intended *hdrhistogram.Histogram // intended send time to lease (or, in the bare loop, to the end of the read)
	arrival  *hdrhistogram.Histogram // arrival to lease
}

func newRecorder() *recorder {
	return &recorder{
		intended: hdrhistogram.New(latencyMin, latencyMax, 3),
		arrival:  hdrhistogram.New(latencyMin, latencyMax, 3),
	}
}

func record(h *hdrhistogram.Histogram, ns, n int64) {
	// Clocks of one machine can still step; a value outside the range counts as its end.
	_ = h.RecordValues(max(latencyMin, min(ns, latencyMax)), n)
}

// histograms is what a recorder noted, as HdrHistogram's own compressed encoding (version 2).
type histograms struct {
	Intended []byte `json:"intended"`
	Arrival  []byte `json:"arrival"`
}

func (r *recorder) encode() (*histograms, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	intended, err := r.intended.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return nil, fmt.Errorf("encode a histogram: %w", err)
	}
	arrival, err := r.arrival.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return nil, fmt.Errorf("encode a histogram: %w", err)
	}
	return &histograms{Intended: intended, Arrival: arrival}, nil
}

// merge adds what a child noted.
func (r *recorder) merge(h *histograms) error {
	for _, part := range []struct {
		into *hdrhistogram.Histogram
		from []byte
	}{{r.intended, h.Intended}, {r.arrival, h.Arrival}} {
		got, err := hdrhistogram.Decode(part.from)
		if err != nil {
			return fmt.Errorf("decode a histogram: %w", err)
		}
		part.into.Merge(got)
	}
	return nil
}

// Latency is a distribution in microseconds.
type Latency struct {
	Count int64   `json:"count"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p99_9_us"`
	Max   float64 `json:"max_us"`
}

func latencyOf(h *hdrhistogram.Histogram) Latency {
	us := func(ns int64) float64 { return float64(ns) / 1e3 }
	return Latency{
		Count: h.TotalCount(),
		P50:   us(h.ValueAtQuantile(50)),
		P99:   us(h.ValueAtQuantile(99)),
		P999:  us(h.ValueAtQuantile(99.9)),
		Max:   us(h.Max()),
	}
}
