"""What a daemon may not say to a publisher, and what becomes of it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ingestd import FormatError, Manifest, Publisher, Tensor

from fakes import PATIENCE, Listener, Peer
from weights_fakes import MANIFEST, WeightsMaker, flat, gone, hear, say, tensors
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


ODD: list[tuple[str, Callable[[Peer], None]]] = [
    ("begin", lambda peer: say(peer, op="published", generation=1)),
    ("begin", lambda peer: say(peer, op="place")),
    ("begin", lambda peer: say(peer, op="place", generation=0, place=0)),
    ("begin", lambda peer: say(peer, op="place", generation=True, place=0)),
    ("begin", lambda peer: say(peer, op="place", generation=1, place=-1)),
    ("begin", lambda peer: say(peer, nothing=1)),
    ("begin", lambda peer: peer.sock.sendall(struct.pack("<I", 1) + b"x")),
    ("begin", lambda peer: peer.sock.sendall(struct.pack("<I", 65_537) + b"x" * 100)),
    ("begin", lambda peer: peer.sock.sendall(struct.pack("<I", 2) + b"[]")),
    ("begin", lambda peer: peer.sock.sendall(struct.pack("<I", 2) + b"\xff\xff")),
    ("begin", lambda peer: peer.sock.sendall(struct.pack("<I", 0) + b"\x01")),
    ("begin", lambda peer: peer.sock.sendall(struct.pack("<IBI", 0, 0, 65_537))),
    ("commit", lambda peer: say(peer, op="place", generation=1, place=0)),
    ("commit", lambda peer: say(peer, op="published", generation=2, digest="")),
    ("commit", lambda peer: say(peer, op="published")),
    ("abort", lambda peer: say(peer, op="published", generation=1)),
]


@pytest.mark.parametrize(("stage", "odd"), ODD)
def test_answers_that_break_the_protocol(table: Table, stage: str, odd: Callable[[Peer], None]) -> None:
    def script(peer: Peer) -> None:
        table.accept(peer)
        if stage == "begin":
            hear(peer)
        elif stage == "commit":
            table.take_unanswered(peer, 1)
        else:
            table.give(peer, 1)
            hear(peer)
        odd(peer)
        gone(peer)

    table.listener.script(script)
    with publisher(table) as pub, pytest.raises(FormatError):
        if stage == "abort":
            pub.begin(deadline=PATIENCE).abort()
        else:
            pub.publish(tensors(1), deadline=PATIENCE)


def test_a_place_that_readers_see(place: Table) -> None:
    """A daemon that gives a place that it has not taken is not written into."""

    def script(peer: Peer) -> None:
        place.accept(peer)
        hear(peer)
        place.maker.publish(4, place=1)
        say(peer, op="place", generation=5, place=1)
        gone(peer)

    def other(peer: Peer) -> None:
        place.accept(peer)
        hear(peer)
        say(peer, op="place", generation=5, place=3)
        gone(peer)

    for run, says in ((script, "place 1, which holds generation 4"), (other, "place 3, the segment has 3")):
        place.listener.script(run)
        with publisher(place) as pub, pytest.raises(FormatError, match=says):
            pub.publish(tensors(5), deadline=PATIENCE)
    maker = place.maker
    assert bytes(maker.memory[maker.place(1) + maker.data_offset :][: MANIFEST.data_bytes]) == flat(tensors(4))


@pytest.mark.parametrize(
    ("over", "fds", "says"),
    [
        ({"segment_bytes": 1 << 40}, 1, "the daemon said"),
        ({"segment_bytes": None}, 1, "segment_bytes"),
        ({"publisher": -1}, 1, "publisher"),
        ({"newest": "x"}, 1, "newest"),
        ({"chunk_bytes": 65_535}, 1, "chunk_bytes"),
        ({"chunk_bytes": (64 << 20) + 1}, 1, "chunk_bytes"),
        ({}, 2, "passed 2 descriptors"),
    ],
)
def test_a_daemon_of_another_kind(place: Table, over: dict[str, Any], fds: int, says: str) -> None:
    def script(peer: Peer) -> None:
        peer.hello()
        body = {"table": "w", "publisher": 9, "newest": 0, "chunk_bytes": CHUNK, "segment_bytes": place.maker.bytes}
        peer.reply({**body, **over}, fds=[place.maker.fd] * fds)
        assert peer.end() == b""

    place.listener.script(script)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError, match=says):
        publisher(place)
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "descriptors were left open"  # the script's


def test_a_segment_of_another_manifest(place: Table) -> None:
    place.maker = WeightsMaker(Manifest([Tensor("other", "U8")]))

    def script(peer: Peer) -> None:
        peer.hello()
        body = {"table": "w", "publisher": 9, "newest": 0, "chunk_bytes": CHUNK, "segment_bytes": place.maker.bytes}
        peer.reply(body, fds=[place.maker.fd])
        assert peer.end() == b""

    place.listener.script(script)
    with pytest.raises(FormatError, match="not the one that this publisher gave"):
        publisher(place)
