"""The daemon's side of tables of tensors, written from docs/tensors.md for the tests."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ingestd import GradReader, Manifest
from ingestd.chunks import chunk_spec
from ingestd.native import crc32c

from fakes import PATIENCE, FakeDaemon, Peer

C = 64 << 10
CHUNKS = chunk_spec(C)
BEGIN, END, ABORT, NO_CRC, REFUSED, OPENED, CLOSED = 1, 2, 4, 8, 16, 32, 64

Raw = np.ndarray[Any, np.dtype[np.uint8]]


class Sent(NamedTuple):
    """A chunk as it came over a connection."""

    flags: int
    step: int
    stream: int
    producer: int
    manifest: int
    offset: int
    tensor: int
    length: int
    crc: int
    data: bytes


def producer(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def parse(raw: bytes, stream: int = 7, name: str = "w") -> Sent:
    """A chunk, all of it checked but its place."""
    magic, version, *fields, header_crc = struct.unpack("<4sHHQQQQQIIII", raw[:64])
    assert (magic, version) == (b"ICHK", 1) and header_crc == crc32c(raw[:60])
    sent = Sent(*fields, raw[64 : 64 + fields[7]])
    assert not any(raw[64 + sent.length :]), "bytes beyond the length are not zero"
    assert sent.crc == (0 if sent.flags & NO_CRC else crc32c(sent.data))
    assert (sent.stream, sent.producer) == (stream, producer(name))
    return sent


def accept(peer: Peer, stream: int = 7, held: int = 0, **more: Any) -> dict[str, Any]:
    """Accepts a producer that pushes."""
    body = peer.hello()
    assert body["role"] == "push" and "spec" not in body
    agreed = {"table": body["table"], "fingerprint": CHUNKS.fingerprint, "stream": stream, "ack": "committed"}
    window = {"window_samples": 4096, "window_bytes": 8 << 20, "chunk_bytes": C}
    peer.reply({**agreed, "held": held, **window, **more})
    return body


def receive(peer: Peer, stream: int = 7, name: str = "w") -> Sent:
    return parse(peer.exactly(64 + C), stream, name)


def header(
    manifest: Manifest,
    flags: int,
    step: int,
    stream: int,
    name: str,
    flat: int = 0,
    data: bytes = b"",
    over: dict[str, int] | None = None,
) -> bytes:
    """A header; ``over`` replaces fields before it is summed."""
    tensor = manifest.at(flat) if data and not flags & END else 0
    fields = {
        "flags": flags, "step": step, "stream": stream, "producer": producer(name), "manifest": manifest.id,
        "offset": flat - manifest.offsets[tensor] if data and not flags & END else 0, "tensor": tensor,
        "length": len(data), "crc": 0 if flags & NO_CRC else crc32c(data), **(over or {}),
    }  # fmt: skip
    plain = struct.pack("<4sHHQQQQQIII", b"ICHK", 1, *fields.values())
    unmarked = plain[:6] + struct.pack("<H", fields["flags"] & ~REFUSED) + plain[8:]
    return plain + struct.pack("<I", crc32c(unmarked))


def flat_of(manifest: Manifest, arrays: dict[str, Any]) -> bytes:
    """The flat bytes of arrays without encodings."""
    out = bytearray(manifest.data_bytes)
    for at, tensor in zip(manifest.offsets, manifest):
        out[at : at + tensor.nbytes] = np.asarray(arrays[tensor.name]).tobytes()
    return bytes(out)


class GradDaemon(FakeDaemon):
    """A fake daemon with one trainer, to which it delivers chunks that tests make. Its own stream is 1."""

    def __init__(self, path: str, manifest: Manifest, *, batches: int = 40, prefetch: int = 16, **more: Any) -> None:
        super().__init__(
            path, CHUNKS, batch_size=1, batches=batches, prefetch=prefetch, capacity=64, sessions=8, **more
        )
        self.manifest = manifest
        self.streams: dict[str, int] = {}
        self.numbers: dict[int, int] = {}
        self.batch = 0
        self.free = list(range(batches))

    def know(self, name: str, stream: int) -> None:
        """Puts a session into the segment's table."""
        entry = len(self.streams)
        self.streams[name] = stream
        self.segment.entry(self.segment.sessions_offset + 256 * entry, name, 1, stream)

    def serve_manifest(self, manifest: Manifest | None = None) -> None:
        """Answers the next connection, which asks for a manifest."""
        found = manifest or self.manifest

        def script(peer: Peer) -> None:
            body = peer.hello()
            want = {"role": "manifest", "table": "t", "byte_order": "little", "manifest_id": f"{found.id:016x}"}
            assert body == {**want, "client": body["client"]}
            peer.reply({"table": "t", "manifest": found.to_dict()})

        self.listener.script(script)

    def chunk(self, stream: int, head: bytes, data: bytes = b"", number: int | None = None) -> int:
        """Delivers one chunk; its batch number."""
        for _, word in self.channel.given():
            self.free.append(word & 0xFFFFFFFF)
        place, batch = self.free.pop(0), self.batch
        self.batch += 1
        sample = {"header": np.frombuffer(head, np.uint8), "data": np.zeros(C, np.uint8)}
        sample["data"][: len(data)] = np.frombuffer(data, np.uint8)
        self.segment.fill(place, batch, [sample], stream)
        if number is None:
            number = self.numbers.get(stream, 0)
            self.numbers[stream] = number + 1
        self.segment.word(self.segment.place(place) + self.segment.columns[1], number)
        self.segment.word(320, self.batch)
        self.channel.push(batch, place, 1)
        return batch

    def opened(self, name: str, flag: int = OPENED) -> None:
        stream = self.streams[name]
        self.chunk(1, header(self.manifest, flag, 0, stream, name))

    def closed(self, name: str) -> None:
        self.opened(name, CLOSED)

    def send(self, name: str, step: int, flags: int, flat: int = 0, data: bytes = b"", **over: int) -> int:
        """Delivers a chunk of a producer; ``over`` are wrong fields of its header."""
        stream = self.streams[name]
        wrong = {field.rstrip("_"): value for field, value in over.items()}
        return self.chunk(stream, header(self.manifest, flags, step, stream, name, flat, data, wrong), data)

    def step(self, name: str, step: int, arrays: dict[str, Any], first: int = 0, last: int | None = None) -> None:
        """Sends a step as a producer would, or some of its chunks."""
        raw = flat_of(self.manifest, arrays)
        starts = list(range(0, len(raw), C))
        for k in range(len(starts))[first:last]:
            end = min(starts[k] + C, self.manifest.ends[-1])
            self.send(name, step, BEGIN if k == 0 else 0, starts[k], raw[starts[k] : end])


Make = Callable[..., GradDaemon]
Arrays = dict[str, Any]

N = 5 * C // 8  # elements of w: two and a half chunks


def gradients(who: int, step: int) -> Arrays:
    rng = np.random.default_rng(who * 1000 + step)
    return {
        "w": (rng.standard_normal((5, N // 5)) * 10.0 ** rng.integers(-9, 9, (5, N // 5))).astype(np.float32),
        "e": np.zeros((2, 0), np.float32), "h": rng.standard_normal(77).astype(np.float16), "n": np.int64(who),
        "b": rng.standard_normal(3).astype(np.float32),
    }  # fmt: skip


GRADIENTS = Manifest.from_arrays(gradients(0, 0))
SMALL = Manifest.from_arrays({"x": np.zeros(6, np.float32)})


def small(k: float) -> Arrays:
    return {"x": np.arange(6, dtype=np.float32) + np.float32(k)}


def reference(arrays: list[Arrays], name: str) -> Any:
    """The documented sum: in the order given, one rounding per addition."""
    total = arrays[0][name].astype(np.float32)
    for more in arrays[1:]:
        total = total + more[name].astype(np.float32)
    return total


def equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and np.array_equal(a.reshape(-1).view(np.uint32), b.reshape(-1).view(np.uint32))


def attach(d: GradDaemon, **options: Any) -> GradReader:
    reader = GradReader(d.address, "t", deadline=PATIENCE, **options)
    d.serve_manifest()
    return reader
