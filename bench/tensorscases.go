package bench

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// What a case of bench tensors measures.
const (
	kindGradients = "gradients" // producers to a reader that sums, through the daemon
	kindReduce    = "reduce"    // the sum of steps that are in the ring
	kindPublish   = "publish"   // weights in shared memory
	kindStream    = "stream"    // weights over TCP
	kindRemote    = "remote"    // batches of samples over TCP
	kindCRC       = "crc"       // CRC-32C alone
)

// tensorKind is how cases of a kind are measured, shown and judged.
type tensorKind struct {
	title   string
	measure func(*tensorRunner, context.Context, *TensorResult) error
	rows    []tensorRow
	targets func(*TensorResult) []Target
}

// tensorRow is a line of a table: a figure, what it is in words, and the figure that it is compared with.
type tensorRow struct {
	figure, words, to string
}

// TensorCase is one shape of load of bench tensors.
type TensorCase struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"`
	Bytes      int64  `json:"bytes"`             // of one producer's step, of one generation, or of the larger buffer
	Tensors    int    `json:"tensors,omitempty"` // that they are cut into, of equal size
	Peers      int    `json:"peers,omitempty"`   // producers, or readers
	ChunkBytes int64  `json:"chunk_bytes,omitempty"`
	RingBytes  int64  `json:"ring_bytes,omitempty"`
	HotBytes   int64  `json:"hot_bytes,omitempty"` // of the smaller buffer
}

// generationsKept is K of the tables of weights.
const generationsKept = 3

// kinds is a function, since the measuring functions lead back to it.
func (c *TensorCase) kind() tensorKind {
	switch c.Kind {
	case kindGradients:
		return gradientsKind()
	case kindReduce:
		return reduceKind()
	case kindPublish:
		return publishKind()
	case kindStream:
		return streamKind()
	case kindRemote:
		return remoteKind()
	case kindCRC:
		return crcKind()
	}
	panic("bench: no kind of case is called " + c.Kind)
}

// tensorCases are the cases of the targets. A reader may hold half of the ring: in gradients that is three steps, since a producer may
// be two ahead of another, and in reduce it is all that is to be summed.
func tensorCases() []TensorCase {
	return []TensorCase{
		{Name: "gradients", Kind: kindGradients, Bytes: 16 * mib, Tensors: 8, Peers: 4, ChunkBytes: mib, RingBytes: 384 * mib},
		{Name: "reduce", Kind: kindReduce, Bytes: 64 * mib, Tensors: 8, Peers: 8, ChunkBytes: mib, RingBytes: 1280 * mib},
		{Name: "publish", Kind: kindPublish, Bytes: 512 * mib, Tensors: 64, Peers: 4},
		{Name: "stream", Kind: kindStream, Bytes: 512 * mib, Tensors: 64, Peers: 1},
		{Name: "remote", Kind: kindRemote, Bytes: 256 * mib, Peers: 1, ChunkBytes: 4 * mib},
		{Name: "crc", Kind: kindCRC, Bytes: 64 * mib, HotBytes: 256 * kib},
	}
}

// smokeTensorCases run the same code in a few seconds, with rings so small that they wrap.
func smokeTensorCases() []TensorCase {
	return []TensorCase{
		{Name: "gradients", Kind: kindGradients, Bytes: 512 * kib, Tensors: 3, Peers: 4, ChunkBytes: 64 * kib, RingBytes: 2 * mib},
		{Name: "reduce", Kind: kindReduce, Bytes: 256 * kib, Tensors: 2, Peers: 3, ChunkBytes: 64 * kib, RingBytes: 4 * mib},
		{Name: "publish", Kind: kindPublish, Bytes: 2 * mib, Tensors: 5, Peers: 2},
		{Name: "stream", Kind: kindStream, Bytes: 2 * mib, Tensors: 5, Peers: 1},
		{Name: "remote", Kind: kindRemote, Bytes: 2 * mib, Peers: 1, ChunkBytes: 128 * kib},
		{Name: "crc", Kind: kindCRC, Bytes: 256 * kib, HotBytes: 16 * kib},
	}
}

// chooseTensorCases returns the cases that are named in filter (a comma-separated list), or all when it is empty.
func chooseTensorCases(cases []TensorCase, filter string) ([]TensorCase, error) {
	if filter == "" {
		return cases, nil
	}
	var chosen []TensorCase
	for name := range strings.SplitSeq(filter, ",") {
		i := slices.IndexFunc(cases, func(c TensorCase) bool { return strings.EqualFold(c.Name, strings.TrimSpace(name)) })
		if i < 0 {
			return nil, fmt.Errorf("no case is called %q: choose from %s", name, tensorCaseNames(cases))
		}
		chosen = append(chosen, cases[i])
	}
	return chosen, nil
}

func tensorCaseNames(cases []TensorCase) string {
	names := make([]string, len(cases))
	for i, c := range cases {
		names[i] = c.Name
	}
	return strings.Join(names, ", ")
}
