package client

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// stingy is a connection whose writes take some bytes and are then interrupted, now and then.
type stingy struct {
	net.Conn
	out bytes.Buffer
	r   *rand.Rand
}

func (s *stingy) Write(b []byte) (int, error) {
	if s.r.IntN(3) > 0 {
		n := s.r.IntN(len(b))
		s.out.Write(b[:n])
		return n, os.ErrDeadlineExceeded
	}
	return s.out.Write(b)
}

// TestInterruptedCompressedWrites: a writer that goes on where it was told it stopped leaves a whole stream, and never has more than it was told be readable.
func TestInterruptedCompressedWrites(t *testing.T) {
	layout, err := spec.ParseText("a:F32[3],b:U8")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []wire.Compression{wire.CompressionS2, wire.CompressionZstd, wire.CompressionS2Shuffle, wire.CompressionZstdShuffle} {
		for seed := range uint64(20) {
			t.Run(fmt.Sprintf("%s/%d", kind, seed), func(t *testing.T) {
				under := &stingy{r: rand.New(rand.NewPCG(seed, 1))}
				c, err := newCompressedConn(under, kind, layout)
				if err != nil {
					t.Fatal(err)
				}
				want := make([]byte, 13*40)
				for i := range want {
					want[i] = byte(under.r.Uint32())
				}
				for at, n := 0, 0; at < len(want); at += n {
					n, err = c.Write(want[at:min(at+1+under.r.IntN(100), len(want))])
					if r, no := compress.NewReader(bytes.NewReader(under.out.Bytes()), kind, layout, 0); no != nil {
						t.Fatal(no)
					} else if got, _ := io.ReadAll(r); len(got) > at+n || !bytes.HasPrefix(want, got) {
						t.Fatalf("%d bytes can be read, %d were said to be written (%v)", len(got), at+n, err)
					}
				}
				if _, err := c.Write(nil); err != nil {
					t.Fatal(err)
				}
				r, err := compress.NewReader(bytes.NewReader(under.out.Bytes()), kind, layout, 0)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
					t.Errorf("error %v, equal %v", err, bytes.Equal(got, want))
				}
			})
		}
	}
}
