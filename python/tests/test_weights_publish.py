"""Publishers against a fake daemon: in place and streamed, every answer and every end, at every stage."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from ingestd import (
    BadSum,
    Closed,
    Ended,
    Error,
    Manifest,
    NotWritten,
    OldGeneration,
    PeerClosed,
    Pin,
    Pinned,
    Publisher,
    Refused,
    Released,
    ShuttingDown,
    SpecError,
    Timeout,
)

from fakes import PATIENCE, Listener, Peer
from weights_fakes import (
    MANIFEST,
    digest_of,
    end,
    flat,
    gone,
    hear,
    hear_chunk,
    say,
    sums_of,
    tensors,
)
from weights_table import CHUNK, Table


@pytest.fixture(params=["in place", "streamed", "tcp"])
def table(request: pytest.FixtureRequest, socket_path: str) -> Iterator[Table]:
    listener = Listener.tcp() if request.param == "tcp" else Listener.unix(socket_path)
    made = Table(listener, request.param == "in place")
    yield made
    listener.finish()


@pytest.fixture
def place(socket_path: str) -> Iterator[Table]:
    made = Table(Listener.unix(socket_path), True)
    yield made
    made.listener.finish()


def publisher(table: Table, **options: Any) -> Publisher:
    return Publisher(table.address, "w", MANIFEST, in_place=table.in_place, **options)


def test_generations(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.newest = 6
        table.accept(peer)
        for generation in (7, 8, 12):
            table.take(peer, generation)
        assert peer.end() == b""

    table.listener.script(script)
    with publisher(table, client="trainer") as pub:
        assert (pub.publisher, pub.newest, pub.in_place) == (9, 6, table.in_place)
        done = pub.publish(tensors(7), deadline=PATIENCE)
        assert done == (7, digest_of(sums_of(tensors(7))).hex()) and pub.newest == 7
        with pub.begin(deadline=PATIENCE) as draft:
            assert draft.generation == 8
            for name, array in tensors(8).items():
                draft[name][...] = array
        assert draft.published is not None and draft.published.generation == 8
        with pub.begin() as draft:
            for i, (name, array) in enumerate(tensors(12).items()):
                if i % 2:
                    draft.put(name, array)
                else:
                    draft[name][...] = array
    assert pub.closed
    with pytest.raises(Closed):
        pub.begin()


def test_what_is_put_and_then_written_again_is_summed_again(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 3)

    table.listener.script(script)
    with publisher(table) as pub, pub.begin() as draft:
        for name, array in tensors(2).items():
            draft.put(name, array)
        for name, array in tensors(3).items():
            draft[name][...] = array


def test_a_number_of_ones_own(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        asked = hear(peer)
        assert asked == {"op": "begin", "deadline_ms": asked["deadline_ms"], "generation": 5}
        say(peer, op="failed", code="old_generation", reason="generation 5 is not above the newest, which is 9")

    table.listener.script(script)
    with publisher(table) as pub, pytest.raises(OldGeneration, match="not above the newest"):
        pub.publish(tensors(5), generation=5, deadline=PATIENCE)


def test_nothing_is_begun_for_tensors_that_do_not_fit(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        assert peer.end() == b""

    table.listener.script(script)
    with publisher(table) as pub:
        good = tensors(1)
        wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({**good, "more": good["step"]}, KeyError, "no tensor 'more'"),
            ({k: v for k, v in good.items() if k != "step"}, KeyError, "no 'step' to publish"),
            ({**good, "step": np.int32(1)}, SpecError, "'step': got dtype I32"),
            ({**good, "layers.0.b": np.zeros(4, np.int16)}, SpecError, r"shape \[4\], want \[3\]"),
            ({**good, "layers.0.b": np.zeros(3, ">i2")}, SpecError, "big-endian"),
            ({**good, "layers.0.b": "text"}, SpecError, "is a str"),
        ]
        for arrays, error, says in wrong:
            with pytest.raises(error, match=says):
                pub.publish(arrays)


def test_arrays_of_any_memory_order(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 1)

    table.listener.script(script)
    with publisher(table) as pub:
        arrays = {name: np.copy(a, order="F") for name, a in tensors(1).items()}
        arrays["layers.0.b"] = np.repeat(arrays["layers.0.b"], 2)[::2]
        pub.publish(arrays)


def test_what_is_not_written_is_not_published(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.give(peer, 1)
        assert hear(peer) == {"op": "abort"}
        say(peer, op="aborted")
        table.take(peer, 2)

    table.listener.script(script)
    with publisher(table) as pub:
        missing = r"generation 1 has no 'layers.0.b', 'layers.1.w', 'step' yet"
        with pytest.raises(NotWritten, match=missing), pub.begin() as draft:
            draft["layers.0.w"][...] = 1
        with pytest.raises(Released):
            draft["step"]
        with pub.begin() as draft:
            for name, array in tensors(2).items():
                if name == "step":
                    with pytest.raises(NotWritten, match="'step'"):
                        draft.commit()  # it goes on
                draft.put(name, array)


def test_an_exception_gives_the_generation_up(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        for generation in (1, 2, 3):
            table.give(peer, generation)
            assert hear(peer) == {"op": "abort"}
            say(peer, op="aborted")
        table.take(peer, 4)

    table.listener.script(script)
    with publisher(table) as pub:
        with pytest.raises(ZeroDivisionError), pub.begin() as draft:
            draft["step"][...] = 1 // 0
        assert draft.published is None
        draft = pub.begin()
        with pytest.raises(Error, match="generation 2 is being written"):
            pub.begin()
        draft.abort()
        draft.abort()
        for call in (lambda: draft["step"], lambda: draft.put("step", 1), draft.commit, draft.__enter__):
            with pytest.raises(Released, match="committed or given up"):
                call()
        pub.begin()  # and dropped
        pub.publish(tensors(4))


def test_arrays_that_are_kept_after_the_commit(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 1)
        table.give(peer, 2)
        assert hear(peer) == {"op": "abort"}
        say(peer, op="aborted")

    table.listener.script(script)
    with publisher(table) as pub:
        draft = pub.begin()
        for name, array in tensors(1).items():
            draft.put(name, array)
        kept = draft["step"]
        kept[...] = 1
        with pytest.warns(ResourceWarning, match="generation 1 is published while arrays of 'step' are still in use"):
            draft.commit()
        draft = pub.begin()
        kept = draft["step"]
        with pytest.warns(ResourceWarning, match="generation 2 was given up while arrays of 'step'"):
            draft.abort()
        del kept


PINS = [
    {"reader": 3, "client": "slow", "pid": 17, "generation": 5, "since": 1_700_000_000_000_000_000},
    {"reader": 4, "client": "far", "generation": 6, "since": 1_700_000_000_000_000_000, "pid": "x", "addr": "y"},
    "odd",
]


def test_all_places_are_pinned(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        assert 4_000 < hear(peer)["deadline_ms"] <= 5_000
        say(peer, op="waiting", pins=PINS)
        say(peer, op="failed", code="pinned", reason="the deadline passed", pins=PINS)
        assert hear(peer)["deadline_ms"] == 0
        say(peer, op="failed", code="pinned", reason="the deadline passed")
        hear(peer)  # without a deadline it asks again
        say(peer, op="failed", code="pinned", reason="the deadline passed", pins=PINS)
        table.take(peer, 1)

    table.listener.script(script)
    with publisher(table) as pub:
        with pytest.raises(Pinned, match="reader 3 \\('slow', pid 17\\) holds generation 5 since 2023-11-14") as caught:
            pub.begin(deadline=5)
        since = 1_700_000_000_000_000_000
        assert caught.value.pins == [Pin(3, "slow", 17, 5, since), Pin(4, "far", 0, 6, since, "y")]
        assert isinstance(caught.value, Timeout)
        with pytest.raises(Pinned) as caught:
            pub.begin(deadline=0)
        assert caught.value.pins == []
        pub.publish(tensors(1))


@pytest.mark.parametrize(("code", "error"), [("incomplete", NotWritten), ("bad_sum", BadSum), ("odd", Ended)])
def test_a_commit_that_fails(table: Table, code: str, error: type[Error]) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take_unanswered(peer, 1)
        say(peer, op="failed", code=code, reason="it is so")
        table.take(peer, 2)

    table.listener.script(script)
    with publisher(table) as pub:
        with pytest.raises(error, match="it is so"):
            pub.publish(tensors(1), deadline=PATIENCE)
        assert pub.publish(tensors(2)).generation == 2


STAGES = ["before the place", "after the place", "at the commit"]


@pytest.mark.parametrize("notice", ["", "shutting_down", "bad_chunk"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_daemon_ends_it_at_every_stage(table: Table, stage: str, notice: str) -> None:
    """The call says how; the next one connects again."""

    def script(peer: Peer) -> None:
        table.accept(peer)
        if stage == "before the place":
            hear(peer)
        elif stage == "after the place":
            table.give(peer, 1)
        else:
            table.take_unanswered(peer, 1)
        if notice:
            end(peer, notice, "it is so")
            peer.sock.shutdown(socket.SHUT_WR)
            gone(peer)

    def again(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 2)

    threads = [table.listener.script(script)]
    errors = {"": PeerClosed, "shutting_down": ShuttingDown, "bad_chunk": Ended}
    with publisher(table) as pub:
        with pytest.raises(errors[notice], match="it is so" if notice else "closed|failed") as caught:
            pub.publish(tensors(1), deadline=PATIENCE)
        assert getattr(caught.value, "code", "") == notice
        threads[0].join(PATIENCE)
        table.listener.script(again)
        assert pub.publish(tensors(2), deadline=PATIENCE).generation == 2


def test_a_draft_whose_connection_is_gone(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.give(peer, 1)
        end(peer, "shutting_down", "later")

    def again(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 2)

    first = table.listener.script(script)
    with publisher(table) as pub:
        draft = pub.begin(deadline=PATIENCE)
        first.join(PATIENCE)
        for name, array in tensors(1).items():
            draft.put(name, array)
        with pytest.raises(ShuttingDown, match="later"):
            draft.commit(deadline=PATIENCE)
        table.listener.script(again)
        pub.publish(tensors(2), deadline=PATIENCE)


def test_a_notice_while_a_generation_is_sent(socket_path: str) -> None:
    """The daemon says why without having read all that was sent."""
    arrays = {"a": np.zeros(32 << 20, np.uint8)}
    listener = Listener.unix(socket_path)

    def script(peer: Peer) -> None:
        peer.hello()
        peer.reply({"table": "w", "publisher": 9, "newest": 0, "chunk_bytes": 1 << 20})
        hear(peer)
        say(peer, op="place", generation=1, place=0)
        peer.exactly(1 << 18)
        text = json.dumps({"code": "bad_chunk", "reason": "tensor a at byte 0"}).encode()
        for part in (struct.pack("<I", 0) + b"\0", struct.pack("<I", len(text)) + text):
            peer.sock.sendall(part)  # in two parts
        gone(peer)

    listener.script(script)
    pub = Publisher(listener.address, "w", arrays, in_place=False)
    with pub, pytest.raises(Ended, match="tensor a at byte 0"):
        pub.publish(arrays, deadline=PATIENCE)
    listener.finish()


def test_a_daemon_that_reads_nothing(socket_path: str) -> None:
    arrays = {"a": np.zeros(32 << 20, np.uint8)}
    listener, over = Listener.unix(socket_path), threading.Event()

    def script(peer: Peer) -> None:
        peer.hello()
        peer.reply({"table": "w", "publisher": 9, "newest": 0, "chunk_bytes": 1 << 20})
        hear(peer)
        say(peer, op="place", generation=1, place=0)
        assert over.wait(PATIENCE)

    listener.script(script)
    with Publisher(listener.address, "w", arrays, in_place=False) as pub:
        with pytest.raises(Timeout, match="sending generation 1"):
            pub.publish(arrays, deadline=0.2)
        over.set()
    listener.finish()


def refuse(listener: Listener, code: str) -> threading.Thread:
    def script(peer: Peer) -> None:
        peer.hello()
        with contextlib.suppress(BrokenPipeError):  # it may have no patience left
            peer.reply({"code": code, "reason": f"this is {code}"}, status=1)

    return listener.script(script)


def test_refusals(table: Table) -> None:
    for code in ("wrong_kind", "unknown_table", "bad_option", *(["not_permitted"] if table.in_place else [])):
        refuse(table.listener, code)
        with pytest.raises(Refused, match=f"this is {code}") as caught:
            publisher(table)
        assert caught.value.code == code


def test_the_publisher_before_this_one_may_end_yet(table: Table) -> None:
    def then(peer: Peer) -> None:
        table.accept(peer)
        assert peer.end() == b""

    refuse(table.listener, "publisher_active")
    with pytest.raises(Refused) as caught:
        publisher(table, deadline=0.2)
    assert caught.value.code == "publisher_active"
    refused = refuse(table.listener, "publisher_active")
    threading.Thread(target=lambda: (refused.join(PATIENCE), table.listener.script(then))).start()
    publisher(table, deadline=PATIENCE).close()


def test_who_may_not_write_in_place_sends(socket_path: str) -> None:
    table = Table(Listener.unix(socket_path), False)

    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 1)

    def first(peer: Peer) -> None:
        assert peer.hello()["in_place"] is True
        peer.reply({"code": "not_permitted", "reason": "no"}, status=1)
        table.listener.script(script)

    table.listener.script(first)
    with Publisher(table.address, "w", tensors(0)) as pub:
        assert not pub.in_place and pub.manifest == MANIFEST
        pub.publish(tensors(1))
    table.listener.finish()


def test_who_may_write_in_place_no_more_sends(place: Table) -> None:
    """After a reconnect: into memory of its own, not into what it had mapped."""

    def first(peer: Peer) -> None:
        place.accept(peer)
        place.take(peer, 1)

    def refusing(peer: Peer) -> None:
        assert peer.hello()["in_place"] is True
        place.in_place = False
        place.listener.script(streamed)
        peer.reply({"code": "not_permitted", "reason": "no more"}, status=1)

    def streamed(peer: Peer) -> None:
        place.accept(peer)
        place.take(peer, 2)

    thread = place.listener.script(first)
    with Publisher(place.address, "w", MANIFEST) as pub:
        pub.publish(tensors(1))
        before = bytes(place.maker.memory)
        thread.join(PATIENCE)
        with pytest.raises(PeerClosed):
            pub.publish(tensors(2), deadline=PATIENCE)
        place.listener.script(refusing)
        with pub.begin(deadline=PATIENCE) as draft:
            for name, array in tensors(2).items():
                draft[name][...] = array
        assert not pub.in_place
    place.maker.word(place.maker.place(2), struct.unpack_from("<Q", before, place.maker.place(2))[0])
    assert bytes(place.maker.memory) == before


def test_random_manifests_are_cut_into_right_chunks(socket_path: str) -> None:
    dice = random.Random(20261121)
    listener = Listener.unix(socket_path)
    for _ in range(20):
        sizes = [dice.choice([0, 1, 3, 255, 256, 257, 65_536, 65_537, 200_000]) for _ in range(dice.randrange(1, 30))]
        arrays = {f"t{i}": np.frombuffer(dice.randbytes(n), np.uint8) for i, n in enumerate(sizes)}
        manifest = Manifest.from_arrays(arrays)

        def script(peer: Peer, manifest: Manifest = manifest, arrays: dict[str, Any] = arrays) -> None:
            peer.hello()
            peer.reply({"table": "w", "publisher": 9, "newest": 0, "chunk_bytes": CHUNK})
            hear(peer)
            say(peer, op="place", generation=1, place=0)
            data = bytearray(manifest.data_bytes)
            while hear_chunk(peer, manifest, 1, 9, data):
                pass
            hear(peer)
            assert bytes(data) == flat(arrays, manifest)
            say(peer, op="published", generation=1, digest="")

        listener.script(script)
        with Publisher(listener.address, "w", manifest, in_place=False) as pub:
            pub.publish(arrays, deadline=PATIENCE)
    listener.finish()


def test_several_threads_take_turns(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        for _ in range(4):
            table.take(peer, 1)

    table.listener.script(script)
    with publisher(table) as pub, ThreadPoolExecutor(4) as pool:
        done = [pool.submit(pub.publish, tensors(1), PATIENCE) for _ in range(4)]
        assert {one.result(PATIENCE).generation for one in done} == {1}


def test_after_a_fork(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 1)

    table.listener.script(script)
    with publisher(table) as pub:
        draft = pub.begin()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                pub.begin()
            except Closed:
                draft.abort()  # says nothing on the parent's connection
                code = 0
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        for name, array in tensors(1).items():
            draft.put(name, array)
        draft.commit(deadline=PATIENCE)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="unix socket"):
        Publisher("tcp://127.0.0.1:1", "w", MANIFEST, in_place=True)
    with pytest.raises(SpecError):
        Publisher("tcp://127.0.0.1:1", "w", {"a": np.zeros(1, np.complex64)})
    with pytest.raises(PeerClosed, match="is ingestd running"):
        Publisher("unix:///nowhere/at/all", "w", MANIFEST)


def test_an_unclosed_publisher_says_so(table: Table) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        assert peer.end() == b""

    table.listener.script(script)
    pub = publisher(table)
    assert "Publisher" in repr(pub)
    with pytest.warns(ResourceWarning, match="unclosed <Publisher"):
        del pub
