//go:build linux && !race

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// TestKilledUnderASlowTrainer: a daemon is killed whose socket holds whole batches for a trainer on a slow connection, and its successor gives their memory to other samples. The trainer
// gets none of them for the old ones.
func TestKilledUnderASlowTrainer(t *testing.T) {
	t.Parallel()
	large := table{"large", "x:U8[20000]", 2, 6} // sent from where it lies, and several batches fit into a socket
	const samples = 10
	dir, kept := t.TempDir(), t.TempDir()
	d := serveIn(t, dir, []table{large}, "--segment-dir", kept)
	run(t, exitOK, "push", "--addr", d.TCP, "--table", large.name, "--generate", "10", "--rate", "0")
	slow, prefetch := slowTrainer(t, strings.TrimPrefix(d.TCP, "tcp://"), large.name)
	d.await("all that it may hold is in its socket", func(s *status) bool {
		return len(s.Trainers) == 1 && s.Trainers[0].State == string(shm.StateAtLimit) && len(s.Trainers[0].Held) == prefetch
	})
	d.signal(syscall.SIGKILL)
	<-d.done
	d = serveIn(t, dir, []table{large}, "--segment-dir", kept)
	other, err := client.Attach(t.Context(), d.Unix, client.TrainerConfig{Table: large.name})
	check(t, err)
	for n := 0; n < samples; {
		b, err := other.Next(t.Context())
		check(t, err)
		n += b.Count()
		b.Release()
	}
	run(t, exitOK, "push", "--addr", d.TCP, "--table", large.name, "--generate", "10", "--rate", "0") // into the same places
	check(t, other.Close())

	s := large.layout(t)
	headers := wire.BatchReader{R: slow, Shape: wire.BatchShape{BatchSize: int64(large.batchSize), SampleBytes: s.SampleBytes(), Leaves: s.NumLeaves()}}
	for {
		var h wire.BatchHeader
		if err = headers.Next(&h); err != nil {
			break
		}
		payload := make([]byte, h.PayloadBytes)
		if _, err = io.ReadFull(slow, payload); err != nil {
			break
		}
		var own [wire.BatchOwnColumns][]uint64
		for i := range own {
			for range h.Count {
				own[i] = append(own[i], binary.LittleEndian.Uint64(payload))
				payload = payload[8:]
			}
		}
		row, _ := proof.CheckColumn(payload, s.Leaf(0), 0, own[0], own[1])
		if row >= 0 || own[1][0] != 2*h.Number {
			t.Errorf("batch %d came with samples %v of streams %v, row %d is torn", h.Number, own[1], own[0], row)
		}
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("at the end of the connection: %v", err)
	}
}

// slowTrainer attaches a trainer whose socket holds little, and that reads nothing. It returns how many batches it may hold, too.
func slowTrainer(t *testing.T, address, table string) (net.Conn, int) {
	t.Helper()
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var set error
		return errors.Join(raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) }), set)
	}}
	conn, err := dialer.DialContext(context.Background(), "tcp", address)
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	var accepted wire.AcceptedRemoteTrain
	check(t, wire.Greet(conn, conn, &wire.Hello{Role: wire.RoleTrain, Table: table, Prefetch: 3}, nil, &accepted))
	return conn, int(accepted.Prefetch)
}
