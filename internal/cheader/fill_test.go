//go:build linux && !race

package cheader

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/internal/daemon"
)

func small(cfg *daemon.Config) { cfg.Tables[0].Batches = 6 }

// TestProducerToTrainer: both sides in C, the daemon between them, many times round a small ring, every byte checked.
func TestProducerToTrainer(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t, small)
		producer, trainer := start(t, b), start(t, b)
		trainer.ok("%s", d.options().attach())
		trainer.send("pull %d", patience)
		producer.ok("%s", d.options().open())
		total := 0
		for _, step := range []int{1, 5, 16, 1000} {
			producer.ok("produce 1003 %d %d", step, patience)
			producer.ok("settle %d", patience)
			total += 1003
			producer.ok("flush %d", patience)
			producer.want(strconv.Itoa(total), "held")
		}
		d.end()
		producer.send("produce 100000 16 %d", patience)
		producer.isError("shutting_down", "daemon=shutting_down", "produce")
		held, err := strconv.Atoi(producer.ok("held"))
		if err != nil || held < total {
			t.Fatalf("%d held, %v", held, err)
		}
		producer.ok("close")
		if got := trainer.isOK("pull"); got != strconv.Itoa(held) {
			t.Errorf("%s samples were read, %d are held", got, held)
		}
	})
}

// TestSessionGoesOn: after a close, a kill and another connection, the daemon says where the session stands, and each sample is in the ring once.
func TestSessionGoesOn(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		trainer := start(t, b)
		trainer.ok("%s", d.options().attach())
		trainer.send("pull %d", patience)
		o := d.options()
		o.session = "worker 7"
		first := start(t, b)
		first.ok("%s", o.open())
		first.want("0", "held")
		first.ok("produce 21 4 %d", patience)
		stream := first.ok("stream")
		first.ok("close")
		first.ok("%s", o.open())
		first.want("21", "held")
		first.want(stream, "stream")
		first.ok("produce 50 7 %d", patience)
		first.ok("reserve 3 %d", patience) // never committed
		first.kill()
		second := start(t, b)
		second.ok("%s", o.open())
		second.want("71", "held")
		second.ok("produce 5 5 %d", patience)
		third := start(t, b)
		third.ok("%s", o.open()) // takes the session over
		third.want("76", "held")
		second.fails("cut_off", "daemon=session_taken|another connection has opened session", "produce 1000 16 %d", patience)
		second.want("76", "held")
		second.ok("close")
		third.ok("produce 24 24 %d", patience)
		third.ok("close")
		d.end()
		if got := trainer.isOK("pull"); got != "100" {
			t.Errorf("%s samples were read, want 100", got)
		}
	})
}

// TestFullNamesTheTrainer: a ring that a trainer holds is an error that names it, with its process, and goes away with a release.
func TestFullNamesTheTrainer(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t, small)
		producer, trainer := start(t, b), start(t, b)
		o := d.options()
		o.prefetch, o.client = 1, "sleeper"
		trainer.ok("%s", o.attach())
		producer.ok("%s", d.options().open())
		producer.ok("produce 16 16 %d", patience)
		trainer.ok("next %d", patience)
		for {
			line := producer.do("reserve 16 2000")
			if !strings.HasPrefix(line, "ok") {
				pid := fmt.Sprintf("pid=%d\t", trainer.cmd.Process.Pid)
				for _, word := range []string{"error full\t", "the ring is full: ", "trainer=1\t", "batch=0\t", "group=default\t", "client=sleeper\t", pid} {
					if !strings.Contains(line, word) {
						t.Errorf("%s: want %q", line, word)
					}
				}
				break
			}
			producer.ok("fill")
			producer.ok("commit %s", strings.Fields(line)[1])
		}
		producer.send("reserve 16 %d", patience)
		trainer.ok("release 0")
		trainer.ok("next %d", patience)
		trainer.ok("release 1")
		producer.isOK("reserve")
		producer.ok("abandon")
		producer.ok("close")
		trainer.ok("detach")
	})
}

// TestGroups: each group gets every batch.
func TestGroups(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		one, other := start(t, b), start(t, b)
		o := d.options()
		one.ok("%s", o.attach())
		o.group = "evaluation"
		other.ok("%s", o.attach())
		one.send("pull %d", patience)
		other.send("pull %d", patience)
		d.push(t, 500)
		d.end()
		for _, p := range []*probe{one, other} {
			if got := p.isOK("pull"); got != "500" {
				t.Errorf("%s samples, want 500", got)
			}
		}
	})
}

// TestProducerExampleAgainstTheDaemon: the example as its comment shows it.
func TestProducerExampleAgainstTheDaemon(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		for _, total := range []string{"100", "150"} { // the second goes on where the first ended
			out, err := example(t, b, "producer", d.socket, testTable, total, "example").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "the daemon holds "+total+" samples") {
				t.Fatalf("%v\n%s", err, out)
			}
		}
		if d.Status().Tables[0].Committed != 150 {
			t.Errorf("%d samples are committed, want 150", d.Status().Tables[0].Committed)
		}
	})
}
