"""Encodings of tensors: ``docs/tensors.md``, "Encodings". What a producer sends of an array, and what it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import native
from .dtypes import NUMPY
from .manifest import DENSE, SCALE_BYTES, Tensor
from .spec import Array

__all__ = ["Feedback", "decode", "encode", "f8_scale", "kind_of", "scale_of", "top"]

_LARGEST = {"f8_e4m3": 448.0, "f8_e5m2": 57344.0}
_SCALE_MIN = 2.0**-120
_PAIR = np.dtype([("index", "<u4"), ("value", "<f4")])

Raw = NDArray[np.uint8]
Floats = NDArray[np.float32]


def kind_of(tensor: Tensor) -> str:
    """How the elements lie in the tensor's bytes, as :func:`ingestd.native.accumulate` calls it."""
    return tensor.kind or tensor.dtype.lower()


def f8_scale(values: Floats, kind: str) -> float:
    """The scale of an 8-bit encoding of ``values``, as float32."""
    scale = np.float32(native.largest_finite(values)) / np.float32(_LARGEST[kind])
    return float(scale) if scale >= _SCALE_MIN else 1.0


def scale_of(raw: Raw) -> float:
    """The scale in front of the elements of an 8-bit encoding."""
    return float(raw[:4].view(np.float32)[0])


def encode(tensor: Tensor, array: Array) -> Raw:
    """The bytes that travel of a contiguous ``array``, which has the tensor's dtype; not for ``topk``.

    Without an encoding they are the array's own memory.
    """
    if not tensor.encoding:
        return array.reshape(-1).view(np.uint8)
    values: Floats = array.reshape(-1)
    kind = tensor.kind
    if DENSE[kind] == 2:
        return native.encode(values, kind)
    if len(values) == 0:
        return np.zeros(0, np.uint8)
    scale = f8_scale(values, kind)
    raw = np.zeros(SCALE_BYTES + len(values), np.uint8)
    raw[:4].view(np.float32)[0] = scale
    raw[SCALE_BYTES:] = native.encode(values, kind, scale)
    return raw


def top(values: Floats, k: int) -> NDArray[np.int64]:
    """The indices of the ``k`` elements of largest magnitude, ascending; of equal ones the lower; NaN is largest."""
    magnitude = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    np.minimum(magnitude, np.uint32(0x7F800001), out=magnitude)  # all NaN are alike
    n = len(magnitude)
    least = np.partition(magnitude, n - k)[n - k]
    above = magnitude > least
    chosen = np.flatnonzero(above)
    equal = np.flatnonzero(magnitude == least)[: k - len(chosen)]
    found: NDArray[np.int64] = np.sort(np.concatenate([chosen, equal]))
    return found


class Feedback:
    """What ``topk`` did not send, kept for the next step: the residual of each tensor.

    :meth:`encode` adds a gradient to it and takes the largest elements out; :meth:`commit` makes that so when the step
    was sent, :meth:`abort` leaves everything as it was.
    """

    def __init__(self) -> None:
        self._residual: dict[str, Floats] = {}
        self._pending: dict[str, Floats] = {}

    def encode(self, tensor: Tensor, array: Array) -> Raw:
        """The ``8 * k`` bytes that travel."""
        values: Floats = array.reshape(-1)
        residual = self._residual.get(tensor.name)
        with np.errstate(all="ignore"):
            total: Floats = values.copy() if residual is None else residual + values
        index = top(total, tensor.k)
        pairs = np.empty(tensor.k, _PAIR)
        pairs["index"], pairs["value"] = index, total[index]
        total[index] = 0
        self._pending[tensor.name] = total
        return pairs.view(np.uint8)

    def residual(self, name: str) -> Floats | None:
        """What is kept of a tensor, flat; None before its first step."""
        return self._residual.get(name)

    def commit(self) -> None:
        self._residual.update(self._pending)
        self._pending.clear()

    def abort(self) -> None:
        self._pending.clear()


def decode(tensor: Tensor, raw: Raw) -> Array:
    """The array that the tensor's bytes stand for: its own dtype (a view of ``raw``), float32 where it was encoded."""
    if not tensor.encoding or tensor.elements == 0:
        plain: NDArray[Any] = raw.view(NUMPY[tensor.dtype]).reshape(tensor.shape)
        return plain
    out = np.zeros(tensor.elements, np.float32)
    if tensor.kind == "topk":
        native.scatter_add(out, raw)
    elif DENSE[tensor.kind] == 2:
        native.accumulate(out, raw, tensor.kind, False)
    else:
        native.accumulate(out, raw[SCALE_BYTES:], tensor.kind, False, scale_of(raw))
    return out.reshape(tensor.shape)
