"""CRC-32C, copies that sum, and float32 accumulation: in C where the package was built with it, else in numpy.

The C library (``_native.c``) is called through ctypes, which lets other threads run meanwhile. :data:`AVAILABLE` says
whether it is there; ``INGESTD_NATIVE=0`` in the environment does without it. Both ways give the same bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AVAILABLE",
    "PAST_CACHES_BYTES",
    "accumulate",
    "check_pairs",
    "combine",
    "copy_crc",
    "crc32c",
    "encode",
    "largest_finite",
    "scatter_add",
    "sum_of",
]

Bytes = Union[bytes, bytearray, memoryview, NDArray[Any]]
Floats = NDArray[np.float32]

#: Bytes of all tensors from which on copying them past the caches is faster: readers would not find them there, either.
PAST_CACHES_BYTES = 8 << 20

_ABI = 3
_SUM_BLOCK = 1 << 16  # elements
_POLY = 0x82F63B78
_KINDS = {"f32": 0, "f16": 1, "bf16": 2, "f8_e4m3": 3, "f8_e5m2": 4}
_ITEM = {"f32": 4, "f16": 2, "bf16": 2, "f8_e4m3": 1, "f8_e5m2": 1}
_UNUSED = 0xFFFFFFFF
_PAIR = np.dtype([("index", "<u4"), ("value", "<f4")])


def _load() -> Any:
    if os.environ.get("INGESTD_NATIVE", "1") == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            lib = ctypes.CDLL(str(path))
            if lib.ingestd_abi() == _ABI:
                return _typed(lib)
        except (OSError, AttributeError):  # of another machine, or older than this file
            continue
    return None


def _typed(lib: Any) -> Any:
    p, n, u32, i32, f = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int, ctypes.c_float
    u64, i64 = ctypes.c_uint64, ctypes.c_int64
    for name, result, arguments in (
        ("crc32c", u32, (u32, p, n)),
        ("crc32c_table", u32, (u32, p, n)),
        ("crc32c_folding", i32, (i32,)),
        ("crc32c_combine", u32, (u32, u32, u64)),
        ("copy_crc", u32, (p, p, n, u32, i32)),
        ("accumulate", None, (p, p, n, i32, f, i32)),
        ("sum", None, (p, ctypes.POINTER(p), ctypes.POINTER(f), n, n, i32)),
        ("check_pairs", i64, (p, u64, u64, ctypes.POINTER(i64))),
        ("scatter_add", None, (p, u64, p, u64)),
        ("encode", None, (p, p, n, i32, f)),
        ("largest_finite", f, (p, n)),
    ):
        function = getattr(lib, f"ingestd_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


_lib: Any = _load()

#: whether the C library is in use
AVAILABLE: bool = _lib is not None


def _raw(data: Bytes) -> NDArray[np.uint8]:
    """The bytes of ``data``, which must be contiguous."""
    if not isinstance(data, np.ndarray):
        return np.frombuffer(data, np.uint8)
    if not data.flags.c_contiguous:
        raise ValueError("the array is not contiguous")
    return data.reshape(-1).view(np.uint8)


def _writable(into: Bytes) -> NDArray[np.uint8]:
    raw = _raw(into)
    if not raw.flags.writeable:
        raise ValueError("the memory is read-only")
    return raw


def crc32c(data: Bytes, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of ``data``, going on from ``crc``."""
    if _lib is None:
        return _crc_plain(_raw(data), crc)
    if type(data) is bytes:
        return int(_lib.ingestd_crc32c(crc, data, len(data)))
    raw = _raw(data)
    return int(_lib.ingestd_crc32c(crc, raw.ctypes.data, len(raw)))


def combine(a: int, b: int, n: int) -> int:
    """CRC-32C of something with the sum ``a``, followed by ``n`` bytes with the sum ``b``."""
    if _lib is not None:
        return int(_lib.ingestd_crc32c_combine(a, b, n))
    return _multiply(_power_of_bytes(n), a) ^ b


def copy_crc(into: Bytes, data: Bytes, crc: int = 0, past_caches: bool = False) -> int:
    """Copies ``data`` into ``into``, which has as many bytes; its CRC-32C, going on from ``crc``.

    With ``past_caches`` what is copied does not displace what the processor's caches hold: for large copies.
    """
    to, raw = _writable(into), _raw(data)
    if len(to) != len(raw):
        raise ValueError(f"{len(raw)} bytes do not fit into {len(to)}")
    if _lib is not None:
        return int(_lib.ingestd_copy_crc(to.ctypes.data, raw.ctypes.data, len(raw), crc, past_caches))
    to[:] = raw
    return _crc_plain(raw, crc)


def accumulate(into: Floats, data: Bytes, kind: str, add: bool, scale: float = 1.0) -> None:
    """``into = x`` or, with ``add``, ``into += x``, where x are the values in ``data``, as float32.

    ``kind`` is ``f32``, ``f16``, ``bf16``, ``f8_e4m3`` or ``f8_e5m2``; of the last two a value is the product with
    ``scale``, rounded. One rounding per addition, to nearest even.
    """
    raw = _raw(data)
    _check_floats(into)
    if len(raw) != into.size * _ITEM[kind]:
        raise ValueError(f"{len(raw)} bytes of {kind} for {into.size} elements")
    if _lib is not None:
        _lib.ingestd_accumulate(into.ctypes.data, raw.ctypes.data, into.size, _KINDS[kind], scale, add)
        return
    flat = into.reshape(-1)
    if kind == "f32":
        values = raw.view(np.float32)
        if add:
            np.add(flat, values, out=flat)
        else:
            flat[:] = values
        return
    step, item = 1 << 16, _ITEM[kind]
    for at in range(0, len(flat), step):
        part = flat[at : at + step]
        values = _decoded(raw[at * item : (at + len(part)) * item], kind, scale)
        if add:
            np.add(part, values, out=part)
        else:
            part[:] = values


def sum_of(into: Floats, sources: Sequence[NDArray[np.uint8]], kind: str, scales: Sequence[float]) -> None:
    """``into`` = the first source's values, then ``+=`` those of the second, and so on: as :func:`accumulate` does.

    At least one source; all are contiguous and have as many elements as ``into``.
    """
    _check_floats(into)
    size, n = into.size * _ITEM[kind], len(sources)
    if n == 0 or any(len(source) != size or not source.flags.c_contiguous for source in sources):
        raise ValueError(f"want 1 or more sources of {size} contiguous bytes")
    if _lib is not None:
        pointers = (ctypes.c_void_p * n)(*[source.ctypes.data for source in sources])
        _lib.ingestd_sum(into.ctypes.data, pointers, (ctypes.c_float * n)(*scales), n, into.size, _KINDS[kind])
        return
    flat, item = into.reshape(-1), _ITEM[kind]
    for at in range(0, len(flat), _SUM_BLOCK):
        part = flat[at : at + _SUM_BLOCK]
        for k, source in enumerate(sources):
            accumulate(part, source[at * item : (at + len(part)) * item], kind, k > 0, scales[k])


def check_pairs(data: Bytes, elements: int, last: int = -1) -> tuple[int, int]:
    """``(bad, last)``: the number of the first of the entries of ``topk`` that is not sound, or -1; the last index.

    Indices must be below ``elements`` and ascend, also from ``last``, that of the entry before; unused ones come last.
    """
    raw = _raw(data)
    if _lib is not None:
        before = ctypes.c_int64(last)
        bad = _lib.ingestd_check_pairs(raw.ctypes.data, len(raw) // 8, elements, ctypes.byref(before))
        return int(bad), int(before.value)
    index = raw.view(_PAIR)["index"].astype(np.int64)
    steps = np.diff(index, prepend=last)
    unused = index == _UNUSED
    wrong = np.flatnonzero(np.where(unused, steps < 0, (steps <= 0) | (index >= elements)))
    if len(wrong):
        return int(wrong[0]), last
    return -1, int(index[-1]) if len(index) else last


def scatter_add(into: Floats, data: Bytes) -> None:
    """Adds the entries of ``topk`` in ``data`` to the elements they name; entries beyond them are passed over."""
    raw = _raw(data)
    _check_floats(into)
    if _lib is not None:
        _lib.ingestd_scatter_add(into.ctypes.data, into.size, raw.ctypes.data, len(raw) // 8)
        return
    flat, pairs = into.reshape(-1), raw.view(_PAIR)
    pairs = pairs[pairs["index"] < into.size]
    np.add.at(flat, pairs["index"], pairs["value"])


def encode(values: Floats, kind: str, scale: float = 1.0) -> NDArray[np.uint8]:
    """The bytes of ``values`` as ``bf16``, ``f16``, ``f8_e4m3`` or ``f8_e5m2`` (of values / scale, without the scale).

    To nearest, ties to even. In 8 bits what is too large becomes the largest finite value, else infinity.
    """
    _check_floats(values)
    out = np.empty(values.size * _ITEM[kind], np.uint8)
    if _lib is not None:
        _lib.ingestd_encode(out.ctypes.data, values.ctypes.data, values.size, _KINDS[kind], scale)
        return out
    flat, step = values.reshape(-1), 1 << 16
    for at in range(0, len(flat), step):
        part = _encoded(flat[at : at + step], kind, scale)
        out[at * _ITEM[kind] : at * _ITEM[kind] + part.nbytes] = part.view(np.uint8)
    return out


def largest_finite(values: Floats) -> float:
    """The largest magnitude of ``values`` that is finite; 0 where there is none."""
    _check_floats(values)
    if _lib is not None:
        return float(_lib.ingestd_largest_finite(values.ctypes.data, values.size))
    magnitude = values.reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)
    magnitude[magnitude >= 0x7F800000] = 0
    return float(magnitude.max(initial=0).view(np.float32))


def _check_floats(array: Floats) -> None:
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ValueError(f"want a contiguous array of float32, got {array.dtype}")


# -- the same in numpy ------------------------------------------------------------------------------------------------


def _decoded(raw: NDArray[np.uint8], kind: str, scale: float) -> Floats:
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    values: Floats = f8_values(kind) * np.float32(scale)
    found: Floats = values[raw]
    return found


@lru_cache(maxsize=2)
def f8_values(kind: str) -> Floats:
    """The 256 values of an 8-bit format, by their bits."""
    bits = np.arange(256)
    mantissa_bits, bias = (3, 7) if kind == "f8_e4m3" else (2, 15)
    exponent, mantissa = (bits & 127) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    whole = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    values = np.ldexp(whole.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    if kind == "f8_e4m3":
        values[(bits & 127) == 127] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    signed: Floats = np.copysign(values, np.where(bits & 128, -1, 1).astype(np.float32))
    return signed


def _encoded(values: Floats, kind: str, scale: float) -> NDArray[Any]:
    if kind == "bf16":
        bits = values.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
        return np.where(np.isnan(values), bits >> np.uint32(16) | np.uint32(0x40), rounded).astype(np.uint16)
    if kind == "f16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            halves = values.astype(np.float16).view(np.uint16)
        bits = values.view(np.uint32)
        quiet = np.uint32(0x7E00) | (bits >> np.uint32(13) & np.uint32(0x3FF)) | (bits >> np.uint32(16) & 0x8000)
        return np.where(np.isnan(values), quiet, halves).astype(np.uint16)
    with np.errstate(all="ignore"):
        bits = (values / np.float32(scale)).view(np.uint32)
    most, drop, bias, least, magic, infinity, nan = (
        (0x43E00000, 20, 120 << 3, 121 << 23, 16384.0, 0x7F, 0x7F) if kind == "f8_e4m3"
        else (0x47600000, 21, 112 << 2, 113 << 23, 128.0, 0x7C, 0x7E)
    )  # fmt: skip
    magnitude = bits & np.uint32(0x7FFFFFFF)
    clamped = np.minimum(magnitude, np.uint32(most))
    half, lowest = np.uint32((1 << (drop - 1)) - 1), clamped >> np.uint32(drop) & np.uint32(1)
    normal = ((clamped + half + lowest) >> np.uint32(drop)) - np.uint32(bias)
    start = np.float32(magic)
    subnormal = (clamped.view(np.float32) + start).view(np.uint32) - start.view(np.uint32)
    found = np.where(clamped < np.uint32(least), subnormal, normal)
    found = np.where(magnitude == 0x7F800000, infinity, np.where(magnitude > 0x7F800000, nan, found))
    signed: NDArray[Any] = found | (bits >> np.uint32(24) & np.uint32(0x80))
    return signed.astype(np.uint8)


def _byte_table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (_POLY if n & 1 else 0)
        table.append(n)
    return table


_TABLE = _byte_table()
_LANE_BYTES = 256
_BLOCK_BYTES = 1 << 20


def _crc_plain(raw: NDArray[np.uint8], crc: int) -> int:
    for at in range(0, len(raw), _BLOCK_BYTES):
        block = raw[at : at + _BLOCK_BYTES]
        if len(block) < 2 * _LANE_BYTES:
            crc ^= 0xFFFFFFFF
            for byte in block.tobytes():
                crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
            crc ^= 0xFFFFFFFF
        else:
            zeros = _shifted(0xFFFFFFFF, len(block)) ^ 0xFFFFFFFF  # the sum of as many zeros
            crc = combine(crc, _crc_in_lanes(block) ^ zeros, len(block))
    return crc


def _crc_in_lanes(block: NDArray[np.uint8]) -> int:
    """The sum of ``block`` that begins with 0 and is not complemented: many stretches of it side by side."""
    lanes = 1 << (-(-len(block) // _LANE_BYTES) - 1).bit_length()
    padded = np.zeros(lanes * _LANE_BYTES, np.uint8)
    padded[len(padded) - len(block) :] = block  # zeros in front change nothing
    words = np.ascontiguousarray(padded.view("<u2").reshape(lanes, -1).T)
    table, sums = _word_table(), np.zeros(lanes, np.uint32)
    for column in words:
        sums = (sums >> np.uint32(16)) ^ table[(sums & np.uint32(0xFFFF)) ^ column]
    n = _LANE_BYTES
    while len(sums) > 1:
        by = _shift_table(n)
        left, right = sums[0::2], sums[1::2]
        sums = by[0][left & np.uint32(0xFFFF)] ^ by[1][left >> np.uint32(16)] ^ right
        n *= 2
    return int(sums[0])


@lru_cache(maxsize=1)
def _word_table() -> NDArray[np.uint32]:
    """What 16 bits make of the sum."""
    sums = np.arange(1 << 16, dtype=np.uint32)
    bytes_table = np.array(_TABLE, np.uint32)
    for _ in range(2):
        sums = (sums >> np.uint32(8)) ^ bytes_table[sums & np.uint32(0xFF)]
    return sums


@lru_cache(maxsize=32)
def _shift_table(n: int) -> NDArray[np.uint32]:
    """What ``n`` bytes of zeros make of the low and of the high half of a sum."""
    images = np.array([_shifted(1 << bit, n) for bit in range(32)], np.uint32)
    bits = np.arange(1 << 16, dtype=np.uint32)
    found = np.zeros((2, 1 << 16), np.uint32)
    for bit in range(16):
        chosen = (bits >> np.uint32(bit) & np.uint32(1)).astype(bool)
        found[0][chosen] ^= images[bit]
        found[1][chosen] ^= images[16 + bit]
    return found


def _shifted(crc: int, n: int) -> int:
    return _multiply(_power_of_bytes(n), crc)


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo that of the sum, reflected."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ _POLY if b & 1 else b >> 1
    return product


@lru_cache(maxsize=64)
def _power_of_bytes(n: int) -> int:
    """x to the power of 8n."""
    power, square = 1 << 31, _multiply_n(1 << 30, 3)
    while n:
        if n & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        n >>= 1
    return power


def _multiply_n(x: int, squarings: int) -> int:
    for _ in range(squarings):
        x = _multiply(x, x)
    return x
