package bench

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// compressInput is one kind of data: a sample of 1 MiB.
type compressInput struct {
	name, spec string
	fill       func(r *rand.Rand, i int) uint32 // element i
}

var compressInputs = []compressInput{
	{"dense gradients", "x:F32[262144]", func(r *rand.Rand, _ int) uint32 { return math.Float32bits(float32(r.NormFloat64() * 1e-3)) }},
	{"bf16 in float32", "x:F32[262144]", func(r *rand.Rand, _ int) uint32 {
		return math.Float32bits(float32(r.NormFloat64()*1e-3)) &^ 0xffff
	}},
	{"1 % sparse", "x:F32[262144]", func(r *rand.Rand, _ int) uint32 {
		if r.IntN(100) > 0 {
			return 0
		}
		return math.Float32bits(float32(r.NormFloat64() * 1e-3))
	}},
	{"byte images", "x:U8[1048576]", func(r *rand.Rand, i int) uint32 { // a slow gradient with noise in the lowest bits
		level := byte(128 + 100*math.Sin(float64(i)/300))
		var e uint32
		for k := range 4 {
			e |= uint32(level+byte(r.IntN(4))) << (8 * k)
		}
		return e
	}},
}

func compressCommand() *cobra.Command {
	smoke, duration := false, time.Second
	cmd := &cobra.Command{
		Use:   "compress",
		Short: "Ratio, rate and processor time of the ways to compress samples, on generated data, beside a plain copy",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if smoke {
				duration = time.Millisecond
			}
			return runCompress(duration, cmd.OutOrStdout())
		},
	}
	cmd.Flags().DurationVar(&duration, "duration", duration, "of each direction of each way, about")
	cmd.Flags().BoolVar(&smoke, "smoke", false, "a moment of each: does everything work? The figures mean nothing")
	return cmd
}

// runCompress prints a line for each input and way.
func runCompress(duration time.Duration, out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "data\tway\tratio\tcompress MB/s\tCPU ns/KB\tdecompress MB/s\tCPU ns/KB")
	for _, in := range compressInputs {
		layout, err := spec.ParseText(in.spec)
		if err != nil {
			return err
		}
		r := rand.New(rand.NewPCG(1, 2))
		sample := make([]byte, layout.SampleBytes())
		for i := range len(sample) / 4 {
			binary.LittleEndian.PutUint32(sample[4*i:], in.fill(r, i))
		}
		copied := make([]byte, len(sample))
		plain, err := timed(duration, len(sample), func() error { copy(copied, sample); return nil })
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%s\tcopy\t1.00\t%.0f\t%.1f\t\t\n", in.name, plain.rate, plain.cpu)
		for _, kind := range []wire.Compression{wire.CompressionS2, wire.CompressionS2Shuffle, wire.CompressionZstd, wire.CompressionZstdShuffle} {
			if err := compressWay(w, in.name, kind, layout, sample, duration); err != nil {
				return fmt.Errorf("%s, %s: %w", in.name, kind, err)
			}
		}
	}
	return w.Flush()
}

func compressWay(out io.Writer, name string, kind wire.Compression, layout *spec.Spec, sample []byte, duration time.Duration) error {
	var stream bytes.Buffer
	z, err := compress.NewWriter(&stream, kind, layout)
	if err != nil {
		return err
	}
	packing, err := timed(duration, len(sample), func() error {
		stream.Reset()
		if _, err := z.Write(sample); err != nil {
			return err
		}
		return z.Flush()
	})
	if err != nil {
		return err
	}
	var once bytes.Buffer
	if z, err = compress.NewWriter(&once, kind, layout); err != nil {
		return err
	}
	if _, err = z.Write(sample); err == nil {
		err = z.Close()
	}
	if err != nil {
		return err
	}
	got := make([]byte, len(sample))
	unpacking, err := timed(duration, len(sample), func() error {
		r, err := compress.NewReader(bytes.NewReader(once.Bytes()), kind, layout, 0)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.ReadFull(r, got)
		return err
	})
	if err == nil && !bytes.Equal(got, sample) {
		err = fmt.Errorf("other bytes came back")
	}
	fmt.Fprintf(out, "%s\t%s\t%.2f\t%.0f\t%.1f\t%.0f\t%.1f\n", name, kind, float64(len(sample))/float64(once.Len()), packing.rate, packing.cpu, unpacking.rate, unpacking.cpu)
	return err
}

// compressPace is how fast something went: MB/s, and nanoseconds of processor time per 1000 bytes.
type compressPace struct{ rate, cpu float64 }

// timed runs f for about so long.
func timed(duration time.Duration, size int, f func() error) (compressPace, error) {
	cpu, began, n := threadsTime(), time.Now(), 0
	for n == 0 || time.Since(began) < duration {
		if err := f(); err != nil {
			return compressPace{}, err
		}
		n++
	}
	total := float64(n * size)
	return compressPace{total / 1e6 / time.Since(began).Seconds(), float64(threadsTime()-cpu) / (total / 1000)}, nil
}

// threadsTime is the processor time of this process so far.
func threadsTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // fails for no process of its own
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
