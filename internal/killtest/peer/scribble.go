//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/wire"
)

// scribbler is a peer written from the docs of the protocol that keeps no rule: it writes random words into its channel, and tries to write all else that it maps.
type scribbler struct {
	*options
	conn    *net.UnixConn
	fds     []int
	channel []byte
	segment []byte
}

// scribble attaches as role, does its worst for a moment, and begins anew.
func (o *options) scribble(ctx context.Context, role wire.Role) error {
	for ctx.Err() == nil {
		s := &scribbler{options: o}
		err := s.attach(role)
		if err == nil {
			err = s.spoil(ctx, role)
			if err == nil {
				fmt.Println("spoiled")
			}
		}
		s.close()
		if err := comeback(err); err != nil {
			return err
		}
		wait(ctx, again)
	}
	return nil
}

func (s *scribbler) attach(role wire.Role) (err error) {
	if s.conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: strings.TrimPrefix(s.addr, "unix://")}); err != nil {
		return err
	}
	if err := s.conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if err := wire.WriteHello(s.conn, &wire.Hello{Role: role, Table: s.table, Group: s.group, Prefetch: 2, Client: "scribbler"}); err != nil {
		return err
	}
	var first [1]byte
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := s.conn.ReadMsgUnix(first[:], oob)
	if err != nil || n == 0 {
		return errors.Join(io.ErrUnexpectedEOF, err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return err
		}
		s.fds = append(s.fds, fds...)
	}
	reply := io.MultiReader(strings.NewReader(string(first[:])), s.conn)
	var channelBytes, segmentBytes int64
	if role == wire.RoleFill {
		var a wire.AcceptedFill
		err = wire.ReadReply(reply, &a)
		channelBytes, segmentBytes = a.ChannelBytes, a.SegmentBytes
	} else {
		var a wire.AcceptedTrain
		err = wire.ReadReply(reply, &a)
		channelBytes, segmentBytes = a.ChannelBytes, a.SegmentBytes
	}
	if err != nil {
		return err
	}
	if len(s.fds) != 4 {
		return broken("%d descriptors came with the reply", len(s.fds))
	}
	if s.channel, err = unix.Mmap(s.fds[1], 0, int(channelBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	s.segment, err = unix.Mmap(s.fds[0], 0, int(segmentBytes), unix.PROT_READ, unix.MAP_SHARED)
	return err
}

// spoil writes for a moment, or until it is cut off.
func (s *scribbler) spoil(ctx context.Context, role wire.Role) error {
	if role == wire.RoleTrain {
		if err := s.mustNotWrite(); err != nil {
			return err
		}
	}
	words := len(s.channel) / 8
	for range 1 + s.rnd.IntN(300) {
		if ctx.Err() != nil {
			break
		}
		at := 8 * s.rnd.IntN(words)
		if s.rnd.IntN(3) == 0 { // the cursors and flags more often than the rest
			deliver, giveback := int(binary.NativeEndian.Uint64(s.channel[16:])), int(binary.NativeEndian.Uint64(s.channel[24:]))
			if at = []int{deliver, giveback}[s.rnd.IntN(2)] + 64*s.rnd.IntN(4); at < 0 || at > len(s.channel)-8 {
				continue
			}
		}
		word := s.rnd.Uint64() >> s.rnd.IntN(64)
		if role == wire.RoleFill && word>>32 == 1 {
			word |= 1 << 33 // all but "rows complete": what lies in those rows would be its sample by right, and trainers would find it torn
		}
		binary.NativeEndian.PutUint64(s.channel[at:], word)
		if s.rnd.IntN(4) == 0 {
			one := []byte{1, 0, 0, 0, 0, 0, 0, 0}
			_, _ = unix.Write(s.fds[3], one)
			_, _ = unix.Write(s.fds[2], one)
		}
	}
	if s.rnd.IntN(8) == 0 {
		_, _ = s.conn.Write([]byte{byte(s.rnd.Uint32())})
	}
	_ = s.conn.SetReadDeadline(time.Now().Add(time.Duration(s.rnd.IntN(5)) * time.Millisecond))
	_, _ = io.ReadAll(s.conn) // what it is told, if anything
	return nil
}

// mustNotWrite tries each way to get at the segment.
func (s *scribbler) mustNotWrite() error {
	if m, err := unix.Mmap(s.fds[0], 0, len(s.segment), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		_ = unix.Munmap(m)
		return broken("a trainer can map the segment writable")
	}
	if err := unix.Mprotect(s.segment, unix.PROT_READ|unix.PROT_WRITE); err == nil {
		return broken("a trainer can make its mapping of the segment writable")
	}
	if _, err := unix.Pwrite(s.fds[0], []byte{1}, 0); err == nil {
		return broken("a trainer can write to the segment's descriptor")
	}
	if err := unix.Ftruncate(s.fds[0], 0); err == nil {
		return broken("a trainer can cut the segment short")
	}
	if err := unix.Ftruncate(s.fds[1], 0); err == nil {
		return broken("a peer can cut its channel short")
	}
	return nil
}

func (s *scribbler) close() {
	if s.conn != nil {
		_ = s.conn.Close()
	}
	for _, m := range [][]byte{s.channel, s.segment} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	for _, fd := range s.fds {
		_ = os.NewFile(uintptr(fd), "").Close()
	}
}
