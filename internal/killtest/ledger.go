package killtest

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
)

// Ledger is a file of two words, that outlives the producer who writes it: the kernel keeps what was written when the writer is killed.
type Ledger struct{ f *os.File }

// The words of a ledger.
const (
	wordSent  = 0 // samples that may be on their way: never less than what the ring can hold
	wordAcked = 8 // samples whose ack was read: never more than what the daemon has promised
)

// OpenLedger opens the file, or makes it.
func OpenLedger(path string) (*Ledger, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	return &Ledger{f}, nil
}

// SetSent is called before the samples are handed to the client.
func (l *Ledger) SetSent(n uint64) error { return l.put(wordSent, n) }

// SetAcked is called after the acks were read.
func (l *Ledger) SetAcked(n uint64) error { return l.put(wordAcked, n) }

func (l *Ledger) put(at int64, n uint64) error {
	_, err := l.f.WriteAt(binary.LittleEndian.AppendUint64(nil, n), at)
	return err
}

// Read returns both words; a word never written is 0. acked is read first, so that it never runs ahead of sent while the writer goes on.
func (l *Ledger) Read() (sent, acked uint64, err error) {
	if acked, err = l.get(wordAcked); err != nil {
		return 0, 0, err
	}
	sent, err = l.get(wordSent)
	return sent, acked, err
}

func (l *Ledger) get(at int64) (uint64, error) {
	var b [8]byte
	if _, err := l.f.ReadAt(b[:], at); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b[:]), nil
}

// Close closes the file.
func (l *Ledger) Close() error { return l.f.Close() }

// Path is the name of the file.
func (l *Ledger) Path() string { return l.f.Name() }
