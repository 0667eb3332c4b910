package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// StepsConfig says which tensors a StepProducer sends and how.
type StepsConfig struct {
	Table    string           // required: a table of kind tensors
	Name     string           // required: the producer's name, by which readers know it; one connection at a time has it
	Manifest *tensor.Manifest // required: the tensors that will come

	// InPlace writes chunks where readers read them, on the same machine and if the daemon trusts this process; shm:// addresses mean it too. It needs Linux.
	InPlace bool

	NoCRC            bool          // chunks are not summed: readers cannot tell damage
	WindowBytes      int64         // most bytes without an ack; 0: the daemon chooses; ask for more where the round trip is long. Not in place
	Prefetch         int           // most places lent at once; 0: the daemon's default. In place only
	HandshakeTimeout time.Duration // for connecting and the reply; default DefaultHandshakeTimeout
	Client           string        // name shown in the daemon's status; default ingestd-go/VERSION
	Token            Token         // see Config.Token
	ReconnectFor     time.Duration // most time without a connection since the last ack; default DefaultReconnectFor; negative: do not reconnect
	ReconnectFrom    time.Duration // least upper bound of a pause before a try; default DefaultReconnectFrom
	ReconnectTo      time.Duration // greatest one; default DefaultReconnectTo

	TLS TLS // for addresses tls:// and quic://

	// Dialer is as in Config. Not in place.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

func (c StepsConfig) withDefaults() (StepsConfig, error) {
	switch {
	case c.Table == "":
		return c, errors.New("client: StepsConfig.Table is empty; name the table of tensors")
	case c.Name == "":
		return c, errors.New("client: StepsConfig.Name is empty; give the producer a name of its own, such as worker-3")
	case c.Manifest == nil:
		return c, errors.New("client: StepsConfig.Manifest is nil; say which tensors will come, with tensor.NewManifest for instance")
	case c.Prefetch < 0 || c.WindowBytes < 0:
		return c, fmt.Errorf("client: StepsConfig.Prefetch is %d and WindowBytes %d; neither may be negative", c.Prefetch, c.WindowBytes)
	case c.InPlace && c.WindowBytes > 0:
		return c, errors.New("client: StepsConfig.WindowBytes is not for producers in place; Prefetch says how far they run ahead")
	case !c.InPlace && c.Prefetch > 0:
		return c, errors.New("client: StepsConfig.Prefetch is for producers in place; WindowBytes says how far others run ahead")
	}
	if c.Dialer == nil {
		c.Dialer = dialNear
	}
	// A spec and a way to connect that are not used: what all clients share is checked in one place.
	same, err := Config{
		Table: c.Table, Spec: &spec.Spec{}, Session: c.Name, HandshakeTimeout: c.HandshakeTimeout, Client: c.Client, Token: c.Token,
		ReconnectFor: c.ReconnectFor, ReconnectFrom: c.ReconnectFrom, ReconnectTo: c.ReconnectTo, TLS: c.TLS, Dialer: c.Dialer,
	}.withDefaults()
	c.HandshakeTimeout, c.Client, c.Dialer = same.HandshakeTimeout, same.Client, same.Dialer
	c.ReconnectFor, c.ReconnectFrom, c.ReconnectTo = same.ReconnectFor, same.ReconnectFrom, same.ReconnectTo
	return c, err
}

// stepWay is how chunks get to the daemon.
type stepWay interface {
	// begin says that a transaction begins, so that nothing is kept of the one before.
	begin()
	// send takes one chunk, whose header has no stream and no sum yet. The data is the caller's again after commit or takeBack.
	send(ctx context.Context, op string, h tensor.Header, data [][]byte) error
	// commit returns when all that was sent is in the ring, or *StepRefusedError.
	commit(ctx context.Context, step uint64) error
	// refused returns the refusal of a step, nil if that is not the last one that was refused.
	refused(step uint64) error
	// takeBack frees the caller's memory without waiting for the daemon. seen says whether the daemon may have had something of the transaction.
	takeBack() (seen bool)
	stats() StepStats
	close(ctx context.Context) error
	abort()
}

// StepProducer sends steps: sets of named tensors that readers get complete or not at all. One goroutine at a time uses it and its transaction; Stats and Abort are
// for any.
type StepProducer struct {
	manifest   *tensor.Manifest
	way        stepWay
	chunkBytes int
	cutter     *tensor.Cutter
	id         uint64 // of the name

	tx        *StepTx // that is open; nil: none is
	last      uint64  // newest step that was committed
	committed bool    // there was one
	encoders  stepEncoders
	steps     atomic.Uint64
}

// StepStats is what a StepProducer has done so far.
type StepStats struct {
	Steps      uint64 // committed
	Chunks     uint64 // sent
	Acked      uint64 // of those, in the ring
	Reconnects uint64 // connections made after the first
	Resent     uint64 // chunks sent again after one
	Replays    uint64 // transactions sent again from their beginning, since the daemon had lost what it acked
	Lost       uint64 // chunks that a daemon had in its ring and its successor has not; those of the open transaction were sent again
}

// DialSteps connects to a table of tensors. addr is tcp://host:port or unix:///path, over which chunks are pushed, or shm:///path, which writes them in place, as InPlace does
// on a unix path. ctx bounds the connecting only. Only a connection that was there is made again.
//
// A *wire.Refusal in the error says why the daemon would not: wire.CodeManifestMismatch when producers with another manifest are connected, with the difference.
func DialSteps(ctx context.Context, addr string, cfg StepsConfig) (*StepProducer, error) {
	if rest, ok := strings.CutPrefix(addr, "shm://"); ok {
		addr, cfg.InPlace = "unix://"+rest, true
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	p := &StepProducer{manifest: cfg.Manifest, id: tensor.ProducerID(cfg.Name), encoders: newStepEncoders(cfg.Manifest)}
	if cfg.InPlace {
		p.way, p.chunkBytes, err = fillSteps(ctx, addr, cfg)
	} else {
		p.way, p.chunkBytes, err = pushSteps(ctx, addr, cfg)
	}
	if err != nil {
		return nil, err
	}
	// The stream's number may change when the daemon starts anew, and the data is best summed just before it is sent: both are done then.
	p.cutter = tensor.NewCutter(cfg.Manifest, p.chunkBytes, 0, p.id, p.emit)
	p.cutter.SkipCRC()
	return p, nil
}

// chunkSpec is the layout of the samples of a table of tensors.
func chunkSpec(chunkBytes int64) (*spec.Spec, error) {
	if chunkBytes < tensor.ChunkBytesMin || chunkBytes > tensor.ChunkBytesMax || tensor.CheckChunkBytes(int(chunkBytes)) != nil {
		return nil, fmt.Errorf("%w: the daemon takes chunks of %d bytes, which no table of tensors does; is the table's kind tensors?", wire.ErrProtocol, chunkBytes)
	}
	return spec.ParseText(fmt.Sprintf("header:U8[%d],data:U8[%d]", tensor.HeaderBytes, chunkBytes))
}

// emit takes chunks from the cutter.
func (p *StepProducer) emit(header []byte, data [][]byte) error {
	h, err := tensor.ParseHeader(header)
	if err != nil {
		return err
	}
	h.Flags &^= tensor.FlagNoCRC
	return p.way.send(p.tx.ctx, p.tx.op, h, data)
}

// Manifest returns the tensors of a step.
func (p *StepProducer) Manifest() *tensor.Manifest { return p.manifest }

// ChunkBytes returns the most bytes of tensors in one chunk.
func (p *StepProducer) ChunkBytes() int { return p.chunkBytes }

// Stats returns the counts so far.
func (p *StepProducer) Stats() StepStats {
	s := p.way.stats()
	s.Steps = p.steps.Load()
	return s
}

// Close ends the producer; a transaction that is open is aborted. An error means that the daemon did not close its side; all that was committed is in the ring. Closing again does nothing.
func (p *StepProducer) Close(ctx context.Context) error {
	if p.tx != nil {
		p.tx.Abort()
	}
	return p.way.close(ctx)
}

// Abort ends the connection at once: a call that waits returns an error that wraps os.ErrClosed. It may be called from any goroutine and more than once.
func (p *StepProducer) Abort() { p.way.abort() }
