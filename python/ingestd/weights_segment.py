"""The memory of a table of weights, and a reader's pins, as ``docs/weights.md`` describes them and from nothing else.

Everything in the header is checked before it is used, so that damaged or foreign memory ends in a FormatError. The
words that change are loaded and stored whole: items of a memoryview of 8 bytes are single loads and stores.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .channel import Fence
from .errors import Error, FormatError
from .manifest import Manifest
from .native import crc32c

__all__ = ["PINS_BYTES", "PLACES_MAX", "Newest", "Pins", "WeightsSegment"]

MAGIC = b"INGWGTS1"
VERSION = 1
PAGE = 4096
PLACES_MIN, PLACES_MAX = 2, 64
TENSORS_MAX = 65_536
MANIFEST_BYTES_MAX = 2_000_000
DATA_BYTES_MAX = (1 << 40) + 256 * TENSORS_MAX
PINS_BYTES = 4096

_FIXED = struct.Struct("<8sII9Q")
_CRC_FROM, _CRC_TO = 16, 128  # of the header; the manifest's text follows
_NEWEST = 128
# Of a place.
_GENERATION, _PUBLISHED, _DIGEST, _PUBLISHER, _SUMS = 0, 8, 16, 48, 64


class Newest(NamedTuple):
    """Which generation is the newest, and the place where it lies."""

    generation: int
    place: int


class WeightsSegment:
    """A checked view of the memory of a table of weights. Raises FormatError where header or manifest are not sound."""

    segment_bytes: int
    places: int  #: generations that it can hold
    place_stride: int  #: bytes from one place to the next
    data_offset: int  #: of the tensors from the start of their place
    data_bytes: int  #: of the tensors of one generation

    def __init__(self, memory: Any) -> None:
        self.memory = memoryview(memory).cast("B")
        if len(self.memory) < PAGE:
            raise FormatError(f"the segment has {len(self.memory)} bytes, its header alone has {PAGE}")
        self._read_header()
        text = bytes(self.memory[self._manifest_offset : self._manifest_offset + self._manifest_bytes])
        crc = crc32c(text, crc32c(bytes(self.memory[_CRC_FROM:_CRC_TO])))
        if crc != self._crc:
            raise FormatError(f"the segment's header is damaged: its CRC-32C is {crc:#010x}, stored {self._crc:#010x}")
        try:
            #: the tensors, and where they lie
            self.manifest = Manifest.parse(text)
        except (Error, ValueError) as e:
            raise FormatError(f"the segment's manifest cannot be read: {e}") from e
        for field, have, want in (
            ("tensors", self._tensors, len(self.manifest.tensors)),
            ("data_bytes", self.data_bytes, self.manifest.data_bytes),
        ):
            if have != want:
                raise FormatError(f"the segment's {field} is {have}, its manifest has {want}")
        self._words = self.memory[: self.segment_bytes // 8 * 8].cast("Q")

    def _read_header(self) -> None:
        (
            magic, version, self._crc,
            self.segment_bytes, self.places, self._tensors, self._manifest_offset, self._manifest_bytes,
            self._places_offset, self.place_stride, self.data_offset, self.data_bytes,
        ) = _FIXED.unpack_from(self.memory)  # fmt: skip
        if magic != MAGIC:
            raise FormatError(f"the memory starts with {magic!r}, a segment of weights with {MAGIC!r}")
        if version != VERSION:
            raise FormatError(f"the segment has version {version}; this package reads version {VERSION}")
        manifest_end = PAGE + self._manifest_bytes
        want = [
            ("segment_bytes", self.segment_bytes, PAGE, len(self.memory)),
            ("places", self.places, PLACES_MIN, PLACES_MAX),
            ("tensors", self._tensors, 1, TENSORS_MAX),
            ("manifest_offset", self._manifest_offset, PAGE, PAGE),
            ("manifest_bytes", self._manifest_bytes, 2, min(MANIFEST_BYTES_MAX, self.segment_bytes)),
            ("places_offset", self._places_offset, manifest_end, self.segment_bytes),
            ("data_bytes", self.data_bytes, 0, min(DATA_BYTES_MAX, self.segment_bytes)),
            ("data_offset", self.data_offset, _SUMS + 4 * self._tensors, self.segment_bytes),
            ("place_stride", self.place_stride, self.data_offset + self.data_bytes, self.segment_bytes),
        ]
        for field, value, least, most in want:
            if not least <= value <= most:
                raise FormatError(f"the segment's {field} is {value}, want {least} to {most}")
        for field, value in (
            ("places_offset", self._places_offset),
            ("place_stride", self.place_stride),
            ("data_offset", self.data_offset),
        ):
            if value % PAGE:
                raise FormatError(f"the segment's {field} is {value}, not a multiple of {PAGE}")
        if self._places_offset + self.places * self.place_stride > self.segment_bytes:
            raise FormatError("the segment's places do not fit into it")

    def place(self, index: int) -> int:
        """Offset of place ``index`` in the memory. Raises FormatError."""
        if not 0 <= index < self.places:
            raise FormatError(f"place {index}, the segment has {self.places}")
        return int(self._places_offset + index * self.place_stride)

    def data(self, index: int) -> int:
        """Offset of the tensors of place ``index`` in the memory. Raises FormatError."""
        return self.place(index) + self.data_offset

    def newest(self) -> Newest | None:
        """The newest generation; None while there is none. Raises FormatError."""
        word = int(self._words[_NEWEST // 8])
        if word == 0:
            return None
        generation, place = word >> 6, word & 63
        if generation == 0 or place >= self.places:
            raise FormatError(f"the newest generation is {generation} in place {place}; the segment has {self.places}")
        return Newest(generation, place)

    def generation(self, index: int) -> int:
        """The generation that place ``index`` holds; 0 while it holds nothing whole."""
        word: int = self._words[(self.place(index) + _GENERATION) // 8]
        return word

    def published(self, index: int) -> int:
        """Unix time in nanoseconds at which the generation in place ``index`` was published."""
        return int(struct.unpack_from("<q", self.memory, self.place(index) + _PUBLISHED)[0])

    def digest(self, index: int) -> bytes:
        """Which bytes the generation in place ``index`` has: SHA-256 of the manifest's fingerprint and the sums."""
        at = self.place(index) + _DIGEST
        return bytes(self.memory[at : at + 32])

    def publisher(self, index: int) -> int:
        """Number of the publisher of the generation in place ``index``, in the daemon's life."""
        return int(struct.unpack_from("<Q", self.memory, self.place(index) + _PUBLISHER)[0])

    def sums(self, index: int) -> NDArray[np.uint32]:
        """The CRC-32C of each tensor of place ``index``, in the manifest's order: the memory itself."""
        return np.frombuffer(self.memory, np.dtype("<u4"), self._tensors, self.place(index) + _SUMS)


class Pins:
    """This reader's page of pins: which generations the daemon must not overwrite.

    One thread at a time. ``memory`` is the page, writable. Raises FormatError where it is too short.
    """

    def __init__(self, memory: Any, segment: WeightsSegment) -> None:
        view = memoryview(memory).cast("B")
        if len(view) < PINS_BYTES:
            raise FormatError(f"the page of pins has {len(view)} bytes, want {PINS_BYTES}")
        self._words = view[: 8 * PLACES_MAX].cast("Q")
        self._segment = segment
        self.fence = Fence()

    def pin_newest(self) -> Newest | None:
        """Pins the newest generation; None where there is none. Raises FormatError where the memory contradicts itself.

        It is the same one again when that was pinned before: who pins counts how often.
        """
        segment, words = self._segment, self._words
        failed: Newest | None = None
        while True:
            newest = segment.newest()
            if newest is None:
                return None
            before = words[newest.place]
            if before == newest.generation:
                return newest
            if before != 0:
                raise FormatError(f"place {newest.place} holds generation {newest.generation}, but {before} is pinned")
            words[newest.place] = newest.generation
            # edge(pin): release - whoever takes the place after this store sees the pin. A full fence: the daemon
            # stores 0 to the place's generation before it loads the pins: it sees this pin, or this side sees the 0.
            # edge(place): acquire - if this is still the generation, its bytes are whole.
            self.fence()
            if segment.generation(newest.place) == newest.generation:
                return newest
            words[newest.place] = 0
            # It was replaced meanwhile, and then the word has moved on: the place of the newest is never taken.
            if newest == failed:
                raise FormatError(
                    f"the newest generation is {newest.generation} in place {newest.place}, which holds "
                    f"{segment.generation(newest.place)}"
                )
            failed = newest
            self.fence()

    def let_go(self, place: int) -> None:
        """Ends the pin of the generation in ``place``."""
        self.fence()  # edge(unpin): release - what was read of the place was read before the daemon sees the 0
        self._words[place] = 0
