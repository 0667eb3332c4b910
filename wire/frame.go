package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// headerBytes is the fixed start of a hello and of a reply: magic, two u16, u32 length.
const headerBytes = 16

// bodyBytesMin is the shortest JSON object, {}.
const bodyBytesMin = 2

func appendFrame(dst []byte, a, b uint16, body []byte) []byte {
	dst = append(dst, Magic...)
	dst = binary.LittleEndian.AppendUint16(dst, a)
	dst = binary.LittleEndian.AppendUint16(dst, b)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(body)))
	return append(dst, body...)
}

// encode is json.Marshal without the escapes for HTML, which could triple a spec's size.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// readHeader fills h and stops as soon as it cannot become a header, so that a peer of another protocol which
// waits for an answer gets one. It returns how much came; ok is false if that is not the magic's beginning.
func readHeader(r io.Reader, h *[headerBytes]byte) (n int, ok bool, err error) {
	for idle := 0; n < headerBytes; {
		k, err := r.Read(h[n:])
		n += k
		if m := min(n, len(Magic)); string(h[:m]) != Magic[:m] {
			return n, false, nil
		}
		if n == headerBytes {
			break
		}
		if idle, err = progress(idle, k, err); err != nil {
			return n, true, err
		}
	}
	return n, true, nil
}

// readBody reads length bytes into memory that at most doubles what has arrived. What it returns begins with a copy of before.
func readBody(r io.Reader, before []byte, length int) ([]byte, error) {
	const first = 4096
	length += len(before)
	body := append(make([]byte, 0, min(length, first)), before...)
	for idle := 0; len(body) < length; {
		if len(body) == cap(body) {
			grown := make([]byte, len(body), min(length, 2*cap(body)))
			copy(grown, body)
			body = grown
		}
		k, err := r.Read(body[len(body):cap(body)])
		body = body[:len(body)+k]
		if len(body) == length {
			break
		}
		if idle, err = progress(idle, k, err); err != nil {
			return body, err
		}
	}
	return body, nil
}

// progress counts reads that gave neither bytes nor an error, so that a broken Reader cannot spin us.
func progress(idle, n int, err error) (int, error) {
	const idleMax = 100
	if n > 0 || err != nil {
		return 0, err
	}
	if idle++; idle == idleMax {
		return idle, io.ErrNoProgress
	}
	return idle, nil
}

// protocolError wraps ErrProtocol.
func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrProtocol, fmt.Errorf(format, args...))
}

// unexpected turns an end in the middle of a message into io.ErrUnexpectedEOF.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
