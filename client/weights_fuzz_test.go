//go:build linux

package client

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// transfer is a generation as a daemon sends it: its tensors' versions, what is announced, and sums and bytes.
func transfer(t testing.TB, m *tensor.Manifest, generation, base uint64, v versions, ranges ...weights.Range) []byte {
	t.Helper()
	flat, sums := make([]byte, m.DataBytes()), make([]uint32, m.Len())
	for i := range m.Len() {
		b := v.data(m)(i)
		copy(flat[m.Offset(i):], b)
		sums[i] = tensor.CRC(b)
	}
	a := weights.Announcement{Op: weights.OpGeneration, Generation: generation, Digest: weights.Digest(m, sums), Base: base, Ranges: ranges}
	var bytes []byte
	for _, r := range ranges {
		a.Bytes += r[1]
		bytes = append(bytes, flat[r[0]:r[0]+r[1]]...)
	}
	text, err := wire.AppendMessage(nil, &a, weights.AnnouncementBytesMax)
	if err != nil {
		t.Fatal(err)
	}
	for _, sum := range sums {
		text = binary.LittleEndian.AppendUint32(text, sum)
	}
	return append(text, bytes...)
}

// FuzzRemoteReceive feeds a subscription what a daemon might send: whatever that is, what is shown has its sums and its digest.
func FuzzRemoteReceive(f *testing.F) {
	m := vectors(f, 300, 0, 512, 70)
	n := m.DataBytes()
	first := transfer(f, m, 1, 0, all(1), weights.Range{0, n})
	f.Add(first)
	f.Add(first[:len(first)-20])
	second := func(i int) uint64 { return 1 + uint64(i%3)/2 }
	f.Add(append(append([]byte{}, first...), transfer(f, m, 2, 1, second, weights.Range{512, 512})...))
	f.Add(append(append([]byte{}, first...), transfer(f, m, 2, 1, second)...)) // says that nothing differs
	f.Add(append(append([]byte{}, first...), transfer(f, m, 1, 0, all(7), weights.Range{0, n})...))
	f.Add(append(append([]byte{}, first...), append([]byte{0, 0, 0, 0}, wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeReplaced, Reason: "x"})...)...))
	f.Fuzz(func(t *testing.T, text []byte) {
		r := &remoteWeights{tensors: m, cfg: SubscribeConfig{Table: "w"}.withDefaults(), room: make(chan struct{}, 1), changed: make(chan struct{})}
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			go io.Copy(io.Discard, theirs) // the answers
			_ = theirs.SetWriteDeadline(time.Now().Add(30 * time.Second))
			_, _ = theirs.Write(text)
			theirs.Close()
		}()
		if err := r.receiveAll(ours); err == nil {
			t.Error("a connection ended, and nobody says why")
		}
		ours.Close()
		<-done
		g := r.newest
		if g == nil {
			return
		}
		for i, sum := range g.sums {
			if tensor.CRC(g.data[m.Offset(i):][:m.EncodedBytes(i)]) != sum {
				t.Fatalf("tensor %d is shown and does not have its sum", i)
			}
		}
		if weights.Digest(m, g.sums) != g.digest || r.buffers > r.cfg.Generations {
			t.Fatalf("digest %v, %d buffers", g.digest, r.buffers)
		}
	})
}
