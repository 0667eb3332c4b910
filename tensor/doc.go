// Package tensor says how named tensors travel: manifests, chunks, encodings (docs/tensors.md).
//
// A Manifest says which tensors a stream has and where they lie in the flat bytes of one step or generation. A Header stands before each chunk of these bytes; Check and CheckData
// say whether a chunk may be used. A Cutter cuts a producer's tensors into chunks; a Coverage tells a reader which bytes of a transaction have come. Encode, Decode and Feedback
// narrow elements and widen them. Who sends chunks, over what, and what is done with them is left to others: client, ingest, weights; adding gradients up is package reduce's.
//
// Ownership: a Manifest is immutable, holds no caller's memory, and its tensors' shapes must not be changed. A Cutter borrows what is put until the caller knows that it was
// received, and hands out slices of it; its own memory, also handed out, stays until the next Begin. Coverage keeps no memory of others.
//
// Goroutines: a Manifest may be used from any; a Cutter, a Coverage and a Feedback belong to one at a time.
//
// Errors: NewManifest and ParseManifest say which tensor breaks which rule. *ChunkError is a peer's fault and names tensor and place. *PlaceError and *IncompleteError are a
// producer's. Nothing from a peer panics; a chunk size of ours that is not legal does, and so does the number of a tensor that the manifest has not.
//
// Cost: a header is one sum of 60 bytes; a chunk one sum of its data (hardware; BenchmarkCRC) and a search among the chunks that came before, or one comparison where they come in
// order. Neither Cutter nor Coverage allocates once it has seen a transaction of the same size.
//
// Proof: header_test.go (every field, both sides of every rule, every damaged byte), manifest_test.go, diff in TestDiffManifests, coverage_test.go (against a plain map of
// blocks), cutter_test.go (random parts, in any order, read back by a checking reader), encode_test.go (every code of every format, every tie), doc_test.go (the examples of
// docs/tensors.md), and the fuzz targets beside them.
package tensor
