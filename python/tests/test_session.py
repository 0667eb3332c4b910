"""A producer with a session against a fake daemon that breaks its connections: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ingestd import (
    Closed,
    Ended,
    FormatError,
    Full,
    Lost,
    PeerClosed,
    Producer,
    Refused,
    SessionTaken,
    ShuttingDown,
    Spec,
    Timeout,
)
from ingestd.redial import PATIENCE_S, Dialer, Redialer, longest_pause
from ingestd.session import Session

from fakes import PATIENCE, SPEC, Listener, Peer, Steps, encoded, sample

SIZE = SPEC.sample_bytes
NUMBERS = Spec.parse("n:U64,pad:U8[42]")
BIG_NUMBERS = Spec.parse("n:U64,pad:U8[99992]")


class Holding:
    """A daemon that holds the samples of one session, and breaks its connections wherever ``dice`` says."""

    def __init__(self, spec: Spec, seed: int, window_samples: int = 64) -> None:
        self.spec, self.dice, self.window = spec, random.Random(seed), window_samples
        self.held: list[int] = []
        self.cuts = 0
        self.over = False
        self.errors: list[BaseException] = []
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.sock.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while True:
                peer = Peer(self.sock.accept()[0])
                with peer.sock:
                    if self.over or self.serve(peer):
                        return
        except BaseException as e:
            self.errors.append(e)

    def serve(self, peer: Peer) -> bool:
        """One connection; True when it ended well."""
        dice = self.dice
        what = dice.randrange(8)
        if what == 0:
            self.cuts += 1
            return False  # before the handshake
        if what == 1:
            self.cuts += 1
            peer.hello()
            peer.reply({"code": dice.choice(["shutting_down", "too_many_connections"]), "reason": "later"}, status=1)
            return False
        window = dice.randrange(1, self.window + 1)
        body = peer.accept(window_samples=window, held=len(self.held), ack="committed")
        assert body["session"] == "s" and body["ack"] == "committed"
        size, data, unacked = self.spec.sample_bytes, bytearray(), 0
        cut = (
            dice.randrange(0, 40 * size)
            if not self.cuts
            else dice.choice([dice.randrange(0, 40 * size), dice.randrange(0, 400 * size), 1 << 40])
        )
        got = 0
        while True:
            if unacked and not select.select([peer.sock], [], [], 0.001)[0]:
                peer.ack(unacked)  # nothing more comes before this
                unacked = 0
            part = peer.sock.recv(min(1 << 18, max(1, cut - got)))
            if not part:
                assert not data, "the producer closed inside a sample"
                if unacked:
                    peer.ack(unacked)
                return True
            got += len(part)
            data += part
            while len(data) >= size:
                self.held.append(int.from_bytes(data[:8], "little"))
                assert data[8:size] == bytes([self.held[-1] % 251]) * (size - 8), "a torn sample"
                del data[:size]
                unacked += 1
            assert unacked <= window, "more than the window is under way"
            if got >= cut:
                self.cuts += 1
                if dice.random() < 0.3:
                    peer.ack(dice.randrange(unacked + 1))
                if dice.random() < 0.3:
                    peer.notice("shutting_down", "later")
                if dice.random() < 0.5:
                    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                return False
            if unacked and dice.random() < 0.5:
                n = dice.randrange(1, unacked + 1)
                peer.ack(n)
                unacked -= n

    def finish(self) -> None:
        self.over = True  # it may have been cut when the producer had nothing more to say
        socket.create_connection(self.sock.getsockname()).close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.sock.close()
        if self.errors:
            raise self.errors[0]


def numbered(spec: Spec, first: int, n: int) -> dict[str, Any]:
    ks = np.arange(first, first + n, dtype=np.uint64)
    pad = np.repeat((ks % np.uint64(251)).astype(np.uint8)[:, None], spec.leaves[1].nbytes, axis=1)
    return {"n": ks, "pad": pad}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spec", [NUMBERS, BIG_NUMBERS], ids=["small", "large"])
def test_model_random_cuts_lose_nothing_and_repeat_nothing(spec: Spec, seed: int) -> None:
    d = Holding(spec, seed)
    dice = random.Random(-1 - seed)
    n = 1000 if spec is NUMBERS else 300
    with Producer(d.address, "t", spec, session="s", reconnect=PATIENCE, deadline=PATIENCE) as p:
        done = 0
        while done < n:
            what = dice.randrange(4)
            k = 1 if what else min(dice.randrange(1, 200), n - done)
            try:
                if what:
                    p.push({name: a[0] for name, a in numbered(spec, done, 1).items()}, deadline=0.01 * what)
                else:
                    p.push_batch(numbered(spec, done, k), deadline=0.05)
                done += k
            except Timeout as e:
                done += e.taken
            if dice.random() < 0.01:
                p.flush(deadline=PATIENCE)
                assert p.acked == done
        p.close(deadline=PATIENCE)
        assert (p.pushed, p.acked, p.lost) == (n, n, 0)
    d.finish()
    assert d.held == list(range(n)), f"seed {seed}"
    assert d.cuts > 0


Scripts = Callable[..., Producer]


@pytest.fixture
def scripts() -> Iterator[Scripts]:
    """A producer with a session whose connections are served by the given scripts, one after the other."""
    made: list[tuple[Listener, Producer]] = []

    def make(*run: Callable[[Peer], None], **options: Any) -> Producer:
        listener = Listener.tcp()
        errors, sock = listener.errors, listener.sock

        def work() -> None:
            try:
                sock.settimeout(PATIENCE)
                for script in run:
                    peer = Peer(sock.accept()[0])
                    with peer.sock:
                        script(peer)
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        listener.threads.append(thread)
        p = Producer(listener.address, "t", SPEC, session="s", **{"deadline": PATIENCE, **options})
        made.append((listener, p))
        return p

    yield make
    for listener, p in made:
        p.abort()
        listener.finish()


def test_what_was_not_acknowledged_is_sent_again(scripts: Scripts) -> None:
    def first(peer: Peer) -> None:
        body = peer.accept(held=10, ack="committed")
        assert (body["session"], body["ack"], body["notes"]) == ("s", "committed", True)
        assert peer.exactly(SIZE) == encoded(0)
        peer.ack(1)
        assert peer.exactly(3 * SIZE) == encoded(1) + encoded(2) + encoded(3)

    def second(peer: Peer) -> None:
        peer.accept(held=12)  # sample 1 of this producer had arrived, its acknowledgement had not
        assert peer.exactly(2 * SIZE) == encoded(2) + encoded(3)
        peer.ack(2)
        assert peer.end() == b""

    p = scripts(first, second)
    assert p.held == 10
    p.push(sample(0))
    p.flush(deadline=PATIENCE)
    for k in (1, 2, 3):
        p.push(sample(k))
    p.flush(deadline=PATIENCE)
    p.close(deadline=PATIENCE)
    assert (p.pushed, p.acked, p.reconnects) == (4, 4, 1)
    with pytest.raises(Closed):
        p.push(sample(4))


def lose_two(peer: Peer) -> None:
    peer.accept()
    assert peer.exactly(3 * SIZE)
    peer.ack(3)


@pytest.mark.parametrize("go_on", [False, True])
def test_samples_that_a_daemon_acknowledged_and_lost(scripts: Scripts, go_on: bool) -> None:
    steps = Steps()

    def first(peer: Peer) -> None:
        peer.accept(held=100)
        for k in range(3):
            assert peer.exactly(SIZE) == encoded(k)
            peer.ack(1)
        steps.wait("flushed")

    def second(peer: Peer) -> None:
        peer.accept(held=101)
        if go_on:
            assert peer.exactly(2 * SIZE) == encoded(3) + encoded(4)

    def third(peer: Peer) -> None:
        if go_on:
            peer.accept(held=102)  # sample 3: the daemon counts two less than this producer
            assert peer.exactly(SIZE) == encoded(4)
            peer.ack(1)
            assert peer.end() == b""

    p = scripts(*([first, second, third] if go_on else [first, second]), continue_after_loss=go_on)
    for k in range(3):
        p.push(sample(k))
        p.flush(deadline=PATIENCE)
    steps.done("flushed")
    if not go_on:
        with pytest.raises(Lost, match=r"samples 101 to 102 of session 's'") as lost:
            while True:
                p.push(sample(3), deadline=PATIENCE)
                p.flush(deadline=PATIENCE)
        assert (lost.value.first, lost.value.end) == (101, 103)
        with pytest.raises(Lost):
            p.push(sample(4))
        with pytest.raises(Lost):
            p.close()
        return
    p.push(sample(3))
    p.push(sample(4))
    p.close(deadline=PATIENCE)
    assert (p.lost, p.acked, p.reconnects) == (2, 5, 2)


def test_another_producer_takes_the_session(scripts: Scripts) -> None:
    def first(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)
        peer.notice("session_taken", "another connection has opened it")
        peer.end()

    p = scripts(first)
    p.push(sample(0))
    with pytest.raises(SessionTaken, match="1 samples were not acknowledged") as taken:
        p.flush(deadline=PATIENCE)
    assert isinstance(taken.value, Ended) and taken.value.code == "session_taken"
    with pytest.raises(SessionTaken):
        p.push(sample(1))


def test_another_producer_went_on_with_the_session(scripts: Scripts) -> None:
    def first(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)

    p = scripts(first, lambda peer: (peer.accept(held=2), None)[1])
    p.push(sample(0))
    with pytest.raises(SessionTaken, match="holds 2 samples of session 's', this producer pushed 1"):
        p.flush(deadline=PATIENCE)


def spec_refused(peer: Peer) -> None:
    peer.hello()
    peer.reply({"code": "spec_mismatch", "reason": "the table was changed"}, status=1)


def test_a_refusal_is_final_and_a_passing_one_is_not(scripts: Scripts) -> None:
    def internal(peer: Peer) -> None:
        peer.accept()
        peer.notice("internal", "the daemon failed")

    def later(peer: Peer) -> None:
        peer.hello()
        peer.reply({"code": "shutting_down", "reason": "stopping"}, status=1)

    def busy(peer: Peer) -> None:
        peer.hello()
        peer.reply({"code": "too_many_connections", "reason": "busy"}, status=1)

    def cut(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)

    p = scripts(later, internal, cut, busy, later, spec_refused)  # the first one is met by the constructor
    p.push(sample(0))
    with pytest.raises(Refused, match="the table was changed"):
        p.flush(deadline=PATIENCE)


def test_patience_ends(scripts: Scripts) -> None:
    def cut(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)
        listener_closed.wait(PATIENCE)

    listener_closed = threading.Event()
    listener = Listener.tcp()
    listener.script(cut)
    p = Producer(listener.address, "t", SPEC, session="s", reconnect=0.05)
    listener.sock.close()
    p.push(sample(0))
    listener_closed.set()
    with pytest.raises(
        PeerClosed, match=r"no connection for 0.05 s; the last try: .*; 1 samples were not acknowledged"
    ):
        p.flush(deadline=PATIENCE)
    p.abort()
    listener.finish()


def test_no_patience_is_as_without_a_session(scripts: Scripts) -> None:
    def stop(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)
        peer.notice("shutting_down", "stopping")

    p = scripts(stop, reconnect=0)
    p.push(sample(0))
    with pytest.raises(ShuttingDown, match="stopping; 1 samples were not"):
        p.flush(deadline=PATIENCE)
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="reconnect="):
            Producer("tcp://127.0.0.1:1", "t", SPEC, session="s", reconnect=bad)


def test_while_there_is_no_connection_the_window_is_filled_and_then_calls_wait(scripts: Scripts) -> None:
    steps = Steps()

    def first(peer: Peer) -> None:
        peer.accept(window_samples=4)
        assert peer.exactly(SIZE) == encoded(0)

    def second(peer: Peer) -> None:
        steps.wait("waited")
        peer.accept(window_samples=2)  # less than before: what was kept goes out two by two
        for k in range(0, 4, 2):
            assert peer.exactly(2 * SIZE) == encoded(k) + encoded(k + 1)
            peer.nothing()
            peer.ack(2)
        peer.end()

    p = scripts(first, second)
    for k in range(4):
        p.push(sample(k), deadline=PATIENCE)
    with pytest.raises(Timeout, match="4 samples fill the window"):
        p.push(sample(4), deadline=0.01)
    with pytest.raises(Timeout, match="waiting for 4 acknowledgements"):
        p.flush(deadline=0)
    steps.done("waited")
    p.close(deadline=PATIENCE)
    assert p.acked == 4


def test_aborting_and_dropping_while_connecting(scripts: Scripts) -> None:
    listener = Listener.tcp()
    steps = Steps()
    listener.script(lambda peer: (peer.accept(), steps.wait("closed"))[1])
    p = Producer(listener.address, "t", SPEC, session="s", reconnect=None)
    listener.sock.close()
    steps.done("closed")
    p.push(sample(0))
    with pytest.raises(Timeout):
        p.flush(deadline=0.05)
    p.abort()
    with pytest.raises(Closed):
        p.flush()
    listener.finish()


def test_protocol_errors_are_final(scripts: Scripts) -> None:
    def too_many(peer: Peer) -> None:
        peer.accept()
        peer.exactly(SIZE)
        peer.ack(2)
        peer.end()

    p = scripts(too_many)
    p.push(sample(0))
    with pytest.raises(FormatError, match="more samples than were sent"):
        p.flush(deadline=PATIENCE)


NOTE = {
    "code": "ring_full", "reason": "trainer 3 of group eval holds batch 9", "trainer": 3, "group": "eval",
    "client": "slow", "pid": 77, "batch": 9, "since": 1_700_000_000_000_000_001,
}  # fmt: skip


@pytest.mark.parametrize("session", [None, "s"])
def test_a_note_names_who_is_waited_for_until_the_next_ack(listener: Listener, session: str | None) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        assert peer.accept(window_samples=1)["notes"] is True
        peer.exactly(SIZE)
        peer.note(NOTE)
        steps.wait("aborted")

    listener.script(script)
    p = Producer(listener.address, "t", SPEC, session=session)
    p.push(sample(0))
    while p.note is None:
        with pytest.raises(Timeout):
            p.flush(deadline=0.01)
    says = r"ring is full: trainer 3 \('slow', group 'eval', pid 77\) has held batch 9 since 2023-11-14T22:13:20Z"
    with pytest.raises(Full, match=says) as full:
        p.push(sample(1), deadline=0.01)
    e = full.value
    assert isinstance(e, Timeout)
    assert (e.trainer, e.group, e.client, e.pid, e.batch, e.since) == (3, "eval", "slow", 77, 9, NOTE["since"])
    with pytest.raises(Full) as full:
        p.push_batch({k: v[None] for k, v in sample(1).items()}, deadline=0)
    assert full.value.taken == 0
    with pytest.raises(Full):
        p.flush(deadline=0)
    with pytest.raises(Full):
        p.close(deadline=0)
    p.abort()
    steps.done("aborted")


def test_the_next_ack_ends_a_note(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept(window_samples=1)
        peer.exactly(SIZE)
        peer.note(NOTE)
        steps.wait("full")
        peer.ack(1)
        peer.exactly(SIZE)
        steps.wait("not full")
        peer.sock.sendall(b"\x02\x02\0\0\0{}\x01")  # a note and its end at once
        assert peer.end() == b""

    listener.script(script)
    p = Producer(listener.address, "t", SPEC)
    p.push(sample(0))
    while p.note is None:
        with pytest.raises(Timeout):
            p.flush(deadline=0.01)
    assert p.note is not None and p.note.trainer == 3
    steps.done("full")
    p.push(sample(1), deadline=PATIENCE)
    assert p.note is None
    with pytest.raises(Timeout) as timeout:
        p.push(sample(2), deadline=0.01)
    assert not isinstance(timeout.value, Full)
    steps.done("not full")
    p.close(deadline=PATIENCE)


def test_patience_does_not_end_while_nothing_is_due(scripts: Scripts) -> None:
    steps = Steps()
    listener = Listener.tcp()

    def first(peer: Peer) -> None:
        peer.accept()
        steps.wait("connected")

    listener.script(first)
    p = Producer(listener.address, "t", SPEC, session="s", reconnect=0.02)
    link = p._link
    assert isinstance(link, Session)
    waits = threading.Event()
    again = link._pause
    link._redialer.again = lambda pause, needed, failed: Redialer.again(  # type: ignore[method-assign]
        link._redialer, lambda s: (waits.set() if s is None else None, again(s))[1], needed, failed
    )
    address = listener.sock.getsockname()
    listener.sock.close()
    steps.done("connected")
    assert waits.wait(PATIENCE)
    assert p.unacked == 0
    listener.sock = socket.create_server(address)

    def second(peer: Peer) -> None:
        peer.accept()
        assert peer.exactly(SIZE) == encoded(0)
        peer.ack(1)
        peer.end()

    listener.script(second)
    p.push(sample(0))
    p.close(deadline=PATIENCE)
    assert p.acked == 1
    listener.finish()


def test_pauses_grow_with_the_outage_and_patience_is_counted_over_outages_without_acknowledgement() -> None:
    assert [longest_pause(s) for s in (0, 0.16, 1.6, 16, 1000)] == [0.01, 0.01, 0.1, 1.0, 1.0]
    assert PATIENCE_S == 300

    class Nobody(Dialer):
        def __init__(self, outcomes: list[Exception | None]) -> None:
            self.outcomes = outcomes

        def open(self, until: Any) -> Any:
            outcome = self.outcomes.pop(0)
            if outcome is not None:
                raise outcome
            return "opened"

    pauses: list[float | None] = []
    failures: list[Exception] = []
    refused = Refused("too_many_connections", "busy")
    redialer = Redialer(Nobody([PeerClosed("x"), refused, None, SessionTaken("session_taken", "gone")]), 300.0)
    pause = lambda s: (pauses.append(s), True)[1]  # noqa: E731
    opened: Any = redialer.again(pause, lambda: True, failures.append)
    assert opened == "opened" and [str(e) for e in failures] == ["x", str(refused)]
    assert len(pauses) == 3 and all(p is not None and 0 <= p <= 0.01 for p in pauses)
    with pytest.raises(SessionTaken):
        redialer.again(pause, lambda: True, failures.append)
    redialer._spent = 300.0
    with pytest.raises(PeerClosed, match="no connection for 300 s"):
        redialer.again(pause, lambda: True, failures.append)
    redialer.acknowledged()
    assert redialer.again(lambda s: False, lambda: True, failures.append) is None
