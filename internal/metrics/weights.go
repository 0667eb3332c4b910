package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// Of tables of kind weights.
var (
	weightsNewest      = desc("weights_newest_generation", "Newest generation; 0: nothing was published.", "table")
	weightsGenerations = desc("weights_generations", "Generations that readers can have.", "table")
	weightsPinned      = desc("weights_generations_pinned", "Generations that a reader holds.", "table")
	weightsBytes       = desc("weights_segment_bytes", "Memory of the segment; 0 before the first publisher.", "table")
	weightsReaders     = desc("weights_readers", "Readers, local and remote.", "table")
	weightsPublishers  = desc("weights_publishers", "1 while the table has a publisher.", "table")
	weightsBegun       = desc("weights_generations_begun_total", "Places given to publishers.", "table")
	weightsPublished   = desc("weights_generations_published_total", "Generations published.", "table")
	weightsWritten     = desc("weights_bytes_published_total", "Bytes of the tensors published.", "table")
	weightsFailed      = desc("weights_generations_failed_total", "Generations that were wanted or begun and not published, by reason.", "table", "reason")

	weightsAccepted = desc("weights_peers_accepted_total", "Publishers and readers accepted.", "role")
	weightsCutOff   = desc("weights_peers_cut_off_total", "Publishers and readers that the daemon ended, by reason.", "reason")
	weightsSent     = desc("weights_bytes_sent_total", "Bytes of tensors sent to remote readers.")
	weightsShown    = desc("weights_transfers_total", "Generations sent to remote readers, by how that went.", "result")
)

func describeWeights() []*prometheus.Desc {
	return []*prometheus.Desc{
		weightsNewest, weightsGenerations, weightsPinned, weightsBytes, weightsReaders, weightsPublishers, weightsBegun, weightsPublished, weightsWritten,
		weightsFailed, weightsAccepted, weightsCutOff, weightsSent, weightsShown,
	}
}

func weightsOf(ch out, st *weights.Stats) {
	t, pinned := st.Table, 0
	for i := range st.Generations {
		if len(st.Generations[i].Pins) > 0 {
			pinned++
		}
	}
	ch.gauge(weightsNewest, float64(st.Newest), t)
	ch.gauge(weightsGenerations, float64(len(st.Generations)), t)
	ch.gauge(weightsPinned, float64(pinned), t)
	ch.gauge(weightsBytes, float64(st.SegmentBytes), t)
	ch.gauge(weightsReaders, float64(len(st.Readers)), t)
	ch.gauge(weightsPublishers, number(st.Publisher != nil), t)
	ch.counter(weightsBegun, st.Begun, t)
	ch.counter(weightsPublished, st.Published, t)
	ch.counter(weightsWritten, st.Bytes, t)
	for _, why := range weights.Failures() {
		ch.counter(weightsFailed, st.Failed[why], t, string(why))
	}
}

func weightsServer(ch out, st *weights.ServerStats) {
	ch.counter(weightsAccepted, st.Publishers, string(wire.RolePublish))
	ch.counter(weightsAccepted, st.Readers, string(wire.RoleSubscribe))
	for _, code := range wire.Codes() {
		ch.counter(weightsCutOff, st.CutOff[code], string(code))
		ch.counter(refused, st.Refused[code], "weights", string(code))
	}
	sent := &st.Sent
	ch.counter(weightsSent, sent.Bytes)
	for _, r := range []struct {
		result string
		n      uint64
	}{
		{"shown", sent.Generations}, {"shown_delta", sent.Deltas}, {"resumed", sent.Resumed}, {"broken", sent.Broken}, {"bad", sent.Bad}, {"skipped", sent.Skipped},
	} {
		ch.counter(weightsShown, r.n, r.result)
	}
}
