"""Receiving one generation over a connection: what is announced, where its bytes go, and whether they are whole."""

from __future__ import annotations

import mmap
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .manifest import Manifest
from .native import crc32c
from .spec import Array
from .weights_blocks import copy_tensors, digest_of

__all__ = ["ANNOUNCEMENT_BYTES_MAX", "Announcement", "Buffer", "Transfer"]

ANNOUNCEMENT_BYTES_MAX = 4 << 20
_GENERATION_MAX = (1 << 58) - 1


class Announcement(NamedTuple):
    """What comes before the bytes of a generation: which these are. Raises FormatError where it breaks the rules."""

    generation: int
    digest: bytes
    published: int  # Unix nanoseconds
    base: int  # generation that the tensors outside of the ranges are of; 0: all are sent
    ranges: tuple[tuple[int, int], ...]  # of flat bytes: offset and length, ascending
    bytes: int  # of all ranges
    start: int  # of those, how many are left out because they came before

    @classmethod
    def parse(cls, fields: dict[str, Any], manifest: Manifest) -> Announcement:
        """Checks everything: afterwards every range lies in the manifest's bytes and cuts no tensor."""
        if fields.get("op") != "generation":
            raise FormatError(f"the daemon sent {str(fields)[:200]} where a generation was due")
        generation = _whole(fields, "generation", 1, _GENERATION_MAX)
        try:
            digest = bytes.fromhex(fields["digest"])
            ranges = tuple((_natural(x), _natural(n)) for x, n in fields.get("ranges") or ())
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"the daemon announced generation {generation} without a digest or ranges") from None
        if len(digest) != 32:
            raise FormatError(f"the daemon announced generation {generation} with a digest of {len(digest)} bytes")
        total = sum(n for _, n in ranges)
        made = cls(
            generation, digest, _whole(fields, "published", 0), _whole(fields, "base", 0, _GENERATION_MAX), ranges,
            _whole(fields, "bytes", total, total), _whole(fields, "from", 0, total),
        )  # fmt: skip
        made._check(manifest)
        return made

    def _check(self, manifest: Manifest) -> None:
        whole = manifest.data_bytes
        if self.base == 0:
            if self.ranges != ((0, whole),) and (whole or self.ranges):
                raise FormatError(f"generation {self.generation} is announced whole, but not all of its bytes are")
            return
        if self.start:
            raise FormatError(f"generation {self.generation} is announced as a difference from byte {self.start} on")
        end = 0
        for offset, length in self.ranges:
            if length < 1 or offset < end or offset + length > whole:
                raise FormatError(f"generation {self.generation} is announced with the range {offset} of {length}")
            end = offset + length
            first, last = manifest.at(offset), manifest.at(end - 1)
            starts, ends = manifest.offsets[first], manifest.offsets[last] + manifest.tensors[last].encoded_bytes
            if offset != starts or manifest.offsets[last] < end < ends:
                raise FormatError(f"generation {self.generation}: the range {offset} of {length} cuts a tensor")


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _whole(fields: dict[str, Any], field: str, least: int, most: int = (1 << 63) - 1) -> int:
    value = fields.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise FormatError(f"a generation was announced with {field} = {value!r}, want {least} to {most}")
    return value


class Buffer:
    """Memory for one generation. It is mapped twice: writable for what is received, read-only for those who use it."""

    def __init__(self, manifest: Manifest) -> None:
        #: of what it holds
        self.manifest = manifest
        size = max(manifest.data_bytes, mmap.PAGESIZE)
        fd = os.memfd_create("ingestd-weights", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, size)
            self._writable = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
            #: what readers see
            self.memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        #: address of the flat bytes in :attr:`memory`
        self.address = int(np.frombuffer(self.memory, np.uint8).ctypes.data)
        #: the flat bytes, writable
        self.flat: Array = np.ndarray((manifest.data_bytes,), np.uint8, buffer=self._writable)
        self.sums: NDArray[np.uint32] = np.zeros(len(manifest), np.uint32)
        self.generation = 0
        self.published = 0
        self.digest = b""
        #: how many readers hold it
        self.holds = 0


class Transfer:
    """A generation on its way into a buffer.

    Bytes come in the order of the ranges. Each tensor is summed as it comes; what is not sent is copied from ``base``,
    and summed too. Raises FormatError where the sums do not make the announced digest: then they are of no use.
    """

    def __init__(
        self,
        manifest: Manifest,
        announced: Announcement,
        sums: NDArray[np.uint32],
        buffer: Buffer,
        base: Buffer | None,
    ) -> None:
        self.announced = announced
        self.buffer = buffer
        #: bytes of the ranges that came
        self.came = 0
        #: name of the first tensor found damaged; empty: none so far
        self.damaged = ""
        self._manifest = manifest
        self._range, self._in_range = 0, 0  # the range that is received, and how much of it came
        self._tensor, self._crc = 0, 0  # the tensor that is summed, and its sum so far
        self.check_digest(sums)
        buffer.sums[:] = sums
        for tensor, crc in zip(manifest.tensors, sums.tolist()):
            if crc and not tensor.encoded_bytes:
                self._note(tensor.name)
        if base is not None:
            self._copy(base)
        self._begin_range()

    def check_digest(self, sums: NDArray[np.uint32]) -> None:
        """Raises FormatError where these are not the announced sums."""
        if digest_of(self._manifest, sums) != self.announced.digest:
            raise FormatError(f"generation {self.announced.generation} came with sums that are not of its digest")

    def room(self) -> Array | None:
        """Where the next bytes go, as far as they lie together; None when all have come."""
        ranges = self.announced.ranges
        if self._range == len(ranges):
            return None
        offset, length = ranges[self._range]
        return self.buffer.flat[offset + self._in_range : offset + length]

    def take(self, n: int) -> None:
        """The first ``n`` bytes of :meth:`room` have come."""
        offset, length = self.announced.ranges[self._range]
        self._sum(offset + self._in_range, offset + self._in_range + n)
        self._in_range += n
        self.came += n
        if self._in_range == length:
            self._range, self._in_range = self._range + 1, 0
            self._begin_range()

    def _begin_range(self) -> None:
        ranges = self.announced.ranges
        while self._range < len(ranges) and ranges[self._range][1] == 0:
            self._range += 1
        if self._range < len(ranges):
            self._tensor, self._crc = self._manifest.at(ranges[self._range][0]), 0

    def _sum(self, at: int, end: int) -> None:
        """Sums the flat bytes that came, tensor by tensor; what lies between them is nobody's."""
        offsets, tensors = self._manifest.offsets, self._manifest.tensors
        while self._tensor < len(tensors):
            start, tensor = offsets[self._tensor], tensors[self._tensor]
            stop = start + tensor.encoded_bytes
            if start >= end:
                return
            if tensor.encoded_bytes:
                self._crc = crc32c(self.buffer.flat[max(at, start) : min(end, stop)], self._crc)
                if end < stop:
                    return
                if self._crc != int(self.buffer.sums[self._tensor]):
                    self._note(tensor.name)
            self._tensor, self._crc = self._tensor + 1, 0

    def _copy(self, base: Buffer) -> None:
        """Takes from ``base`` the tensors that are not sent, and sums them on the way."""
        manifest = self._manifest
        starts = np.array([offset for offset, _ in self.announced.ranges], np.int64)
        ends = np.array([offset + length for offset, length in self.announced.ranges], np.int64)
        at = np.array(manifest.offsets, np.int64)
        before = np.searchsorted(starts, at, "right") - 1  # the range that begins last at or before the tensor
        kept = (before < 0) | (at >= ends[np.maximum(before, 0)]) if len(ends) else np.ones(len(at), np.bool_)
        sources = {
            i: base.flat[manifest.offsets[i] : manifest.offsets[i] + manifest.tensors[i].encoded_bytes]
            for i in np.flatnonzero(kept).tolist()
        }
        for i, crc in copy_tensors(manifest, self.buffer.flat, sources).items():
            if crc != int(self.buffer.sums[i]):
                self._note(manifest.tensors[i].name)

    def _note(self, name: str) -> None:
        self.damaged = self.damaged or name
