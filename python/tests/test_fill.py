"""FillProducer against a fake daemon: rows in lent places, descriptors, reconnects, what is never written again."""

from __future__ import annotations

import gc
import os
import random
import select
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ingestd import (
    Closed,
    Ended,
    EndOfStream,
    Error,
    FillProducer,
    FormatError,
    Full,
    Lost,
    PeerClosed,
    Refused,
    Released,
    SessionTaken,
    ShuttingDown,
    Spec,
    SpecError,
    Timeout,
    _io,
)

from fakes import PATIENCE, SPEC, FillDaemon, Filling, Peer, SegmentMaker, Steps, encoded, image, sample


@pytest.fixture
def fake(socket_path: str) -> Iterator[FillDaemon]:
    made = FillDaemon(socket_path)
    yield made
    made.finish()


def until(filling: Filling, peer: Peer, n: int) -> list[bytes]:
    """Takes samples until there are n."""
    got: list[bytes] = []
    while len(got) < n:
        found = filling.take()
        if found is None:
            filling.channel.set_daemon_waiting()
            assert select.select([filling.channel.to_daemon, peer.sock], [], [], PATIENCE)[0]
            filling.channel.signalled()
            assert not select.select([peer.sock], [], [], 0)[0], "the producer has gone"
        else:
            got += found
    return got


def gone(peer: Peer) -> None:
    assert peer.sock.recv(1) == b"", "a filler sends nothing after its hello"


def many(first: int, n: int) -> dict[str, Any]:
    ks = range(first, first + n)
    return {"image": np.stack([image(k) for k in ks]), "label": np.array([100 + k for k in ks], np.int16)}


def test_rows_are_filled_in_place_and_in_order(fake: FillDaemon) -> None:
    seen: dict[str, Any] = {}

    def script(peer: Peer, filling: Filling) -> None:
        seen.update(filling.accept(peer))
        assert until(filling, peer, 8) == [encoded(k) for k in range(8)]
        gone(peer)
        assert filling.take() is None

    fake.serve(script)
    with FillProducer(fake.address, "t", prefetch=3, client="me") as p:
        assert (p.spec, p.table, p.stream, p.held, p.prefetch, p.batch_size) == (SPEC, "t", 7, 0, 2, 4)
        with p.reserve(3) as slots:
            assert len(slots) == 3 and slots["image"].shape == (3, 2, 2) and slots["label"].shape == (3,)
            assert slots["image"].flags.writeable and slots["image"].ctypes.data % 64 == 0
            for i in range(3):
                slots["image"][i] = image(i)
                slots["label"][i] = 100 + i
            assert list(slots.tree) == ["image", "label"]
            with pytest.raises(KeyError, match="no leaf 'x'; there are 'image', 'label'"):
                slots["x"]
            with pytest.raises(Error, match="reserved already"):
                p.reserve(1)
            with pytest.raises(Error, match="rows are reserved"):
                p.push(sample(0))
            with pytest.raises(Error, match="rows are reserved"):
                p.settle()
        assert len(slots) == 0
        for use in (lambda: slots["image"], lambda: slots.tree, slots.commit, slots.__enter__):
            with pytest.raises(Released, match="committed or abandoned"):
                use()
        slots.abandon()
        p.push(sample(3))  # the last row of the place
        assert p.pushed == 4
        slots = p.reserve(100)
        assert len(slots) == 4  # no more than the place has
        slots["image"][:2] = [image(4), image(5)]
        slots["label"][:2] = [104, 105]
        with pytest.raises(ValueError, match=r"commit\(5\): 4 rows"):
            slots.commit(5)
        with pytest.raises(ValueError, match=r"commit\(0\)"):
            slots.commit(0)
        slots.commit(2)
        with pytest.raises(ZeroDivisionError), p.reserve(2) as slots:
            slots["label"][:] = 9
            raise ZeroDivisionError
        assert p.pushed == 6
        assert p.push_batch(many(6, 2)) == 2
        p.flush(deadline=PATIENCE)
        assert (p.pushed, p.acked, p.unacked, p.lost, p.reconnects) == (8, 8, 0, 0, 0)
        for bad in (0, -1):
            with pytest.raises(ValueError, match="want 1 or more"):
                p.reserve(bad)
    assert seen == {
        "role": "fill", "table": "t", "byte_order": "little", "prefetch": 3, "notes": True, "client": "me",
    }  # fmt: skip
    with pytest.raises(Closed):
        p.reserve(1)
    p.close()


def test_wrong_samples_take_nothing(fake: FillDaemon) -> None:
    fake.serve(lambda peer, filling: (filling.accept(peer), gone(peer), None)[2])
    with FillProducer(fake.address, "t", SPEC) as p:
        with pytest.raises(SpecError, match="want I16"):
            p.push({"image": image(0), "label": np.int64(1)})
        assert p.pushed == 0
    with pytest.raises(ValueError, match="over a unix socket"):
        FillProducer("tcp://127.0.0.1:1", "t")


def test_waiting_for_places_and_for_the_daemon(fake: FillDaemon) -> None:
    steps = Steps()

    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        steps.wait("full")
        assert until(filling, peer, 3) == [encoded(k) for k in range(3)]
        steps.wait("took 3")
        assert until(filling, peer, 5) == [encoded(k) for k in range(3, 8)]
        filling.lend(2)
        assert until(filling, peer, 1) == [encoded(8)]
        assert until(filling, peer, 3) == [encoded(k) for k in range(9, 12)]
        peer.note({"code": "ring_full", "reason": "wait", "trainer": 3, "group": "g", "pid": 9, "batch": 5, "since": 1})
        steps.wait("Full")
        filling.lend(0)
        assert until(filling, peer, 1) == [encoded(12)]
        filling.channel.close()
        gone(peer)

    fake.serve(script)
    with FillProducer(fake.address, "t") as p:
        for k in range(8):
            p.push(sample(k), deadline=0)
        with pytest.raises(Timeout, match="waiting for a place"):
            p.push(sample(8), deadline=0.01)
        with pytest.raises(Timeout, match="to take what was committed"):
            p.flush(deadline=0.01)
        steps.done("full")
        while p.acked < 3:
            with pytest.raises(Timeout):
                p.flush(deadline=0.01)
        steps.done("took 3")
        p.push(sample(8), deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
        with pytest.raises(Timeout) as timeout:
            p.push_batch(many(9, 4), deadline=0.05)
        assert timeout.value.taken == 3
        while p.note is None:
            with pytest.raises(Timeout):
                p.reserve(1, deadline=0.01)
        with pytest.raises(Full, match=r"trainer 3 .* group 'g', pid 9.* has held batch 5") as full:
            p.reserve(1, deadline=0.01)
        assert full.value.batch == 5
        steps.done("Full")
        p.push(sample(12), deadline=PATIENCE)
        assert p.note is None
        p.flush(deadline=PATIENCE)
        with p.reserve(3, deadline=PATIENCE) as slots:  # the place that it has may still be filled
            assert len(slots) == 3
            slots.abandon()
        p._open()._attached.places.clear()  # type: ignore[union-attr]
        with pytest.raises(EndOfStream, match="no more samples"):
            p.reserve(1, deadline=PATIENCE)


def test_settling(fake: FillDaemon) -> None:
    steps = Steps()

    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        assert until(filling, peer, 2) == [encoded(0), encoded(1)]
        steps.wait("settled")
        assert filling.settled == [] and filling.take() == []
        assert filling.settled == [1] and filling.take() is None  # asked for once
        gone(peer)

    fake.serve(script)
    with FillProducer(fake.address, "t") as p:
        p.settle()  # nothing is there to settle
        p.push(sample(0))
        p.push(sample(1))
        p.flush(deadline=PATIENCE)
        p.settle()
        p.settle()
        steps.done("settled")


def test_a_daemon_that_does_not_take_holds_the_producer_back(fake: FillDaemon) -> None:
    steps = Steps()

    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        steps.wait("full")
        until(filling, peer, 9)
        gone(peer)

    fake.batches, fake.places = 8, 5
    fake.serve(script)
    with FillProducer(fake.address, "t") as p:
        for k in range(8):  # as many descriptors as the queue holds
            p.push(sample(k), deadline=0)
        for wait in (lambda: p.push(sample(8), deadline=0.01), lambda: p.reserve(1, deadline=0)):
            with pytest.raises(Timeout):
                wait()
        p._open()._attached.places[0].row = 1  # type: ignore[union-attr]
        with pytest.raises(Timeout, match="room in the queue"):
            p.settle(deadline=0)
        p._open()._attached.places[0].row = 0  # type: ignore[union-attr]
        steps.done("full")
        p.push(sample(8), deadline=PATIENCE)


@pytest.mark.parametrize(
    ("notice", "error"),
    [
        (("shutting_down", "stopping"), ShuttingDown),
        (("bad_peer", "no"), Ended),
        (("session_taken", "gone"), SessionTaken),
        (None, PeerClosed),
    ],
)
def test_without_a_session_the_end_is_final(fake: FillDaemon, notice: Any, error: type[Exception]) -> None:
    steps = Steps()

    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        until(filling, peer, 1)
        steps.wait("pushed 2")
        if notice:
            peer.notice(*notice)

    fake.serve(script)
    p = FillProducer(fake.address, "t")
    p.push(sample(0))
    p.flush(deadline=PATIENCE)
    p.push(sample(1))
    steps.done("pushed 2")
    with pytest.raises(error, match="1 samples were not acknowledged"):
        p.flush(deadline=PATIENCE)
    with pytest.raises(error):
        p.push(sample(2))
    with pytest.raises(error, match="1 samples were not acknowledged"):
        p.close()
    p.close()


@pytest.mark.parametrize(
    ("descriptor", "says"),
    [
        ((2, 0, 0), "want lease 1"),
        ((1, 9, 0), "of this segment"),
        ((1, 0, 1), "want lease 1"),
        ((1, 3, 0), "segment says"),
    ],
)
def test_bad_leases(
    fake: FillDaemon, descriptor: tuple[int, int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        filling.channel.push(*descriptor)
        gone(peer)

    monkeypatch.setattr(_io, "STALE_S", 0.01)
    fake.places = 0
    fake.serve(script)
    p = FillProducer(fake.address, "t")
    for _ in range(2):
        with pytest.raises(FormatError, match=says):
            p.reserve(1, deadline=PATIENCE)
    p.abort()


@pytest.mark.parametrize("session", [None, "s"])
def test_places_that_a_dead_daemon_lent(fake: FillDaemon, session: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_io, "STALE_S", PATIENCE)

    def dies(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        filling.segment.lend(3, 8)  # by its successor, to another
        filling.channel.push(1, 3, 0)
        filling.channel.push(2, 2, 0)
        while filling.channel.words[(filling.channel.deliver + 64) // 8] == 0:
            os.sched_yield()  # until the first was taken
        peer.note({"code": "ring_full", "reason": "its last words, which end nothing"})

    def lives(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        filling.lend(0)
        assert until(filling, peer, 1) == [encoded(0)]
        gone(peer)

    fake.places = 0
    fake.serve(*[dies, lives][: 2 if session else 1])
    p = FillProducer(fake.address, "t", session=session)
    if session:
        p.push(sample(0), deadline=PATIENCE)
        p.close(deadline=PATIENCE)
        assert p.reconnects == 1
    else:
        with pytest.raises(PeerClosed, match="closed the attachment"):
            p.push(sample(0), deadline=PATIENCE)
        p.abort()


def test_refusals_and_bad_answers(fake: FillDaemon) -> None:
    def refused(peer: Peer, filling: Filling) -> None:
        peer.hello()
        peer.reply({"code": "not_permitted", "reason": "another user"}, status=1)

    def other(peer: Peer, filling: Filling) -> None:
        filling.accept(peer, fingerprint="00")

    def acks(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        peer.ack(1)
        gone(peer)

    fake.serve(refused, other, acks)
    with pytest.raises(Refused, match="another user"):
        FillProducer(fake.address, "t")
    with pytest.raises(FormatError, match="another spec"):
        FillProducer(fake.address, "t", SPEC)
    p = FillProducer(fake.address, "t")
    with pytest.raises(FormatError, match="on the socket"):
        while True:
            p.push(sample(1), deadline=PATIENCE)
    p.abort()


def test_a_second_attachment_gets_what_the_first_did_not_take(fake: FillDaemon) -> None:
    steps = Steps()

    def first(peer: Peer, filling: Filling) -> None:
        assert filling.accept(peer, held=10)["session"] == "s"
        assert until(filling, peer, 2) == [encoded(0), encoded(1)]
        steps.wait("pushed")
        assert filling.take(done=False) == [encoded(2)]  # in the ring, but the producer was not told

    def second(peer: Peer, filling: Filling) -> None:
        body = filling.accept(peer, held=13)
        assert body["fingerprint"] == SPEC.fingerprint
        assert until(filling, peer, 4) == [encoded(k) for k in range(3, 7)]
        while not filling.resumed:
            filling.take()
        gone(peer)

    fake.serve(first, second)
    with FillProducer(fake.address, "t", session="s") as p:
        assert p.held == 10
        for k in range(6):
            p.push(sample(k), deadline=PATIENCE)
        steps.done("pushed")
        p.push(sample(6), deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
        assert (p.pushed, p.acked, p.reconnects) == (7, 7, 1)


@pytest.mark.parametrize("commit_when", ["while there is none", "after"])
def test_rows_reserved_when_the_daemon_dies_are_copied_when_they_are_committed(
    fake: FillDaemon, commit_when: str
) -> None:
    steps = Steps()

    def first(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        steps.wait("reserved")

    def second(peer: Peer, filling: Filling) -> None:
        if commit_when == "while there is none":
            steps.wait("committed")
        filling.accept(peer)
        assert until(filling, peer, 1) == [encoded(0)]
        steps.done("resumed all but the reservation")
        if commit_when == "after":
            assert not filling.resumed  # somebody still writes to a place of the first attachment
        assert until(filling, peer, 4) == [encoded(k) for k in range(1, 5)]
        while not filling.resumed:
            filling.take()
        gone(peer)

    fake.serve(first, second)
    with FillProducer(fake.address, "t", session="s") as p:
        p.push(sample(0))
        slots = p.reserve(3)
        slots["image"][:] = [image(k) for k in (1, 2, 3)]
        steps.done("reserved")
        filler = p._open()
        if commit_when == "after":
            steps.wait("resumed all but the reservation")
            while p.reconnects == 0:
                select.select([], [], [], 0.001)
        else:
            while filler._attached is not None:
                select.select([], [], [], 0.001)
        slots["label"][:] = [101, 102, 103]
        slots.commit(deadline=PATIENCE)
        steps.done("committed")
        p.push(sample(4), deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
        assert (p.pushed, p.acked) == (5, 5)


def test_lost_samples(fake: FillDaemon) -> None:
    def first(peer: Peer, filling: Filling) -> None:
        filling.accept(peer, held=5)
        until(filling, peer, 3)

    fake.serve(first, lambda peer, filling: (filling.accept(peer, held=6), None)[1])
    p = FillProducer(fake.address, "t", session="s")
    p.push_batch(many(0, 3))
    with pytest.raises(Lost, match="samples 6 to 7 of session 's'"):
        while True:
            p.flush(deadline=PATIENCE)
            p.push(sample(3), deadline=PATIENCE)
    p.abort()


def test_lost_samples_that_are_gone_on_from(fake: FillDaemon) -> None:
    def first(peer: Peer, filling: Filling) -> None:
        filling.accept(peer, held=5)
        until(filling, peer, 3)

    def second(peer: Peer, filling: Filling) -> None:
        filling.accept(peer, held=6)
        until(filling, peer, 1)
        gone(peer)

    fake.serve(first, second)
    with FillProducer(fake.address, "t", session="s", continue_after_loss=True) as p:
        p.push_batch(many(0, 3))
        p.flush(deadline=PATIENCE)
        while p.reconnects == 0:
            select.select([], [], [], 0.001)
        p.push(sample(3), deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
        assert (p.lost, p.acked) == (2, 4)


def test_another_producer_went_on(fake: FillDaemon) -> None:
    def first(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        until(filling, peer, 1)

    fake.serve(first, lambda peer, filling: (filling.accept(peer, held=2), None)[1])
    p = FillProducer(fake.address, "t", session="s")
    p.push(sample(0))
    with pytest.raises(SessionTaken, match="this producer committed 1"):
        while True:
            p.flush(deadline=PATIENCE)
            p.reserve(1, deadline=PATIENCE).abandon()
    p.abort()


def test_taken_over_while_rows_are_reserved(fake: FillDaemon) -> None:
    steps = Steps()

    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer)
        steps.wait("reserved")
        peer.notice("session_taken", "another one")
        steps.wait("abandoned")
        gone(peer)  # only then: until it has closed, it may write to the place

    fake.serve(script)
    p = FillProducer(fake.address, "t", session="s")
    slots = p.reserve(2)
    steps.done("reserved")
    filler = p._open()
    while filler._error is None:
        select.select([], [], [], 0.001)
    fake_peer_open = filler._left
    assert fake_peer_open is not None and fake_peer_open.sock.fileno() >= 0
    with pytest.raises(SessionTaken):
        slots.commit()
    assert fake_peer_open.sock.fileno() < 0
    steps.done("abandoned")
    p.abort()


def test_forks_and_forgotten_producers(fake: FillDaemon) -> None:
    fake.serve(*[lambda peer, filling: (filling.accept(peer), gone(peer), None)[2]] * 2)
    p = FillProducer(fake.address, "t")
    pid = os.fork()
    if pid == 0:
        try:
            p.reserve(1)
        except Closed:
            os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    p.push(sample(0), deadline=PATIENCE)
    p.abort()
    p = FillProducer(fake.address, "t")
    with pytest.warns(ResourceWarning, match="unclosed <FillProducer"):
        del p
        gc.collect()


NUMBERS = Spec.parse("n:U64,pad:U8[56]")


class Keeping:
    """A daemon that is killed again and again, and keeps its segment or does not."""

    def __init__(self, seed: int, keep: bool) -> None:
        self.dice, self.keep = random.Random(seed), keep
        self.folder = tempfile.TemporaryDirectory(prefix="ingestd-")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.bind(f"{self.folder.name}/sock")
        self.sock.listen()
        self.address = f"unix://{self.folder.name}/sock"
        self.held: list[int] = []
        self.segment = SegmentMaker(NUMBERS, batch_size=8, batches=8)
        self.segments = [self.segment]
        self.pinned: set[int] = set()  # places of an earlier attachment, that may not be reused
        self.kills = 0
        self.over = False
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.sock.settimeout(PATIENCE)
            while True:
                peer = Peer(self.sock.accept()[0])
                with peer.sock:
                    if self.over or self.serve(peer):
                        return
        except BaseException as e:
            self.errors.append(e)

    def free(self, used: list[list[int]]) -> list[int]:
        return [i for i in range(8) if i not in self.pinned and i not in {place for _, place, _ in used}]

    def spoil(self, place: int) -> None:
        """Somebody else's samples go there."""
        at = self.segment.place(place)
        self.segment.memory[at : at + self.segment.stride] = b"\xee" * self.segment.stride

    def serve(self, peer: Peer) -> bool:
        dice = self.dice
        if not self.keep:
            self.segment, self.pinned = SegmentMaker(NUMBERS, batch_size=8, batches=8), set()
            self.segments.append(self.segment)
        for place in self.free([]):
            self.spoil(place)
        f = Filling(self.segment, 7, [], capacity=dice.choice([2, 4, 8]))
        old = set(self.pinned)
        f.accept(peer, held=len(self.held), prefetch=2)
        left = dice.randrange(60)
        ended = False
        while True:
            if len(f.lent) < 2 and (free := self.free(f.lent)) and dice.random() < 0.7:
                f.lend(dice.choice(free))
            if left == 0:
                self.kills += 1
                self.pinned = ({place for _, place, _ in f.lent} | self.pinned) if self.keep else set()
                if dice.random() < 0.5:  # committed, some rows or all, but the producer is not told
                    found = f.take(done=False) or []
                    self.hold(found[: dice.randrange(len(found) + 1)])
                    self.pinned |= {place for _, place, _ in f.lent} if self.keep else set()
                f.close()
                return False
            used = [place for _, place, _ in f.lent]
            found = f.take()
            for place in used:
                if place not in [p for _, p, _ in f.lent]:
                    self.spoil(place)  # published, read, and reused
            if found is None:
                if ended:
                    f.close()
                    return True
                ended = bool(select.select([peer.sock], [], [], 0.001)[0])
                continue
            self.hold(found)
            if f.resumed and old:
                self.pinned -= old
                for place in old - {p for _, p, _ in f.lent}:
                    self.spoil(place)
                old = set()
            left -= 1

    def hold(self, found: list[bytes] | None) -> None:
        for row in found or []:
            (n,) = struct.unpack_from("<Q", row)
            assert row[8:] == bytes([n % 251]) * 56, f"sample {n} is torn"
            self.held.append(n)

    def finish(self) -> None:
        self.over = True  # it may have been killed when the producer had nothing more to say
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:
            last.connect(self.address[7:])
        self.thread.join(PATIENCE)
        self.sock.close()
        self.folder.cleanup()
        for segment in self.segments:
            os.close(segment.fd)
        if self.errors:
            raise self.errors[0]
        assert not self.thread.is_alive()


def numbered(first: int, n: int) -> dict[str, Any]:
    ks = np.arange(first, first + n, dtype=np.uint64)
    return {"n": ks, "pad": np.repeat((ks % np.uint64(251)).astype(np.uint8)[:, None], 56, axis=1)}


@pytest.mark.parametrize("keep", [False, True], ids=["new", "kept"])
@pytest.mark.parametrize("seed", range(6))
def test_model_random_kills_lose_nothing_and_repeat_nothing(seed: int, keep: bool) -> None:
    d = Keeping(seed, keep)
    dice = random.Random(-1 - seed)
    total = 600
    try:
        with FillProducer(d.address, "t", session="s", reconnect=PATIENCE) as p:
            done = 0
            while done < total:
                k = min(dice.randrange(1, 14), total - done)
                what = dice.randrange(6)
                try:
                    if what == 0:
                        p.push({name: a[0] for name, a in numbered(done, 1).items()}, deadline=0.02)
                        done += 1
                    elif what == 1:
                        p.push_batch(numbered(done, k), deadline=0.05)
                        done += k
                    elif what == 2:
                        p.settle(deadline=0.02)
                    elif what == 3:
                        p.reserve(k, deadline=0.02).abandon()
                    else:
                        slots = p.reserve(k, deadline=0.02)
                        k = dice.randrange(1, len(slots) + 1)
                        for name, array in numbered(done, k).items():
                            slots[name][:k] = array
                            if dice.random() < 0.05:
                                select.select([], [], [], 0.01)  # the daemon may die meanwhile
                        slots.commit(k, deadline=PATIENCE)
                        done += k
                except Timeout as e:
                    done += e.taken
                if dice.random() < 0.02:
                    p.flush(deadline=PATIENCE)
                    assert p.acked == done
            p.flush(deadline=PATIENCE)
            assert (p.pushed, p.acked, p.lost) == (total, total, 0)
    finally:
        d.finish()
    assert d.held == list(range(total)), f"seed {seed}"
    assert d.kills > 0
