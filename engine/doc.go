// Package engine puts a table together: spec, ring, streams and sampler, in one process and without any socket. The daemon is tables
// with listeners before them; a trainer that wants none embeds one (see the example):
//
//	pool := drainer.NewPool(1)                // go pool.Run(ctx): commits what is pushed
//	table, err := engine.New(engine.Config{Name: ..., Spec: ..., BatchSize: ..., Batches: ..., Drainers: pool})
//	                                          // go table.Run(ctx) if it has a Linger
//	stream, err := table.OpenStream(ctx, engine.StreamConfig{})
//	                                          // a producer: Reserve, fill Column in place, Push; Close at its end
//	trainer := table.NewTrainer()             // Next, read the columns in place, Release
//	err = table.Close(ctx)                    // when the streams are closed; then stop the pool, then Free
//
// Bytes: the segment is the table's, from the heap or wherever Config.Memory takes it, until Free. A run of slots belongs to whoever reserved it until
// Push, a batch to whoever got it until Release.
//
// A Table's methods may be called from any goroutine. A stream belongs to one goroutine, and so does a trainer's Next. Close
// ends a table in order: no new streams, the open ones drained, the batch being filled published short, then end of stream for the trainers. It
// needs the pool to run, as the streams do.
//
// A stream with a session goes on where the session's last one ended, also in a later process over kept memory: Stream.Held says with which sample. One stream
// has a session at a time; who opens it again waits for the one before, which StreamConfig.Taken tells.
//
// Trainers in one group share the batches, and every group gets them all; Config.Groups are there from the start. With Config.Recover a table goes on in a
// segment that an earlier process left, however that ended: what was committed and not released is offered again.
//
// With Config.Steps the samples are chunks of named tensors: a stream needs a manifest and a session, headers are checked (package steps), and a goroutine of
// Run announces in the ring who comes and goes; Close says the last of that.
//
// Errors: New says which part of the configuration cannot be. os.ErrClosed from OpenStream and Reserve after Close; *FullError, which names who holds the ring
// up, from a Reserve that ran out of time; io.EOF from Next after the last batch; the context's error, wrapped, from Close when streams are still open.
// Releasing a batch twice, or pushing to a closed stream, panics.
//
// Cost: one goroutine per open stream, which only waits for its end; nothing per sample or batch beyond what drainer, ring and sampler say.
// Proof: table_test.go, stream_test.go (sessions), recover_test.go, trainer_test.go, example_test.go, and every test of a transport.
package engine
