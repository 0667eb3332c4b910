// Package spsc is the one queue of the engine: bounded, one producer, one consumer, no locks. It comes in two forms, Queue between
// goroutines (any element type) and Producer and Consumer over shared bytes (16-byte descriptors) between processes.
//
// It leaves the bytes that descriptors speak of to ring, and memory, eventfds and the death of a peer to shm.
//
// Ownership: elements are copied in and out, so a slice passed to a call belongs to its caller again when the call returns. A Queue
// forgets elements that hold pointers as they are taken. The shared form keeps the memory it was given and never frees it.
//
// Goroutines: TryPush, Put, Push, PushSome and Close belong to one producer at a time, TryPop, Take and Pop to one consumer at a
// time; handing a side to another goroutine needs a synchronisation of the caller's, such as a channel. Len, Cap, Closed and
// NotifyPush are for anybody. Producer and Consumer are each one side. A Consumer takes in one step (TryPop) or in two (Peek, Done), where
// its count is a promise that must follow the work.
//
// Both sides keep a copy of the other's cursor and read the cursor itself only when the copy says that there is no room or nothing
// to take, so two busy sides seldom touch each other's cache line; a batch costs one publishing store whatever its length.
//
// Errors: os.ErrClosed from a Push into a closed queue, io.EOF from a Pop of a closed and empty one, the context's error, and
// *CorruptError when the other process has put an impossible value into its cursor: end that peer and nothing else. A capacity that
// is not a power of two between 2 and the limit panics in New, and is an error where it may come from a peer.
//
// Cost: no allocation but in New. Measured on 2 cores of an EPYC guest between two goroutines (twin_test.go prints the figures of
// the machine at hand): 2 ns per element in batches of 32 (16 times a Go channel), 11 ns for single elements (3 times).
//
// Proof: model_test.go (random operations against a plain slice), race_test.go (capacities 2 and 4 under the race detector),
// process_test.go (two processes over a memfd, and hostile cursors), alloc_test.go, twin_test.go (beside a channel and a mutex ring).
package spsc
