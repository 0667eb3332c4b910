package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// Sources is where a Collector gets its snapshots.
type Sources struct {
	Version    string
	Ready      func() bool
	Tables     func() []engine.Stats
	Transports func() []ingest.Stats
	Trainers   func() shm.Stats
	Segments   map[string]int64 // bytes of each table's segment
}

// Collector implements prometheus.Collector.
type Collector struct{ from Sources }

// New returns a Collector over these sources.
func New(from Sources) *Collector { return &Collector{from} }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("ingestd_"+name, help, labels, nil)
}

var (
	build = desc("build_info", "Always 1; the version is a label.", "version")
	ready = desc("ready", "1 while the daemon takes new connections.")

	segmentBytes = desc("table_segment_bytes", "Memory of the table's segment.", "table")
	batchSize    = desc("table_batch_size_samples", "Samples in a batch.", "table")
	capacity     = desc("table_capacity_batches", "Batches that the ring holds.", "table")
	places       = desc("table_places", "Places of the ring by state of the batch in them.", "table", "state")
	pushed       = desc("table_samples_pushed_total", "Samples that transports put into queues.", "table")
	committed    = desc("table_samples_committed_total", "Samples in the ring.", "table")
	abandoned    = desc("table_slots_abandoned_total", "Slots given back unfilled because their sample never came whole.", "table")
	published    = desc("table_batches_published_total", "Batches that became readable.", "table")
	delivered    = desc("table_batches_delivered_total", "Batches given to trainers, again after their trainer died.", "table")
	released     = desc("table_batches_released_total", "Batches that trainers gave back read.", "table")
	returned     = desc("table_batches_returned_total", "Batches that came back by the death of their trainer.", "table")
	lingered     = desc("table_batches_lingered_total", "Batches published short because a sample had waited for the table's linger.", "table")
	streams      = desc("table_streams", "Open streams.", "table")
	opened       = desc("table_streams_opened_total", "Streams there ever were.", "table")
	waiting      = desc("table_streams_waiting", "Streams that wait for a free slot: the ring is full.", "table")
	longest      = desc("table_stream_wait_seconds", "How long the stream that waits longest for a free slot has waited; 0 if none does.", "table")

	connections  = desc("connections", "Open connections.", "transport")
	accepted     = desc("connections_accepted_total", "Connections accepted.", "transport")
	acceptErrors = desc("accept_errors_total", "Connections that could not be accepted.", "transport")
	samples      = desc("samples_received_total", "Samples received whole.", "transport")
	bytes        = desc("sample_bytes_received_total", "Bytes of the samples received whole.", "transport")
	cutShort     = desc("samples_cut_short_total", "Samples discarded because only a part of them came.", "transport")
	ended        = desc("streams_ended_total", "Streams that ended, by reason.", "transport", "reason")
	refused      = desc("refused_total", "Connections refused, by reason.", "transport", "reason")

	trainers        = desc("trainers", "Attached trainers of other processes.", "table")
	held            = desc("trainer_batches_held", "Batches in the hands of trainers of other processes.", "table")
	attached        = desc("trainers_attached_total", "Trainers that attached.")
	observed        = desc("observers_total", "Observers that were served.")
	trainersEnded   = desc("trainers_ended_total", "Trainers that ended, by reason.", "reason")
	trainersReasons = []string{"detached", "died", "cut_off", "bad_peer"}
)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		build, ready, segmentBytes, batchSize, capacity, places, pushed, committed, abandoned, published, delivered, released, returned, lingered,
		streams, opened, waiting, longest, connections, accepted, acceptErrors, samples, bytes, cutShort, ended, refused,
		trainers, held, attached, observed, trainersEnded,
	} {
		ch <- d
	}
}

// out sends metrics to a channel.
type out chan<- prometheus.Metric

func (ch out) gauge(d *prometheus.Desc, v float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (ch out) counter(d *prometheus.Desc, v uint64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(metrics chan<- prometheus.Metric) {
	ch := out(metrics)
	ch.gauge(build, 1, c.from.Version)
	ch.gauge(ready, number(c.from.Ready()))
	tables := c.from.Tables()
	for i := range tables {
		c.table(ch, &tables[i])
	}
	for _, t := range c.from.Transports() {
		transport(ch, &t)
	}
	c.trainers(ch, tables)
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (c *Collector) table(ch out, st *engine.Stats) {
	t := st.Table
	ch.gauge(segmentBytes, float64(c.from.Segments[t]), t)
	ch.gauge(batchSize, float64(st.BatchSize), t)
	ch.gauge(capacity, float64(st.Batches), t)
	for _, state := range []ring.State{ring.Free, ring.Open, ring.Sealing, ring.Published, ring.Leased} {
		ch.gauge(places, float64(st.Places[state.String()]), t, state.String())
	}
	ch.counter(pushed, st.Pushed, t)
	ch.counter(committed, st.Committed, t)
	ch.counter(abandoned, st.Abandoned, t)
	ch.counter(published, st.Published, t)
	ch.counter(delivered, st.Sampler.Delivered, t)
	ch.counter(released, st.Sampler.Released, t)
	ch.counter(returned, st.Sampler.Returned, t)
	ch.counter(lingered, st.Sampler.Lingered, t)
	ch.gauge(streams, float64(len(st.Streams)), t)
	ch.counter(opened, st.Opened, t)
	now, n, most := time.Now(), 0, time.Duration(0)
	for _, s := range st.Streams {
		if !s.WaitingSince.IsZero() {
			n++
			most = max(most, now.Sub(s.WaitingSince))
		}
	}
	ch.gauge(waiting, float64(n), t)
	ch.gauge(longest, most.Seconds(), t)
}

// endReasons are all reasons for which a stream ends; each is there from the first scrape on.
func endReasons() []string {
	all := []string{ingest.EndClean, ingest.EndReset}
	for _, code := range wire.Codes() {
		all = append(all, string(code))
	}
	return all
}

func transport(ch out, st *ingest.Stats) {
	t := st.Transport
	ch.gauge(connections, float64(st.Open), t)
	ch.counter(accepted, st.Accepted, t)
	ch.counter(acceptErrors, st.AcceptErrors, t)
	ch.counter(samples, st.Samples, t)
	ch.counter(bytes, st.Bytes, t)
	ch.counter(cutShort, st.CutShort, t)
	for _, reason := range endReasons() {
		ch.counter(ended, st.Ended[reason], t, reason)
	}
	for _, code := range wire.Codes() {
		ch.counter(refused, st.Refused[string(code)], t, string(code))
	}
}

func (c *Collector) trainers(ch out, tables []engine.Stats) {
	st := c.from.Trainers()
	n, batches := map[string]int{}, map[string]int{}
	for _, t := range st.Trainers {
		n[t.Table]++
		batches[t.Table] += len(t.Held)
	}
	for i := range tables {
		t := tables[i].Table
		ch.gauge(trainers, float64(n[t]), t)
		ch.gauge(held, float64(batches[t]), t)
	}
	ch.counter(attached, st.Attached)
	ch.counter(observed, st.Observed)
	for i, v := range []uint64{st.Detached, st.Died, st.CutOff, st.BadPeers} {
		ch.counter(trainersEnded, v, trainersReasons[i])
	}
	for _, code := range wire.Codes() {
		ch.counter(refused, st.Refused[code], "shm", string(code))
	}
}
