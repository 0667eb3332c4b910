package bench

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/ingestd/ingestd/tensor"
)

// Figures of the case crc, all in GB/s of input.
const (
	figureCRCHot   = "crc, hot"
	figureCRCCold  = "crc, cold"
	figureCopyHot  = "copy, hot"
	figureCopyCold = "copy, cold"
)

func crcKind() tensorKind {
	return tensorKind{
		title:   "CRC-32C, one goroutine, GB/s: over one buffer again and again that stays in the cache (hot), and over one that does not (cold)",
		measure: (*tensorRunner).crc,
		rows: []tensorRow{
			{figureCRCHot, "CRC-32C, hot", figureCopyHot},
			{figureCRCCold, "CRC-32C, cold", figureCopyCold},
			{figureCopyHot, "copy(), hot", ""},
			{figureCopyCold, "copy(), cold", ""},
		},
		targets: crcTargets,
	}
}

// crc sums and copies buffers of both sizes, interleaved.
func (r *tensorRunner) crc(ctx context.Context, out *TensorResult) error {
	from, into := make([]byte, out.Bytes), make([]byte, out.Bytes)
	for i := range from {
		from[i] = byte(i * 7)
	}
	want, sum := tensor.CRC(from), uint32(0)
	who := map[string]func(n int64){
		figureCRCHot:   func(n int64) { sum += tensor.CRC(from[:n]) },
		figureCRCCold:  func(n int64) { sum += tensor.CRC(from[:n]) },
		figureCopyHot:  func(n int64) { copy(into[:n], from) },
		figureCopyCold: func(n int64) { copy(into[:n], from) },
	}
	names := []string{figureCRCHot, figureCopyHot, figureCRCCold, figureCopyCold}
	err := interleave(r.opt.Runs, names, func(run int, name string) error {
		size := out.Bytes
		if name == figureCRCHot || name == figureCopyHot {
			size = out.HotBytes
		}
		ratePass(ctx, size, r.opt.Warmup/4, who[name])
		rate := ratePass(ctx, size, r.opt.Duration/4, who[name])
		out.add(name, "GB/s", rate)
		r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s", rate))
		return context.Cause(ctx)
	})
	runtime.KeepAlive(&sum) // so that no sum is left out
	if err == nil && tensor.CRC(into) != want {
		err = fmt.Errorf("the copy has another sum than what was copied")
	}
	return err
}

// ratePass works for about the given time on n bytes at a time and returns GB/s. The clock is read once per MiB or call, whichever is more.
func ratePass(ctx context.Context, n int64, length time.Duration, work func(n int64)) float64 {
	begin, done := time.Now(), int64(0)
	for done == 0 || time.Since(begin) < length && ctx.Err() == nil {
		for range max(1, mib/n) {
			work(n)
			done += n
		}
	}
	return float64(done) / 1e9 / time.Since(begin).Seconds()
}
