// Package safetensors reads and writes files of named tensors in the safetensors format: one file, or several with an index.
//
// Open maps files and checks all that their headers say before anything is used: every byte of the data belongs to exactly one tensor, whose length is that of its shape and
// dtype. Tensors come in the order in which they lie in their file, files in the order of their names. Write makes one file whose data starts on 64 bytes, all at once.
// How tensors travel is package tensor's business; encodings are for the way only, so Write refuses manifests that have one.
//
// Ownership: Data returns the mapped file, read-only: a write to it ends the process. It is valid until Close. A file that another process cuts short while it is mapped ends
// the process with SIGBUS when what is missing is read: replace files by renaming, as Write does. A File may be used from any goroutine, but for Close.
//
// Errors: *FormatError for what a file says that cannot be used, with the file; else those of the operating system. Nothing in a file panics, or takes more memory than a small
// multiple of its header, of which at most HeaderBytesMax bytes are read.
//
// Cost: one pass over the header; data is not touched. Proof: header_test.go (every refusal), file_test.go (files and shards), write_test.go (round trips), FuzzReadHeader.
//
// Format: https://huggingface.co/docs/safetensors.
package safetensors
