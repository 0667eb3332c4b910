package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// Messages are what publishers and readers of weights say after the handshake: u32 length and one JSON object, see docs/weights.md.

// MessageBytesMax is the most bytes of a message, but for those whose reader states another limit.
const MessageBytesMax = 64 << 10

// ChunkMark in the length of a message says that a chunk follows instead: its bytes are the other bits.
const ChunkMark = 1 << 31

// AppendMessage appends a message. It fails on what JSON cannot hold, and on more than limit bytes.
func AppendMessage(dst []byte, v any, limit int) ([]byte, error) {
	body, err := encode(v)
	if err != nil {
		return dst, fmt.Errorf("wire: message: %w", err)
	}
	if len(body) > limit {
		return dst, fmt.Errorf("wire: message: the body has %d bytes, at most %d are allowed", len(body), limit)
	}
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(body)))
	return append(dst, body...), nil
}

// ReadMessageLength reads the length of the next message or chunk. A peer that closed before its first byte is io.EOF.
func ReadMessageLength(r io.Reader) (length int, chunk bool, err error) {
	var b [4]byte
	if n, err := io.ReadFull(r, b[:]); err != nil {
		if n == 0 && err == io.EOF {
			return 0, false, io.EOF
		}
		return 0, false, fmt.Errorf("wire: read a message: %w", unexpected(err))
	}
	word := binary.LittleEndian.Uint32(b[:])
	return int(word &^ ChunkMark), word&ChunkMark != 0, nil
}

// ReadMessageBody reads the JSON of a message whose length was read, and refuses a length that is not from 2 to limit before it takes memory for it. What is
// wrong with the peer's bytes wraps ErrProtocol.
func ReadMessageBody(r io.Reader, length, limit int, into any) error {
	if length < bodyBytesMin || length > limit {
		return protocolError("a message has %d bytes; it may have %d to %d", length, bodyBytesMin, limit)
	}
	body, err := readBody(r, nil, length)
	if err != nil {
		return fmt.Errorf("wire: read a message: %w", unexpected(err))
	}
	if err := json.Unmarshal(body, into); err != nil {
		return protocolError("a message: %w", err)
	}
	return nil
}

// ReadMessage reads a message that may not be a chunk.
func ReadMessage(r io.Reader, limit int, into any) error {
	length, chunk, err := ReadMessageLength(r)
	if err != nil {
		return err
	}
	if chunk {
		return protocolError("a chunk came where a message was due")
	}
	return ReadMessageBody(r, length, limit, into)
}
