package bench

import (
	"context"
	"fmt"
	"hash/crc32"
	"runtime"
	"strings"
	"time"

	"github.com/ingestd/ingestd/tensor"
)

// Figures of the case crc, all in GB/s of input.
const (
	figureCRCHot      = "crc, hot"
	figureCRCCold     = "crc, cold"
	figureLibraryHot  = "hash/crc32, hot"
	figureLibraryCold = "hash/crc32, cold"
	figureCopyHot     = "copy, hot"
	figureCopyCold    = "copy, cold"
	figureBothHot     = "copy and crc, hot"
	figureBothCold    = "copy and crc, cold"
)

func crcKind() tensorKind {
	return tensorKind{
		title:   "CRC-32C in Go, one goroutine, GB/s: over one buffer again and again that stays in the cache (hot), and over one that does not (cold)",
		measure: (*tensorRunner).crc,
		rows: []tensorRow{
			{figureCRCHot, "CRC-32C, hot", figureLibraryHot},
			{figureLibraryHot, "hash/crc32, hot", ""},
			{figureCRCCold, "CRC-32C, cold", figureLibraryCold},
			{figureLibraryCold, "hash/crc32, cold", ""},
			{figureBothHot, "copied and summed in one pass, hot", figureCopyHot},
			{figureCopyHot, "copy(), hot", ""},
			{figureBothCold, "copied past the caches and summed in one pass, cold", figureCopyCold},
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
	table, sum := crc32.MakeTable(crc32.Castagnoli), uint32(0)
	want := crc32.Checksum(from, table)
	ours := func(n int64) { sum += tensor.CRC(from[:n]) }
	library := func(n int64) { sum += crc32.Checksum(from[:n], table) }
	plain := func(n int64) { copy(into[:n], from) }
	who := map[string]func(n int64){
		figureCRCHot: ours, figureCRCCold: ours, figureLibraryHot: library, figureLibraryCold: library, figureCopyHot: plain, figureCopyCold: plain,
		figureBothHot:  func(n int64) { sum += tensor.CopyCRC(0, into, from[:n]) },
		figureBothCold: func(n int64) { sum += tensor.CopyPastCRC(0, into, from[:n]) },
	}
	names := []string{figureCRCHot, figureLibraryHot, figureCopyHot, figureBothHot, figureCRCCold, figureLibraryCold, figureCopyCold, figureBothCold}
	err := interleave(r.opt.Runs, names, func(run int, name string) error {
		size := out.Bytes
		if strings.HasSuffix(name, ", hot") {
			size = out.HotBytes
		}
		ratePass(ctx, size, r.opt.Warmup/4, who[name])
		rate := ratePass(ctx, size, r.opt.Duration/4, who[name])
		out.add(name, "GB/s", rate)
		r.progress(&out.TensorCase, run, name, fmt.Sprintf("%.2f GB/s", rate))
		return context.Cause(ctx)
	})
	runtime.KeepAlive(&sum) // so that no sum is left out
	if err == nil && (tensor.CRC(into) != want || tensor.CRC(from) != want) {
		err = fmt.Errorf("the copy, or what was copied, has another sum than that of hash/crc32")
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
