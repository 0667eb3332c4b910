// Package sendfile writes to peers, from this process's memory and from that of a memfd, and gives up on those that take nothing.
//
// It leaves to its callers what is sent, and who may change the memory meanwhile: what File has written is not copied, so that the pages of the file are read
// again whenever the kernel sends them. They belong to the peer until it says that it has them, or its connection is gone (Abort, ResetAtEnd).
//
// A Sender is used by one goroutine. What the context's end does is the caller's: it must set a write deadline in the past (context.AfterFunc), and Sender sees to it
// that none it sets later undoes that.
//
// Errors are those of the connection; os.ErrDeadlineExceeded when the peer took nothing for Stall, or the context ended. Cost: one system call per write that
// does not wait, one more and a timer each eighth of Stall; no allocation, but for the first File of a connection. Proof: sendfile_test.go; packages weights and remote.
package sendfile
