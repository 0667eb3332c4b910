package client

import (
	"context"
	"io"
	"testing"
)

// discardAndAck is a daemon that allocates nothing itself, since allocations are counted for the whole process.
func discardAndAck(f *fake) {
	buf, acks := make([]byte, 1<<20), make([]byte, 1<<20)
	for i := range acks {
		acks[i] = 1
	}
	have := 0
	for {
		n, err := f.Read(buf)
		have += n
		f.Write(acks[:have/f.sampleBytes])
		have %= f.sampleBytes
		if err != nil {
			if err != io.EOF {
				f.t.Error(err)
			}
			return
		}
	}
}

func TestPushAllocatesNothing(t *testing.T) {
	for name, text := range map[string]string{
		"small": "image:F32[8,8],label:I32", "40 leaves": manyLeaves(40, "F32[25]"), "direct": "a:U8[100000],b:U8[31072]",
	} {
		for _, network := range []string{"tcp", "unix"} {
			for _, c := range []struct {
				session string
				window  int64
			}{{"", 0}, {"", 2}, {"s", 0}, {"s", 2}} {
				t.Run(name+"/"+network+"/"+c.session, func(t *testing.T) {
					addr := fakeDaemon(t, options{network: network, windowSamples: c.window}, discardAndAck)
					p := dial(t, addr, Config{Spec: specOf(t, text), Session: c.session})
					sample := makeSamples(0, 1, int(p.sampleBytes))
					leaves := leavesOf(p.spec, sample)
					many := makeSamples(0, 4, int(p.sampleBytes))
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					allocs := testing.AllocsPerRun(500, func() {
						if err := p.Push(ctx, leaves...); err != nil {
							t.Fatal(err)
						}
						if _, err := p.PushMany(ctx, 4, many); err != nil {
							t.Fatal(err)
						}
					})
					if allocs != 0 {
						t.Errorf("%v allocations per push", allocs)
					}
					closeWell(t, p)
				})
			}
		}
	}
}
