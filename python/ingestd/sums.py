"""Sums of gradients from where they lie: :class:`Plan`.

The sum of a tensor is that of the producers that have it, in the order of their names: the first one's elements, the
second one's added to them, and so on, one rounding per addition (``docs/tensors.md``, "Reducing"). It is made cell by
cell, a cell being as many flat bytes as a chunk has, so that what is added to stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from . import native
from .dtypes import ITEMSIZE
from .encodings import kind_of, scale_of
from .errors import SpecError, TensorMismatch
from .gather import Transaction
from .manifest import DENSE, SCALE_BYTES, Manifest, Tensor

__all__ = ["Plan", "outputs"]

Floats = NDArray[np.float32]
Out = dict[str, Floats]


def outputs(manifest: Manifest, out: Mapping[str, Floats] | None) -> Out:
    """The arrays that sums go into, checked; new ones for all tensors that can be summed where ``out`` is None.

    Raises KeyError, TensorMismatch, SpecError.
    """
    if out is None:
        return {t.name: np.empty(t.shape, np.float32) for t in manifest if t.summable}
    for name, array in out.items():
        tensor = manifest[manifest.index(name)]
        if not tensor.summable:
            raise SpecError(f"tensor {name!r} is {tensor.dtype}, which is not summed: F32, F16 and BF16 are")
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != tensor.shape:
            got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise TensorMismatch(name, got, f"a numpy array float32{list(tensor.shape)}")
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise SpecError(f"the array for tensor {name!r} must be contiguous and writable")
    return dict(out)


class _Unit:
    """What is summed at once: elements of tensors in one cell, or a tensor of ``topk``."""

    def __init__(self, needs: set[int]) -> None:
        self.needs = needs  # cells
        self.segments: list[tuple[int, int, int]] = []  # tensor, flat begin and end
        self.of: tuple[Transaction, ...] | None = None  # whose sum is there


class Plan:
    """The sum of one step into ``out``: of cells as they come (:meth:`advance`), and of the rest (:meth:`finish`)."""

    def __init__(self, manifest: Manifest, out: Out, cell_bytes: int) -> None:
        self.manifest = manifest
        self.out = out
        self._flat = {manifest.index(name): array.reshape(-1) for name, array in out.items()}
        self._units: list[_Unit] = []
        self._by_cell: dict[int, list[_Unit]] = {}
        dense: dict[int, _Unit] = {}
        for i in sorted(self._flat):
            tensor, begin, end = manifest[i], manifest.offsets[i], manifest.ends[i]
            if begin == end:
                continue
            cells = range(begin // cell_bytes, -(-end // cell_bytes))
            if tensor.kind == "topk":
                self._unit(set(cells)).segments.append((i, begin, end))
                continue
            head = SCALE_BYTES if tensor.kind.startswith("f8") else 0
            for cell in cells:
                unit = dense.get(cell)
                if unit is None:
                    unit = dense[cell] = self._unit({cell})
                if head and cells[0] not in unit.needs:
                    unit.needs.add(cells[0])
                    self._by_cell.setdefault(cells[0], []).append(unit)
                first, last = max(begin + head, cell * cell_bytes), min(end, (cell + 1) * cell_bytes)
                if first < last:
                    unit.segments.append((i, first, last))

    def _unit(self, needs: set[int]) -> _Unit:
        unit = _Unit(needs)
        self._units.append(unit)
        for cell in needs:
            self._by_cell.setdefault(cell, []).append(unit)
        return unit

    def advance(self, members: Sequence[Transaction], cells: Iterable[int] | None = None) -> None:
        """Sums what ``members``, in order, all have of the cells (None: of all) and was not summed for them yet."""
        of = tuple(members)
        units = self._units if cells is None else [u for cell in cells for u in self._by_cell.get(cell, ())]
        for unit in units:
            if of and unit.of != of and all(tx.has_cell(cell) for tx in of for cell in unit.needs):
                for segment in unit.segments:
                    self._sum(segment, of)
                unit.of = of

    def finish(self, members: Sequence[Transaction]) -> None:
        """Sums what is not the sum of ``members``, which are complete, yet."""
        everyone = tuple(members)
        whole = all(tx.subset is None for tx in everyone)
        for unit in self._units:
            if whole and unit.of == everyone:
                continue
            for segment in unit.segments:
                have = tuple(tx for tx in everyone if tx.has_tensor(segment[0]))
                if unit.of is None or unit.of != have:
                    self._sum(segment, have)
            unit.of = everyone if whole else None

    def divide(self, members: Sequence[Transaction]) -> None:
        """Makes means of sums, which are there no more then."""
        for unit in self._units:
            unit.of = None
        for i, flat in self._flat.items():
            n = sum(tx.has_tensor(i) for tx in members)
            if n > 1:
                np.divide(flat, np.float32(n), out=flat)

    def _sum(self, segment: tuple[int, int, int], transactions: Sequence[Transaction]) -> None:
        i, begin, end = segment
        tensor, out = self.manifest[i], self._flat[i]
        if tensor.kind == "topk":
            out[:] = 0
            for tx in transactions:
                for _, raw in tx.parts(begin, end):
                    native.scatter_add(out, raw)
            return
        item = DENSE.get(tensor.kind) or ITEMSIZE[tensor.dtype]
        start = self.manifest.offsets[i] + (SCALE_BYTES if tensor.kind.startswith("f8") else 0)
        if not transactions:
            out[(begin - start) // item : (end - start) // item] = 0
            return
        scales = [self._scale(tensor, i, tx) for tx in transactions]
        kind, flat = kind_of(tensor), begin
        while flat < end:
            parts = [tx.part(flat, end) for tx in transactions]
            n = min(map(len, parts))
            into = out[(flat - start) // item : (flat + n - start) // item]
            native.sum_of(into, [part[:n] for part in parts], kind, scales)
            flat += n

    def _scale(self, tensor: Tensor, i: int, tx: Transaction) -> float:
        if not tensor.kind.startswith("f8"):
            return 1.0
        begin = self.manifest.offsets[i]
        return scale_of(next(raw for _, raw in tx.parts(begin, begin + 4)))
