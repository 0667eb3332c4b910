package client

import (
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkPush sends samples to a peer that only acks them, without a session and with one, which keeps a copy of each (in a window
// that is larger than the cache, and in the one that a daemon gives), beside plain
// writes of 256 KiB on a bare connection to a peer that only reads: the ratio of the rates is what a Producer costs.
func BenchmarkPush(b *testing.B) {
	for _, size := range []int{64, 1 << 10, 16 << 10, 256 << 10, 4 << 20} {
		b.Run(fmt.Sprintf("producer/%d", size), func(b *testing.B) { benchPush(b, "", size, 32<<20) })
		b.Run(fmt.Sprintf("session/%d", size), func(b *testing.B) { benchPush(b, "s", size, 32<<20) })
		b.Run(fmt.Sprintf("session, default window/%d", size), func(b *testing.B) { benchPush(b, "s", size, max(1<<20, 2*int64(size))) })
	}
	b.Run("bare/262144", func(b *testing.B) {
		addr := benchListen(b, func(conn net.Conn) {
			for buf := make([]byte, 1<<20); ; {
				if _, err := conn.Read(buf); err != nil {
					return
				}
			}
		})
		conn, err := net.Dial("tcp", addr[len("tcp://"):])
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		data := make([]byte, DefaultBufferBytes)
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if _, err := conn.Write(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func benchPush(b *testing.B, session string, size int, windowBytes int64) {
	s := specOf(b, fmt.Sprintf("a:U8[%d]", size))
	addr := benchListen(b, func(conn net.Conn) {
		acceptPush(b, options{windowSamples: 1 << 16, windowBytes: windowBytes}, conn, discardAndAck)
	})
	p, err := Dial(b.Context(), addr, Config{Table: "t", Spec: s, Session: session})
	if err != nil {
		b.Fatal(err)
	}
	sample := make([]byte, size)
	b.SetBytes(int64(size))
	for b.Loop() {
		if err := p.Push(b.Context(), sample); err != nil {
			b.Fatal(err)
		}
	}
	if err := p.Close(b.Context()); err != nil {
		b.Fatal(err)
	}
}

func benchListen(b *testing.B, serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		serve(conn)
		io.Copy(io.Discard, conn)
	}()
	b.Cleanup(func() { l.Close() })
	return "tcp://" + l.Addr().String()
}
