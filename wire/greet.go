package wire

import (
	"errors"
	"fmt"
	"io"
)

// The errors of a client with a token.
var (
	// ErrNotChallenged says that the daemon accepted a client that named a token, and proved nothing itself: it has no tokens, or somebody between took the question away.
	ErrNotChallenged = errors.New("the daemon did not prove to know the token that was named, nor ask for proof: it has no tokens, or it is not who it should be")
	// ErrDaemonUnproven says that the daemon, or who speaks in its place, does not know the secret of the token.
	ErrDaemonUnproven = errors.New("the daemon does not know this token with this secret: one of them is wrong, or it is not the daemon it should be")
)

// Greet says hello on w and reads the reply from r, which may be the same connection; if the hello names a token it proves both sides to each other. It sets the hello's Nonce
// anew, so that the same hello may be used for one Greet after another. exporter is what TLS exports under ExporterLabel, nil where there is no TLS. The caller bounds the time.
//
// Errors are those of AppendHello and ReadReply, ErrNotChallenged, ErrDaemonUnproven, and *WriteError when the daemon did not take what it was sent and left no reply.
func Greet(w io.Writer, r io.Reader, h *Hello, exporter []byte, into Accepted) error {
	token := Token{h.Token, h.Secret}
	if err := token.Check(); err != nil {
		return fmt.Errorf("%w: %w", ErrHello, err)
	}
	h.Nonce = Nonce{}
	if !token.IsZero() {
		h.Nonce = NewNonce()
	}
	hello, err := AppendHello(nil, h)
	if err != nil {
		return err
	}
	err = ask(w, r, hello, into)
	var challenge *Challenge
	switch asked := errors.As(err, &challenge); {
	case token.IsZero() && asked:
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	case err == nil && !token.IsZero():
		return ErrNotChallenged
	case !asked:
		return err
	}
	t := NewTranscript(hello, challenge.Nonce, exporter)
	if !challenge.Proves(t, token.Secret) {
		return fmt.Errorf("token %q: %w", token.Name, ErrDaemonUnproven)
	}
	err = ask(w, r, AppendProof(nil, t.ClientProof(token.Secret)), into)
	if errors.As(err, &challenge) {
		return protocolError("the daemon asked for proof twice")
	}
	return err
}

// WriteError says that the daemon did not take what it was sent, and left no reply.
type WriteError struct{ Err error }

func (e *WriteError) Error() string { return fmt.Sprintf("wire: write to the daemon: %v", e.Err) }
func (e *WriteError) Unwrap() error { return e.Err }

// ask writes, and reads the reply in any case: a daemon that refuses before it has read all leaves its reason behind.
func ask(w io.Writer, r io.Reader, what []byte, into Accepted) error {
	_, failed := w.Write(what)
	err := ReadReply(r, into)
	var refusal *Refusal
	if failed != nil && err != nil && !errors.As(err, &refusal) && !errors.Is(err, ErrProtocol) {
		return &WriteError{failed}
	}
	return err
}
