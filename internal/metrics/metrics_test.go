package metrics

import (
	"errors"
	"os"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/bans/sockfilter"
	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

func collector() *Collector {
	return New(Sources{
		Version: "v1",
		Ready:   func() bool { return true },
		Tables: func() []engine.Stats {
			return []engine.Stats{{
				Table: "a", BatchSize: 4, Batches: 8, Published: 5, Places: map[string]int{"free": 6, "leased": 2}, Pushed: 22, Committed: 21, Opened: 3,
				Streams:  []drainer.StreamStats{{Stream: 1}, {Stream: 2, WaitingSince: time.Now().Add(-time.Hour)}},
				Lenders:  []drainer.LenderStats{{Stream: 4, WaitingSince: time.Now().Add(-2 * time.Hour)}},
				Sessions: 9, Taken: 2,
				Steps: &steps.Stats{
					Newest: 12, Completed: 40, Aborted: 3, Refused: 2, CutShort: 5, Chunks: 900, Late: 6, Announced: 14, Unsaid: 1,
					BadChunks: map[string]uint64{"place": 4, "made up": 7}, Producers: make([]steps.ProducerStats, 3),
				},
				Sampler: sampler.Stats{Delivered: 5, Released: 13, Returned: 1, Lost: 4, Groups: []sampler.GroupStats{
					{GroupConfig: sampler.GroupConfig{Name: "listed"}, Listed: true, Members: 2, Unread: 3, Released: 10, Lost: 1},
					{GroupConfig: sampler.GroupConfig{Name: "made up"}, Members: 1, Unread: 5, Released: 2},
					{GroupConfig: sampler.GroupConfig{Name: "_others"}, Listed: true, Members: 1},
				}},
			}}
		},
		Transports: func() []ingest.Stats {
			return []ingest.Stats{{
				Transport: "tcp", Accepted: 7, Open: 2, Samples: 22, Bytes: 374, CutShort: 1, Notes: 11,
				Ended:   map[string]uint64{ingest.EndClean: 3, string(wire.CodeStalled): 1, "a reason that a peer made up": 9},
				Refused: map[string]uint64{string(wire.CodeSpecMismatch): 2},
			}, {
				Transport: "quic",
				Carriers:  &ingest.Carriers{Open: 7, Strangers: 3, HalfOpen: 2, Max: 90, Ended: map[string]uint64{ingest.EndReset: 5, "another that a peer made up": 9}},
			}}
		},
		Trainers: func() shm.Stats {
			return shm.Stats{Attached: 4, Died: 1, Stalled: 2, Failed: 3, Sent: 10, SentInPlace: 7, Refused: map[wire.Code]uint64{wire.CodeUnknownTable: 6},
				Trainers: []shm.TrainerStats{{Table: "a", Held: make([]shm.LeaseStats, 2)}},
				Fill:     shm.FillStats{Attached: 8, Taken: 3, Published: 6, Settled: 5, Notes: 7, Fillers: []shm.FillerStats{{Table: "a", Lent: 2}}}}
		},
		Weights: func() ([]weights.Stats, weights.ServerStats) {
			return []weights.Stats{{
					Table: "m", Newest: 8, SegmentBytes: 8192, Publisher: &weights.PublisherStats{}, Readers: make([]weights.ReaderStats, 2), Begun: 9, Published: 7, Bytes: 70,
					Generations: []weights.GenerationStats{{Pins: make([]weights.Pin, 2)}, {}}, Failed: map[weights.Failure]uint64{weights.FailedPinned: 2},
				}}, weights.ServerStats{
					Publishers: 3, Readers: 4, Refused: map[wire.Code]uint64{wire.CodeNoGeneration: 5}, CutOff: map[wire.Code]uint64{wire.CodeBadChunk: 6},
					Sent: weights.RemoteCounts{Generations: 11, Deltas: 2, Skipped: 3, Bytes: 99},
				}
		},
		Segments: map[string]int64{"a": 4096},
		Access: Access{
			Gate: func() auth.GateStats {
				return auth.GateStats{ByToken: 21, ByUser: 22, NotAuthenticated: 23, NotPermitted: 24, TimedOut: 25}
			},
			Tokens: func() auth.Stats {
				return auth.Stats{Reloads: 5, Failures: 4, Broken: errors.New("x"), Tokens: make([]auth.TokenStatus, 3)}
			},
			Bans: func() bans.Stats {
				return bans.Stats{Addresses: 9, Banned: 8, Failures: 70, Bans: 11, Refused: 12, Slowed: 13, Forgotten: 14, Cleared: 15}
			},
			HalfOpen: func() (open, addresses int, refused uint64) { return 6, 2, 17 },
			Admin:    func() map[string]uint64 { return map[string]uint64{string(wire.CodeNotAuthenticated): 41} },
			Kernel: func() sockfilter.Stats {
				return sockfilter.Stats{Addresses: 31, Failures: 32, DroppedTCP: 33, DroppedQUIC: 34}
			},
		},
	})
}

func TestValues(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(collector())
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			value := m.GetGauge().GetValue()
			if m.GetCounter() != nil {
				value = m.GetCounter().GetValue()
			}
			got[strings.Join(append([]string{f.GetName()}, labels...), " ")] = value
		}
	}
	for name, want := range map[string]float64{
		"ingestd_build_info v1":                             1,
		"ingestd_tokens":                                    3,
		"ingestd_tokens_stale":                              1,
		"ingestd_kernel_banned_addresses":                   31,
		"ingestd_kernel_filter_failures_total":              32,
		"ingestd_kernel_dropped_total tcp":                  33,
		"ingestd_kernel_dropped_total quic":                 34,
		"ingestd_tokens_reloads_total":                      5,
		"ingestd_tokens_reload_failures_total":              4,
		"ingestd_authentications_total token":               21,
		"ingestd_authentications_total user":                22,
		"ingestd_authentications_total not_authenticated":   23,
		"ingestd_authentications_total not_permitted":       24,
		"ingestd_authentications_total timed_out":           25,
		"ingestd_failed_addresses":                          9,
		"ingestd_banned_addresses":                          8,
		"ingestd_handshake_failures_total":                  70,
		"ingestd_bans_total":                                11,
		"ingestd_bans_refused_total":                        12,
		"ingestd_bans_slowed_total":                         13,
		"ingestd_bans_forgotten_total":                      14,
		"ingestd_bans_cleared_total":                        15,
		"ingestd_half_open_handshakes":                      6,
		"ingestd_half_open_refused_total":                   17,
		"ingestd_ready":                                     1,
		"ingestd_table_segment_bytes a":                     4096,
		"ingestd_table_places free a":                       6, // the labels come sorted by name: state, table
		"ingestd_table_samples_pushed_total a":              22,
		"ingestd_table_samples_committed_total a":           21,
		"ingestd_table_batches_published_total a":           5,
		"ingestd_table_batches_released_total a":            13,
		"ingestd_table_sessions a":                          9,
		"ingestd_table_sessions_taken_total a":              2,
		"ingestd_group_trainers listed a":                   2,
		"ingestd_group_trainers _others a":                  2,
		"ingestd_group_batches_unread listed a":             3,
		"ingestd_group_batches_unread _others a":            5,
		"ingestd_group_batches_released_total listed a":     10,
		"ingestd_group_batches_released_total _others a":    3, // the one that ended had one
		"ingestd_group_batches_returned_total _others a":    1,
		"ingestd_group_batches_lost_total listed a":         1,
		"ingestd_group_batches_lost_total _others a":        3,
		"ingestd_notes_total tcp":                           11,
		"ingestd_notes_total shm":                           7,
		"ingestd_local_producers a":                         1,
		"ingestd_local_producer_places a":                   2,
		"ingestd_local_producers_attached_total":            8,
		"ingestd_local_producers_ended_total session_taken": 3,
		"ingestd_local_places_published_total":              6,
		"ingestd_local_samples_settled_total":               5,
		"ingestd_table_streams a":                           3,
		"ingestd_table_streams_waiting a":                   2,
		"ingestd_streams_ended_total clean tcp":             3,
		"ingestd_streams_ended_total stalled tcp":           1,
		"ingestd_streams_ended_total idle_timeout tcp":      0,
		"ingestd_refused_total spec_mismatch tcp":           2,
		"ingestd_refused_total unknown_table shm":           6,
		"ingestd_quic_connections used":                     4,
		"ingestd_quic_connections stranger":                 3,
		"ingestd_quic_connections half_open":                2,
		"ingestd_quic_connections_max":                      90,
		"ingestd_quic_connections_ended_total reset":        5,
		"ingestd_quic_connections_ended_total idle_timeout": 0,
		"ingestd_trainers a":                                1,
		"ingestd_trainer_batches_held a":                    2,
		"ingestd_trainers_ended_total died":                 1,
		"ingestd_trainers_ended_total stalled":              2,
		"ingestd_trainers_ended_total failed":               3,
		"ingestd_trainer_sent_bytes_total in_place":         7,
		"ingestd_trainer_sent_bytes_total copied":           3,
		"ingestd_connections_accepted_total tcp":            7,
		"ingestd_sample_bytes_received_total tcp":           374,
		"ingestd_table_batches_returned_total a":            1,
		"ingestd_table_capacity_batches a":                  8,
		"ingestd_trainers_attached_total":                   4,
		"ingestd_samples_cut_short_total tcp":               1,
		"ingestd_table_streams_opened_total a":              3,
		"ingestd_table_batches_delivered_total a":           5,

		"ingestd_step_producers a":                          3,
		"ingestd_step_newest a":                             12,
		"ingestd_steps_completed_total a":                   40,
		"ingestd_steps_aborted_total a":                     3,
		"ingestd_steps_refused_total a":                     2,
		"ingestd_steps_cut_short_total a":                   5,
		"ingestd_chunks_total a":                            900,
		"ingestd_chunks_refused_total a":                    6,
		"ingestd_chunks_bad_total place a":                  4,
		"ingestd_chunks_bad_total header a":                 0,
		"ingestd_producers_announced_total a":               14,
		"ingestd_producers_unannounced a":                   1,
		"ingestd_weights_newest_generation m":               8,
		"ingestd_weights_generations m":                     2,
		"ingestd_weights_generations_pinned m":              1,
		"ingestd_weights_segment_bytes m":                   8192,
		"ingestd_weights_readers m":                         2,
		"ingestd_weights_publishers m":                      1,
		"ingestd_weights_generations_begun_total m":         9,
		"ingestd_weights_generations_published_total m":     7,
		"ingestd_weights_bytes_published_total m":           70,
		"ingestd_weights_generations_failed_total pinned m": 2,
		"ingestd_weights_peers_accepted_total publish":      3,
		"ingestd_weights_peers_accepted_total subscribe":    4,
		"ingestd_weights_peers_cut_off_total bad_chunk":     6,
		"ingestd_refused_total no_generation weights":       5,
		"ingestd_weights_bytes_sent_total":                  99,
		"ingestd_weights_transfers_total shown":             11,
		"ingestd_weights_transfers_total skipped":           3,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	for name := range got {
		if strings.Contains(name, "made up") {
			t.Errorf("a peer made a time series: %s", name)
		}
	}
	if v := got["ingestd_table_stream_wait_seconds a"]; v < 7200 {
		t.Errorf("the longest wait is %v s, want two hours", v)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v %+v", err, problems)
	}
}

// TestDocumented: docs/operations.md lists every metric with its labels, and no other.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(ingestd_\\w+)` \\|([^|]*)\\|").FindAllStringSubmatch(string(text), -1) {
		labels := strings.Split(strings.TrimSpace(m[2]), ", ")
		sort.Strings(labels)
		documented[m[1]] = strings.Join(labels, ",")
	}
	ch := make(chan *prometheus.Desc, 100)
	collector().Describe(ch)
	close(ch)
	form := regexp.MustCompile(`fqName: "(\w+)".*variableLabels: \{([^}]*)\}`)
	var known []string
	for d := range ch {
		m := form.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("cannot read %s", d)
		}
		labels := strings.FieldsFunc(m[2], func(r rune) bool { return r == ',' })
		sort.Strings(labels)
		known = append(known, m[1])
		if got, ok := documented[m[1]]; !ok || got != strings.Join(labels, ",") {
			t.Errorf("%s has labels %v; docs/operations.md says %q", m[1], labels, got)
		}
	}
	for name := range documented {
		if !slices.Contains(known, name) {
			t.Errorf("docs/operations.md has %s, which there is not", name)
		}
	}
}
