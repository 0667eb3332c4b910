package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ingestd/ingestd/steps"
)

// Of tables of kind tensors.
var (
	stepProducers  = desc("step_producers", "Connected producers of a table of tensors.", "table")
	stepNewest     = desc("step_newest", "Newest step begun by a producer; 0 also while none is connected.", "table")
	stepsCompleted = desc("steps_completed_total", "Steps of producers of which all bytes came.", "table")
	stepsAborted   = desc("steps_aborted_total", "Steps that their producer gave up.", "table")
	stepsRefused   = desc("steps_refused_total", "Steps refused because they were too old.", "table")
	stepsCutShort  = desc("steps_cut_short_total", "Steps that were incomplete when their stream ended or its next step began.", "table")
	chunks         = desc("chunks_total", "Chunks of tensors whose header is right.", "table")
	chunksRefused  = desc("chunks_refused_total", "Of those, chunks marked as refused because their step was too old.", "table")
	chunksBad      = desc("chunks_bad_total", "Chunks whose header is wrong, by what is: each ended its connection.", "table", "reason")
	announced      = desc("producers_announced_total", "Chunks by which readers are told that a producer comes or goes.", "table")
	unsaid         = desc("producers_unannounced", "Those that wait for a free slot.", "table")
)

func describeSteps() []*prometheus.Desc {
	return []*prometheus.Desc{
		stepProducers, stepNewest, stepsCompleted, stepsAborted, stepsRefused, stepsCutShort, chunks, chunksRefused, chunksBad, announced, unsaid,
	}
}

func stepsOf(ch out, t string, st *steps.Stats) {
	ch.gauge(stepProducers, float64(len(st.Producers)), t)
	ch.gauge(stepNewest, float64(st.Newest), t)
	ch.counter(stepsCompleted, st.Completed, t)
	ch.counter(stepsAborted, st.Aborted, t)
	ch.counter(stepsRefused, st.Refused, t)
	ch.counter(stepsCutShort, st.CutShort, t)
	ch.counter(chunks, st.Chunks, t)
	ch.counter(chunksRefused, st.Late, t)
	for _, reason := range steps.BadReasons() {
		ch.counter(chunksBad, st.BadChunks[reason], t, reason)
	}
	ch.counter(announced, st.Announced, t)
	ch.gauge(unsaid, float64(st.Unsaid), t)
}
