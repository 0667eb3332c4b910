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
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, fmt.Errorf("wire: read the closing notice: %w", unexpected(err))
	}
	bytes := binary.LittleEndian.Uint32(length[:])
	if bytes < bodyBytesMin || bytes > NoticeBytesMax {
		return nil, protocolError("the closing notice has %d bytes; it may have %d to %d", bytes, bodyBytesMin, NoticeBytesMax)
	}
	body, err := readBody(r, int(bytes))
	if err != nil {
		return nil, fmt.Errorf("wire: read the closing notice: %w", unexpected(err))
	}
	n := new(Notice)
	if err := json.Unmarshal(body, n); err != nil {
		return nil, protocolError("the closing notice: %w", err)
	}
	if n.Code == "" {
		return nil, protocolError("the closing notice has no code")
	}
	return n, nil
}
