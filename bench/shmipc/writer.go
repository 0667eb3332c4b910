package main

import (
	"fmt"
	"os"
	"sync/atomic"

	"github.com/cloudwego/shmipc-go"
)

// writer hands samples over as fast as the reader releases them.
type writer struct {
	peer
	opt      options
	room     uint64 // most samples that are written and not released
	released *atomic.Uint64
}

func runWriter(opt options) error {
	released, err := mapCounter(opt.counter)
	if err != nil {
		return err
	}
	cfg, samples := opt.config()
	if samples <= opt.batch {
		return fmt.Errorf("the library's memory holds %d samples of %d bytes: too few for batches of %d", samples, opt.sampleBytes, opt.batch)
	}
	manager := shmipc.DefaultSessionManagerConfig()
	manager.Config, manager.Network, manager.Address = cfg, "unix", opt.socket
	sessions, err := shmipc.NewSessionManager(manager)
	if err != nil {
		return fmt.Errorf("connect to the reader: %w", err)
	}
	stream, err := sessions.GetStream()
	if err != nil {
		return fmt.Errorf("open a stream: %w", err)
	}
	w := &writer{opt: opt, room: uint64(samples), released: released}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.fail(w.write(stream))
	}()
	err = serveControl(os.Stdin, os.Stdout, &ready{WindowSamples: int64(samples)}, &w.peer)
	w.stopped.Store(true)
	<-ended
	return err
}

func (w *writer) write(stream *shmipc.Stream) error {
	buffer := stream.BufferWriter()
	for sent, released := uint64(0), uint64(0); !w.stopped.Load(); {
		for round := 0; sent+uint64(w.opt.batch) > released+w.room; round++ {
			if w.stopped.Load() {
				return nil
			}
			if round > 0 {
				pause(round)
			}
			released = w.released.Load()
		}
		for range w.opt.batch {
			if _, err := buffer.Reserve(w.opt.sampleBytes); err != nil {
				return fmt.Errorf("reserve a sample: %w", err)
			}
			if err := stream.Flush(false); err != nil {
				return fmt.Errorf("flush a sample: %w", err)
			}
			sent++
		}
		w.samples.Store(sent)
	}
	return nil
}
