// Package engine puts a table together: spec, ring, streams and sampler, in one process and without any socket. The daemon is tables
// with listeners before them; a trainer that wants none embeds one (see the example):
//
//	pool := drainer.NewPool(1)                            // go pool.Run(ctx)
//	table, err := engine.New(engine.Config{...})          // go table.Run(ctx)
//	stream, err := table.OpenStream()                     // reserve, fill in place, push
//	batch, err := table.Sampler().Next(ctx, seat)         // and Release
//
// A Table's methods may be called from any goroutine. Streams belong to one goroutine each, batches to whoever leased them. Close
// ends a table in order: no new streams, the open ones drained, the batch being filled published short, then end of stream for the trainers.
package engine
