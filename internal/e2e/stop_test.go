//go:build linux && !race

package e2e

import (
	"path/filepath"
	"syscall"
	"testing"
)

// TestTermUnderLoad: SIGTERM while producers push as fast as they can. Every sample that was acked is read, and the daemon says so with code 0.
func TestTermUnderLoad(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"queued": nil, "committed": {"--ack", "committed"}} {
		t.Run(name, func(t *testing.T) {
			d := serve(t, []table{small, large})
			readers := map[string]*reader{small.name: d.reader(small.name), large.name: d.reader(large.name)}
			producers := map[string][]*process{}
			for range 2 {
				for name := range readers {
					producers[name] = append(producers[name], d.push(name, endless, 0, flags...))
				}
			}
			d.await("all are in full flow", func(s *status) bool {
				for _, c := range s.Producers.Connections {
					if c.Samples < 20 {
						return false
					}
				}
				return s.Producers.Open == 4
			})
			d.signal(syscall.SIGTERM)
			d.ends(exitOK)
			for name, r := range readers {
				r.account(producers[name]...)
			}
		})
	}
}

// TestTermWithoutTrainers: where nobody reads, the daemon does not wait for ever, and says what is lost.
func TestTermWithoutTrainers(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	run(t, exitOK, "push", "--addr", d.TCP, "--table", small.name, "--generate", "40")
	push := d.push(small.name, endless, 0)
	d.await("the ring is full, and /status says who waits", func(s *status) bool { return len(s.Waits) == 1 && s.Tables[0].Fill == 1 })
	says(t, d.status().Waits[0].For+d.status().Waits[0].On, "the ring is full", "a trainer")
	d.signal(syscall.SIGTERM)
	d.ends(exitData)
	says(t, d.err.String(), `512 of table "small"`, "no trainer has read", "--drain-timeout")
	push.ends(exitRefused)
	says(t, push.err.String(), "shutting_down")
	if n := result[pushed](push).Acked; n != 512-40 {
		t.Errorf("%d samples acked, want %d", n, 512-40)
	}
}

// TestSecondSignal: a second SIGTERM stops a daemon at once that waits for a trainer that does not read.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small}, "--drain-timeout", "1h")
	pull := d.pull(small.name, "--prefetch", "4")
	d.await("it has attached", func(s *status) bool { return attached(s, pull) != nil })
	pull.stop()
	run(t, exitOK, "push", "--addr", d.TCP, "--table", small.name, "--generate", "200") // more than it may hold
	d.signal(syscall.SIGTERM)
	d.await("it waits for the trainer", func(s *status) bool { return s.State == "draining" && s.Producers.Open == 0 })
	d.signal(syscall.SIGTERM)
	d.ends(exitInterrupted)
	says(t, d.err.String(), "stopped at once")
	pull.signal(syscall.SIGCONT)
	pull.ends(exitRefused)
	says(t, pull.err.String(), "shutting_down")
}

// TestDaemonKilled: kill -9 of the daemon. Its peers end with the reason, and a new daemon takes over the socket.
func TestDaemonKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := serveIn(t, dir, []table{small})
	p := d.pair(small.name, 2000)
	d.signal(syscall.SIGKILL)
	<-d.done
	for _, peer := range []*process{p.push, p.pull} {
		peer.ends(exitUnreachable)
		says(t, peer.err.String(), "start it again")
	}
	if out := result[pulled](p.pull); out.Wrong+out.Gaps+out.Disorder > 0 || out.Ended {
		t.Errorf("%+v", out)
	}
	again := serveIn(t, dir, []table{small})
	if want := "unix://" + filepath.Join(dir, "s"); again.Unix != want {
		t.Errorf("it listens on %s, want %s", again.Unix, want)
	}
	again.finish(nil, again.pair(small.name, 2000))
}
