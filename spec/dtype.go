package spec

import (
	"fmt"
	"strings"
)

// DType is the type of one element, named as in the safetensors format. The zero value is not legal.
type DType uint8

// The legal dtypes.
const (
	BOOL DType = iota + 1
	U8
	I8
	F8_E4M3
	F8_E5M2
	I16
	U16
	F16
	BF16
	I32
	U32
	F32
	I64
	U64
	F64
)

var dtypes = [...]struct {
	name  string
	bytes int64
}{
	BOOL: {"BOOL", 1}, U8: {"U8", 1}, I8: {"I8", 1}, F8_E4M3: {"F8_E4M3", 1}, F8_E5M2: {"F8_E5M2", 1},
	I16: {"I16", 2}, U16: {"U16", 2}, F16: {"F16", 2}, BF16: {"BF16", 2},
	I32: {"I32", 4}, U32: {"U32", 4}, F32: {"F32", 4},
	I64: {"I64", 8}, U64: {"U64", 8}, F64: {"F64", 8},
}

const dtypeNames = "BOOL, U8, I8, F8_E4M3, F8_E5M2, I16, U16, F16, BF16, I32, U32, F32, I64, U64 and F64"

var byName = func() map[string]DType {
	m := make(map[string]DType, len(dtypes))
	for d := BOOL; d <= F64; d++ {
		m[dtypes[d].name] = d
	}
	return m
}()

// DTypes returns every legal dtype.
func DTypes() []DType {
	var all []DType
	for d := BOOL; d <= F64; d++ {
		all = append(all, d)
	}
	return all
}

// ParseDType returns the dtype of that name. For names that other libraries use, such as float32, the
// error says which one is meant.
func ParseDType(name string) (DType, error) {
	if d, ok := byName[name]; ok {
		return d, nil
	}
	if d, ok := meant(name); ok {
		return 0, fmt.Errorf("dtype %s is written %v here", quoteShort(name), d)
	}
	return 0, fmt.Errorf("dtype %s is not known; the dtypes are %s", quoteShort(name), dtypeNames)
}

// meant guesses which dtype a name of numpy, torch or plain C stands for.
func meant(name string) (DType, bool) {
	if len(name) > 32 {
		return 0, false
	}
	lower := strings.ToLower(name)
	if i := strings.LastIndexByte(lower, '.'); i >= 0 {
		lower = lower[i+1:]
	}
	switch lower {
	case "bool_":
		return BOOL, true
	case "bfloat16":
		return BF16, true
	case "half":
		return F16, true
	case "float", "single":
		return F32, true
	case "double":
		return F64, true
	case "float8_e4m3fn", "float8_e4m3":
		return F8_E4M3, true
	case "float8_e5m2":
		return F8_E5M2, true
	}
	for _, long := range [...][2]string{{"float", "F"}, {"uint", "U"}, {"int", "I"}} {
		if bits, ok := strings.CutPrefix(lower, long[0]); ok {
			d, ok := byName[long[1]+bits]
			return d, ok
		}
	}
	d, ok := byName[strings.ToUpper(lower)]
	return d, ok
}

// String returns the name, such as F32.
func (d DType) String() string {
	if !d.legal() {
		return fmt.Sprintf("DType(%d)", uint8(d))
	}
	return dtypes[d].name
}

// Bytes is the size of one element, 0 for a value that is not a dtype.
func (d DType) Bytes() int64 {
	if !d.legal() {
		return 0
	}
	return dtypes[d].bytes
}

func (d DType) legal() bool { return d >= BOOL && d <= F64 }

// quoteShort quotes s for an error, cut so that hostile input cannot fill a log.
func quoteShort(s string) string {
	const most = 160
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
