//go:build linux && !race

package remote

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

const pathVariable = "REMOTE_TEST_SEGMENT"

// killedText is a sample of which batches are sent from where they lie, and several of them fit into a socket.
const killedText = "a:U8[20000]"

// TestDaemonProcess is the daemon that TestKilled kills. It says where it listens, and when one trainer was sent all that it may hold.
func TestDaemonProcess(t *testing.T) {
	path := os.Getenv(pathVariable)
	if path == "" {
		t.Skip("it is another process of TestKilled, which starts it")
	}
	d := setup{network: "tcp", text: killedText, path: path}.start(t)
	d.push(batches - 1)
	fmt.Println(d.address)
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for range again.C {
		if all := d.seats.Stats().Trainers; len(all) == 1 && all[0].State == shm.StateAtLimit && len(all[0].Held) == all[0].Prefetch {
			fmt.Println("sent")
			break
		}
	}
	select {}
}

// TestKilled: of a daemon that is killed, a trainer that reads slowly gets no batch that its socket had taken and not sent: the memory of a segment that is kept may be others' by then.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "segment")
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDaemonProcess$")
	cmd.Env = append(os.Environ(), pathVariable+"="+path)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	defer cmd.Wait() //nolint:errcheck // it is killed
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("no daemon")
	}
	d := &daemon{t: t, network: "tcp", address: lines.Text()}
	d.spec = specOf(t, killedText)
	little := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var set error
		return errors.Join(raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) }), set)
	}}
	conn, err := little.DialContext(t.Context(), "tcp", d.address)
	check(t, err)
	defer conn.Close()
	var accepted wire.AcceptedRemoteTrain
	check(t, wire.Greet(conn, conn, &wire.Hello{Role: wire.RoleTrain, Table: "t", Prefetch: 3}, nil, &accepted))
	if !lines.Scan() || lines.Text() != "sent" || accepted.Prefetch < 2 {
		t.Fatalf("the daemon said %q, prefetch %d", lines.Text(), accepted.Prefetch)
	}
	check(t, cmd.Process.Kill())
	_ = cmd.Wait()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	check(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte{0xEE}, int(size)), 0) // as a successor's producers would
	check(t, err)
	headers := wire.BatchReader{R: conn, Shape: wire.BatchShape{BatchSize: rows, SampleBytes: d.spec.SampleBytes(), Leaves: d.spec.NumLeaves()}}
	for {
		var h wire.BatchHeader
		if err = headers.Next(&h); err != nil {
			break
		}
		payload := make([]byte, h.PayloadBytes)
		if _, err = io.ReadFull(conn, payload); err != nil {
			break
		}
		if n := bytes.Count(payload, []byte{0xEE}); n > len(payload)/128 { // some are its own
			t.Errorf("batch %d came whole, with %d bytes that are not its own", h.Number, n)
		}
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("at the end: %v", err)
	}
}
