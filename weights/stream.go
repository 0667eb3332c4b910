//go:build linux

package weights

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// servePublishStream serves a publisher that sends its generations.
func (s *Server) servePublishStream(ctx context.Context, conn net.Conn, m *tensor.Manifest, store *Store, who Who, log *slog.Logger) error {
	nc, ok := conn.(netConn)
	if !ok {
		return wire.Refuse(wire.CodeInternal, "a connection of type %T cannot be served", conn)
	}
	p, err := store.OpenPublisher(m, who)
	if err != nil {
		return refusalOf(err)
	}
	defer p.Close()
	_ = conn.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if err := wire.WriteAccepted(conn, &wire.AcceptedPublish{
		Table: store.Table(), Publisher: p.number, Newest: store.Newest(), ChunkBytes: int64(s.cfg.ChunkBytes),
	}); err != nil {
		return quiet(err)
	}
	s.accepted(0, 1)
	log = log.With("publisher", p.number, "peer", who.Addr)
	log.Info("publisher connected", "bytes", m.DataBytes())
	defer log.Info("publisher ended")
	return newSession(nc, p, true, s.limits(), log).run(ctx)
}

func (s *Server) limits() limits {
	c := &s.cfg
	return limits{
		chunkBytes: c.ChunkBytes, stall: c.StallTimeout, idle: c.IdleTimeout, answer: c.AnswerTimeout, write: c.WriteTimeout, linger: c.LingerTimeout,
	}
}

// receiveBytes is read at once: it is summed while it is in the cache.
const receiveBytes = 256 << 10

// piecesMax is how many pieces without a neighbour a generation may be in at any time, beside one per tensor: those of a publisher that sends in no order.
const piecesMax = 1 << 16

// receiver takes the chunks of one generation after another. Their bytes are read where readers will find them.
type receiver struct {
	manifest   *tensor.Manifest
	publisher  uint64
	chunkBytes int

	place   *Place // nil: none was begun
	covered *tensor.Coverage
	have    [][]piece // of each tensor, ascending, no two with nothing between them
	pieces  int       // of all tensors
	header  [tensor.HeaderBytes]byte
}

// piece is a run of a tensor's bytes that is here.
type piece struct {
	from, to int64
	crc      uint32
}

func newReceiver(p *Publishing, chunkBytes int) *receiver {
	return &receiver{
		manifest: p.manifest, publisher: p.number, chunkBytes: chunkBytes,
		covered: tensor.NewCoverage(p.manifest), have: make([][]piece, p.manifest.Len()),
	}
}

// begin makes ready for the chunks of a place.
func (r *receiver) begin(place *Place) {
	r.place, r.pieces = place, 0
	r.covered.Reset()
	for i := range r.have {
		r.have[i] = r.have[i][:0]
	}
}

// chunk reads a chunk of n bytes, header included. A *tensor.ChunkError says what is wrong with it; other errors are in's.
func (r *receiver) chunk(in io.Reader, n int) error {
	if n < tensor.HeaderBytes || n > tensor.HeaderBytes+r.chunkBytes {
		return &tensor.ChunkError{Reason: fmt.Sprintf("%d bytes are announced; it may have %d to %d", n, tensor.HeaderBytes, tensor.HeaderBytes+r.chunkBytes)}
	}
	if _, err := io.ReadFull(in, r.header[:]); err != nil {
		return err
	}
	h, err := tensor.ParseHeader(r.header[:])
	if err == nil {
		err = h.Check(r.manifest, r.chunkBytes)
	}
	if err == nil {
		err = r.check(&h, n-tensor.HeaderBytes)
	}
	if err != nil {
		return err
	}
	if h.Flags&tensor.FlagBegin != 0 {
		r.begin(r.place)
	}
	if h.Length == 0 {
		return nil
	}
	flat := h.Flat(r.manifest)
	again, err := r.free(&h, flat)
	if err != nil {
		return err
	}
	return r.data(in, &h, flat, again)
}

// check checks what is particular to chunks of weights.
func (r *receiver) check(h *tensor.Header, n int) error {
	reason := ""
	switch {
	case r.place == nil:
		reason = "no generation was begun"
	case h.Flags&^tensor.FlagBegin != 0:
		reason = fmt.Sprintf("has the flags %#x; a chunk of weights may have BEGIN alone", h.Flags)
	case h.Step != r.place.Generation():
		reason = fmt.Sprintf("is of generation %d, and generation %d was begun", h.Step, r.place.Generation())
	case h.Stream != r.publisher:
		reason = fmt.Sprintf("is of stream %d, and this publisher is number %d", h.Stream, r.publisher)
	case h.Producer != 0:
		reason = fmt.Sprintf("is of producer %016x, and weights have none: it must be 0", h.Producer)
	case int(h.Length) != n:
		reason = fmt.Sprintf("its header says %d bytes of data, and %d were announced", h.Length, n)
	default:
		return nil
	}
	return r.wrong(h, reason)
}

// wrong names the tensor, if there is one.
func (r *receiver) wrong(h *tensor.Header, reason string) error {
	e := &tensor.ChunkError{Reason: reason}
	if h.Length > 0 && int(h.Tensor) < r.manifest.Len() {
		e.Tensor, e.Offset = r.manifest.Tensor(int(h.Tensor)).Name, int64(h.Offset)
	}
	return e
}

// parts calls f with the part of each tensor that lies in the n flat bytes from flat on, until it returns false: from is where the part starts in the tensor's
// bytes, at in the n bytes.
func (r *receiver) parts(flat, n int64, f func(i int, from, bytes, at int64) bool) {
	m := r.manifest
	for i := m.At(flat); i < m.Len() && m.Offset(i) < flat+n; i++ {
		from, to := max(flat, m.Offset(i)), min(flat+n, endOf(m, i))
		if from < to && !f(i, from-m.Offset(i), to-from, from-flat) {
			return
		}
	}
}

// free refuses a chunk of which some bytes have come before, unless it is the same again.
func (r *receiver) free(h *tensor.Header, flat int64) (again bool, err error) {
	switch added := r.covered.Add(flat, h.Length, h.DataCRC); {
	case added == tensor.Overlap:
		err = r.wrong(h, "overlaps another chunk that has come before")
	case added == tensor.TooMany, r.pieces > piecesMax+r.manifest.Len():
		err = r.wrong(h, "the generation comes in too many pieces: send larger chunks, in order")
	default:
		again = added == tensor.Same
	}
	return again, err
}

// search returns the first piece of a tensor that ends after from.
func (r *receiver) search(i int, from int64) int {
	have := r.have[i]
	if n := len(have); n == 0 || have[n-1].to <= from { // in order
		return n
	}
	k, _ := slices.BinarySearchFunc(have, from, func(p piece, from int64) int {
		if p.to <= from {
			return -1
		}
		return 1
	})
	return k
}

// data reads the bytes of a chunk into the place, and sums them while they are in the cache. What comes again is compared with its sum and does not count.
func (r *receiver) data(in io.Reader, h *tensor.Header, flat int64, again bool) error {
	to := r.place.Data()[flat : flat+int64(h.Length)]
	sum := uint32(0)
	for left := to; len(left) > 0; {
		n, err := in.Read(left[:min(len(left), receiveBytes)])
		sum = tensor.UpdateCRC(sum, left[:n])
		left = left[n:]
		if err != nil && (err != io.EOF || len(left) > 0) {
			return unexpectedEnd(err)
		}
	}
	if sum != h.DataCRC {
		return r.wrong(h, fmt.Sprintf("the data is damaged: its sum is %08x and the header says %08x", sum, h.DataCRC))
	}
	gap := int64(0) // end of the tensor before
	wrong := false
	r.parts(flat, int64(len(to)), func(i int, from, n, at int64) bool {
		wrong = !zero(to[gap:at])
		part := sum
		if n != int64(len(to)) {
			part = tensor.CRC(to[at : at+n])
		}
		if !again {
			r.add(i, piece{from, from + n, part})
		}
		gap = at + n
		return !wrong
	})
	if wrong || !zero(to[gap:]) {
		return r.wrong(h, "bytes between two tensors are not zero")
	}
	return nil
}

func unexpectedEnd(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func zero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// add notes a piece that free let pass, and joins it to its neighbours.
func (r *receiver) add(i int, p piece) {
	k := r.search(i, p.from)
	have := r.have[i]
	before := k > 0 && have[k-1].to == p.from
	after := k < len(have) && have[k].from == p.to
	switch {
	case before && after:
		have[k-1] = join(join(have[k-1], p), have[k])
		r.have[i] = slices.Delete(have, k, k+1)
		r.pieces--
	case before:
		have[k-1] = join(have[k-1], p)
	case after:
		have[k] = join(p, have[k])
	default:
		r.have[i] = slices.Insert(have, k, p)
		r.pieces++
	}
}

func join(a, b piece) piece {
	return piece{a.from, b.to, tensor.CombineCRC(a.crc, b.crc, b.to-b.from)}
}

// complete gives the place the sums of its tensors. An *IncompleteError says what is missing.
func (r *receiver) complete() error {
	missing, first := 0, 0
	for i := len(r.have) - 1; i >= 0; i-- {
		n := r.manifest.EncodedBytes(i)
		switch have := r.have[i]; {
		case n == 0:
		case len(have) == 1 && have[0].from == 0 && have[0].to == n:
			r.place.SetSum(i, have[0].crc)
		default:
			missing, first = missing+1, i
		}
	}
	if missing > 0 {
		return &IncompleteError{r.place.Generation(), r.manifest.Tensor(first).Name, missing}
	}
	return nil
}
