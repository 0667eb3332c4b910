// Package reduce adds encoded gradients into float32 arrays. It is what a reader of steps spends its time in, so there are two builds of every kernel: AVX2
// and F16C instructions on amd64 machines that have them, and plain Go for all others. Both give the same bits, also for infinities, subnormals and NaN.
//
// The formats, and the order in which producers are summed, are in docs/tensors.md. Where bytes come from, and whether they are whole, is the
// caller's matter.
//
// Arithmetic: every element is decoded to float32, which is exact but for the scale of the 8-bit formats (one multiplication, rounded to nearest even), and added
// with one rounding to nearest even. There is no fused multiply-add and no other order than the one given: Sum of a, b, c is (a + b) + c for each element.
// A sum that is NaN is the accumulator's NaN if that was one, else the other's, made quiet; infinities that cancel give FFC00000. So a sum has the same bits on
// every machine.
//
// Ownership: nothing is kept, nothing is allocated. Destination and sources may be unaligned; they may not overlap, unless they are the same.
// Functions may be called from any goroutine.
//
// Errors: AddSparse and CheckSparse return *IndexError for an index beyond the array. A source whose length is not that of the destination panics, since who calls has
// checked what came from elsewhere.
//
// Cost: Sum reads each source once and writes the destination once, whatever the number of sources; Add reads both and writes one. Give blocks
// that stay in the second-level cache when several passes are to be made. Benchmarks show each kernel beside a plain loop.
//
// Proof: reduce_test.go compares both builds bit by bit on random, short, unaligned and special input, and with tables and arithmetic written down independently.
package reduce
