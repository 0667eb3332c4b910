// Package strictjson reads JSON of a known form: the caller says what comes next, and whatever else is there is refused with its place.
//
// It exists for texts that strangers send (manifests, headers of files) in which nothing may be ignored: unknown, repeated and missing fields, numbers with fraction or
// exponent, text that is not UTF-8, half surrogates and whatever follows the end are errors. Nothing is skipped unless the caller says so, so memory and time are bounded by the text's length,
// and nesting by what the caller asks for, or a limit where it skips.
//
// A Reader belongs to one goroutine and borrows the text; the strings it returns are copies. Errors are for a person and name a byte or a field; nothing panics on input.
// Cost: one pass; one allocation per string. Proof: strictjson_test.go, FuzzReader (against encoding/json).
//
// Source: RFC 8259.
package strictjson
