package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// AppendNotice appends the closing notice, NoticeMark included, its reason cut to the limit.
func AppendNotice(dst []byte, n *Notice) []byte {
	// Two strings always encode, and escaped they stay far below NoticeBytesMax.
	body, _ := encode(Notice{Code(cutText(string(n.Code), NameBytesMax)), cutText(n.Reason, ReasonBytesMax)})
	dst = append(dst, NoticeMark)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(body)))
	return append(dst, body...)
}

// ReadNotice reads a closing notice after its NoticeMark.
func ReadNotice(r io.Reader) (*Notice, error) {
	n := new(Notice)
	if err := readLater(r, "closing notice", n); err != nil {
		return nil, err
	}
	if n.Code == "" {
		return nil, protocolError("the closing notice has no code")
	}
	return n, nil
}

// AppendNote appends a note, NoteMark included, its texts cut to the limit.
func AppendNote(dst []byte, n *Note) []byte {
	cut := *n
	cut.Code = Code(cutText(string(n.Code), NameBytesMax))
	cut.Reason, cut.Group, cut.Client = cutText(n.Reason, ReasonBytesMax), cutText(n.Group, NameBytesMax), cutText(n.Client, NameBytesMax)
	body, _ := encode(cut) // texts and numbers always encode
	dst = append(dst, NoteMark)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(body)))
	return append(dst, body...)
}

// ReadNote reads a note after its NoteMark.
func ReadNote(r io.Reader) (*Note, error) {
	n := new(Note)
	if err := readLater(r, "note", n); err != nil {
		return nil, err
	}
	if n.Code == "" {
		return nil, protocolError("the note has no code")
	}
	return n, nil
}

// readLater reads what follows the mark of a note or notice: a length and a JSON object.
func readLater(r io.Reader, what string, into any) error {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return fmt.Errorf("wire: read the %s: %w", what, unexpected(err))
	}
	bytes := binary.LittleEndian.Uint32(length[:])
	if bytes < bodyBytesMin || bytes > NoticeBytesMax {
		return protocolError("the %s has %d bytes; it may have %d to %d", what, bytes, bodyBytesMin, NoticeBytesMax)
	}
	body, err := readBody(r, nil, int(bytes))
	if err != nil {
		return fmt.Errorf("wire: read the %s: %w", what, unexpected(err))
	}
	if err := json.Unmarshal(body, into); err != nil {
		return protocolError("the %s: %w", what, err)
	}
	return nil
}
