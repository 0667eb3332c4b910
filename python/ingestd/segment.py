"""The segment of a table, read as ``docs/segment-format.md`` describes it and from nothing else.

A segment is the shared memory in which the daemon keeps the batches of one table. It is only read here. Everything in
its header is checked before it is used, so that damaged or foreign memory ends in a FormatError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from .errors import FormatError, SpecError
from .native import crc32c
from .spec import Spec

__all__ = [
    "FREE",
    "LEASED",
    "LENT",
    "OPEN",
    "PUBLISHED",
    "SEALING",
    "Column",
    "Group",
    "Segment",
    "Session",
    "State",
]

MAGIC = b"INGDSEG1"
VERSION = 2
HEADER_BYTES = 512
BATCHES_MAX = 65_536
SESSIONS_MAX = 65_536
GROUPS = 64
NAME_BYTES_MAX = 128
COLUMNS_MAX = 4_096
SPEC_BYTES_MAX = 2_097_152

FREE, OPEN, SEALING, PUBLISHED, LEASED, LENT = range(6)

_FIXED = struct.Struct("<8sII14Q32sQ32s3Q")
_CRC_FROM, _CRC_TO = 16, 256  # of the header; the column table and the spec follow
_RESERVED, _PUBLISHED, _LEASED, _CLOSED, _STREAMS, _BOOT, _CLEAN = 256, 320, 384, 448, 456, 464, 480
_ENTRY_BYTES = 256  # of the session table and of the group table


@dataclass(frozen=True)
class Column:
    """Where the bytes of one leaf lie: ``offset`` from the start of a batch, ``slot_bytes`` per row."""

    offset: int
    slot_bytes: int


@dataclass(frozen=True)
class State:
    """A place's state line: ``number``, ``phase`` (FREE, OPEN, SEALING, PUBLISHED, LEASED, LENT), ``count`` of rows.

    ``pending`` has one bit per group that has not released the batch. Of a lent place, ``stream`` is the one that
    fills it, and ``settled`` of its ``committed`` rows were copied elsewhere.
    """

    number: int
    phase: int
    committed: int
    void: int
    count: int
    pending: int = 0
    stream: int = 0
    settled: int = 0


@dataclass(frozen=True)
class Session:
    """An entry of the session table: the daemon holds ``held`` samples of it, as ``stream``; ``seen`` in Unix ns."""

    name: str
    stream: int
    held: int
    seen: int


@dataclass(frozen=True)
class Group:
    """An entry of the group table; ``index`` is its bit in a state's ``pending``, ``seen`` is in Unix nanoseconds."""

    index: int
    name: str
    seen: int


class Segment:
    """A checked view of the memory of a segment. Raises FormatError where header, columns or spec are not sound."""

    segment_bytes: int
    batch_size: int  #: rows of a full batch
    batches: int  #: capacity in batches
    sample_bytes: int
    states_offset: int
    data_offset: int
    batch_stride: int
    stream_column: int  #: offsets of the u64 columns from the start of a batch
    number_column: int
    arrival_column: int
    fingerprint: bytes
    created: int  #: Unix time in nanoseconds
    sessions_max: int  #: entries of the session table
    sessions_offset: int
    groups_offset: int

    def __init__(self, memory: Any) -> None:
        self.memory = memoryview(memory).cast("B")
        if len(self.memory) < HEADER_BYTES:
            raise FormatError(f"the segment has {len(self.memory)} bytes, its header alone has {HEADER_BYTES}")
        self._read_header()
        self._check_bounds()
        self.columns = self._read_columns()
        self._check_crc()
        text = bytes(self.memory[self._spec_offset : self._spec_offset + self._spec_bytes])
        try:
            #: the spec of the samples
            self.spec = Spec.parse(text)
        except SpecError as e:
            raise FormatError(f"the segment's spec cannot be read: {e}") from e
        sizes = [leaf.nbytes for leaf in self.spec.leaves]
        if sizes != [c.slot_bytes for c in self.columns]:
            raise FormatError("the segment's columns do not fit the leaves of its spec")
        # One 8-byte load each: words that the daemon changes must not be read in parts.
        self._words = self.memory[: len(self.memory) // 8 * 8].cast("Q")

    def _read_header(self) -> None:
        (
            magic, version, self._crc,
            self.segment_bytes, self.batch_size, self.batches, columns, self.sample_bytes,
            columns_offset, self._spec_offset, self._spec_bytes,
            self.states_offset, self.data_offset, self.batch_stride,
            self.stream_column, self.number_column, self.arrival_column,
            self.fingerprint, self.created, table,
            self.sessions_max, self.sessions_offset, self.groups_offset,
        ) = _FIXED.unpack_from(self.memory)  # fmt: skip
        if magic != MAGIC:
            raise FormatError(f"the memory starts with {magic!r}, a segment with {MAGIC!r}")
        if version != VERSION:
            raise FormatError(f"the segment has version {version}; this package reads version {VERSION}")
        self._columns = columns
        #: table name, cut to 32 bytes
        self.table = table.rstrip(b"\0").decode(errors="replace")
        want = [
            ("segment_bytes", self.segment_bytes, HEADER_BYTES, len(self.memory)),
            ("batch_size", self.batch_size, 1, (1 << 32) - 1),
            ("batches", self.batches, 2, BATCHES_MAX),
            ("columns", columns, 1, COLUMNS_MAX),
            ("columns_offset", columns_offset, HEADER_BYTES, HEADER_BYTES),
            ("spec_offset", self._spec_offset, HEADER_BYTES + 16 * columns, HEADER_BYTES + 16 * columns),
            ("spec_bytes", self._spec_bytes, 2, SPEC_BYTES_MAX),
            ("sessions", self.sessions_max, 1, SESSIONS_MAX),
        ]
        for field, value, least, most in want:
            if not least <= value <= most:
                raise FormatError(f"the segment's {field} is {value}, want {least} to {most}")

    def _check_bounds(self) -> None:
        if self._spec_offset + self._spec_bytes > self.states_offset:
            raise FormatError("the segment's spec runs into its state lines")
        if self.states_offset % 64 or self.data_offset % 4096 or self.batch_stride % 4096:
            raise FormatError("the segment's states, data or batches are not aligned")
        if self.sessions_offset % 64 or self.groups_offset % 64:
            raise FormatError("the segment's sessions or groups are not aligned")
        if self.states_offset + 64 * self.batches > self.sessions_offset:
            raise FormatError("the segment's state lines run into its sessions")
        if self.sessions_offset + _ENTRY_BYTES * self.sessions_max > self.groups_offset:
            raise FormatError("the segment's sessions run into its groups")
        if self.groups_offset + _ENTRY_BYTES * GROUPS > self.data_offset:
            raise FormatError("the segment's groups run into its batches")
        if self.batch_stride == 0 or self.data_offset + self.batches * self.batch_stride > self.segment_bytes:
            raise FormatError("the segment's batches do not fit into it")

    def _read_columns(self) -> list[Column]:
        columns = [Column(*struct.unpack_from("<QQ", self.memory, HEADER_BYTES + 16 * i)) for i in range(self._columns)]
        end = 0
        names = [("stream", self.stream_column), ("number", self.number_column), ("arrival", self.arrival_column)]
        places = [(name, Column(offset, 8)) for name, offset in names]
        places += [(f"leaf {i}", c) for i, c in enumerate(columns)]
        for name, c in places:
            if c.slot_bytes < 1 or c.offset % 64 or c.offset < end:
                raise FormatError(f"the segment's column {name} is empty, not aligned, or overlaps the one before it")
            end = c.offset + c.slot_bytes * self.batch_size
            if end > self.batch_stride:
                raise FormatError(f"the segment's column {name} does not fit into a batch")
        if sum(c.slot_bytes for c in columns) != self.sample_bytes:
            raise FormatError("the segment's columns do not add up to its sample_bytes")
        return columns

    def _check_crc(self) -> None:
        end = self._spec_offset + self._spec_bytes
        crc = crc32c(bytes(self.memory[HEADER_BYTES:end]), crc32c(bytes(self.memory[_CRC_FROM:_CRC_TO])))
        if crc != self._crc:
            raise FormatError(f"the segment's header is damaged: its CRC-32C is {crc:#010x}, stored {self._crc:#010x}")

    @property
    def reserved(self) -> int:
        """Position after the last slot given to a writer."""
        return self._words[_RESERVED // 8]

    @property
    def published(self) -> int:
        """Number of batches published so far."""
        return self._words[_PUBLISHED // 8]

    @property
    def leased(self) -> int:
        """Number of batches given to trainers so far."""
        return self._words[_LEASED // 8]

    @property
    def closed(self) -> bool:
        """True when nothing will be published any more."""
        return self._words[_CLOSED // 8] != 0

    @property
    def streams(self) -> int:
        """Number of the last stream that was given one."""
        return self._words[_STREAMS // 8]

    @property
    def boot(self) -> bytes:
        """The run of the machine's kernel that last used the segment, 16 bytes; zero where unknown."""
        return bytes(self.memory[_BOOT : _BOOT + 16])

    @property
    def clean(self) -> bool:
        """True after the daemon stopped in order; False while it uses the segment, or when it did not."""
        return self._words[_CLEAN // 8] != 0

    def sessions(self) -> list[Session]:
        """The sessions that the daemon knows, in the order of the table. Raises FormatError."""
        found = []
        for at in self._entries(self.sessions_offset, self.sessions_max):
            name = self._entry_name(at, "session")
            found.append(Session(name, self._words[at // 8 + 1], self._words[at // 8 + 8], self._words[at // 8 + 2]))
        return found

    def groups(self) -> list[Group]:
        """The groups of trainers that there are, by index. Raises FormatError."""
        return [
            Group((at - self.groups_offset) // _ENTRY_BYTES, self._entry_name(at, "group"), self._words[at // 8 + 2])
            for at in self._entries(self.groups_offset, GROUPS)
        ]

    def _entries(self, offset: int, n: int) -> list[int]:
        """Offsets of the entries in use."""
        return [at for at in range(offset, offset + n * _ENTRY_BYTES, _ENTRY_BYTES) if self._words[at // 8] == 1]

    def _entry_name(self, at: int, what: str) -> str:
        length = self._words[at // 8 + 3]
        if length > NAME_BYTES_MAX:
            raise FormatError(f"the name of a {what} in the segment has {length} bytes, want at most {NAME_BYTES_MAX}")
        return bytes(self.memory[at + 128 : at + 128 + length]).decode(errors="replace")

    def place(self, index: int) -> int:
        """Offset of the batch at place ``index``."""
        if not 0 <= index < self.batches:
            raise FormatError(f"batch place {index}, the segment has {self.batches}")
        return self.data_offset + index * self.batch_stride

    def state_word(self, index: int) -> int:
        """The state of a place as it is stored: ``number << 3 | phase``."""
        word: int = self._words[(self.states_offset + 64 * index) // 8]
        return word

    def state(self, index: int) -> State:
        """The state line of place ``index``."""
        self.place(index)
        at = (self.states_offset + 64 * index) // 8
        word, progress, count, _, pending, stream, settled = self._words[at : at + 7]
        return State(word >> 3, word & 7, progress & 0xFFFFFFFF, progress >> 32, count, pending, stream, settled)
