package tcpingest

import (
	"errors"
	"io"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/ingestd/ingestd/compress"
	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/wire"
)

// session receives the samples of one stream: after the handshake, until its end.
type session struct {
	*conn
	to        target
	committed bool // acks follow the commit
	notes     bool // the peer reads notes

	carry      []byte // the first part of a sample, when its slot is not reserved yet
	runs       [runsMax]ring.Run
	partial    bool      // the stream ended while a sample was received in place
	heldSince  time.Time // first wait for the sample that is received in place
	last       bool      // Shutdown was noticed: only lastLeft more bytes are taken
	lastLeft   int64
	unacked    int64 // samples taken and not acked
	ackSamples int64 // acks are written at this many at the latest
	unyielded  int64 // bytes since the last wait
}

func newSession(c *conn, stream *drainer.Stream, p *plan, acc *wire.AcceptedPush) *session {
	if a, ok := c.from.(*ahead); ok {
		a.fit(p)
	}
	return &session{
		conn:      c,
		to:        target{stream: stream, plan: p},
		committed: acc.Ack == wire.AckCommitted,
		// A quarter of the window: the peer never waits for acks that we hold back while it could send.
		ackSamples: max(1, min(acc.WindowSamples, acc.WindowBytes/p.sample)/4),
	}
}

// Errors by which run tells its caller how the stream ended.
var (
	errAcks     = errors.New("tcpingest: acks are not read")
	errIdle     = errors.New("tcpingest: idle")
	errStalled  = errors.New("tcpingest: stalled inside a sample")
	errCutShort = errors.New("tcpingest: ended inside a sample")
)

// run receives until the stream ends, closes it, and acks all it took. It returns nil when the peer ended the stream after a whole sample.
func (s *session) run() error {
	s.setState(stateReceiving)
	var err error
	for err == nil {
		err = s.round()
	}
	if err == io.EOF {
		err = nil
	}
	if s.partial || len(s.carry) > 0 {
		s.server.counters.CutShort.Add(1)
	}
	if s.taken.Load() {
		err = errTaken // whatever it was that giveUp ended
	}
	s.to.stream.Close() // at once: another connection may wait for the session
	s.settle()
	if errors.Is(err, errAcks) {
		return err
	}
	if errors.Is(err, errTaken) {
		// Reading acks is all that the peer can still do, and it gets no more time for that than for reading why it is ended.
		defer time.AfterFunc(s.server.cfg.LingerTimeout, func() { _ = s.SetWriteDeadline(time.Unix(1, 0)) }).Stop()
		_ = s.flushAcks()
		return err
	}
	if ackErr := s.flushAcks(); ackErr != nil {
		return ackErr
	}
	return err
}

// round waits for bytes and takes what is there, up to one read.
func (s *session) round() error {
	n, err := s.await()
	if err != nil {
		return err
	}
	if err := s.reserve(n); err != nil {
		return err
	}
	if err := s.receive(); err != nil {
		return err
	}
	if s.unacked >= s.ackSamples {
		if err := s.flushAcks(); err != nil {
			return err
		}
	}
	if s.unyielded >= yieldBytes {
		s.unyielded = 0
		runtime.Gosched()
	}
	return nil
}

// await waits until a sample can be taken and returns how many can be.
func (s *session) await() (int64, error) {
	p := s.to.plan
	for {
		n, err := s.bytesAtHand()
		if err != nil {
			return 0, s.waitError(err)
		}
		if whole := (int64(len(s.carry)) + n) / p.sample; whole > 0 {
			return min(whole, p.atOnce), nil
		}
		if s.stopping.Load() {
			return 0, errInterrupted
		}
		if p.held {
			return 1, nil
		}
		// Take the part out of the socket, so that more of it, or its end, can be waited for.
		if s.carry == nil {
			s.carry = make([]byte, 0, p.sample)
		}
		s.vec.reset()
		s.vec.add(s.carry[len(s.carry) : int64(len(s.carry))+n])
		got, err := s.readNow()
		if err != nil {
			return 0, s.waitError(err)
		}
		s.carry = s.carry[:len(s.carry)+got]
	}
}

// bytesAtHand returns how many bytes the socket holds, at least one. Before it waits, the acks that are due go out.
func (s *session) bytesAtHand() (int64, error) {
	if s.taken.Load() {
		return 0, errTaken
	}
	n, err := s.atHand()
	if s.stopping.Load() {
		return s.lastBytes(int64(n), err)
	}
	if n > 0 || err != nil {
		return int64(n), err
	}
	if err := s.flushAcks(); err != nil {
		return 0, err
	}
	s.setState(stateWaitingForData)
	s.unyielded = 0
	s.allowRead(s.patience())
	n, err = s.wait()
	s.setState(stateReceiving)
	if err == errInterrupted {
		return s.lastBytes(0, nil)
	}
	return int64(n), err
}

// lastBytes limits a stopping session to what the socket held when it noticed.
func (s *session) lastBytes(n int64, err error) (int64, error) {
	if !s.last {
		s.last, s.lastLeft = true, n
	}
	if n = max(0, min(n, s.lastLeft)); n == 0 && err == nil {
		err = errInterrupted
	}
	return n, err
}

func (s *session) patience() time.Duration {
	if len(s.carry) > 0 {
		return s.server.cfg.StallTimeout
	}
	return s.server.cfg.IdleTimeout
}

// waitError names the end of a wait for the next sample.
func (s *session) waitError(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && len(s.carry) > 0:
		return errStalled
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errIdle
	case err == io.EOF && len(s.carry) > 0:
		return errCutShort
	}
	return err
}

// reserve takes slots for n samples, fewer if the ring has no more just now, but at least one, for which it waits.
func (s *session) reserve(n int64) error {
	s.to.runs = s.runs[:0]
	for n > 0 && len(s.to.runs) < runsMax {
		run, ok := s.to.stream.TryReserve(int(n))
		if !ok {
			if len(s.to.runs) > 0 {
				return nil
			}
			if err := s.flushAcks(); err != nil {
				return err
			}
			s.setState(stateWaitingForSlot)
			s.startWatch()
			var err error
			run, err = s.to.stream.Reserve(s.ctx, int(n))
			s.stopWatch()
			s.setState(stateReceiving)
			if err != nil {
				return s.interrupted() // or the ring was closed, or the server waits no longer
			}
		}
		s.to.runs = append(s.to.runs, run)
		n -= int64(run.N)
	}
	failpoint.Hit("tcpingest/reserve/taken")
	return nil
}

// receive fills the reserved slots and pushes those that were filled. If the stream ends before, the others are given back.
func (s *session) receive() error {
	want := s.to.samples() * s.to.plan.sample
	done := int64(0)
	var err error
	if s.to.plan.way == staged {
		done, err = s.receiveStaged(want)
	} else {
		done, err = s.receiveInPlace(want)
	}
	s.carry = s.carry[:0]
	s.partial = done%s.to.plan.sample != 0
	bad := s.place(done)
	s.lastLeft -= done
	s.unyielded += done
	switch {
	case bad != nil:
		return bad
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errStalled
	case err == io.EOF && s.partial:
		return errCutShort
	}
	return err
}

func (s *session) receiveInPlace(want int64) (int64, error) {
	done := int64(len(s.carry))
	s.to.put(s.carry)
	s.heldSince = time.Time{}
	for done < want {
		s.to.vectors(&s.vec, done)
		n, err := s.readSome()
		done += int64(n)
		if err != nil {
			return done, err
		}
		failpoint.Hit("tcpingest/receive/part")
	}
	return done, nil
}

// receiveStaged reads exactly the reserved samples, which the socket holds, and scatters them while they are in the cache.
func (s *session) receiveStaged(want int64) (int64, error) {
	buf := s.server.staging.get()
	defer s.server.staging.put(buf)
	done := int64(copy(buf, s.carry))
	for done < want {
		s.vec.reset()
		s.vec.add(buf[done:want])
		n, err := s.readSome()
		done += int64(n)
		if err != nil {
			return 0, err // what is lost was not acked
		}
	}
	failpoint.Hit("tcpingest/receive/staged")
	s.to.scatter(buf[:want])
	return done, nil
}

// readSome reads into s.vec, waiting as long as a sender may stall. A sender that dribbles stalls as well: what it holds must come at heldRateMin.
func (s *session) readSome() (int, error) {
	if s.taken.Load() {
		return 0, errTaken
	}
	if n, err := s.readNow(); n > 0 || err != nil {
		return n, err
	}
	now := time.Now()
	if s.heldSince.IsZero() {
		s.heldSince = now
	} else if now.Sub(s.heldSince) > s.server.cfg.StallTimeout+time.Duration(s.to.samples()*s.to.plan.sample)*time.Second/heldRateMin {
		return 0, errStalled
	}
	if s.unacked > 0 && !s.from.more() {
		if err := s.flushAcks(); err != nil {
			return 0, err
		}
	}
	s.unyielded = 0
	s.setState(stateWaitingForData)
	s.allowRead(s.server.cfg.StallTimeout)
	n, err := s.readWait()
	s.setState(stateReceiving)
	return n, err
}

// place pushes the samples that are complete and gives back the slots of the others. The error is a *drainer.CheckError: one of the samples may not be pushed, so
// that it and those after it were given back, too.
func (s *session) place(done int64) (err error) {
	now := time.Now()
	whole, pushed := done/s.to.plan.sample, int64(0)
	s.count(whole)
	left := whole
	for i, run := range s.to.runs {
		filled, _ := run.Split(int(min(left, int64(run.N))))
		left -= int64(filled.N)
		n := 0
		if filled.N > 0 && err == nil {
			n, err = s.to.stream.Push(filled, now)
			failpoint.Hit("tcpingest/place/pushed")
		}
		pushed += int64(n)
		_, s.runs[i] = run.Split(n)
	}
	// The last first: slots at the end of the ring go straight to the next sample.
	for i := len(s.to.runs) - 1; i >= 0; i-- {
		if rest := s.runs[i]; rest.N > 0 {
			s.to.stream.Abandon(rest)
		}
	}
	if pushed < whole {
		s.count(pushed - whole)
	}
	s.unacked += pushed
	return err
}

// count adds to what was taken, or takes back what after all was not.
func (s *session) count(samples int64) {
	bytes := samples * s.to.plan.sample
	s.samples.Store(s.samples.Load() + uint64(samples))
	s.bytes.Store(s.bytes.Load() + uint64(bytes))
	s.server.counters.Samples.Add(uint64(samples))
	s.server.counters.Bytes.Add(uint64(bytes))
}

// flushAcks acks every sample taken; where that promises it, not before they are in the ring.
func (s *session) flushAcks() error {
	if s.unacked == 0 {
		return nil
	}
	if s.committed {
		// Not for long: the drainers wait for nobody.
		if err := s.to.stream.WaitCommitted(s.server.hurry); err != nil {
			return errInterrupted
		}
	}
	failpoint.Hit("tcpingest/ack/due")
	// What the stream has to say about samples goes out before their acks.
	if s.notes {
		s.watch.rest = s.to.stream.AppendNotes(s.watch.rest)
	}
	var err error
	if s.unacked, err = s.ack(s.unacked); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return errAcks
		}
		return err
	}
	failpoint.Hit("tcpingest/ack/sent")
	return nil
}

// ending says how an end of run is counted and what the peer is told; a nil notice tells nothing.
func (s *session) ending(err error) (string, *wire.Notice) {
	p := s.to.plan
	notice := func(code wire.Code, reason string) (string, *wire.Notice) {
		return string(code), &wire.Notice{Code: code, Reason: reason}
	}
	var bad *drainer.CheckError
	var corrupt *compress.CorruptError
	switch {
	case errors.As(err, &corrupt):
		return notice(wire.CodeBadCompression, corrupt.Error()+"; every sample that was acked is kept, send the others again")
	case err == nil:
		return ingest.EndClean, nil
	case errors.As(err, &bad):
		return notice(wire.CodeBadChunk, bad.Error())
	case errors.Is(err, errInterrupted):
		return notice(wire.CodeShuttingDown, "the daemon is stopping; every sample it acked is kept, send the others again later")
	case errors.Is(err, errTaken):
		return notice(wire.CodeSessionTaken, "another connection has opened this session; two producers must not have one session")
	case errors.Is(err, errAcks):
		return string(wire.CodeAckTimeout), nil // it would not read this either
	case errors.Is(err, errIdle):
		return notice(wire.CodeIdleTimeout, "no sample came for "+s.server.cfg.IdleTimeout.String()+"; connect again when there is one")
	case errors.Is(err, errStalled):
		return notice(wire.CodeStalled, "a sample stopped half-way for "+s.server.cfg.StallTimeout.String()+"; it was dropped, send it again")
	case errors.Is(err, errCutShort):
		return notice(wire.CodeCutShort, "the stream ended inside a sample of "+strconv.FormatInt(p.sample, 10)+" bytes; that sample was dropped")
	}
	return ingest.EndReset, nil
}
