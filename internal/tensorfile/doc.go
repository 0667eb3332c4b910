// Package tensorfile reads samples from the files people have them in: .npy, .npz and .safetensors whose first axis is the sample axis, and raw bytes.
// It writes .npz files, too.
//
// A Source is read in chunks of bounded size; no file is ever read whole, and nothing is mapped, so that a file cut short meanwhile is an error and not a
// SIGBUS. What the samples are for, and who pushes them, is the caller's business.
//
// The bytes of a Chunk belong to the Source and are valid until its next Next or Close. A Source belongs to one goroutine.
//
// Errors: *FormatError for whatever the file says that cannot be used, with what to do; nothing in a file makes this package panic, or allocate more than the
// stated limits (HeaderBytesMax and safetensors.HeaderBytesMax for the text in a file, ChunkBytes or one sample for the data). There is no pickle: object arrays are refused.
//
// Cost: one read per leaf and chunk. Proof: npy_test.go and source_test.go (every format, damaged files, round trips), FuzzOpen.
//
// Formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html and https://huggingface.co/docs/safetensors.
package tensorfile
