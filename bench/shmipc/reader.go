package main

import (
	"fmt"
	"net"
	"os"
	"sync/atomic"

	"github.com/cloudwego/shmipc-go"
)

// reader takes samples in place and releases them.
type reader struct {
	peer
	opt      options
	released *atomic.Uint64
	listener *net.UnixListener
}

func runReader(opt options) error {
	released, err := mapCounter(opt.counter)
	if err != nil {
		return err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: opt.socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen for the writer: %w", err)
	}
	defer listener.Close()
	r := &reader{opt: opt, released: released, listener: listener}
	go func() { r.fail(r.read()) }()
	defer r.stopped.Store(true)
	return serveControl(os.Stdin, os.Stdout, &ready{Address: opt.socket}, &r.peer)
}

// read returns with an error when the writer goes away, which nobody asks for then.
func (r *reader) read() error {
	conn, err := r.listener.Accept()
	if err != nil {
		return fmt.Errorf("accept the writer: %w", err)
	}
	cfg, _ := r.opt.config()
	session, err := shmipc.Server(conn, cfg)
	if err != nil {
		return fmt.Errorf("answer the writer: %w", err)
	}
	stream, err := session.AcceptStream()
	if err != nil {
		return fmt.Errorf("accept the writer's stream: %w", err)
	}
	buffer := stream.BufferReader()
	for n := uint64(0); ; {
		for range r.opt.batch {
			if _, err := buffer.ReadBytes(r.opt.sampleBytes); err != nil {
				return fmt.Errorf("read a sample: %w", err)
			}
			n++
		}
		buffer.ReleasePreviousRead()
		r.samples.Store(n)
		// The library keeps the buffer that was read last until the next one is read.
		r.released.Store(n - 1)
	}
}
