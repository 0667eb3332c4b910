//go:build linux && !race

package e2e

import (
	"bytes"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/wire"
)

var compressions = []wire.Compression{wire.CompressionS2, wire.CompressionZstd, wire.CompressionS2Shuffle, wire.CompressionZstdShuffle}

// TestCompressed: producers compress in every way over every transport, beside others that do not, and all samples arrive as they were.
func TestCompressed(t *testing.T) {
	t.Parallel()
	tb := table{"mixed", "x:F32[300],y:U8[7],z:F64[9,2]", 16, 16}
	certs := filepath.Join(t.TempDir(), "certs")
	certify(t, certs)
	in := func(name string) string { return filepath.Join(certs, name) }
	d := serve(t, []table{tb}, "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0", "--tls-cert", in("server.pem"), "--tls-key", in("server.key"),
		"--compression", "s2,zstd,s2+shuffle,zstd+shuffle")
	pull := d.pull(tb.name, "--gapless")
	const samples = 1000
	all := uint64(0)
	var pushes []*process
	for _, addr := range []string{d.TCP, d.TLS, d.QUIC, d.Unix} {
		for _, kind := range append(compressions, wire.CompressionNone) {
			args := []string{"--addr", addr, "--tls-ca", in("ca.pem")}
			if kind != wire.CompressionNone {
				args = append(args, "--compress", string(kind))
			}
			pushes = append(pushes, d.push(tb.name, samples, 0, args...))
			all += samples
		}
	}
	for _, p := range pushes {
		p.ends(exitOK)
		if r := result[pushed](p); r.Acked != samples {
			t.Errorf("%v: %+v", p.args, r)
		}
	}
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	pull.ends(exitOK)
	if r := result[pulled](pull); r.Samples != all || r.Wrong+r.Gaps+r.Disorder > 0 || !r.Ended {
		t.Errorf("%d samples pushed: %+v", all, r)
	}
}

// TestCompressionNotOffered: who compresses where that is not offered is told what to do, and is counted.
func TestCompressionNotOffered(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small}, "--compression", "s2")
	p := d.push(small.name, 3, 0, "--compress", "zstd")
	p.ends(exitRefused)
	says(t, p.err.String(), "bad_option", "not offered here, but s2")
	d.push(small.name, 3, 0, "--compress", "s2").ends(exitOK)
	d.awaitMetric(`ingestd_refused_total{reason="bad_option",transport="tcp"}`, 1)
	says(t, run(t, exitUsage, "serve", "--table", small.name, "--spec", small.spec, "--compression", "lz4", "--print-config"), "lz4")
}

// joinCompressed is a producer that has shaken hands and may say anything now.
func (d *server) joinCompressed(tb table, kind wire.Compression) *producer {
	d.t.Helper()
	c := d.connect()
	c.layout = tb.layout(d.t)
	check(d.t, wire.WriteHello(c, &wire.Hello{Role: wire.RolePush, Table: tb.name, Spec: c.layout, Compression: kind}))
	check(d.t, wire.ReadReply(c, &c.accepted))
	return c
}

// TestCompressedBombs: many connections at once whose few kilobytes become a gigabyte. While nobody reads, the daemon takes what its ring holds and no more, of memory neither; when
// somebody does, all of it is samples like others. Streams that ask for more than was agreed on, and garbage, end with their reason and are counted.
func TestCompressedBombs(t *testing.T) {
	t.Parallel()
	const connections, samples = 48, 4096
	tb := table{"bombs", "x:U8[4096]", 8, 4}
	d := serve(t, []table{tb, small}, "--compression", "s2,zstd,zstd+shuffle")
	beside := d.pair(small.name, 500)
	var held []*producer
	for i := range connections {
		kind := []wire.Compression{wire.CompressionS2, wire.CompressionZstd, wire.CompressionZstdShuffle}[i%3]
		c := d.joinCompressed(tb, kind)
		c.write(bomb(t, kind, tb, samples))
		c.shut()
		held = append(held, c)
	}
	own := int64(0)
	look := func() { own = max(own, d.memory("RssAnon")) }
	d.await("all of the ring is taken", func(s *status) bool {
		look()
		return tableOf(s, tb.name).Committed == uint64(tb.batchSize*tb.batches)
	})
	full := own
	pull := start(t, "pull", "--addr", d.Unix, "--table", tb.name)
	d.await("the bombs are read", func(s *status) bool {
		look()
		return tableOf(s, tb.name).Committed == connections*samples
	})
	for _, c := range held {
		if acks, notice, err := c.ending(); acks != samples || notice != nil || err != nil {
			t.Errorf("%d acks, notice %v, error %v", acks, notice, err)
		}
		_ = c.Close()
	}
	const bound = 64<<20 + connections*(3<<20) // what docs/operations.md says of a connection
	t.Logf("beside the rings the daemon held %.1f MiB while nobody read, %.1f at most; bound %d", float64(full)/(1<<20), float64(own)/(1<<20), bound>>20)
	if own > bound {
		t.Errorf("%d bombs: the daemon held %d bytes beside its rings, at most %d were expected", connections, own, bound)
	}
	bad := 0.0
	for kind, stream := range map[wire.Compression][]byte{
		wire.CompressionZstd:        {0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3}, // a window of 1 GiB
		wire.CompressionS2:          []byte("\xff\x06\x00\x00S2sTwO\x00\x0a\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\x0f\x00"),
		wire.CompressionZstdShuffle: bytes.Repeat([]byte("garbage "), 100),
	} {
		c := d.joinCompressed(tb, kind)
		c.write(stream)
		c.shut()
		acks, notice, err := c.ending()
		if acks != 0 || notice == nil || notice.Code != wire.CodeBadCompression || err != nil {
			t.Errorf("%s: %d acks, notice %v, error %v", kind, acks, notice, err)
		}
		_ = c.Close()
		bad++
	}
	d.awaitMetric(`ingestd_streams_ended_total{reason="bad_compression",transport="tcp"}`, bad)
	d.push(tb.name, 100, 0, "--compress", "zstd").ends(exitOK)
	d.finish(nil, beside)
	pull.ends(exitOK)
}

// bomb is so many samples of zeros, compressed.
func bomb(t *testing.T, kind wire.Compression, tb table, samples int) []byte {
	t.Helper()
	var out bytes.Buffer
	layout := tb.layout(t)
	w, err := compress.NewWriter(&out, kind, layout)
	check(t, err)
	zeros := make([]byte, layout.SampleBytes())
	for range samples {
		_, err := w.Write(zeros)
		check(t, err)
	}
	check(t, w.Close())
	if out.Len() > samples*len(zeros)/20 {
		t.Fatalf("no bomb: %d bytes", out.Len())
	}
	return out.Bytes()
}
