// Command shmipc is the shmipc-go baseline of `ingestd bench shm`: the two processes that hand samples over in place through
// github.com/cloudwego/shmipc-go, driven over the bench's control protocol. `make bench-shmipc` builds it as bin/shmipc-peer.
//
// It is a module of its own, so that the library stays out of ingestd's own dependencies. The writer reserves a sample's bytes in a buffer of shared
// memory, leaves them as they are and flushes; the reader takes the bytes in place, leaves them alone and releases them. That is the least the library can
// do for a sample.
//
// The library has no backpressure of its own that would do here: out of buffers it falls back to copying through its socket, and a full queue makes it
// sleep for 10 ms. So the reader counts what it has released in a word that both map, and the writer waits on that before it reserves more than there is. The word costs
// the library nothing. Limits: its memory is counted in 32 bits, so less than 4 GiB; one buffer holds at most that, and a list of buffers never
// gives out its last one.
//
// Errors end the process, or answer the parent's next request. Cost: the library's own, and an atomic word per few samples. Proof: TestPeers.
package main
