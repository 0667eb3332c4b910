"""The transactions of one producer under :class:`ingestd.grads.GradReader`: what has come of each step.

The bytes stay where the daemon put them, under the lease of their batch, until they are used, dropped, or copied
(*spilled*) because the reader may hold no more batches.
"""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .batch import Batch
from .errors import Closed, PeerClosed
from .manifest import ALIGN, Manifest

__all__ = ["Heap", "Held", "Piece", "Source", "Transaction"]

Raw = NDArray[np.uint8]


class Heap:
    """How many bytes were copied and are still needed."""

    def __init__(self) -> None:
        self.bytes = 0


class Piece:
    """A verified run of flat bytes of a transaction: sample ``number`` of its stream."""

    __slots__ = ("crc", "flat", "heap", "held", "number", "raw")

    def __init__(self, flat: int, crc: int, raw: Raw, number: int, held: Held | None) -> None:
        self.flat = flat
        self.crc = crc
        self.raw = raw
        self.number = number
        self.held = held  # None: the bytes are a copy
        self.heap: Heap | None = None

    @property
    def end(self) -> int:
        return self.flat + len(self.raw)

    def drop(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            held.let_go(self)
        heap, self.heap = self.heap, None
        if heap is not None:
            heap.bytes -= len(self.raw)


class Held:
    """A leased batch with pieces in it. It is released with the last of them."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.pieces: list[Piece] = []
        #: whether the batch was given back
        self.released = False

    @property
    def intact(self) -> bool:
        """Whether the bytes are still those that were verified."""
        return self.batch.intact

    def let_go(self, piece: Piece) -> None:
        self.pieces.remove(piece)
        if not self.pieces:
            self.release()

    def release(self) -> None:
        if not self.released:
            self.released = True
            with contextlib.suppress(PeerClosed, Closed):  # the daemon has it already
                self.batch.release()

    def spill(self, heap: Heap) -> int | None:
        """Copies the pieces and releases the batch; how many bytes, or None where they were not intact any more."""
        copies = [piece.raw.copy() for piece in self.pieces]
        if not self.intact:
            return None
        for piece, copy in zip(self.pieces, copies):
            piece.raw, piece.held, piece.heap = copy, None, heap
        self.pieces = []
        self.release()
        n = sum(len(copy) for copy in copies)
        heap.bytes += n
        return n


class Transaction:
    """What has come of one step from one producer."""

    def __init__(self, step: int, manifest: Manifest, cell_bytes: int) -> None:
        self.step = step
        self.manifest = manifest
        self.complete = False
        #: the tensors of which it consists; None: all
        self.subset: frozenset[int] | None = None
        #: when the last chunk of it came
        self.touched = time.monotonic()
        self._there = np.zeros(manifest.data_bytes // ALIGN, np.bool_)
        self._blocks = 0
        self._cell_blocks = cell_bytes // ALIGN
        self._cells: dict[int, int] = {}  # blocks of each that have come
        self._starts: list[int] = []  # flat offsets of the pieces, ascending
        self._pieces: list[Piece] = []

    def add(self, piece: Piece) -> bool | None:
        """Adds a piece: True if it is new, False if the same was there, None if it overlaps another."""
        at = bisect.bisect_left(self._starts, piece.flat)
        if at < len(self._starts) and self._starts[at] == piece.flat:
            there = self._pieces[at]
            if there.end == piece.end and there.crc == piece.crc:
                return False
        first, last = piece.flat // ALIGN, -(-piece.end // ALIGN)
        if self._there[first:last].any():
            return None
        self._mark(first, last, True)
        self._starts.insert(at, piece.flat)
        self._pieces.insert(at, piece)
        return True

    def remove(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Takes those of the pieces that it has out again, and returns them."""
        mine = []
        for piece in pieces:
            at = bisect.bisect_left(self._starts, piece.flat)
            if at < len(self._pieces) and self._pieces[at] is piece:
                del self._pieces[at], self._starts[at]
                self._mark(piece.flat // ALIGN, -(-piece.end // ALIGN), False)
                self.complete = False
                mine.append(piece)
        return mine

    def _mark(self, first: int, last: int, there: bool) -> None:
        self._there[first:last] = there
        sign = 1 if there else -1
        self._blocks += sign * (last - first)
        while first < last:
            cell = first // self._cell_blocks
            stop = min(last, (cell + 1) * self._cell_blocks)
            self._cells[cell] = self._cells.get(cell, 0) + sign * (stop - first)
            first = stop

    def cells_of(self, piece: Piece) -> range:
        """The cells, stretches of flat bytes, that a piece touches."""
        cell_bytes = self._cell_blocks * ALIGN
        return range(piece.flat // cell_bytes, -(-piece.end // cell_bytes))

    def has_cell(self, cell: int) -> bool:
        """Whether all of a cell has come."""
        need = min(self._cell_blocks, len(self._there) - cell * self._cell_blocks)
        return self._cells.get(cell, 0) == need

    def check_complete(self) -> bool:
        """Whether all that belongs to it has come, and nothing else."""
        if self.subset is None:
            self.complete = self._blocks == len(self._there)
        else:
            blocks = [self._blocks_of(i) for i in self.subset]
            want = sum(b.stop - b.start for b in blocks)
            self.complete = want == self._blocks and all(bool(self._there[b].all()) for b in blocks)
        return self.complete

    def has_tensor(self, i: int) -> bool:
        """Whether tensor ``i`` belongs to it."""
        return self.subset is None or i in self.subset

    def progress(self) -> tuple[int, int]:
        """``(have, want)`` bytes of tensors."""
        m = self.manifest
        tensors = range(len(m)) if self.subset is None else self.subset
        want = sum(m[i].encoded_bytes for i in tensors)
        have = sum(len(piece.raw) for piece in self._pieces)
        return min(have, want), want

    def part(self, flat: int, end: int) -> Raw:
        """The bytes from ``flat`` on that lie in one piece, at most to ``end``."""
        piece = self._pieces[bisect.bisect_right(self._starts, flat) - 1]
        return piece.raw[flat - piece.flat : end - piece.flat]

    def parts(self, flat: int, end: int) -> Iterator[tuple[int, Raw]]:
        """``(flat offset, bytes)`` of the pieces that make up flat bytes ``flat`` to ``end``, in order."""
        at = bisect.bisect_right(self._starts, flat) - 1
        while flat < end:
            piece = self._pieces[at]
            stop = min(piece.end, end)
            yield flat, piece.raw[flat - piece.flat : stop - piece.flat]
            flat, at = stop, at + 1

    def assembled(self, i: int) -> Raw:
        """A copy of the encoded bytes of tensor ``i``."""
        begin, end = self.manifest.offsets[i], self.manifest.ends[i]
        out = np.empty(end - begin, np.uint8)
        for at, raw in self.parts(begin, end):
            out[at - begin : at - begin + len(raw)] = raw
        return out

    def intact(self) -> bool:
        """Whether what was read of it is what was verified."""
        return all(piece.held is None or piece.held.intact for piece in self._pieces)

    def drop(self) -> None:
        """Lets go of all of it."""
        pieces, self._pieces, self._starts = self._pieces, [], []
        for piece in pieces:
            piece.drop()

    def _blocks_of(self, i: int) -> slice:
        return slice(self.manifest.offsets[i] // ALIGN, -(-self.manifest.ends[i] // ALIGN))


class Source:
    """A producer, known by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stream = 0
        #: whether its connection is there, as far as is known
        self.live = False
        #: id of the manifest of its connection
        self.manifest = 0
        self.transactions: dict[int, Transaction] = {}
        #: why steps of it are not complete
        self.reasons: dict[int, str] = {}
        #: steps that will not come any more, or not whole
        self.over: set[int] = set()
        #: the last step that it began
        self.newest = -1
        #: why the last chunk of an unknown step was dropped
        self.damaged = ""
        #: number of the next sample of its stream; -1: of any
        self.next = -1
        #: numbers of samples that came, were lost with a daemon, and come again
        self.again: set[int] = set()

    def complete(self, step: int) -> Transaction | None:
        """The transaction of a step, if it is complete."""
        tx = self.transactions.get(step)
        return tx if tx is not None and tx.complete else None

    def hopeless(self, step: int) -> bool:
        """Whether a step that is not complete will not become so, whatever comes next on this connection."""
        return step in self.over or self.newest > step

    def fail(self, step: int, reason: str) -> None:
        """A step of it will not come any more, unless it begins anew."""
        self.drop(step)
        self.reasons[step] = reason
        self.over.add(step)

    def drop(self, step: int) -> bool:
        """Drops what has come of a step; whether there was something that was not complete."""
        tx = self.transactions.pop(step, None)
        if tx is None:
            return False
        tx.drop()
        return not tx.complete

    def why(self, step: int, manifest: Manifest | None) -> str:
        """Why a step is not complete."""
        tx = self.transactions.get(step)
        if step in self.reasons:
            return self.reasons[step]
        if manifest is not None and self.manifest not in (0, manifest.id):
            return "manifest differs"
        if self.live and self.newest > step:
            return f"went on to step {self.newest}"
        have, want = (0, sum(t.encoded_bytes for t in manifest)) if tx is None and manifest else (0, 0)
        if tx is not None:
            have, want = tx.progress()
        if not self.live:
            return f"connection ended: {have} of {want} bytes" if have else "connection ended"
        return f"incomplete: {have} of {want} bytes"

    def forget(self, step: int) -> int:
        """Drops everything of the steps up to ``step``; how many of them were not complete."""
        steps = [s for s in self.transactions if s <= step]
        dropped = sum(self.drop(s) for s in steps)
        self.reasons = {s: why for s, why in self.reasons.items() if s > step}
        self.over = {s for s in self.over if s > step}
        return dropped
