package client

import (
	"context"
	"errors"
	"fmt"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// StepTx is the transaction of one step. Readers see the step when all of it is there, and nothing of it before.
//
// The arrays that are put are borrowed: they must not change until Commit has returned nil, or Abort has returned, since they are sent, and after a reconnect
// sent again, from where they lie.
type StepTx struct {
	p    *StepProducer
	ctx  context.Context // of the call that is under way; see Step
	op   string
	step uint64
	done bool
}

// Step begins the transaction of a step. Steps may only grow: one that was committed may be sent again, which readers ignore, but no lower one. ctx bounds the
// Puts of the transaction, which wait for places when the producer writes in place; otherwise they do not wait.
func (p *StepProducer) Step(ctx context.Context, step uint64) (*StepTx, error) {
	switch {
	case p.tx != nil:
		return nil, fmt.Errorf("client: step %d: the transaction of step %d is still open; Commit or Abort it first", step, p.tx.step)
	case p.committed && step < p.last:
		return nil, &StepOrderError{Step: step, Last: p.last}
	}
	if err := p.way.refused(step); err != nil { // the daemon says so once
		return nil, err
	}
	p.way.begin()
	p.cutter.Begin(step)
	p.tx = &StepTx{p: p, ctx: ctx, op: "put", step: step}
	return p.tx, nil
}

// Step returns the step's number.
func (tx *StepTx) Step() uint64 { return tx.step }

var errTxDone = errors.New("client: the transaction is over: it was committed or aborted")

// index finds a tensor.
func (tx *StepTx) index(name string) (int, error) {
	if tx.done {
		return 0, errTxDone
	}
	i, ok := tx.p.manifest.Index(name)
	if !ok {
		return 0, unknownTensor(tx.p.manifest, name)
	}
	return i, nil
}

// Put puts a whole tensor: its bytes as the manifest's encoding has them, row-major and little-endian. After an error that is a *tensor.PlaceError the transaction is as it was.
func (tx *StepTx) Put(name string, data []byte) error {
	i, err := tx.index(name)
	if err != nil {
		return err
	}
	return tx.named("put", tx.p.cutter.Put(i, data))
}

// PutSlice puts a part of a tensor: elements from elementOffset on, in the order in which they lie. A part starts at a multiple of 256 bytes, or where the one put
// just before ended. Tensors with an 8-bit or top-k encoding are put as a whole.
func (tx *StepTx) PutSlice(name string, data []byte, elementOffset int64) error {
	i, err := tx.index(name)
	if err != nil {
		return err
	}
	t := tx.p.manifest.Tensor(i)
	size := elementBytes(&t)
	switch {
	case size == 0:
		return fmt.Errorf("client: put a slice of %q: tensors with the encoding %v are put as a whole", name, t.Encoding)
	case int64(len(data))%size != 0:
		return fmt.Errorf("client: put a slice of %q: %d bytes are no whole number of elements of %d bytes", name, len(data), size)
	case elementOffset < 0 || elementOffset > t.Elements():
		return fmt.Errorf("client: put a slice of %q: it starts at element %d of %d", name, elementOffset, t.Elements())
	}
	return tx.named("put a slice", tx.p.cutter.PutAt(i, elementOffset*size, data))
}

// elementBytes is the size of an encoded element; 0 where elements do not stand one after another.
func elementBytes(t *tensor.Tensor) int64 {
	switch t.Encoding.Kind {
	case tensor.Raw:
		return t.DType.Bytes()
	case tensor.BF16, tensor.F16:
		return 2
	}
	return 0
}

// PutFloats puts a whole F32 tensor and encodes it as the manifest says; without an encoding nothing is copied. Encoded bytes are kept in memory of the producer, as much as the tensors of that kind
// have.
func (tx *StepTx) PutFloats(name string, values []float32) error {
	i, err := tx.index(name)
	if err != nil {
		return err
	}
	t := tx.p.manifest.Tensor(i)
	switch {
	case t.DType != spec.F32:
		return fmt.Errorf("client: put %q: the tensor is %s, not F32; give its bytes to Put", name, t.Type())
	case int64(len(values)) != t.Elements():
		return fmt.Errorf("client: put %q: %d values, but %s has %d", name, len(values), t.Type(), t.Elements())
	}
	data, err := tx.p.encoders.encode(i, &t, tx.p.manifest.EncodedBytes(i), values)
	if err != nil {
		return fmt.Errorf("client: put %q: %w", name, err)
	}
	return tx.named("put", tx.p.cutter.Put(i, data))
}

// named says what was being done when a chunk could not be made or sent.
func (tx *StepTx) named(op string, err error) error {
	if place := (*tensor.PlaceError)(nil); errors.As(err, &place) {
		return fmt.Errorf("client: %s: %w", op, err)
	}
	return err
}

// Commit sends what is left and returns nil when the whole step is in the ring, committed. Every tensor must have been put; else *tensor.IncompleteError names those that lack bytes, and the transaction
// goes on.
//
// Other errors: the context's, after which Commit may be called again, *ReconnectingError and ErrFull among them; *StepRefusedError; ErrSessionTaken and the others of a
// Producer that has ended. After those the transaction can only be aborted.
func (tx *StepTx) Commit(ctx context.Context) error {
	return tx.commit(ctx, tx.p.cutter.Finish)
}

// CommitSubset is Commit of exactly those tensors of which something was put.
func (tx *StepTx) CommitSubset(ctx context.Context) error {
	return tx.commit(ctx, tx.p.cutter.FinishSubset)
}

func (tx *StepTx) commit(ctx context.Context, finish func() error) error {
	if tx.done {
		return errTxDone
	}
	if tx.op != "commit" { // else it was finished before, and a context ended
		tx.ctx, tx.op = ctx, "commit"
		if err := finish(); err != nil {
			tx.op = "put"
			if errors.As(err, new(*tensor.IncompleteError)) {
				return fmt.Errorf("client: commit step %d: %w", tx.step, err)
			}
			return err
		}
	}
	if err := tx.p.way.commit(ctx, tx.step); err != nil {
		return err
	}
	tx.end(true)
	tx.p.last, tx.p.committed = tx.step, true
	tx.p.steps.Add(1)
	return nil
}

func (tx *StepTx) end(committed bool) {
	tx.p.encoders.end(committed)
	tx.done, tx.p.tx = true, nil
}

// Abort gives the step up: readers drop what they have of it, and the arrays are the caller's again. It does not wait for the daemon. The same step may be begun again.
// Aborting what is over does nothing, so that it can be deferred.
func (tx *StepTx) Abort() {
	if tx.done {
		return
	}
	if tx.p.way.takeBack() {
		ended, cancel := context.WithCancel(context.Background())
		cancel() // it is not waited for: without this chunk readers drop the step when the next one begins
		_ = tx.p.way.send(ended, "abort", tensor.Header{Flags: tensor.FlagAbort, Step: tx.step, Producer: tx.p.id, Manifest: tx.p.manifest.ID()}, nil)
	}
	tx.end(false)
}
