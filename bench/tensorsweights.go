package bench

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Figures of the case publish. Those of one reader have oneReader before their name.
const (
	figurePublish  = "publish"       // ms from the beginning of a publication until the last reader has seen it
	figureCopy     = "copy"          // ms of one copy() of as many bytes, in the publisher's process
	figureVisible  = "visible"       // us from the daemon's stamp of publication until the last reader has seen it
	figureView     = "view"          // us from being awake to the first byte of a tensor, the median of the readers
	figureMemory   = "daemon memory" // MiB, at most
	figureBound    = "bound"         // MiB that it may be
	oneReader      = "1 reader: "
	publishesRun   = 5 // measured in a run, after as many as the table has places
	memoryOverhead = 64 * mib
)

func publishKind() tensorKind {
	return tensorKind{
		title: "Weights in shared memory: one publisher in place, several local readers, each a process. publish: from the start of writing a generation until the last\n" +
			"reader has seen its first tensor, sums included; copy: one copy() of as many bytes by the same process; view: from the moment a reader is awake to the first\n" +
			"byte of a tensor, with the pin; visible: from the daemon's stamp of the publication until the last reader has seen it, wake-ups included.",
		measure: (*tensorRunner).publish,
		rows: []tensorRow{
			{figurePublish, "publish to all readers", figureCopy},
			{oneReader + figurePublish, "publish to one reader", figureCopy},
			{figureCopy, "copy()", ""},
			{figureView, "awake to first view, all readers", oneReader + figureView},
			{oneReader + figureView, "awake to first view, one reader", ""},
			{figureVisible, "stamp to last reader, all readers", oneReader + figureVisible},
			{oneReader + figureVisible, "stamp to last reader, one reader", ""},
			{figureMemory, "daemon's memory at most", figureBound},
			{figureBound, fmt.Sprintf("%d generations + 64 MiB", generationsKept), ""},
		},
		targets: publishTargets,
	}
}

// publish measures generations with all readers and with one, and copies in between.
func (r *tensorRunner) publish(ctx context.Context, out *TensorResult) error {
	return interleave(r.opt.Runs, []string{"all", "one"}, func(run int, name string) error {
		readers, prefix := out.Peers, ""
		if name == "one" {
			readers, prefix = 1, oneReader
		}
		g, err := r.startWeights(ctx, out.TensorCase, readers, "unix")
		if err == nil {
			err = r.profile(&out.TensorCase, run, name, g.publisher)
		}
		if err == nil {
			err = g.measure(ctx, run, prefix, out)
		}
		if err == nil && prefix == "" {
			err = g.memory(out)
		}
		if g != nil {
			err = errors.Join(err, g.stop(err != nil))
		}
		if err == nil {
			at := func(figure string) float64 { return out.Figures[figure].Runs[run] }
			r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.1f ms, copy %.1f ms, view %.1f us",
				at(prefix+figurePublish), at(prefix+figureCopy), at(prefix+figureView)))
		}
		return err
	})
}

// weightsRig is a daemon with a table of weights, its publisher, and readers.
type weightsRig struct {
	c         TensorCase
	daemon    *daemon
	publisher *process
	readers   []*process
}

func weightsConfig(c TensorCase) string {
	return fmt.Sprintf("tables:\n  - {name: %s, kind: weights, generations: %d, capacity: %d}\n", tableName, generationsKept, (generationsKept+1)*c.Bytes+16*mib)
}

// startWeights starts the publisher first, since a reader waits for a generation.
func (r *tensorRunner) startWeights(ctx context.Context, c TensorCase, readers int, transport string) (*weightsRig, error) {
	opt := r.options()
	d, err := startConfigured(ctx, opt, weightsConfig(c))
	if err != nil {
		return nil, err
	}
	g := &weightsRig{c: c, daemon: d}
	common := []string{"--table", tableName, "--bytes", strconv.FormatInt(c.Bytes, 10), "--tensors", strconv.Itoa(c.Tensors)}
	if g.publisher, _, err = startChild("publisher", opt.Binary, append([]string{"_publisher", "--address", d.Unix}, common...)...); err != nil {
		return g, err
	}
	if _, err := g.publisher.values(request{Do: doPublish}, valueGeneration); err != nil {
		return g, err
	}
	address := d.Unix
	if transport == "tcp" {
		address = d.TCP
	}
	for range readers {
		reader, _, err := startChild("reader", opt.Binary, append([]string{"_subscriber", "--address", address}, common...)...)
		if err != nil {
			return g, err
		}
		g.readers = append(g.readers, reader)
	}
	return g, nil
}

// once publishes a generation and waits until every reader has seen it.
func (g *weightsRig) once() (*publication, error) {
	told, err := g.publisher.values(request{Do: doPublish}, valueBegan, valueGeneration, valueFirst)
	if err != nil {
		return nil, err
	}
	p := new(publication)
	var views []float64
	for _, reader := range g.readers {
		seen, err := reader.values(request{Do: doSeen, Upto: uint64(told[valueGeneration])}, valueSeen, valueView, valueShown, valueFirst)
		if err != nil {
			return nil, err
		}
		if seen[valueFirst] != told[valueFirst] {
			return nil, reader.fail(fmt.Errorf("generation %d begins with %#x, not %#x", told[valueGeneration], seen[valueFirst], told[valueFirst]))
		}
		p.all = max(p.all, time.Duration(seen[valueSeen]-told[valueBegan]))
		p.visible = max(p.visible, time.Duration(seen[valueShown]))
		views = append(views, float64(seen[valueView])/1e3)
	}
	p.view = median(views)
	return p, nil
}

// publication is how long one generation took.
type publication struct {
	all     time.Duration // from the publisher's start to the last reader
	visible time.Duration // from the daemon's stamp to the last reader
	view    float64       // us, the median of the readers
}

// warmUp publishes until every place has been written and mapped by everybody.
func (g *weightsRig) warmUp() error {
	for range generationsKept + 1 {
		if _, err := g.once(); err != nil {
			return err
		}
		if _, err := g.publisher.values(request{Do: doCopy}, valueTook); err != nil {
			return err
		}
	}
	return nil
}

// measure publishes and copies in turn; a run's figures are medians of its own.
func (g *weightsRig) measure(ctx context.Context, run int, prefix string, out *TensorResult) error {
	if err := g.warmUp(); err != nil {
		return err
	}
	of := map[string][]float64{}
	for i := range publishesRun {
		var p *publication
		var copied map[string]int64
		var err error
		for turn := range 2 {
			if (turn+i+run)%2 == 0 {
				p, err = g.once()
			} else {
				copied, err = g.publisher.values(request{Do: doCopy}, valueTook)
			}
			if err != nil {
				return errors.Join(err, context.Cause(ctx))
			}
		}
		of[figurePublish] = append(of[figurePublish], p.all.Seconds()*1e3)
		of[figureVisible] = append(of[figureVisible], p.visible.Seconds()*1e6)
		of[figureView] = append(of[figureView], p.view)
		of[figureCopy] = append(of[figureCopy], float64(copied[valueTook])/1e6)
	}
	for figure, values := range of {
		unit := "ms"
		if figure == figureVisible || figure == figureView {
			unit = "us"
		}
		out.add(prefix+figure, unit, median(values))
	}
	return nil
}

// memory notes what the daemon holds beside what it may.
func (g *weightsRig) memory(out *TensorResult) error {
	peak, err := peakBytes(g.daemon.pid())
	if err != nil {
		return err
	}
	out.add(figureMemory, "MiB", float64(peak)/mib)
	out.add(figureBound, "MiB", float64(generationsKept*g.c.Bytes+memoryOverhead)/mib)
	return nil
}

// peakBytes is the most that a process held, its shared memory and huge pages included.
func peakBytes(pid int) (int64, error) {
	of, err := statusBytes(pid)
	if err != nil {
		return 0, err
	}
	return of["VmHWM"] + of["HugetlbPages"], nil
}

// stop ends the readers, the publisher, and then the daemon.
func (g *weightsRig) stop(failed bool) error {
	err := stopAll(failed, append(g.readers, g.publisher)...)
	if failed {
		g.daemon.kill()
	} else {
		err = errors.Join(err, g.daemon.terminate())
	}
	return errors.Join(err, g.daemon.cleanUp())
}

func publishTargets(r *TensorResult) []Target {
	var all []Target
	if v, ok := r.ratio(figurePublish, figureCopy); ok {
		all = append(all, atMost(r.Name, fmt.Sprintf("time to all %d readers to one copy's", r.Peers), v, publishCopyMax))
	}
	for _, prefix := range []string{"", oneReader} {
		if v, ok := r.median(prefix + figureView); ok {
			all = append(all, atMost(r.Name, prefix+"us from awake to the first view", v, viewMax))
		}
	}
	if v, ok := r.ratio(figureMemory, figureBound); ok {
		all = append(all, atMost(r.Name, "daemon's memory to its bound", v, 1))
	}
	return all
}
