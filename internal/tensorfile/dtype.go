package tensorfile

import (
	"fmt"
	"strings"

	"github.com/ingestd/ingestd/spec"
)

// descrOf is how numpy names each dtype. numpy itself has no BF16 and F8; ml_dtypes saves them as bytes without a meaning (void).
var descrOf = map[spec.DType]string{
	spec.BOOL: "|b1", spec.U8: "|u1", spec.I8: "|i1", spec.F8_E4M3: "|V1", spec.F8_E5M2: "|V1",
	spec.I16: "<i2", spec.U16: "<u2", spec.F16: "<f2", spec.BF16: "|V2",
	spec.I32: "<i4", spec.U32: "<u4", spec.F32: "<f4",
	spec.I64: "<i8", spec.U64: "<u8", spec.F64: "<f8",
}

var byDescr = func() map[string]spec.DType {
	m := map[string]spec.DType{}
	for d, descr := range descrOf {
		if descr[1] != 'V' {
			m[descr[1:]] = d
		}
	}
	return m
}()

// element is what a file says of one element of an array: a dtype, or only a size.
type element struct {
	dtype spec.DType // 0 when opaque
	bytes int64
}

// parseDescr reads a numpy type string such as <f4, or says why an array of it cannot be samples.
func parseDescr(descr string) (element, error) {
	if len(descr) < 2 {
		return element{}, formatErrorf("dtype %q is not known", cut(descr))
	}
	order, kind := descr[0], descr[1:]
	if strings.IndexByte("<>|=", order) < 0 {
		order, kind = '|', descr
	}
	if dtype, ok := byDescr[kind]; ok {
		if order == '>' && dtype.Bytes() > 1 {
			return element{}, formatErrorf("dtype %s is big-endian; samples are little-endian: save it with a.astype(a.dtype.newbyteorder('<'))", descr)
		}
		return element{dtype: dtype, bytes: dtype.Bytes()}, nil
	}
	switch kind[0] {
	case 'O':
		return element{}, formatErrorf("it holds Python objects (pickle), which are never read: save it as a plain numeric array")
	case 'c':
		return element{}, formatErrorf("dtype %s is complex: save it as real numbers with a last axis of 2, such as a.view('f4').reshape(*a.shape, 2)", descr)
	case 'S', 'U', 'a':
		return element{}, formatErrorf("dtype %s is text: save it as numbers", descr)
	case 'M', 'm':
		return element{}, formatErrorf("dtype %s is a time: save it as int64 with a.view('i8')", descr)
	case 'V':
		switch kind {
		case "V1":
			return element{bytes: 1}, nil
		case "V2":
			return element{bytes: 2}, nil
		}
		return element{}, formatErrorf("dtype %s is raw bytes of no known type: save it as numbers", descr)
	}
	return element{}, formatErrorf("dtype %s has no counterpart here; the dtypes are %v", cut(descr), spec.DTypes())
}

// FormatError says what in a file cannot be used, and what to do.
type FormatError struct {
	File   string // path, with the array's name where there is one
	Reason string
}

func (e *FormatError) Error() string {
	if e.File == "" {
		return e.Reason
	}
	return e.File + ": " + e.Reason
}

func formatErrorf(format string, args ...any) error {
	return &FormatError{Reason: fmt.Sprintf(format, args...)}
}

// cut keeps hostile text from filling a terminal.
func cut(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
