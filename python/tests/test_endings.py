"""How a producer ends: closing, aborting, notices, a daemon that goes away, forks, interrupts, forgotten producers."""

from __future__ import annotations

import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from ingestd import (
    Closed,
    Ended,
    FormatError,
    PeerClosed,
    Producer,
    Spec,
    Timeout,
)

from fakes import BIG, PATIENCE, SPEC, Listener, Peer, Steps, big, encoded, image, sample

SIZE = SPEC.sample_bytes


def ends(listener: Listener, script: Any, error: type[Exception], says: str) -> Exception:
    """Pushes two samples, of which the script acknowledges one before it ends the connection its own way."""

    def run(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)
        peer.ack(1)
        peer.exactly(SIZE)
        script(peer)

    listener.script(run)
    p = Producer(listener.address, "t", SPEC)
    p.push(sample(0))
    p.flush(deadline=PATIENCE)
    p.push(sample(1))
    with pytest.raises(error, match=says) as flushed:
        p.flush(deadline=PATIENCE)
    with pytest.raises(error):
        p.push(sample(2))
    with pytest.raises(error):
        p.push_batch({"image": image(0)[None], "label": np.zeros(1, np.int16)})
    with pytest.raises(error):  # one sample was not acknowledged: close does not hide it
        p.close(deadline=PATIENCE)
    p.close()
    return flushed.value


def test_the_daemon_ends_the_stream(listener: Listener) -> None:
    error = ends(listener, lambda peer: peer.notice("shutting_down", "stopping"), Ended, "stopping; 1 samples were not")
    assert isinstance(error, Ended) and (error.code, error.reason) == ("shutting_down", "stopping")
    assert isinstance(error, ConnectionError)

    def dribble(peer: Peer) -> None:
        for byte in b"\0\x18\0\0\0" + b'{"code":"x","reason":""}':
            peer.sock.sendall(bytes([byte]))
        peer.sock.recv(1)

    ends(listener, dribble, Ended, r"\(x\)")


def test_the_daemon_goes_away(listener: Listener) -> None:
    ends(listener, lambda peer: peer.close(), PeerClosed, "without a reason; 1 samples were not acknowledged")
    ends(listener, lambda peer: peer.sock.sendall(b"\0\x18\0\0\0{"), PeerClosed, "without a reason")


def test_the_daemon_breaks_the_protocol(listener: Listener) -> None:
    ends(listener, lambda peer: (peer.sock.sendall(b"\x07"), peer.end()), FormatError, "0x07 where an acknowledgement")
    ends(listener, lambda peer: (peer.ack(3), peer.end()), FormatError, "more samples than were sent")
    ends(listener, lambda peer: (peer.sock.sendall(b"\0\1\0\0\0{"), peer.end()), FormatError, "says it has 1 bytes")
    ends(listener, lambda peer: (peer.sock.sendall(b"\0\2\0\0\0[]"), peer.end()), FormatError, "not a JSON object")


def test_a_pusher_that_waits_learns_of_the_end(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        peer.accept(window_samples=1)
        peer.exactly(SIZE)
        peer.notice("internal", "lost")

    listener.script(script)
    p = Producer(listener.address, "t", SPEC)
    p.push(sample(0))
    with pytest.raises(Ended, match="lost"):
        p.push(sample(1))
    with pytest.raises(Ended):
        p.close()

    def stop_reading(peer: Peer) -> None:
        peer.accept(window_bytes=1 << 30)
        peer.exactly(1000)
        peer.notice("stalled", "enough")

    listener.script(stop_reading)
    p = Producer(listener.address, "t", BIG)
    with pytest.raises(PeerClosed):
        p.push_batch({k: np.repeat(v[None], 64, axis=0) for k, v in big(1).items()})
    with pytest.raises(PeerClosed):
        p.close()


def test_close_waits_for_the_last_acknowledgements(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept()
        assert peer.end() == encoded(0) + encoded(1)
        steps.wait("timed out")
        peer.ack(2)

    listener.script(script)
    p = Producer(listener.address, "t", SPEC)
    p.push(sample(0))
    p.push(sample(1))
    with pytest.raises(Timeout, match="2 samples not acknowledged"):
        p.close(deadline=0.01)
    with pytest.raises(Closed):
        p.push(sample(2))
    steps.done("timed out")
    p.close(deadline=PATIENCE)
    p.close()
    p.abort()
    assert p.acked == 2
    with pytest.raises(Closed, match="closed"):
        p.push(sample(2))


def test_close_with_samples_missing(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.end()
        peer.ack(1)

    listener.script(script)
    with pytest.raises(PeerClosed, match="1 samples were not"), Producer(listener.address, "t", SPEC) as p:
        p.push(sample(0))
        p.push(sample(1))


def test_an_exception_in_the_block_does_not_wait(listener: Listener) -> None:
    listener.script(lambda peer: (peer.accept(), peer.end())[0])
    with pytest.raises(ZeroDivisionError), Producer(listener.address, "t", SPEC) as p:
        p.push(sample(0))
        raise ZeroDivisionError
    with pytest.raises(Closed):
        p.flush()


def test_abort_frees_a_thread_that_waits(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept(window_samples=1)
        peer.exactly(SIZE)
        steps.done("full")
        peer.end()

    listener.script(script)
    p = Producer(listener.address, "t", SPEC)
    p.push(sample(0))
    steps.wait("full")
    caught: list[BaseException] = []

    def push() -> None:
        try:
            p.push(sample(1))
        except Exception as e:
            caught.append(e)

    thread = threading.Thread(target=push)
    thread.start()
    p.abort()
    thread.join(PATIENCE)
    assert len(caught) == 1 and isinstance(caught[0], (Closed, PeerClosed))


def test_threads_push_whole_samples(listener: Listener) -> None:
    spec = Spec.parse("who:U8,n:U32,pad:U8[995]")
    each, threads = 400, 4

    def script(peer: Peer) -> None:
        peer.accept(window_samples=64)
        seen = [0] * threads
        for _ in range(each * threads):
            data = peer.exactly(1000)
            who, n = struct.unpack_from("<BI", data)
            assert n == seen[who] and data[5:] == bytes([who]) * 995
            seen[who] += 1
            peer.ack(1)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", spec) as p:

        def push(who: int) -> None:
            pad = np.full((each, 995), who, np.uint8)
            whos = np.full(each, who, np.uint8)
            ns = np.arange(each, dtype=np.uint32)
            for at in range(0, each, 20):
                if who % 2:
                    p.push_batch({"who": whos[at : at + 20], "n": ns[at : at + 20], "pad": pad[at : at + 20]})
                else:
                    for k in range(at, at + 20):
                        p.push({"who": whos[k], "n": ns[k], "pad": pad[k]})

        workers = [threading.Thread(target=push, args=(who,)) for who in range(threads)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()


def test_a_forked_child_may_not_push_and_does_not_hold_the_connection(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)
        peer.ack(1)
        assert peer.end() == b""  # comes although the child lives on
        peer.sock.shutdown(socket.SHUT_WR)  # the child holds this end too, as no real daemon's child would
        steps.done("ended")

    listener.script(script)
    p = Producer(listener.address, "t", SPEC)
    (r, w), (stay, leave) = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if pid == 0:
        try:
            p.push(sample(1))
        except Closed as e:
            os.write(w, str(e).encode())
        os.close(w)
        os.close(leave)
        os.read(stay, 1)
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as answer:
        assert "parent process" in answer.read()
    p.push(sample(0))
    p.close(deadline=PATIENCE)
    steps.wait("ended")
    os.close(leave)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(stay)


@pytest.mark.parametrize("session", [None, "s"])
def test_a_closed_producer_closes_nothing_in_a_forked_child(listener: Listener, session: str | None) -> None:
    listener.script(lambda peer: (peer.accept(), peer.end())[0])
    before = set(os.listdir("/proc/self/fd"))
    p = Producer(listener.address, "t", SPEC, session=session)
    p.close(deadline=PATIENCE)
    pipes = [os.pipe() for _ in range(8)]  # they take the numbers that the producer had
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if pid == 0:
        try:
            for r, w in pipes:
                os.fstat(r), os.fstat(w)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert p.acked == 0
    for fd in {fd for pair in pipes for fd in pair}:
        os.close(fd)
    listener.threads[0].join(PATIENCE)
    assert set(os.listdir("/proc/self/fd")) <= before | {str(listener.sock.fileno())}


def test_a_dropped_producer_warns_and_disconnects(listener: Listener) -> None:
    listener.script(lambda peer: (peer.accept(), peer.end())[0])
    p = Producer(listener.address, "t", SPEC)
    with pytest.warns(ResourceWarning, match="unclosed <Producer"):
        del p
        gc.collect()


def test_an_interrupted_send_is_not_repeated(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    listener.script(lambda peer: (peer.accept(), peer.end())[0])
    p = Producer(listener.address, "t", SPEC)
    link = p._link
    assert link is not None

    class Interrupted:
        """The socket, with an interrupt between the kernel's taking the bytes and our counting them."""

        def __init__(self, sock: Any) -> None:
            self.sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def sendmsg(self, buffers: Any) -> int:
            self.sock.sendmsg(buffers)
            raise KeyboardInterrupt

    with link._state:
        link._sock = Interrupted(link._sock)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        p.push(sample(0))
    with pytest.raises(PeerClosed, match="interrupted half-way"):
        p.push(sample(1))
    p.abort()


def test_a_program_that_forgets_to_close_ends(listener: Listener) -> None:
    listener.script(lambda peer: (peer.accept(), peer.end())[0])
    script = (
        "import sys, numpy as np; from ingestd import Producer\n"
        f"p = Producer({listener.address!r}, 't', 'x:U8')\n"
        "p.push({'x': np.uint8(1)})\n"
        "sys.modules['kept'] = p\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}
    assert subprocess.run([sys.executable, "-c", script], env=env, timeout=PATIENCE).returncode == 0
