package bench

import (
	"context"
	"errors"
	"fmt"
	"strconv"
)

// Figures of the case stream, in GB/s, but for the memory.
const (
	figureStream       = "stream"         // the daemon to a remote reader that verifies
	figureSendfile     = "sendfile"       // the bare loop
	figureSendfileSums = "sendfile, sums" // the bare loop, its receiver sums
	transfersRun       = 5                // of each in a run
)

func streamKind() tensorKind {
	return tensorKind{
		title: "Weights over TCP on loopback to one reader. stream: from the daemon's stamp of the publication until the reader has verified all and shows it; sendfile: a\n" +
			"process that sends a memfd of that size with sendfile to one that reads it into memory, the same every time, and verifies nothing; sums: the same, and the\n" +
			"receiver sums each piece that it has read.",
		measure: (*tensorRunner).stream,
		rows: []tensorRow{
			{figureStream, "daemon to reader, verified", figureSendfile},
			{figureSendfile, "bare sendfile loop, nothing verified", ""},
			{figureSendfileSums, "bare sendfile loop, receiver sums", figureSendfile},
			{figureMemory, "daemon's memory at most", figureBound},
			{figureBound, fmt.Sprintf("%d generations + 64 MiB", generationsKept), ""},
		},
		targets: streamTargets,
	}
}

// stream measures transfers through the daemon and through the bare loop.
func (r *tensorRunner) stream(ctx context.Context, out *TensorResult) error {
	return interleave(r.opt.Runs, []string{figureStream, figureSendfile}, func(run int, name string) error {
		measure := r.streamOne
		if name == figureSendfile {
			measure = r.sendfileOne
		}
		if err := measure(ctx, run, out); err != nil {
			return err
		}
		r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s", out.Figures[name].Runs[run]))
		return nil
	})
}

// streamOne publishes some generations and notes how fast each came to the reader; a run's figure is their median.
func (r *tensorRunner) streamOne(ctx context.Context, run int, out *TensorResult) error {
	g, err := r.startWeights(ctx, out.TensorCase, 1, "tcp")
	if err == nil {
		err = r.profile(&out.TensorCase, run, figureStream, g.readers...)
	}
	if err == nil {
		err = g.warmUp()
	}
	var rates []float64
	for i := 0; err == nil && i < transfersRun; i++ {
		var p *publication
		if p, err = g.once(); err == nil {
			rates = append(rates, float64(out.Bytes)/1e9/p.visible.Seconds())
			err = context.Cause(ctx)
		}
	}
	if err == nil {
		out.add(figureStream, "GB/s", median(rates))
		err = g.memory(out)
	}
	if g != nil {
		err = errors.Join(err, g.stop(err != nil))
	}
	return err
}

// sendfileOne lets the bare loop make as many transfers, with and without sums in turn.
func (r *tensorRunner) sendfileOne(ctx context.Context, _ int, out *TensorResult) error {
	size := strconv.FormatInt(out.Bytes, 10)
	sender, first, err := startChild("sendfile sender", r.opt.Binary, "_sendfile", "--bytes", size)
	if err != nil {
		return err
	}
	receiver, _, err := startChild("sendfile receiver", r.opt.Binary, "_sendfile", "--bytes", size, "--address", first.Address)
	rates := map[string][]float64{}
	for i := 0; err == nil && i < transfersRun+1; i++ {
		for _, one := range []struct{ ask, figure string }{{doFetch, figureSendfile}, {doFetchVerify, figureSendfileSums}} {
			var told map[string]int64
			if told, err = receiver.values(request{Do: one.ask}, valueTook); err != nil {
				break
			}
			if i > 0 { // the first is warm-up
				rates[one.figure] = append(rates[one.figure], float64(out.Bytes)/float64(told[valueTook]))
			}
		}
		if err == nil {
			err = context.Cause(ctx)
		}
	}
	for figure, values := range rates {
		if err == nil {
			out.add(figure, "GB/s", median(values))
		}
	}
	return errors.Join(err, stopAll(err != nil, receiver, sender))
}

func streamTargets(r *TensorResult) []Target {
	var all []Target
	if v, ok := r.ratio(figureStream, figureSendfile); ok {
		all = append(all, atLeast(r.Name, "GB/s to the bare sendfile loop's", v, streamRateMin))
	}
	if v, ok := r.ratio(figureMemory, figureBound); ok {
		all = append(all, atMost(r.Name, "daemon's memory to its bound", v, 1))
	}
	return all
}
