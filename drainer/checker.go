package drainer

// Checker looks at the samples of one stream before they are committed. The stream's sender calls it, or the goroutine that commits for a Lender.
type Checker interface {
	// Check looks at samples that are in place, given as the columns of their leaves, and returns how many of them may be committed and, unless all may, why not
	// the next one. It may change the bytes, and keeps none.
	Check(columns [][]byte) (good int, err error)

	// AppendNotes appends what the producer is to be told before the next ack, as bytes that go over the wire, and forgets it.
	AppendNotes(dst []byte) []byte
}

// CheckError says that the stream's Checker turned a sample down: end the producer.
type CheckError struct{ Err error }

func (e *CheckError) Error() string { return e.Err.Error() }

func (e *CheckError) Unwrap() error { return e.Err }
