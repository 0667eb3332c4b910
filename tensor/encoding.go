package tensor

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/ingestd/ingestd/internal/strictjson"
	"github.com/ingestd/ingestd/spec"
)

// EncodingKind is how the elements of a tensor are stored.
type EncodingKind uint8

// The encodings; all but Raw are for F32 only.
const (
	Raw    EncodingKind = iota // as the dtype says
	BF16                       // 2 bytes per element
	F16                        // 2 bytes per element
	F8E4M3                     // ScaleBytes, then 1 byte per element
	F8E5M2                     // ScaleBytes, then 1 byte per element
	TopK                       // K pairs of u32 index and F32 value
)

// ScaleBytes is what comes before the elements of an 8-bit encoding: an F32 scale, then zeros.
const ScaleBytes = 256

// PairBytes is the size of one entry of a top-k encoding.
const PairBytes = 8

// NoIndex is the index of an entry of a top-k encoding that is not used.
const NoIndex = 1<<32 - 1

var encodingNames = [...]string{Raw: "", BF16: "bf16", F16: "f16", F8E4M3: "f8_e4m3", F8E5M2: "f8_e5m2"}

// Encoding says how the bytes of a tensor come from its elements (docs/tensors.md, "Encodings").
type Encoding struct {
	Kind EncodingKind
	K    int // TopK only: how many entries
}

// ParseEncoding reads the form of a manifest, such as bf16 or topk:100. The empty string is Raw.
func ParseEncoding(text string) (Encoding, error) {
	for kind, name := range encodingNames {
		if name == text {
			return Encoding{Kind: EncodingKind(kind)}, nil
		}
	}
	if digits, ok := strings.CutPrefix(text, "topk:"); ok {
		k, err := strconv.Atoi(digits)
		if err != nil || k < 1 || strconv.Itoa(k) != digits {
			return Encoding{}, fmt.Errorf("encoding %s: topk must be followed by the number of entries, such as topk:1000", strictjson.Quote(text))
		}
		return Encoding{Kind: TopK, K: k}, nil
	}
	return Encoding{}, fmt.Errorf("encoding %s is not known; the encodings are bf16, f16, f8_e4m3, f8_e5m2 and topk:K", strictjson.Quote(text))
}

// String is the form of a manifest, empty for Raw.
func (e Encoding) String() string {
	switch {
	case e.Kind == TopK:
		return "topk:" + strconv.Itoa(e.K)
	case int(e.Kind) < len(encodingNames):
		return encodingNames[e.Kind]
	}
	return fmt.Sprintf("EncodingKind(%d)", uint8(e.Kind))
}

// bytes is the encoded size of so many elements, at most DataBytesMax each and in all.
func (e Encoding) bytes(dtype spec.DType, elements int64) (int64, error) {
	if e.Kind != TopK && e.K != 0 {
		return 0, fmt.Errorf("only topk has a K, and here it is %d", e.K)
	}
	if e.Kind != Raw && dtype != spec.F32 {
		return 0, fmt.Errorf("encoding %v is for F32 only, not %v", e, dtype)
	}
	size, fixed := int64(2), int64(0)
	switch e.Kind {
	case Raw:
		size = dtype.Bytes()
	case BF16, F16:
	case F8E4M3, F8E5M2:
		size, fixed = 1, ScaleBytes
	case TopK:
		switch {
		case e.K < 1 || int64(e.K) > elements:
			return 0, fmt.Errorf("encoding %v of %d elements: K must be at least 1 and at most the number of elements", e, elements)
		case elements >= NoIndex:
			return 0, fmt.Errorf("encoding %v of %d elements: topk is for less than %d", e, elements, int64(NoIndex))
		}
		return int64(e.K) * PairBytes, nil
	default:
		return 0, fmt.Errorf("%v is not an encoding", e)
	}
	switch {
	case elements == 0:
		return 0, nil
	case elements > (DataBytesMax-fixed)/size:
		return 0, fmt.Errorf("it is larger than all tensors together may be (%d bytes)", int64(DataBytesMax))
	}
	return fixed + elements*size, nil
}
