"""Reader, Batch and Channel against a fake daemon whose memory is laid out by hand."""

from __future__ import annotations

import gc
import json
import os
import struct
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ingestd import (
    AllHeld,
    Batch,
    Closed,
    Difference,
    Ended,
    EndOfStream,
    FormatError,
    LostBatches,
    PeerClosed,
    Reader,
    Refused,
    Released,
    ShuttingDown,
    Spec,
    Timeout,
    _io,
)
from ingestd.channel import Channel
from ingestd.lease import Leased
from ingestd.segment import LEASED, OPEN

from fakes import PATIENCE, SPEC, ChannelMaker, FakeDaemon, Listener, Peer, image, sample

Make = Callable[..., FakeDaemon]


def samples(first: int, n: int = 4) -> list[dict[str, Any]]:
    return [sample(k) for k in range(first, first + n)]


def test_attach_and_one_batch(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t", prefetch=2, client="me") as r:
        assert d.hello == {"role": "train", "table": "t", "byte_order": "little", "prefetch": 2, "client": "me"}
        assert (r.table, r.trainer, r.prefetch, r.batch_size, r.spec) == ("t", 5, 2, 4, SPEC)
        d.deliver(0, samples(0))
        with r.next(deadline=PATIENCE) as batch:
            assert (batch.seq, batch.count, batch.place, batch.released) == (0, 4, 0, False)
            assert r.held == 1
            assert np.array_equal(batch["image"], np.stack([image(k) for k in range(4)]))
            assert batch["label"].tolist() == [100, 101, 102, 103]
            assert batch.number.tolist() == [0, 1, 2, 3]
            assert batch.stream.tolist() == [1] * 4
            assert batch.arrival.tolist() == [1_700_000_001_000_000_000 + k for k in range(4)]
            assert list(batch.tree) == ["image", "label"]
            assert batch.tree["label"] is batch.tree["label"]
            assert [a.dtype.name for a in batch.leaves] == ["float32", "int16"]
            assert d.channel.given() == []
        assert batch.released and r.held == 0
        assert d.channel.given() == [(0, 0)]
    assert r.closed
    assert d.detached.wait(PATIENCE)


def test_arrays_are_the_memory_itself_and_read_only(daemon: Make) -> None:
    d = daemon()
    with Reader(f"shm://{d.address[7:]}", "t") as r:
        d.deliver(4, samples(0, 3), place=2)
        with r.next(deadline=PATIENCE) as batch:
            for array in [*batch.leaves, batch.stream, batch.number, batch.arrival]:
                assert array.ctypes.data % 64 == 0
                assert array.flags.c_contiguous and not array.flags.writeable and len(array) == 3
                with pytest.raises(ValueError, match="read-only"):
                    array[0] = 0
                with pytest.raises(ValueError):
                    array.flags.writeable = True
            label = batch["label"]
            # The daemon never writes into a leased batch; here it does, to show that nothing was copied.
            at = d.segment.place(2) + d.segment.columns[4]
            struct.pack_into("<h", d.segment.memory, at, -7)
            assert label[0] == -7
            mine = batch.copy()
            assert mine["label"].flags.writeable and mine["label"].flags.owndata
            struct.pack_into("<h", d.segment.memory, at, 5)
            assert mine["label"][0] == -7
            with pytest.raises(KeyError, match="no leaf 'x'; there are 'image', 'label'"):
                batch["x"]
            del label, array


def test_a_released_batch_says_so(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        batch = r.next(deadline=PATIENCE)
        batch.release()
        batch.release()
        uses: list[Callable[[], object]] = [
            lambda: batch["image"], lambda: batch.leaves, lambda: batch.tree, lambda: batch.stream,
            lambda: batch.number, lambda: batch.arrival, batch.copy, batch.__enter__,
        ]  # fmt: skip
        for use in uses:
            with pytest.raises(Released, match="batch 0 was released"):
                use()
        assert "released" in repr(batch)
        assert d.channel.given() == [(0, 0)]


def test_arrays_kept_after_the_release_are_named(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t", check=False) as r:
        d.deliver(0, samples(0))
        batch = r.next(deadline=PATIENCE)
        kept = batch["image"][1:, 0].T[::-1]  # a view of a view
        also = memoryview(batch.stream)
        batch["label"].sum()
        with (
            pytest.warns(ResourceWarning, match="batch 0 .* arrays of 'image', stream are still in use") as caught,
            batch,
        ):
            pass
        assert caught[0].filename == __file__
        del kept, also
        d.deliver(1, samples(4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with r.next(deadline=PATIENCE) as batch:
                tree = batch.tree
                total = tree["image"].sum() + batch.copy()["label"].sum()
                del tree
        assert total > 0


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_checked_releases_turn_kept_arrays_to_junk(daemon: Make, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d = daemon()
    if how == "environment":
        monkeypatch.setenv("INGESTD_CHECK", "1")
    with Reader(d.address, "t", check=True if how == "argument" else None) as r:
        for number in range(4):  # places are used again
            d.deliver(number, samples(number))
            batch = r.next(deadline=PATIENCE)
            label, images = batch["label"], batch["image"]
            assert label.ctypes.data % 64 == 0 and label[0] == 100 + number
            with pytest.warns(ResourceWarning, match="'image', 'label'"):
                batch.release()
            assert label.view(np.uint8).tolist() == [0xCC] * 8
            assert set(images.reshape(-1).view(np.uint8).tolist()) == {0xCC}
            with pytest.raises(ValueError, match="read-only"):
                label[0] = 1
            del label, images
            # Nobody else's memory was touched.
            assert struct.unpack_from("<h", d.segment.memory, d.segment.place(number % 3) + d.segment.columns[4]) == (
                100 + number,
            )


def test_several_batches_at_once_and_not_too_many(daemon: Make) -> None:
    d = daemon(prefetch=2)
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        d.deliver(1, samples(4))
        a, b = r.next(deadline=PATIENCE), r.next(deadline=PATIENCE)
        assert (a["label"][0], b["label"][0], r.held) == (100, 104, 2)
        with pytest.raises(AllHeld, match="holds 2 batches and may hold 2; release one"):
            r.next(deadline=PATIENCE)
        b.release()
        assert d.channel.given() == [(1, 1)]
        with pytest.raises(Timeout):
            r.next(deadline=0)
        d.deliver(2, samples(8))
        with r.next(deadline=PATIENCE) as c:
            assert c["label"].tolist() == [108, 109, 110, 111]
            assert a["label"][0] == 100
        a.release()
        assert d.channel.given() == [(2, 2), (0, 0)]


def test_timeout_is_not_the_end(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        with pytest.raises(Timeout, match="waiting for a batch of table 't'") as e:
            r.next(deadline=0)
        assert isinstance(e.value, TimeoutError)
        with pytest.raises(Timeout):
            r.next(deadline=0.01)
        d.deliver(0, samples(0))
        d.channel.close()
        with r.next(deadline=PATIENCE) as batch:
            assert batch.seq == 0
        for _ in range(2):
            with pytest.raises(EndOfStream, match="table 't' is closed"):
                r.next()
        d.die()
        with pytest.raises(EndOfStream):
            r.next()


def test_a_reader_that_sleeps_is_woken(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        for number in range(20):
            found: list[Batch] = []
            thread = threading.Thread(target=lambda found=found: found.append(r.next()))
            thread.start()
            while not d.channel.waiting():
                os.sched_yield()
            d.deliver(number, samples(number))
            thread.join(PATIENCE)
            assert found[0].seq == number
            assert not d.channel.waiting()
            found[0].release()
            assert d.channel.given() == [(number, number % 3)]


def test_the_daemon_is_woken_only_where_it_sleeps(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        r.next(deadline=PATIENCE).release()
        assert not d.channel.signalled()
        d.channel.set_daemon_waiting()
        d.deliver(1, samples(4))
        r.next(deadline=PATIENCE).release()
        assert d.channel.signalled()


def test_iteration_releases_and_ends(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        d.deliver(1, samples(4, 2))
        d.channel.close()
        seen = []
        for batch in r:
            seen.append((batch.seq, batch.count, int(batch["label"].sum())))
        assert seen == [(0, 4, 406), (1, 2, 209)]
        assert batch.released
        assert d.channel.given() == [(0, 0), (1, 1)]


def test_leaving_an_iteration_releases(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        batch = next(iter(r))
        gc.collect()
        assert batch.released and d.channel.given() == [(0, 0)]


@pytest.mark.parametrize("while_waiting", [False, True])
def test_the_daemon_ends_the_attachment(daemon: Make, while_waiting: bool) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        held = r.next(deadline=PATIENCE)
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                r.next()
            except Exception as e:
                caught.append(e)

        thread = threading.Thread(target=wait)
        if while_waiting:
            thread.start()
            while not d.channel.waiting():
                os.sched_yield()
        d.die(lambda peer: peer.notice("shutting_down", "the daemon is stopping"))
        if not while_waiting:
            thread.start()
        thread.join(PATIENCE)
        assert isinstance(caught[0], Ended)
        assert (caught[0].code, caught[0].reason) == ("shutting_down", "the daemon is stopping")
        with pytest.raises(Closed, match="ended the attachment"):
            held.copy()
        with pytest.raises(Closed):
            r.next()


def test_the_daemon_dies(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.die()
        with pytest.raises(PeerClosed, match="went away"):
            r.next()


@pytest.mark.parametrize("junk", [b"\0", b"\0\xff\xff\xff\xffxx", b"\x01", b"\0\2\0\0\0[]"])
def test_the_daemon_dies_talking_junk(daemon: Make, junk: bytes) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.die(lambda peer: peer.sock.sendall(junk))
        with pytest.raises(PeerClosed, match="went away"):
            r.next()


def test_closing_the_reader_ends_its_batches(daemon: Make) -> None:
    d = daemon()
    r = Reader(d.address, "t")
    d.deliver(0, samples(0))
    batch = r.next(deadline=PATIENCE)
    with batch:
        r.close()
        r.close()
        with pytest.raises(Closed, match="reader of this batch was closed"):
            batch["image"]
    with pytest.raises(Closed):
        batch.release()
    with pytest.raises(Closed, match="the reader is closed"):
        r.next()
    assert d.channel.given() == []


@pytest.mark.parametrize(
    ("number", "place", "count"), [(0, 3, 4), (0, 0xFFFFFFFF, 4), (0, 0, 0), (0, 0, 5), (1, 0, 4), (0, 1, 4), (0, 0, 3)]
)
def test_descriptors_are_checked(
    daemon: Make, number: int, place: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_io, "STALE_S", 0.01)
    d = daemon()
    with Reader(d.address, "t") as r:
        d.segment.fill(0, 0, samples(0))
        d.channel.push(number, place, count)
        with pytest.raises(FormatError, match="the daemon delivered"):
            r.next(deadline=PATIENCE)


def test_a_batch_must_be_leased(daemon: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_io, "STALE_S", 0.01)
    d = daemon()
    with Reader(d.address, "t") as r:
        d.segment.fill(0, 0, samples(0), phase=3)
        d.channel.push(0, 0, 4)
        with pytest.raises(FormatError, match="phase=3"):
            r.next(deadline=PATIENCE)


def test_a_batch_taken_back_while_held(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        with pytest.raises(PeerClosed, match="batch 0 back while it was held"), r.next(deadline=PATIENCE):
            d.segment.state(0, 3, 4, 4)


@pytest.mark.parametrize("dies", ["before", "later", "later, with a notice"])
@pytest.mark.parametrize("phase", [OPEN, LEASED])
def test_a_batch_that_a_dead_daemon_delivered(
    daemon: Make, dies: str, phase: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_io, "STALE_S", PATIENCE)
    d = daemon()

    def die() -> None:
        while dies != "before" and d.channel.words[(d.channel.deliver + 64) // 8] == 0:
            os.sched_yield()  # until the descriptor was taken
        d.die((lambda peer: peer.notice("shutting_down", "it stops")) if "notice" in dies else None)

    with Reader(d.address, "t") as r:
        d.segment.fill(0, 3, samples(0), phase=phase)  # by its successor
        d.channel.push(0, 0, 4)
        thread = threading.Thread(target=die)
        thread.start()
        if dies == "before":
            thread.join(PATIENCE)
        with pytest.raises(PeerClosed) as e:
            r.next(deadline=PATIENCE)
        thread.join(PATIENCE)
        assert isinstance(e.value, ShuttingDown) == ("notice" in dies)
        assert r.closed


def test_intact_until_the_place_is_used_again(daemon: Make) -> None:
    d = daemon(prefetch=3)
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        d.deliver(1, samples(4))
        lost, kept = r.next(deadline=PATIENCE), r.next(deadline=PATIENCE)
        label = kept["label"]
        assert lost.intact and kept.intact
        d.die()
        with pytest.raises(PeerClosed):
            r.next(deadline=PATIENCE)
        assert lost.intact and kept.intact and label[0] == 104
        d.segment.fill(0, 3, samples(12))
        assert not lost.intact and kept.intact


def test_intact_ends_with_the_lease(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        batch = r.next(deadline=PATIENCE)
        keeps = batch.dlpack("image")
        batch.release()
        assert batch.intact
        del keeps
        assert d.channel.given() == [(0, 0)] and not batch.intact


@pytest.mark.parametrize("how", ["numpy", "other libraries"])
def test_a_torn_copy_says_so(daemon: Make, how: str) -> None:
    d = daemon()

    def copy(leased: Leased, copy: bool) -> Any:
        d.segment.state(0, 3, OPEN, 4)
        return leased.array().copy()

    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        batch = r.next(deadline=PATIENCE)
        if how == "numpy":
            assert batch.copy()["label"][0] == 100
            d.segment.state(0, 3, OPEN, 4)
        with pytest.raises(PeerClosed, match=r"took batch 0 back .* may be torn"):
            batch.copy() if how == "numpy" else batch._converted(None, True, copy)
        if how != "numpy":
            with pytest.raises(PeerClosed, match="may be torn"):
                batch._converted("label", True, copy)
        with pytest.raises(PeerClosed, match="batch 0 back while it was held"):
            batch.release()


def test_counts_of_the_channel_are_checked(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.channel.words[d.channel.deliver // 8] = 9  # the capacity is 8
        with pytest.raises(FormatError, match="9 descriptors produced after 0 consumed"):
            r.next(deadline=PATIENCE)
        d.channel.words[d.channel.deliver // 8] = 1 << 63
        with pytest.raises(FormatError):
            r.next(deadline=PATIENCE)


def test_refusals(socket_path: str) -> None:
    def script(peer: Peer) -> None:
        assert peer.hello()["spec"] == Spec.parse("x:U8").to_dict()
        diff = [{"leaf": "x", "got": "U8", "want": ""}]
        peer.reply({"code": "spec_mismatch", "reason": "differs", "diff": diff, "spec": SPEC.to_dict()}, status=1)

    listener = Listener.unix(socket_path)
    listener.script(script)
    with pytest.raises(Refused, match="differs") as refused:
        Reader(listener.address, "t", "x:U8")
    assert refused.value.diff == [Difference("x", "U8", "")]
    assert refused.value.spec is not None and Spec.parse(refused.value.spec) == SPEC
    listener.finish()
    with pytest.raises(PeerClosed, match="is ingestd running there"):
        Reader(listener.address, "t")
    with pytest.raises(ValueError, match="write tcp://host:port"):
        Reader("udp://127.0.0.1:1", "t")


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({"prefetch": 0}, "prefetch = 0"),
        ({"prefetch": 9}, "prefetch = 9, want a whole number of 1 to 8"),
        ({"segment_bytes": 1 << 40}, "the daemon said 1099511627776"),
        ({"fingerprint": "00"}, "not the one that the daemon agreed to"),
        ({"batch_size": 5}, "batch_size 4, the daemon said 5"),
        ({"batches": 4}, "batches 3, the daemon said 4"),
    ],
)
def test_replies_that_do_not_fit_the_memory(daemon: Make, reply: dict[str, Any], says: str) -> None:
    d = daemon(**{k: v for k, v in reply.items() if k not in ("batches", "batch_size", "prefetch")})
    d.over.update(reply)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError, match=says):
        Reader(d.address, "t")
    assert d.detached.wait(PATIENCE)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the fake's own end of the connection


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_wrong_number_of_descriptors(daemon: Make, n: int) -> None:
    d = daemon()
    fds = (d.fds * 2)[:n]
    d.fds = fds
    with pytest.raises(FormatError, match=f"passed {n} descriptors, want 4"):
        Reader(d.address, "t")


def test_no_descriptor_leaks(daemon: Make) -> None:
    d = daemon()
    before = set(os.listdir("/proc/self/fd"))
    with Reader(d.address, "t", check=True) as r:
        for number in range(6):
            d.deliver(number, samples(0))
            with r.next(deadline=PATIENCE) as batch:
                batch.copy()
        del batch
    del r
    d.detached.wait(PATIENCE)
    d.listener.threads[0].join(PATIENCE)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_dropped_readers_and_batches_warn(daemon: Make) -> None:
    d = daemon()
    r = Reader(d.address, "t")
    d.deliver(0, samples(0))
    batch = r.next(deadline=PATIENCE)
    with pytest.warns(ResourceWarning, match="batch 0 was dropped without a release"):
        del batch
    assert r.held == 1
    with pytest.warns(ResourceWarning, match="unclosed <Reader"):
        del r
        gc.collect()
    assert d.detached.wait(PATIENCE)


def test_a_forked_child_may_not_read_and_does_not_hold_the_attachment(daemon: Make) -> None:
    d = daemon()
    r = Reader(d.address, "t")
    d.deliver(0, samples(0))
    batch = r.next(deadline=PATIENCE)
    (answer_r, answer_w), (stay, leave) = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if pid == 0:
        said = []
        for use in (r.next, lambda: batch["image"], batch.release):
            try:
                use()
            except Closed as e:
                said.append(str(e))
        r.close()
        os.write(answer_w, json.dumps(said).encode())
        os.close(answer_w)
        os.close(leave)
        os.read(stay, 1)
        os._exit(0)
    os.close(answer_w)
    with os.fdopen(answer_r) as answer:
        said = json.load(answer)
    assert len(said) == 3 and all("parent process" in s for s in said)
    assert batch["label"][0] == 100  # the parent's is untouched
    batch.release()
    assert d.channel.given() == [(0, 0)]
    r.close()
    assert d.detached.wait(PATIENCE)  # although the child lives on
    os.close(leave)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(stay)


def test_next_and_release_in_different_threads(daemon: Make) -> None:
    d = daemon(prefetch=2)
    total = 60
    with Reader(d.address, "t") as r:
        handed: list[Batch] = []
        ready = threading.Semaphore(0)
        room = threading.Semaphore(1)

        def fetch() -> None:
            for _ in range(total):
                room.acquire()
                handed.append(r.next())
                ready.release()

        thread = threading.Thread(target=fetch)
        thread.start()
        given = 0
        for number in range(total):
            d.deliver(number, samples(number))
            assert ready.acquire(timeout=PATIENCE)
            batch = handed.pop()
            assert batch.seq == number and batch["label"][0] == 100 + number
            room.release()
            batch.release()
            given += len(d.channel.given())
        thread.join(PATIENCE)
        assert given == total


# -- the channel by itself -------------------------------------------------------------------------------------------


def make_channel(maker: ChannelMaker) -> Channel:
    return Channel(maker.memory, maker.to_trainer, maker.to_daemon)


def test_queues_wrap() -> None:
    maker = ChannelMaker(capacity=2)
    channel = make_channel(maker)
    for n in range(50):
        maker.push(n, n % 3, 4)
        if n % 2:
            maker.push(n + 100, 1, 4)
            assert channel.take() == (n, n % 3, 4)
            assert channel.take() == (n + 100, 1, 4)
            channel.give_back(n + 100, 1)
        else:
            assert channel.take() == (n, n % 3, 4)
        assert channel.take() is None
        channel.give_back(n, n % 3)
        assert maker.given()[-1] == (n, n % 3)
    assert not channel.drained()
    maker.close()
    assert channel.drained()


def test_a_daemon_that_takes_nothing_back() -> None:
    maker = ChannelMaker(capacity=2)
    channel = make_channel(maker)
    channel.give_back(0, 0)
    channel.give_back(1, 1)
    with pytest.raises(FormatError, match="does not take descriptors back"):
        channel.give_back(2, 2)
    maker.words[(maker.giveback + 64) // 8] = 3
    with pytest.raises(FormatError, match="3 descriptors consumed of 2"):
        channel.give_back(2, 2)


@pytest.mark.parametrize(
    ("form", "offset", "value", "says"),
    [
        ("<B", 0, 0, "a channel with b'INGDCHN1'"),
        ("<I", 8, 2, "version 2"),
        ("<I", 12, 0, "capacity is 0"),
        ("<I", 12, 1, "capacity is 1"),
        ("<I", 12, 6, "capacity is 6"),
        ("<I", 12, 1 << 17, "capacity is 131072"),
        ("<I", 12, 16, "does not fit"),
        ("<Q", 16, 0, "deliver at 0"),
        ("<Q", 16, 65, "deliver at 65"),
        ("<Q", 16, 1 << 40, "deliver"),
        ("<Q", 24, 1 << 63, "giveback"),
        ("<Q", 24, 128, "overlap"),
        ("<Q", 32, 1 << 40, "says it has"),
        ("<Q", 32, 63, "says it has"),
    ],
)
def test_channel_headers_are_checked(form: str, offset: int, value: int, says: str) -> None:
    maker = ChannelMaker(capacity=8)
    struct.pack_into(form, maker.memory, offset, value)
    with pytest.raises(FormatError, match=says):
        make_channel(maker)
    with pytest.raises(FormatError, match="its header alone"):
        Channel(bytearray(63), -1, -1)


def test_a_group_and_what_it_lost(daemon: Make) -> None:
    d = daemon(group="eval")
    with Reader(d.address, "t", group="eval") as r:
        assert d.hello["group"] == "eval" and r.group == "eval"
        d.deliver(0, samples(0))
        d.channel.push(1, 5, 0)  # batches 1 to 5 were dropped unread
        d.deliver(6, samples(4), place=1)
        with r.next(deadline=PATIENCE) as batch:
            assert batch.seq == 0
        with pytest.raises(LostBatches, match="group 'eval' was too slow: batch 1 to 5 was dropped") as lost:
            r.next(deadline=PATIENCE)
        assert (lost.value.group, lost.value.first, lost.value.n) == ("eval", 1, 5)
        assert (r.held, r.lost) == (0, 5)
        with r.next(deadline=PATIENCE) as batch:
            assert batch.seq == 6
        assert d.channel.given() == [(0, 0), (6, 1)]  # a loss is not given back
        d.channel.push(7, 0, 0)
        with pytest.raises(FormatError, match="neither a batch nor a loss"):
            r.next(deadline=PATIENCE)


def test_losses_that_are_only_counted(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t", on_lost="count") as r:
        assert r.group == "default"
        d.channel.push(0, 1, 0)
        d.channel.push(1, 2, 0)
        d.deliver(3, samples(0))
        d.channel.close()
        assert [batch.seq for batch in r] == [3]
        assert r.lost == 3
    with pytest.raises(ValueError, match="on_lost"):
        Reader(d.address, "t", on_lost="ignore")  # type: ignore[arg-type]
