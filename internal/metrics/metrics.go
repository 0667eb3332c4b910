package metrics

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// Sources is where a Collector gets its snapshots.
type Sources struct {
	Version    string
	Ready      func() bool
	Tables     func() []engine.Stats
	Transports func() []ingest.Stats
	Trainers   func() shm.Stats
	Weights    func() ([]weights.Stats, weights.ServerStats)
	Access     Access
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
	sessions     = desc("table_sessions", "Sessions of producers that the table knows, with and without a connection.", "table")
	taken        = desc("table_sessions_taken_total", "Sessions that one connection took from another.", "table")
	longest      = desc("table_stream_wait_seconds", "How long the stream that waits longest for a free slot has waited; 0 if none does.", "table")

	groupTrainers = desc("group_trainers", "Trainers of a group that the configuration lists; all others together are the group _others.", "table", "group")
	groupUnread   = desc("group_batches_unread", "Batches that the group has not given out.", "table", "group")
	groupReleased = desc("group_batches_released_total", "Batches that the group's trainers gave back read.", "table", "group")
	groupReturned = desc("group_batches_returned_total", "Batches that came back by the death of their trainer.", "table", "group")
	groupDropped  = desc("group_batches_dropped_total", "Batches given up unread because their trainer died or the group ended.", "table", "group")
	groupLost     = desc("group_batches_lost_total", "Batches given up unread because the group was too slow.", "table", "group")

	connections  = desc("connections", "Open connections.", "transport")
	accepted     = desc("connections_accepted_total", "Connections accepted.", "transport")
	acceptErrors = desc("accept_errors_total", "Connections that could not be accepted.", "transport")
	samples      = desc("samples_received_total", "Samples received whole.", "transport")
	bytes        = desc("sample_bytes_received_total", "Bytes of the samples received whole.", "transport")
	cutShort     = desc("samples_cut_short_total", "Samples discarded because only a part of them came.", "transport")
	ended        = desc("streams_ended_total", "Streams that ended, by reason.", "transport", "reason")
	refused      = desc("refused_total", "Connections refused, by reason.", "transport", "reason")

	quic        = desc("quic_connections", "Connections of QUIC, which carry streams, by state; strangers' are those on which nobody was let in yet.", "state")
	quicMax     = desc("quic_connections_max", "How many there may be at once.")
	quicEnded   = desc("quic_connections_ended_total", "Connections of QUIC that ended, by reason; of whom nobody had any use is refused.", "reason")
	quicReasons = []string{ingest.EndClean, ingest.EndReset, string(wire.CodeIdleTimeout), string(wire.CodeBadPeer), string(wire.CodeShuttingDown)}

	notes = desc("notes_total", "Notes to producers that waited for the ring.", "transport")

	fillers        = desc("local_producers", "Attached producers that write in place.", "table")
	lent           = desc("local_producer_places", "Places that they have.", "table")
	filling        = desc("local_producers_attached_total", "Producers that attached to write in place.")
	fillersEnded   = desc("local_producers_ended_total", "Producers that wrote in place and ended, by reason.", "reason")
	fillersReasons = []string{"detached", "cut_off", "session_taken", "bad_peer"}
	inPlace        = desc("local_places_published_total", "Places that became a batch as a producer had filled them.")
	settled        = desc("local_samples_settled_total", "Samples written in place that were copied into a batch that many share.")
	stranded       = desc("local_samples_stranded_total", "Samples that stayed in lent places when the daemon stopped.")

	trainers        = desc("trainers", "Attached trainers of other processes, on this machine and others.", "table")
	held            = desc("trainer_batches_held", "Batches in the hands of trainers of other processes.", "table")
	attached        = desc("trainers_attached_total", "Trainers that attached.")
	observed        = desc("observers_total", "Observers that were served.")
	trainersEnded   = desc("trainers_ended_total", "Trainers that ended, by reason.", "reason")
	sentBytes       = desc("trainer_sent_bytes_total", "Bytes of batches sent to trainers over connections, by whether they were copied on their way to the socket.", "way")
	trainersReasons = []string{"detached", "died", "cut_off", "bad_peer", "stalled", "failed"}
)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		build, ready, segmentBytes, batchSize, capacity, places, pushed, committed, abandoned, published, delivered, released, returned, lingered,
		streams, opened, waiting, longest, connections, accepted, acceptErrors, samples, bytes, cutShort, ended, refused, quic, quicMax, quicEnded,
		trainers, held, attached, observed, trainersEnded, sentBytes, sessions, taken, notes,
		groupTrainers, groupUnread, groupReleased, groupReturned, groupDropped, groupLost, fillers, lent, filling, fillersEnded, inPlace, settled, stranded,
	} {
		ch <- d
	}
	for _, d := range slices.Concat(describeSteps(), describeWeights(), describeAccess()) {
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
	stores, served := c.from.Weights()
	for i := range stores {
		weightsOf(ch, &stores[i])
	}
	weightsServer(ch, &served)
	c.from.Access.collect(ch)
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
	for _, state := range []ring.State{ring.Free, ring.Open, ring.Sealing, ring.Published, ring.Leased, ring.Lent} {
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
	ch.gauge(streams, float64(len(st.Streams)+len(st.Lenders)), t)
	ch.gauge(sessions, float64(st.Sessions), t)
	ch.counter(taken, st.Taken, t)
	groups(ch, st)
	if st.Steps != nil {
		stepsOf(ch, t, st.Steps)
	}
	ch.counter(opened, st.Opened, t)
	now, n, most := time.Now(), 0, time.Duration(0)
	waits := func(since time.Time) {
		if !since.IsZero() {
			n++
			most = max(most, now.Sub(since))
		}
	}
	for _, s := range st.Streams {
		waits(s.WaitingSince)
	}
	for _, l := range st.Lenders {
		waits(l.WaitingSince)
	}
	ch.gauge(waiting, float64(n), t)
	ch.gauge(longest, most.Seconds(), t)
}

// othersGroup stands for all groups that the configuration does not list: trainers choose their names.
const othersGroup = "_others"

func groups(ch out, st *engine.Stats) {
	byName := map[string]*sampler.GroupStats{}
	others := &sampler.GroupStats{Released: st.Sampler.Released, Returned: st.Sampler.Returned, Dropped: st.Sampler.Dropped, Lost: st.Sampler.Lost}
	byName[othersGroup] = others
	for _, g := range st.Sampler.Groups {
		if !g.Listed || g.Name == othersGroup {
			others.Members += g.Members
			others.Unread += g.Unread
			continue
		}
		// What is left of the sums belongs to the others, also to those that have ended.
		others.Released -= g.Released
		others.Returned -= g.Returned
		others.Dropped -= g.Dropped
		others.Lost -= g.Lost
		byName[g.Name] = &g
	}
	for name, g := range byName {
		ch.gauge(groupTrainers, float64(g.Members), st.Table, name)
		ch.gauge(groupUnread, float64(g.Unread), st.Table, name)
		ch.counter(groupReleased, g.Released, st.Table, name)
		ch.counter(groupReturned, g.Returned, st.Table, name)
		ch.counter(groupDropped, g.Dropped, st.Table, name)
		ch.counter(groupLost, g.Lost, st.Table, name)
	}
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
	ch.counter(notes, st.Notes, t)
	for _, reason := range endReasons() {
		ch.counter(ended, st.Ended[reason], t, reason)
	}
	for _, code := range wire.Codes() {
		ch.counter(refused, st.Refused[string(code)], t, string(code))
	}
	for _, reason := range ingest.RefusedUntold() {
		ch.counter(refused, st.Refused[reason], t, reason)
	}
	c := st.Carriers
	if c == nil {
		return
	}
	ch.gauge(quic, float64(c.Open-c.Strangers), "used")
	ch.gauge(quic, float64(c.Strangers), "stranger")
	ch.gauge(quic, float64(c.HalfOpen), "half_open")
	ch.gauge(quicMax, float64(c.Max))
	for _, reason := range quicReasons {
		ch.counter(quicEnded, c.Ended[reason], reason)
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
	c.fillers(ch, &st.Fill, tables)
	ch.counter(attached, st.Attached)
	ch.counter(observed, st.Observed)
	ch.counter(sentBytes, st.SentInPlace, "in_place")
	ch.counter(sentBytes, st.Sent-st.SentInPlace, "copied")
	for i, v := range []uint64{st.Detached, st.Died, st.CutOff, st.BadPeers, st.Stalled, st.Failed} {
		ch.counter(trainersEnded, v, trainersReasons[i])
	}
	for _, code := range wire.Codes() {
		ch.counter(refused, st.Refused[code], "shm", string(code))
	}
}

func (c *Collector) fillers(ch out, st *shm.FillStats, tables []engine.Stats) {
	n, places := map[string]int{}, map[string]int{}
	for _, f := range st.Fillers {
		n[f.Table]++
		places[f.Table] += f.Lent
	}
	for i := range tables {
		t := tables[i].Table
		ch.gauge(fillers, float64(n[t]), t)
		ch.gauge(lent, float64(places[t]), t)
	}
	ch.counter(filling, st.Attached)
	for i, v := range []uint64{st.Detached, st.CutOff, st.Taken, st.BadPeers} {
		ch.counter(fillersEnded, v, fillersReasons[i])
	}
	ch.counter(inPlace, st.Published)
	ch.counter(settled, st.Settled)
	ch.counter(stranded, st.Stranded)
	ch.counter(notes, st.Notes, "shm")
}
