package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/tensor"
)

// sendfileOptions are the flags of the two processes of the bare sendfile loop.
type sendfileOptions struct {
	bytes   int64
	address string // where the sender is; "" for the sender itself
	write   bool   // send with write()
}

// sendfileCallBytes is the most that one sendfile moves, and sendfileReadBytes the most of one read on the other side: the sizes at which these calls cost
// the least on the 2-core guest where the targets were set.
const (
	sendfileCallBytes = 4 * mib
	sendfileReadBytes = 256 * kib
)

func sendfileCommand() *cobra.Command {
	var opt sendfileOptions
	cmd := &cobra.Command{
		Use:    "_sendfile",
		Short:  "One side of the bare sendfile loop of bench tensors; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opt.address != "" {
				return runSendfileReceiver(cmd.Context(), opt)
			}
			return runSendfileSender(cmd.Context(), opt)
		},
	}
	f := cmd.Flags()
	f.Int64Var(&opt.bytes, "bytes", mib, "bytes of one transfer")
	f.StringVar(&opt.address, "address", "", "receive from here: host:port; without it send")
	f.BoolVar(&opt.write, "write", false, "send with write() from a mapping, not with sendfile")
	return cmd
}

// runSendfileSender answers every byte of its one connection with the whole of a memfd.
func runSendfileSender(ctx context.Context, opt sendfileOptions) error {
	file, err := newSharedFile("ingestd bench weights", opt.bytes)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := fillFile(file, opt.bytes); err != nil {
		return err
	}
	send := sendBySendfile(file)
	if opt.write {
		mapped, err := unix.Mmap(int(file.Fd()), 0, int(opt.bytes), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("map %d bytes for the write loop: %w", opt.bytes, err)
		}
		send = sendByWrite(mapped)
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	listener, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for the sendfile loop: %w", err)
	}
	defer listener.Close()
	go func() {
		if err := serveTransfers(listener, send, opt.bytes); err != nil {
			fmt.Fprintln(os.Stderr, "sendfile loop:", err)
		}
	}()
	return serveControl(os.Stdin, os.Stdout, &ready{Address: listener.Addr().String()}, func(ask request) (reply, error) {
		return reply{}, unknownRequest(ask)
	})
}

// fillFile writes the same pattern over all of it, so that every page is there.
func fillFile(file *os.File, size int64) error {
	pattern := newPattern(patternBytes)
	for at := int64(0); at < size; at += patternBytes {
		if _, err := file.WriteAt(pattern[:min(patternBytes, size-at)], at); err != nil {
			return fmt.Errorf("fill %s: %w", file.Name(), err)
		}
	}
	return nil
}

// senderCall is one system call that sends what comes at an offset, at most n bytes of it.
type senderCall func(socket int, offset, n int64) (int, error)

func sendBySendfile(file *os.File) senderCall {
	return func(socket int, offset, n int64) (int, error) {
		return unix.Sendfile(socket, int(file.Fd()), &offset, int(min(n, sendfileCallBytes)))
	}
}

func sendByWrite(mapped []byte) senderCall {
	return func(socket int, offset, n int64) (int, error) {
		return unix.Write(socket, mapped[offset:offset+min(n, senderWriteBytes)])
	}
}

func serveTransfers(listener net.Listener, send senderCall, size int64) error {
	conn, err := listener.Accept()
	if err != nil {
		return nil // closed: the end
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	for one := make([]byte, 1); ; {
		switch _, err := conn.Read(one); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		offset, failed := int64(0), error(nil)
		err := raw.Write(func(socket uintptr) bool {
			for offset < size {
				n, err := send(int(socket), offset, size-offset)
				switch err {
				case nil:
					offset += int64(n)
				case unix.EINTR:
				case unix.EAGAIN:
					return false
				default:
					failed = err
					return true
				}
			}
			return true
		})
		if err := errors.Join(err, failed); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
}

// sendfileReceiver reads transfers into memory of their size, the same every time.
type sendfileReceiver struct {
	conn   net.Conn
	memory []byte
}

func runSendfileReceiver(ctx context.Context, opt sendfileOptions) error {
	memory, err := newMemory(opt.bytes)
	if err != nil {
		return err
	}
	defer memory.Close()
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	conn, err := dialer.DialContext(ctx, "tcp", opt.address)
	if err != nil {
		return fmt.Errorf("connect to the sendfile loop: %w", err)
	}
	defer conn.Close()
	s := &sendfileReceiver{conn: conn, memory: memory.Bytes()[:opt.bytes]}
	return serveControl(os.Stdin, os.Stdout, &ready{}, s.handle)
}

func (s *sendfileReceiver) handle(ask request) (reply, error) {
	if ask.Do != doFetch && ask.Do != doFetchVerify {
		return reply{}, unknownRequest(ask)
	}
	took, err := s.fetch(ask.Do == doFetchVerify)
	if err != nil {
		return reply{}, err
	}
	return reply{Values: map[string]int64{valueTook: int64(took)}}, nil
}

// fetch asks for one transfer and reads it; with verify it sums what it reads, piece by piece, while that is in the cache.
func (s *sendfileReceiver) fetch(verify bool) (time.Duration, error) {
	begin := time.Now()
	if _, err := s.conn.Write([]byte{1}); err != nil {
		return 0, fmt.Errorf("ask for a transfer: %w", err)
	}
	sum := uint32(0)
	for at := 0; at < len(s.memory); {
		n, err := s.conn.Read(s.memory[at:min(at+sendfileReadBytes, len(s.memory))])
		if err != nil {
			return 0, fmt.Errorf("read byte %d of a transfer: %w", at, err)
		}
		if verify {
			sum = tensor.UpdateCRC(sum, s.memory[at:at+n])
		}
		at += n
	}
	took := time.Since(begin)
	if verify && sum != tensor.CRC(s.memory) {
		return 0, errors.New("what lies in memory has another sum than what was read")
	}
	return took, nil
}
