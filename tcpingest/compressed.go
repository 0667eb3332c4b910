package tcpingest

import (
	"slices"
	"strings"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// compressed is what a connection's samples are read from where they are compressed: a Stream, so that they are read ahead.
type compressed struct {
	netConn
	below   source // for what is no matter of samples
	samples *compress.Reader
}

// decompress makes all that comes from now on pass a decompressor, which needs no more memory than the window in bytes asks for. Nothing may have been read ahead. The caller
// closes the Reader.
func (c *conn) decompress(kind wire.Compression, s *spec.Spec, window int64) (*compress.Reader, error) {
	r, err := compress.NewReader(c.netConn, kind, s, window)
	if err != nil {
		return nil, err
	}
	c.from = newAhead(&compressed{c.netConn, c.from, r}, c)
	return r, nil
}

func (z *compressed) Read(b []byte) (int, error) { return z.samples.Read(b) }

// Ready implements Stream. What has come may be a part of a block, or no samples at all, and the rest of it may wait for acks: so all of it is read when nothing else is
// to be done, acks least of all.
func (z *compressed) Ready() bool { return false }

// HungUp implements Stream.
func (z *compressed) HungUp() bool { return z.below.hungUp() }

// Offer implements Stream.
func (z *compressed) Offer(b []byte) int { return z.below.offer(b) }

// checkCompression says why a producer may not compress as it asks to, nil if it may.
func (s *Server) checkCompression(h *wire.Hello) *wire.Refusal {
	switch {
	case h.Compression == wire.CompressionNone:
		return nil
	case h.Manifest != nil:
		return wire.Refuse(wire.CodeBadOption, "tables of kind tensors take no compression: choose an encoding in the manifest (bf16, topk), or leave the field \"compression\" out")
	case slices.Contains(s.cfg.Compression, h.Compression):
		return nil
	case len(s.cfg.Compression) == 0:
		return wire.Refuse(wire.CodeBadOption, "the compression %s is not offered here, nor is any other: allow it with `compression: [%s]` in the daemon's configuration, or send without",
			h.Compression, h.Compression)
	}
	offered := make([]string, len(s.cfg.Compression))
	for i, kind := range s.cfg.Compression {
		offered[i] = string(kind)
	}
	return wire.Refuse(wire.CodeBadOption, "the compression %s is not offered here, but %s: use that, or add %s to `compression` in the daemon's configuration",
		h.Compression, strings.Join(offered, ", "), h.Compression)
}

var _ Stream = (*compressed)(nil)
