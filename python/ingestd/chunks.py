"""Chunks: the header that is in front of the bytes of tensors, and how a producer cuts tensors into them.

``docs/tensors.md``, "Chunks". A chunk is a run of flat bytes. Every block of 256 flat bytes is of one tensor and in one
chunk, so what has come is told in blocks.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import ChunkError, SpecError
from .manifest import ALIGN, Manifest
from .native import crc32c
from .spec import Leaf, Spec

__all__ = [
    "ABORT",
    "BEGIN",
    "CHUNK_BYTES_MAX",
    "CHUNK_BYTES_MIN",
    "CLOSED",
    "END",
    "HEADER_BYTES",
    "NO_CRC",
    "OPENED",
    "REFUSED",
    "Chunk",
    "Cutter",
    "Header",
    "chunk_bytes_of",
    "chunk_spec",
    "parse_end",
    "producer_id",
]

HEADER_BYTES = 64
CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 64 << 20
CHUNK_BYTES_UNIT = 4096

MAGIC = b"ICHK"
VERSION = 1

BEGIN, END, ABORT, NO_CRC, REFUSED, OPENED, CLOSED = (1 << n for n in range(7))

_LAYOUT = struct.Struct("<4sHHQQQQQIII")
_FLAGS_AT = 6
_SUM_AT = 60
_SMALL_BYTES = 4096  # pieces below are put together
_ALL = (1 << 7) - 1

Raw = NDArray[np.uint8]


def producer_id(name: str) -> int:
    """The number of a producer's name in the headers of its chunks."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def chunk_spec(chunk_bytes: int) -> Spec:
    """The spec of a table of kind ``tensors`` whose chunks have so many bytes of data."""
    return Spec([Leaf("header", "U8", (HEADER_BYTES,)), Leaf("data", "U8", (chunk_bytes,))])


def chunk_bytes_of(spec: Spec) -> int:
    """Bytes of data of a chunk of a table with this spec. Raises SpecError where it is no table of tensors."""
    size = spec.leaves[-1].nbytes
    legal = CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX and size % CHUNK_BYTES_UNIT == 0
    if not legal or spec != chunk_spec(size):
        raise SpecError(f"the table is not of kind 'tensors': its samples are {spec.text()}")
    return size


class Header(NamedTuple):
    """What a chunk says of itself. ``offset`` counts in the encoded bytes of tensor number ``tensor``."""

    flags: int
    step: int
    stream: int
    producer: int
    manifest: int
    offset: int = 0
    tensor: int = 0
    length: int = 0
    data_crc: int = 0

    def pack(self) -> bytes:
        """The 64 bytes, with their sum."""
        plain = _LAYOUT.pack(MAGIC, VERSION, *self)
        return plain + crc32c(plain).to_bytes(4, "little")

    @classmethod
    def parse(cls, raw: bytes) -> Header:
        """Reads 64 bytes and checks magic, version, sum and flags; :meth:`check` does the rest. Raises ChunkError."""
        if len(raw) != HEADER_BYTES:
            raise ChunkError(f"the header has {len(raw)} bytes, not {HEADER_BYTES}")
        magic, version, *fields = _LAYOUT.unpack_from(raw)
        if magic != MAGIC:
            raise ChunkError(f"it starts with {magic!r}, a chunk with {MAGIC!r}")
        if version != VERSION:
            raise ChunkError(f"version {version} of chunks is not known; this package reads version {VERSION}")
        plain = raw[:_SUM_AT]
        if fields[0] & REFUSED:  # set after the sum was made
            plain = plain[:_FLAGS_AT] + struct.pack("<H", fields[0] & ~REFUSED) + plain[_FLAGS_AT + 2 :]
        if crc32c(plain) != int.from_bytes(raw[_SUM_AT:], "little"):
            raise ChunkError("the header is damaged: its sum is not the one that it says")
        if fields[0] & ~_ALL:
            raise ChunkError(f"unknown flags {fields[0] & ~_ALL:#x}")
        return cls(*fields)

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)

    def flat(self, manifest: Manifest) -> int:
        """Flat offset of the first byte of data."""
        return manifest.offsets[self.tensor] + self.offset

    def error(self, manifest: Manifest, reason: str) -> ChunkError:
        """An error that names the tensor, where there is one."""
        if self.length and not self.has(END) and self.tensor < len(manifest):
            return ChunkError(reason, manifest[self.tensor].name, self.offset)
        return ChunkError(reason)

    def check(self, manifest: Manifest, chunk_bytes: int) -> None:
        """Checks manifest, flags and place. Raises ChunkError."""
        own = self.flags & (OPENED | CLOSED)
        if self.manifest != manifest.id:
            raise ChunkError(f"its manifest is {self.manifest:016x}, that of the stream is {manifest.id:016x}")
        if self.length > chunk_bytes:
            raise self.error(manifest, f"{self.length} bytes of data; at most {chunk_bytes} fit into a chunk")
        if self.has(NO_CRC) and self.data_crc:
            raise self.error(manifest, "it has a sum, and says that it was not summed")
        alone = (
            own == OPENED | CLOSED
            or (own and self.flags & (BEGIN | END | ABORT))
            or (self.has(END) and self.has(ABORT))
        )
        if alone:
            raise self.error(manifest, f"the flags {self.flags:#x} do not go together")
        if self.length == 0 or own or self.has(ABORT):
            if self.length or self.tensor or self.offset:
                raise self.error(manifest, f"with the flags {self.flags:#x} it has no data and no place")
            if not own and not self.flags & (ABORT | BEGIN | END):
                raise ChunkError("it has no data, and no flag that says why")
        elif self.has(END):
            if self.tensor or self.offset or self.length % 4 or self.length // 4 > len(manifest):
                raise ChunkError(
                    f"the end of a step lists tensors in {self.length} bytes, 4 for each, and has no place"
                )
        else:
            self._check_place(manifest)

    def _check_place(self, manifest: Manifest) -> None:
        if self.tensor >= len(manifest):
            raise ChunkError(f"it is of tensor {self.tensor}; the manifest has {len(manifest)}")
        size = manifest[self.tensor].encoded_bytes
        if self.offset >= size:
            raise self.error(manifest, f"it lies outside of its tensor, which has {size} bytes")
        if self.offset % ALIGN:
            raise self.error(manifest, f"it must start on a multiple of {ALIGN} bytes")
        end = self.flat(manifest) + self.length
        if end > manifest.data_bytes:
            raise self.error(manifest, f"its {self.length} bytes run beyond the last tensor")
        if end % ALIGN and manifest.ends[manifest.at(end - 1)] != end:
            raise self.error(
                manifest, f"its {self.length} bytes end neither on a multiple of {ALIGN} nor with a tensor"
            )


def parse_end(manifest: Manifest, data: bytes) -> tuple[int, ...]:
    """The tensors of which a step consists, from the data of a chunk with END. Raises ChunkError."""
    found = struct.unpack(f"<{len(data) // 4}I", data)
    for before, i in zip((-1, *found), found):
        if not before < i < len(manifest):
            raise ChunkError(f"the end of a step lists tensor {i} after {before}; there are {len(manifest)}, ascending")
    return found


class Chunk:
    """A chunk that was cut: its data lies in ``pieces``, which may be the memory of whoever put it."""

    __slots__ = ("flags", "length", "offset", "pieces", "step", "tensor")

    def __init__(self, flags: int, step: int, tensor: int = 0, offset: int = 0) -> None:
        self.flags = flags
        self.step = step
        self.tensor = tensor
        self.offset = offset
        self.length = 0
        self.pieces: list[Raw] = []

    def header(self, stream: int, producer: int, manifest: int, crc: int | None) -> Header:
        """``crc`` None: the data was not summed."""
        flags = self.flags if crc is not None else self.flags | NO_CRC
        return Header(flags, self.step, stream, producer, manifest, self.offset, self.tensor, self.length, crc or 0)

    def crc(self) -> int:
        """The sum of the data."""
        crc = 0
        for piece in self.pieces:
            crc = crc32c(piece, crc)
        return crc


class _Edge:
    """A block of which some bytes have come, so that it can be in no chunk yet."""

    def __init__(self, need: int) -> None:
        self.data = np.zeros(need, np.uint8)
        self.there = np.zeros(need, np.bool_)


class Cutter:
    """Cuts the tensors of one transaction after the other into chunks, which ``out`` gets in order.

    What is put in the manifest's order is packed into chunks that are full but for the last; a put elsewhere begins
    another chunk. Whole blocks of 256 bytes are not copied, unless they are in pieces below 4 KiB.
    """

    def __init__(self, manifest: Manifest, chunk_bytes: int, out: Callable[[Chunk], None]) -> None:
        self.manifest = manifest
        self.chunk_bytes = chunk_bytes
        self._out = out
        self._step = 0
        self._chunk: Chunk | None = None  # the one being filled
        self._small: bytearray | None = None  # the last piece of it, where that is put together
        self._parts: list[Raw | bytearray] = []
        self._start = self._end = 0  # flat bytes of it
        self.chunks = 0  # of this transaction
        self._there = np.zeros(manifest.data_bytes // ALIGN, np.bool_)
        self._edges: dict[int, _Edge] = {}

    def begin(self, step: int) -> None:
        """Begins a transaction, whatever became of the one before."""
        self._step, self.chunks = step, 0
        self._chunk, self._small, self._parts = None, None, []
        self._edges.clear()
        self._there[:] = False

    def put(self, i: int, offset: int, data: Raw) -> None:
        """Bytes of tensor ``i`` from ``offset`` of its encoded bytes on. Raises ChunkError where some were there."""
        flat = self.manifest.offsets[i] + offset
        end, stop = flat + len(data), self.manifest.ends[i]
        if offset < 0 or end > stop:
            raise ChunkError(
                f"{len(data)} bytes run beyond its {stop - self.manifest.offsets[i]}", self._name(i), offset
            )
        self._check_new(i, flat, end)
        first, last = -(-flat // ALIGN) * ALIGN, end if end == stop else end // ALIGN * ALIGN
        if flat < first:
            cut = min(first, end)
            self._put_edge(i, flat, data[: cut - flat])
            flat, data = cut, data[cut - flat :]
        if flat < last:
            self._append(i, flat, data[: last - flat])
            flat, data = last, data[last - flat :]
        if flat < end:
            self._put_edge(i, flat, data)

    def finish(self, subset: Iterable[int] | None = None) -> dict[str, int]:
        """Ends the transaction: all tensors were put, or all of the subset and no others.

        Returns the missing bytes by tensor; where there are some, no chunk has been made of that. Raises ChunkError.
        """
        tensors = range(len(self.manifest)) if subset is None else sorted(set(subset))
        missing = {self._name(i): n for i in tensors if (n := self.missing(i))}
        if missing:
            return missing
        if subset is not None:
            rest = np.zeros_like(self._there)
            for i in tensors:
                rest[self._blocks(i)] = True
            strange = np.flatnonzero(self._there & ~rest)
            if len(strange):
                name = self._name(self.manifest.at(int(strange[0]) * ALIGN))
                raise ChunkError("it was put, and is not in the announced subset", name)
            if 4 * len(tensors) > self.chunk_bytes:
                raise ChunkError(f"a subset of {len(tensors)} tensors does not fit into a chunk")
        self.flush()
        if subset is not None:
            self._emit(END, np.array(tensors, "<u4").view(np.uint8))
        elif self.chunks == 0:
            self._emit(0, np.zeros(0, np.uint8))  # all tensors are empty
        return {}

    def missing(self, i: int) -> int:
        """Bytes of tensor ``i`` that were not put."""
        there = self._there[self._blocks(i)]
        absent = np.flatnonzero(~there)
        if len(absent) == 0:
            return 0
        blocks = absent + self.manifest.offsets[i] // ALIGN
        missing = len(absent) * ALIGN - max(0, (int(blocks[-1]) + 1) * ALIGN - self.manifest.ends[i])
        return missing - sum(int(self._edges[b].there.sum()) for b in self._edges if blocks[0] <= b <= blocks[-1])

    def flush(self) -> None:
        """Sends the chunk that is being filled on its way."""
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            return
        chunk.length = self._end - self._start
        chunk.pieces = [np.frombuffer(p, np.uint8) if isinstance(p, bytearray) else p for p in self._parts]
        self._parts, self._small = [], None
        self._send(chunk)

    def _emit(self, flags: int, data: Raw) -> None:
        chunk = Chunk(flags, self._step)
        chunk.length, chunk.pieces = len(data), [data] if len(data) else []
        self._send(chunk)

    def _send(self, chunk: Chunk) -> None:
        if self.chunks == 0:
            chunk.flags |= BEGIN
        self.chunks += 1
        self._out(chunk)

    def _name(self, i: int) -> str:
        return self.manifest[i].name

    def _blocks(self, i: int) -> slice:
        return slice(self.manifest.offsets[i] // ALIGN, -(-self.manifest.ends[i] // ALIGN))

    def _check_new(self, i: int, flat: int, end: int) -> None:
        if flat == end:
            return
        first, last = flat // ALIGN, (end - 1) // ALIGN
        there = self._there[first : last + 1]
        found = [max((first + int(there.argmax())) * ALIGN, flat)] if there.any() else []
        for block, edge in self._edges.items():
            if first <= block <= last:
                begin = max(block * ALIGN, flat)
                taken = edge.there[begin - block * ALIGN : end - block * ALIGN]
                found += [begin + int(taken.argmax())] if taken.any() else []
        if found:
            raise ChunkError("it was put in this step before", self._name(i), min(found) - self.manifest.offsets[i])

    def _put_edge(self, i: int, flat: int, data: Raw) -> None:
        block = flat // ALIGN
        edge = self._edges.get(block)
        if edge is None:
            edge = self._edges[block] = _Edge(min(ALIGN, self.manifest.ends[i] - block * ALIGN))
        at = flat - block * ALIGN
        edge.data[at : at + len(data)] = data
        edge.there[at : at + len(data)] = True
        if edge.there.all():
            del self._edges[block]
            self._append(i, block * ALIGN, edge.data)

    def _append(self, i: int, flat: int, data: Raw) -> None:
        """Whole blocks, but that the last one may end with the tensor."""
        self._there[flat // ALIGN : -(-(flat + len(data)) // ALIGN)] = True
        while len(data):
            if self._chunk is not None and not self._continue(flat):
                self.flush()
            if self._chunk is None:
                self._chunk = Chunk(0, self._step, i, flat - self.manifest.offsets[i])
                self._start = self._end = flat
            take = data[: self._start + self.chunk_bytes - flat]
            self._add(take)
            self._end = flat = flat + len(take)
            data = data[len(take) :]
            if self._end - self._start == self.chunk_bytes:
                self.flush()

    def _continue(self, flat: int) -> bool:
        """Whether bytes at ``flat`` can follow in the chunk being filled; closes the gap before them if so."""
        after = -(-self._end // ALIGN) * ALIGN
        if flat != after or flat >= self._start + self.chunk_bytes:
            return False
        if flat > self._end:
            self._add(_GAP[: flat - self._end])
            self._end = flat
        return True

    def _add(self, data: Raw) -> None:
        if len(data) >= _SMALL_BYTES:
            self._parts.append(data)
            self._small = None
            return
        if self._small is None:
            self._small = bytearray()
            self._parts.append(self._small)
        self._small += data.data


_GAP = np.zeros(ALIGN, np.uint8)
