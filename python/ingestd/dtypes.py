"""The element types of leaves, by their safetensors names, and their numpy counterparts.

``BF16``, ``F8_E4M3`` and ``F8_E5M2`` have no numpy type of their own. Where the ``ml_dtypes`` package is installed they
are its ``bfloat16``, ``float8_e4m3fn`` and ``float8_e5m2``, else unsigned integers that hold the raw bits.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("ingestd needs a little-endian machine: samples and segments are little-endian")

__all__ = ["ITEMSIZE", "NUMPY", "RAW", "name_of"]

#: dtype name -> bytes of one element.
ITEMSIZE: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

#: dtype name -> unsigned integers of the same size, for those that numpy itself does not know.
RAW: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
}

#: dtype name -> numpy dtype of the arrays that this package hands out.
NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
    **RAW,
}

try:
    import ml_dtypes
except ImportError:
    pass
else:
    NUMPY["BF16"] = np.dtype(ml_dtypes.bfloat16)
    NUMPY["F8_E4M3"] = np.dtype(ml_dtypes.float8_e4m3fn)
    NUMPY["F8_E5M2"] = np.dtype(ml_dtypes.float8_e5m2)

_NAMES = {d: n for n, d in NUMPY.items() if d is not RAW.get(n)}


def name_of(dtype: np.dtype[Any]) -> str | None:
    """The name of a numpy dtype, or None when no leaf can have it (complex, text, objects, other byte order)."""
    return _NAMES.get(dtype)
