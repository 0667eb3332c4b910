// Package spec says what one sample is: its ordered leaves with names, dtypes and shapes.
//
// It parses and prints specs as JSON and as a short text form, gives each a stable fingerprint, and
// names the leaves in which two specs differ. What is done with the bytes of a sample is left to its
// users: wire sends specs, ring lays columns out by them, client checks lengths by them.
//
// Ownership: a Spec is immutable and holds no caller's memory: New copies. Leaf returns a Leaf whose
// Shape is shared with the Spec and must not be changed; Leaves returns a deep copy.
//
// Goroutines: every function and method may be called from any goroutine at any time, but for
// UnmarshalJSON, which fills a Spec that nobody else uses yet.
//
// Errors: New and the parsers refuse whatever the limits below do not allow, with the leaf and what
// to do. Check returns *MismatchError. Nothing panics on input; Leaf and Offset panic on an index out
// of range, as a slice does.
//
// Cost: nothing here runs per sample. Parsing stops at the first thing that breaks a limit, so memory
// is bounded by a small multiple of TextBytesMax whatever the input is.
//
// Proof: spec_test.go (both sides of every limit), text_test.go and json_test.go (round trips and
// refusals), fingerprint_test.go (a fingerprint computed by hand from the documented encoding),
// diff_test.go, and the spec targets in fuzz.
package spec
