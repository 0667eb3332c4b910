"""What a daemon may not say to a reader over a connection, and what becomes of it: an error, and nothing shown."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from ingestd import FormatError

from fakes import PATIENCE, Listener, Peer
from weights_fakes import MANIFEST, accept_reader, announce, give, gone, say, subscribe, tensors

FIRST = MANIFEST.tensors[0].encoded_bytes
ODD: list[dict[str, Any]] = [
    {"op": "place"},
    {"generation": 0},
    {"generation": 1 << 58},
    {"generation": "1"},
    {"generation": True},
    {"digest": "00"},
    {"digest": "zz" * 32},
    {"digest": None},
    {"digest": "00" * 32},
    {"published": None},
    {"ranges": None},
    {"ranges": [[0]]},
    {"ranges": [[0, "1"]]},
    {"ranges": [[0, -1]]},
    {"ranges": 7},
    {"ranges": [[0, MANIFEST.data_bytes + 256]], "bytes": MANIFEST.data_bytes + 256},
    {"ranges": [[256, MANIFEST.data_bytes - 256]], "bytes": MANIFEST.data_bytes - 256},
    {"bytes": MANIFEST.data_bytes - 1},
    {"from": 1},
    {"from": -1},
    {"base": 1},
    {"base": -1},
]
#: as what differs from generation 1, which is there
ODD_DELTAS: list[dict[str, Any]] = [
    {"base": 3},
    {"ranges": [[0, FIRST]], "bytes": FIRST, "from": 1},
    {"ranges": [[0, FIRST], [0, FIRST]], "bytes": 2 * FIRST},
    {"ranges": [[256, 6], [0, FIRST]], "bytes": 6 + FIRST},
    {"ranges": [[0, 0]], "bytes": 0},
    {"ranges": [[4, FIRST - 4]], "bytes": FIRST - 4},
    {"ranges": [[0, FIRST - 4]], "bytes": FIRST - 4},
    {"ranges": [[0, FIRST + 200]], "bytes": FIRST + 201},
    {"ranges": [[1 << 62, 1 << 62]], "bytes": 1 << 63},
    {"ranges": [[MANIFEST.data_bytes, 256]], "bytes": 256},
]


@pytest.mark.parametrize("odd", ODD)
def test_announcements_that_break_the_rules(tcp: Listener, odd: dict[str, Any]) -> None:
    def script(peer: Peer) -> None:
        accept_reader(peer)
        announce(peer, 1, tensors(1), **odd)
        gone(peer)

    tcp.script(script)
    with subscribe(tcp) as sub, pytest.raises(FormatError):
        sub.wait(deadline=PATIENCE)


@pytest.mark.parametrize("odd", ODD_DELTAS)
def test_differences_that_break_the_rules(tcp: Listener, odd: dict[str, Any]) -> None:
    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        announce(peer, 2, tensors(2), **{"base": 1, "ranges": [], "bytes": 0, **odd})
        gone(peer)

    tcp.script(script)
    with subscribe(tcp) as sub, pytest.raises(FormatError):
        sub.wait(newer_than=1, deadline=PATIENCE)


BYTES: list[Callable[[Peer], None]] = [
    lambda peer: peer.sock.sendall(struct.pack("<I", 1) + b"x"),
    lambda peer: peer.sock.sendall(struct.pack("<I", (4 << 20) + 1) + b"x"),
    lambda peer: peer.sock.sendall(struct.pack("<I", 1 << 31 | 100)),
    lambda peer: peer.sock.sendall(struct.pack("<I", 2) + b"[]"),
    lambda peer: peer.sock.sendall(struct.pack("<I", 2) + b"{x"),
    lambda peer: peer.sock.sendall(struct.pack("<IBI", 0, 1, 2) + b"{}"),
    lambda peer: peer.sock.sendall(struct.pack("<IBI", 0, 0, 65_537)),
    lambda peer: say(peer, op="generation"),
]


@pytest.mark.parametrize("odd", BYTES)
def test_bytes_that_break_the_protocol(tcp: Listener, odd: Callable[[Peer], None]) -> None:
    def script(peer: Peer) -> None:
        accept_reader(peer)
        odd(peer)
        gone(peer)

    tcp.script(script)
    with subscribe(tcp) as sub, pytest.raises(FormatError):
        sub.wait(deadline=PATIENCE)


@pytest.mark.parametrize("manifest", [None, {}, {"tensors": []}, 7])
def test_a_manifest_that_cannot_be_read(tcp: Listener, manifest: Any) -> None:
    def script(peer: Peer) -> None:
        peer.hello()
        peer.reply({"table": "w", "reader": 4, "newest": 1, "manifest": manifest})
        gone(peer)

    tcp.script(script)
    with pytest.raises(FormatError, match="manifest of the table"):
        subscribe(tcp)
