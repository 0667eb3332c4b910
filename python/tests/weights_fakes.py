"""The daemon's side of a table of weights, written from docs/weights.md for the tests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from ingestd import Manifest, Subscription
from ingestd.segment import crc32c

from fakes import PATIENCE, Listener, Peer, align

HEADER = struct.Struct("<4sHHQQQQQIIII")


def tensors(k: int) -> dict[str, Any]:
    """The tensors of generation k, which prove themselves. Some are empty, some are no multiple of anything."""
    return {
        "layers.0.w": np.arange(15, dtype=np.float32).reshape(5, 3) + np.float32(100 * k),
        "empty": np.zeros((0, 4), np.float32),
        "layers.0.b": np.full(3, k, np.int16),
        "layers.1.w": (np.arange(70_000, dtype=np.uint32) * np.uint32(k + 1)).reshape(100, 700),
        "step": np.array(k, np.int64),
        "last": np.zeros(0, np.uint8),
    }


MANIFEST = Manifest.from_arrays(tensors(0))


def check(weights: Mapping[str, Any], k: int) -> None:
    """Asserts that these are the tensors of generation k."""
    want = tensors(k)
    assert list(weights) == list(want)
    for name, array in want.items():
        assert weights[name].dtype == array.dtype and weights[name].shape == array.shape
        assert np.array_equal(weights[name], array), name


def flat(arrays: Mapping[str, Any], manifest: Manifest = MANIFEST) -> bytes:
    """All tensors where they lie."""
    data = bytearray(manifest.data_bytes)
    for name, offset in zip(manifest.names, manifest.offsets):
        text = np.ascontiguousarray(arrays[name]).tobytes()
        data[offset : offset + len(text)] = text
    return bytes(data)


def sums_of(arrays: Mapping[str, Any]) -> list[int]:
    return [crc32c(np.ascontiguousarray(a).tobytes()) for a in arrays.values()]


def digest_of(sums: list[int], manifest: Manifest = MANIFEST) -> bytes:
    text = struct.pack(f"<{len(sums)}I", *sums)
    return hashlib.sha256(bytes.fromhex(manifest.fingerprint) + text).digest()


class WeightsMaker:
    """A segment of weights in a memfd, and pages of pins, laid out by hand from docs/weights.md."""

    def __init__(self, manifest: Manifest = MANIFEST, places: int = 3) -> None:
        self.manifest, self.places = manifest, places
        text = manifest.json().encode()
        n = len(manifest.tensors)
        self.places_offset = align(4096 + len(text), 4096)
        self.data_offset = align(64 + 4 * n, 4096)
        self.stride = align(self.data_offset + manifest.data_bytes, 4096)
        self.bytes = self.places_offset + places * self.stride
        fixed = struct.pack(
            "<9Q40x", self.bytes, places, n, 4096, len(text), self.places_offset, self.stride, self.data_offset,
            manifest.data_bytes,
        )  # fmt: skip
        header = b"INGWGTS1" + struct.pack("<II", 1, crc32c(text, crc32c(fixed))) + fixed
        self.fd = os.memfd_create("weights")
        os.truncate(self.fd, self.bytes)
        self.memory = mmap.mmap(self.fd, self.bytes)
        self.memory[: len(header)] = header
        self.memory[4096 : 4096 + len(text)] = text
        self.words = memoryview(self.memory).cast("Q")

    def place(self, index: int) -> int:
        return self.places_offset + index * self.stride

    def word(self, offset: int, value: int) -> None:
        self.words[offset // 8] = value

    def write(self, index: int, generation: int, arrays: Mapping[str, Any], sums: list[int] | None = None) -> None:
        """Puts a generation into a place, and calls it whole."""
        at = self.place(index)
        sums = sums_of(arrays) if sums is None else sums
        self.word(at, 0)
        data = flat(arrays, self.manifest)
        self.memory[at + self.data_offset : at + self.data_offset + len(data)] = data
        self.memory[at + 64 : at + 64 + 4 * len(sums)] = struct.pack(f"<{len(sums)}I", *sums)
        self.memory[at + 16 : at + 48] = digest_of(sums, self.manifest)
        struct.pack_into("<q", self.memory, at + 8, 1_700_000_000_000_000_000 + generation)
        self.word(at + 48, 9)
        self.word(at, generation)

    def publish(self, generation: int, arrays: Mapping[str, Any] | None = None, place: int | None = None) -> None:
        index = generation % self.places if place is None else place
        self.write(index, generation, tensors(generation) if arrays is None else arrays)
        self.word(128, generation << 6 | index)


class Pages:
    """A reader's page of pins."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("pins")
        os.truncate(self.fd, 4096)
        self.memory = mmap.mmap(self.fd, 4096)
        self.words = memoryview(self.memory).cast("Q")

    def pinned(self) -> dict[int, int]:
        """place -> generation"""
        assert not any(self.words[64:])
        return {place: word for place, word in enumerate(self.words[:64]) if word}


class Readers:
    """Serves local readers of one table of weights, each in a thread."""

    def __init__(self, path: str) -> None:
        self.listener = Listener.unix(path)
        self.address = self.listener.address
        self.made: list[Any] = []

    def serve(self, maker: WeightsMaker, **reply: Any) -> Attached:
        """Serves one more connection."""
        attached = Attached(self, maker, reply)
        self.made.append(attached)
        return attached

    def refuse(self, code: str, wait: bool | None = None) -> None:
        """Refuses one connection."""

        def script(peer: Peer) -> None:
            hello = peer.hello()
            assert wait is None or hello.get("wait", False) is wait
            peer.reply({"code": code, "reason": f"this is {code}"}, status=1)

        self.listener.script(script).join(0)

    def close(self) -> None:
        for attached in self.made:
            attached.end()
        self.listener.finish()


class Attached:
    """One reader's attachment."""

    def __init__(self, readers: Readers, maker: WeightsMaker, reply: dict[str, Any]) -> None:
        self.maker, self.pages = maker, Pages()
        self.over = reply
        self.hello: dict[str, Any] = {}
        self.fds = [maker.fd, self.pages.fd]
        self.detached = threading.Event()
        self._ready, self._end = threading.Event(), threading.Event()
        self._peer: Peer | None = None
        self.thread = readers.listener.script(self._run)

    def _run(self, peer: Peer) -> None:
        self.hello = peer.hello()
        assert self.hello["role"] == "subscribe"
        newest = self.maker.words[16] >> 6
        body = {"table": "w", "segment_bytes": self.maker.bytes, "reader": 4, "newest": newest, **self.over}
        peer.reply(body, fds=self.fds)
        self._peer = peer
        self._ready.set()
        with contextlib.suppress(ConnectionResetError):  # it went away before it had read everything
            assert peer.sock.recv(1) == b"", "a reader writes nothing after its hello"
        self.detached.set()
        if not self._end.is_set():
            self._end.wait(PATIENCE)

    @property
    def peer(self) -> Peer:
        assert self._ready.wait(PATIENCE), "no reader attached"
        assert self._peer is not None
        return self._peer

    def news(self, n: int = 1) -> None:
        self.peer.sock.sendall(b"\x01" * n)

    def hang_up(self) -> None:
        """The daemon's end of the connection, both ways."""
        self.peer.sock.shutdown(socket.SHUT_RDWR)
        self.end()

    def end(self) -> None:
        self._end.set()


def say(peer: Peer, **fields: Any) -> None:
    text = json.dumps(fields).encode()
    peer.sock.sendall(struct.pack("<I", len(text)) + text)


def hear(peer: Peer) -> dict[str, Any]:
    (length,) = struct.unpack("<I", peer.exactly(4))
    assert not length >> 31, "a chunk came where a message was due"
    assert 2 <= length <= 65_536
    fields: dict[str, Any] = json.loads(peer.exactly(length))
    return fields


def end(peer: Peer, code: str, reason: str = "because") -> None:
    """What ends the connection of a publisher, or of a reader over a connection."""
    peer.sock.sendall(struct.pack("<I", 0))
    peer.notice(code, reason)


def gone(peer: Peer) -> None:
    """Waits until the client has closed the connection, with or without having read everything."""
    with contextlib.suppress(ConnectionResetError):
        peer.end()


def hear_chunk(peer: Peer, manifest: Manifest, generation: int, publisher: int, into: bytearray) -> int:
    """Takes one chunk and returns its bytes; 0 where a message comes instead, which is left."""
    (word,) = struct.unpack("<I", peer.peek(4))
    if not word >> 31:
        return 0
    peer.exactly(4)
    header = peer.exactly(64)
    magic, version, flags, step, stream, producer, manifest_id, offset, tensor, length, crc, own = HEADER.unpack(header)
    assert (magic, version, step, stream, producer) == (b"ICHK", 1, generation, publisher, 0)
    assert flags in (0, 1) and manifest_id == manifest.id and own == crc32c(header[:60])
    assert word & 0x7FFFFFFF == 64 + length
    start = manifest.offsets[tensor] + offset
    assert offset < manifest.tensors[tensor].encoded_bytes and start % 256 == 0
    assert start + length <= manifest.data_bytes and (start + length) % 256 == 0
    data = peer.exactly(length)
    assert crc == crc32c(data)
    assert not any(into[start : start + length]), "sent twice"
    into[start : start + length] = data
    return length


def announce(peer: Peer, number: int, arrays: Mapping[str, Any], manifest: Manifest = MANIFEST, **over: Any) -> bytes:
    """What comes before the bytes of a whole generation; returns these."""
    sums = over.pop("sums", None) or sums_of(arrays)
    data = flat(arrays, manifest)
    fields = {
        "op": "generation", "generation": number, "digest": digest_of(sums, manifest).hex(),
        "published": 1_700_000_000_000_000_000 + number, "base": 0, "ranges": [[0, len(data)]],
        "bytes": len(data), "from": 0, **over,
    }  # fmt: skip
    say(peer, **fields)
    peer.sock.sendall(struct.pack(f"<{len(sums)}I", *sums))
    return data


SHOWN, DAMAGED = b"\x01", b"\x02"


def accept_reader(peer: Peer, manifest: Manifest = MANIFEST, **over: Any) -> dict[str, Any]:
    """Takes a reader over a connection."""
    body = peer.hello()
    assert body["role"] == "subscribe" and body["table"] == "w"
    peer.reply({"table": "w", "reader": 4, "newest": 1, "manifest": manifest.to_dict(), **over})
    return body


def give(peer: Peer, generation: int, answer: bytes = SHOWN) -> None:
    """A whole generation, and the answer to it."""
    peer.sock.sendall(announce(peer, generation, tensors(generation)))
    assert peer.exactly(1) == answer


def subscribe(listener: Listener, **options: Any) -> Subscription:
    return Subscription(listener.address, "w", stream=True, **options)
