package client

import (
	"reflect"

	"github.com/ingestd/ingestd/spec"
)

// Element is what View can show a column as. Floats of 16 and 8 bits, which Go does not have, and BOOL show as unsigned bits.
type Element interface {
	uint8 | int8 | uint16 | int16 | uint32 | int32 | float32 | uint64 | int64 | float64
}

var elements = map[reflect.Kind][]spec.DType{
	reflect.Uint8: {spec.U8, spec.BOOL, spec.F8_E4M3, spec.F8_E5M2}, reflect.Int8: {spec.I8},
	reflect.Uint16: {spec.U16, spec.F16, spec.BF16}, reflect.Int16: {spec.I16},
	reflect.Uint32: {spec.U32}, reflect.Int32: {spec.I32}, reflect.Float32: {spec.F32},
	reflect.Uint64: {spec.U64}, reflect.Int64: {spec.I64}, reflect.Float64: {spec.F64},
}
