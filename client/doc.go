// Package client is the Go library for the two ends of ingestd: Producer pushes samples to a daemon, Filler (Linux) writes them where
// trainers read them, and Trainer (Linux) maps a table's ring and reads whole batches from it. StepProducer and GradReader (Linux) do the same with gradients: named tensors, of
// which a reader gets whole steps or nothing.
//
// What a sample is, is left to spec; what tensors, chunks and encodings are, to tensor; adding them, to reduce; the bytes of the handshake to wire; mapping and descriptor passing to shm.
//
// Ownership: the slices given to Push and PushMany are the caller's again when the call returns, whatever it returns. A
// sample is taken when Push returns nil: then the Producer has written it or holds a copy. After an error it was not taken and
// may be pushed again. Taken is not acked: what Sent counts and Acked does not is lost when the Producer ends.
//
// Sessions: a Producer whose Config names a Session keeps a copy of every sample until its ack. When its connection breaks, or the
// daemon ends it for any reason but session_taken, it makes another, learns how many samples the daemon holds, and sends the rest again, in
// order: each sample gets into the ring once, also across restarts of a daemon that keeps its segments, if the acks are committed ones. It
// does so by itself, whether a call waits or not; Push goes on taking samples as long as the window has room. Before each try it pauses for a
// random part of a sixteenth of the outage so far, which is at least Config.ReconnectFrom (10 ms) and at most ReconnectTo (1 s), so that an
// outage of up to 1.6 s costs at most 100 ms more. When it had no connection for ReconnectFor (5 min) since the last ack it gives up,
// unless nothing is unacked: then it waits for the next Push and starts anew. A refusal ends it at once, except too_many_connections,
// shutting_down, handshake_timeout, banned and internal. A fresh process of an old session asks Held and pushes the samples after those.
//
// Fillers: Reserve gives slots in the daemon's own memory, which are the caller's until Commit or Abandon; no byte is copied. A committed sample is in
// the ring as soon as the daemon looks, whether this process lives on or not. With a session, a Filler attaches anew as a Producer connects anew, and
// copies what it had committed and the daemon does not hold out of the old memory, which it keeps mapped until then; slots that are open meanwhile are
// copied at their Commit. Its acks are always committed ones. One goroutine uses a Filler, and Abort, Committed, Held, Accepted and Stats are for any; it has
// two of its own, until Close or Abort: one watches the socket, one attaches anew and copies.
//
// Steps: a StepProducer sends chunks as the samples of a Producer with a session, or of a Filler. Pushed, the arrays of a transaction are borrowed from Put until Commit has returned nil, or
// Abort has returned: chunks are summed and written from where they lie, by the producer's goroutine, so that Put waits for nothing and Commit for the rest; after a
// reconnect they are written from there again, and all of the transaction is, from its beginning, where a daemon was started anew and has nothing of it. In place, Put copies a
// chunk into the ring, and waits for a place until Step's context ends, after which the transaction can only be aborted.
//
// GradReader: everything happens in its calls, which one goroutine makes. Step takes chunks, verifies headers and sums, keeps track of who is there, and holds the chunks of steps that were not released
// yet in the ring, or copies the oldest to the heap when it may hold no more, so that a step may be larger than the ring. It sums a part of the tensors as soon as all who are expected
// have it, always in the order of names, and anew if it turns out that others are complete; so sums repeat bit by bit whatever comes first. The memory of a GradStep is valid until its Release.
// Over a connection it is a Trainer that has batches sent to it: it holds half of what comes without an answer, so that the other half is on its way, and copies what is beyond that. Names of producers, which the
// segment has where it is mapped, it asks for, one by one and once, as it does for manifests, over connections of their own. Where the connection breaks, what is sent again is known by its numbers and not
// looked at twice; where the daemon has made its ring anew, complete steps stay, others are dropped, and their producers, who have no acks for them, send them again.
//
// Weights: a Publisher makes generations of named tensors visible, each whole or not at all, and a Subscription reads the newest one, which stays as it is until its Weights are
// released. Over a unix socket both use the daemon's own memory; over a connection a Publisher sends the caller's memory in chunks, borrowed until Commit returns, and a Subscription
// receives into memory of its own, verifies every sum before it shows anything, and makes another connection by itself when one breaks: a transfer goes on where it was. Its memory is that of
// two generations, and one more for each that callers hold, up to SubscribeConfig.Generations; when they hold all of it, it lets the daemon go and comes back when one is released. A Publisher
// whose connection broke makes another at the next Begin; what was under way is gone. A Subscription over a connection has one goroutine, until Close.
//
// Tokens: a client whose configuration has a Token proves to the daemon that it knows its secret, and the daemon proves the same to it first; the secret is never sent. A daemon that
// proves nothing (ErrNotChallenged), or something else (ErrDaemonUnproven), is final: no other connection is tried. So is a daemon whose certificate is not believed, or that does not take
// the client's: each try would be a failed handshake, and a few of them have the address banned. Nothing that prints a configuration or an error shows a secret.
//
// Trainers over connections: a Trainer of a tcp:// address has batches sent to it, into memory of its own for as many as it was granted, and connects anew by itself as a Producer
// does. A batch whose connection had ended when the last of it was here is dropped: the daemon offers it again, as it does with those that were not given out or not released. Release answers over the
// connection that the batch came by, and after that one's end says nothing. What callers hold stays whole. Such a Trainer has one goroutine, until Close.
//
// Goroutines: Push, PushMany, Flush and Close of one Producer are for one goroutine at a time. Abort, Sent, Acked,
// Held, Accepted and Stats may be called from any. Dial starts two goroutines, one that reads acks and reconnects, and one that writes
// what is left over when nobody pushes; Close and Abort end both.
//
// Errors, to be told apart with errors.Is and errors.As; each is only itself:
//
//	what happened            errors.Is                       errors.As              and then
//	deadline passed          os.ErrDeadlineExceeded                                 the call may be made again
//	... the ring being full  ErrFull, os.ErrDeadlineExceeded *FullError             it names the trainer that is waited for
//	... while reconnecting   os.ErrDeadlineExceeded          *ReconnectingError     it says what failed last
//	context cancelled        context.Canceled                                       the call may be made again
//	connection ended         ErrDaemonGone                                          the Producer has ended, also all below
//	daemon stops             ErrShuttingDown                 *wire.Notice, Refusal
//	session taken over       ErrSessionTaken                 *wire.Notice or none   do not dial again by yourself
//	daemon ended the stream                                  *wire.Notice
//	daemon refused                                           *wire.Refusal
//	daemon proved nothing    ErrNotChallenged                                       it has no tokens, or somebody is in between
//	daemon proved wrong      ErrDaemonUnproven                                      name or secret are wrong, or the daemon is
//	daemon not believed                                      *tls.CertificateVerificationError  its certificate, or what this client believes, is wrong
//	daemon refused TLS                                       *TLSRefusedError       it says what of this client's certificate is wrong
//	acked samples lost                                       *LostError             or Config.ContinueAfterLoss
//	step too old                                             *StepRefusedError      abort the transaction, go on with a newer step
//	step goes back                                           *StepOrderError        as if the call had not been made, also all below
//	no such tensor                                           *UnknownTensorError
//	wrong place in a tensor                                  *tensor.PlaceError
//	tensors are missing                                      *tensor.IncompleteError
//	no quorum in time        os.ErrDeadlineExceeded          *StepTimeoutError      it says who has the step, and why the others have not
//	Close or Abort           os.ErrClosed
//	not an ingestd daemon    wire.ErrProtocol
//
// A deadline is context.DeadlineExceeded too. With a session, the end of a connection and a stopping daemon are errors only once
// patience is out. Nothing panics on what a daemon sends.
//
// Cost: small samples are copied once into a send buffer and go many to one system call; large ones are written from the
// caller's memory with no copy. With a session both are copied once into the memory they are kept in and written from there: Push does not
// wait for acks, so the caller's memory will not do. In BenchmarkPush, in the window a daemon gives, that costs both ends together nothing
// that can be measured at 16 KiB and about a third more processor time from 256 KiB on, where there is no copy otherwise. In steady state a Push allocates nothing. Memory per Producer: two send buffers of at most
// Config.BufferBytes, and the rest of one sample when a context ends in the middle of writing it; with a session instead the bytes of the
// window (Stats.KeptBytes), which are at most Config.WindowBytes, or where that is 0, 64 MiB, and always room for one sample (two where it is 0).
//
// Proof: trainer_test.go (trainers that map and such as are sent to, alike), remote_test.go (byte for byte, cut after each byte, hostile daemons, patience),
// remote_ends_test.go (who leaves last, answers that are cut, daemons that break each connection), producer_test.go (delivery, both windows, coalescing, interruption half-way, over TCP and unix sockets),
// producer_alloc_test.go (no allocation), producer_errors_test.go (each error, and no other), producer_session_test.go (a model:
// random cuts of connections against a daemon that keeps the session, with and without loss), producer_reconnect_test.go (pauses,
// patience, takeover, loss), and the conformance suite of the transports. BenchmarkPush sets the rates beside bare writes. Of steps: step_test.go (a model: random tensors in random
// order, connections that end anywhere, daemons that forget), grad_model_test.go (a model of the reader: transactions given up, begun again, damaged, doubled, in any order of arrival, against sums
// made one by one), grad_test.go (each reason, each error, each byte of a chunk flipped, each limit), grad_daemon_test.go and grad_lives_test.go (against a daemon, over every way: deaths, restarts, latecomers,
// encodings, 10,000 tensors, a tensor larger than the ring).
package client
