// Package tensor says how named tensors travel: manifests, chunks, encodings (docs/tensors.md).
package tensor
