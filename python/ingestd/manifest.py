"""Which tensors a stream of gradients or weights has, and where they lie: ``docs/tensors.md``, "Manifest".

Manifests are immutable. They are made from arrays (:meth:`Manifest.from_arrays`), from the header of a safetensors file
(:meth:`Manifest.from_safetensors`), or from JSON (:meth:`Manifest.parse`); equal ones have equal fingerprints, here and
in the daemon. Flat offsets are places in the ``data_bytes`` bytes in which all tensors lie one after the other.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
import struct
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .dtypes import ITEMSIZE, NUMPY, name_of
from .errors import Difference, SpecError
from .spec import Array, as_array, dtype_advice

__all__ = ["DENSE", "Manifest", "Tensor", "diff", "read_safetensors_header"]

NAME_BYTES_MAX = 512
DIMENSIONS_MAX = 8
DIMENSION_MAX = 1 << 40
TENSORS_MAX = 65_536
METADATA_MAX = 1_024
TEXT_BYTES_MAX = 2_000_000
DATA_BYTES_MAX = 1 << 40
ALIGN = 256
SCALE_BYTES = 256  # in front of the elements of the 8-bit encodings
TOPK_MAX = (1 << 32) - 2  # elements of a tensor with topk, so that an index is never FFFFFFFF
SAFETENSORS_HEADER_MAX = 100_000_000

#: encoding -> bytes of one element, of those that have one value per element
DENSE = {"bf16": 2, "f16": 2, "f8_e4m3": 1, "f8_e5m2": 1}
#: dtypes without an encoding that can be summed
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """One named tensor: ``dtype`` (``F32``), ``shape`` (``()`` for a scalar; dimensions of 0 make it empty).

    ``encoding`` is how its bytes travel: empty (as they are), ``bf16``, ``f16``, ``f8_e4m3``, ``f8_e5m2`` or
    ``topk:K``. Raises SpecError.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    encoding: str = ""

    def __post_init__(self) -> None:
        _check_text(self.name, "tensor name", 1, NAME_BYTES_MAX)
        if self.dtype not in ITEMSIZE:
            raise SpecError(f"tensor {self.name!r}: unknown dtype {self.dtype!r}; use one of {' '.join(ITEMSIZE)}")
        shape = tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if len(shape) > DIMENSIONS_MAX:
            raise SpecError(f"tensor {self.name!r} has {len(shape)} dimensions, at most {DIMENSIONS_MAX} are allowed")
        for d in shape:
            if not isinstance(d, int) or isinstance(d, bool) or not 0 <= d <= DIMENSION_MAX:
                raise SpecError(f"tensor {self.name!r}: dimension {d!r} in shape {list(shape)}; each must be 0 to 2^40")
        if self.nbytes > DATA_BYTES_MAX:
            raise SpecError(f"tensor {self.name!r} has {self.nbytes} bytes, at most {DATA_BYTES_MAX} are allowed")
        self._check_encoding()

    def _check_encoding(self) -> None:
        kind, colon, k = self.encoding.partition(":")
        number = k.isascii() and k.isdigit() and k == k.lstrip("0")
        known = number if kind == "topk" else kind in DENSE and not colon
        if self.encoding and not known:
            raise SpecError(
                f"tensor {self.name!r}: unknown encoding {self.encoding!r}; use {', '.join(DENSE)} or topk:K"
            )
        if self.encoding and self.dtype != "F32":
            raise SpecError(f"tensor {self.name!r}: only F32 can be sent as {self.encoding}, this one is {self.dtype}")
        if kind == "topk":
            if self.elements > TOPK_MAX:
                raise SpecError(f"tensor {self.name!r} has {self.elements} elements, topk allows at most {TOPK_MAX}")
            if len(k) > 10 or not 1 <= int(k) <= self.elements:
                raise SpecError(
                    f"tensor {self.name!r}: {self.encoding}: it has {self.elements} elements; K is 1 to that"
                )

    @cached_property
    def elements(self) -> int:
        """Number of elements; 0 where a dimension is 0."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements as they are, without an encoding."""
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """dtype of the arrays that hold it."""
        return NUMPY[self.dtype]

    @property
    def kind(self) -> str:
        """The encoding without its number: ``topk`` of ``topk:10``; empty without an encoding."""
        return self.encoding.partition(":")[0]

    @property
    def k(self) -> int:
        """How many entries ``topk`` keeps; 0 in other encodings."""
        return int(self.encoding[5:]) if self.kind == "topk" else 0

    @cached_property
    def encoded_bytes(self) -> int:
        """Bytes that travel."""
        if self.elements == 0 or not self.encoding:
            return self.nbytes
        if self.kind == "topk":
            return 8 * self.k
        size = DENSE[self.kind]
        return (SCALE_BYTES if size == 1 else 0) + size * self.elements

    @property
    def summable(self) -> bool:
        """Whether sums of it can be made: F32, F16, BF16 and every encoding."""
        return self.dtype in _FLOATS

    @property
    def layout(self) -> str:
        """dtype, shape and encoding as text: ``F32[8,8]``, ``F32[512] bf16``."""
        shape = f"[{','.join(map(str, self.shape))}]" if self.shape else ""
        return f"{self.dtype}{shape}{f' {self.encoding}' if self.encoding else ''}"

    def to_dict(self) -> dict[str, Any]:
        """As in the manifest's JSON."""
        found = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        return {**found, "encoding": self.encoding} if self.encoding else found

    def __str__(self) -> str:
        return f"{self.name}:{self.layout}"


class Manifest:
    """The tensors of a stream, in the order in which they lie. Raises SpecError where a rule of the format is broken.

    ``manifest["layers.0.w"]`` and ``manifest[0]`` are its :class:`Tensor`; it iterates over all of them. ``metadata``
    is text for people, and no part of the fingerprint.
    """

    def __init__(self, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        if not 1 <= len(self.tensors) <= TENSORS_MAX:
            raise SpecError(f"a manifest has 1 to {TENSORS_MAX} tensors, this one has {len(self.tensors)}")
        self.metadata: dict[str, str] = dict(metadata or {})
        if len(self.metadata) > METADATA_MAX:
            raise SpecError(f"the metadata has {len(self.metadata)} entries, at most {METADATA_MAX} are allowed")
        for key, value in self.metadata.items():
            for text in (key, value):
                _check_metadata(text)
        self._index: dict[str, int] = {}
        offsets, end = [], 0
        for i, t in enumerate(self.tensors):
            if self._index.setdefault(t.name, i) != i:
                raise SpecError(f"tensor name {t.name!r} appears twice; names must be unique")
            offsets.append(end)
            end = -(-(end + t.encoded_bytes) // ALIGN) * ALIGN
        #: flat offset of each tensor
        self.offsets: tuple[int, ...] = tuple(offsets)
        #: flat offset of the end of each tensor's bytes
        self.ends: tuple[int, ...] = tuple(at + t.encoded_bytes for at, t in zip(offsets, self.tensors))
        #: bytes in which all tensors lie
        self.data_bytes: int = end
        if end > DATA_BYTES_MAX:
            raise SpecError(f"the tensors have {end} bytes, at most {DATA_BYTES_MAX} are allowed")
        if len(self.json()) > TEXT_BYTES_MAX // 4 and len(self.json().encode()) > TEXT_BYTES_MAX:
            raise SpecError(f"the manifest has {len(self.json().encode())} bytes of text, at most {TEXT_BYTES_MAX}")

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        encodings: Mapping[str, str] | str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Manifest:
        """The manifest of a dict of numpy, torch (CPU) or JAX arrays, in its order. Raises SpecError.

        ``encodings`` gives some of them an encoding, or all that are F32 the same one (empty ones keep their bytes
        where it is ``topk``; K is lowered to what a tensor has).
        """
        tensors = []
        for name, value in arrays.items():
            array = as_array(name, value)
            dtype = name_of(array.dtype)
            if dtype is None:
                raise SpecError(f"tensor {name!r} has {dtype_advice(array.dtype)}")
            tensors.append(Tensor(name, dtype, array.shape))
        return cls(_encoded(tensors, encodings), metadata)

    @classmethod
    def from_safetensors(
        cls, path: str | os.PathLike[str], encodings: Mapping[str, str] | str | None = None
    ) -> Manifest:
        """The manifest of a safetensors file, or of all files that an index (``*.json``) names. Reads headers only.

        Tensors are in the order in which they lie in the file, files in the order of their names. Raises SpecError,
        OSError.
        """
        path = Path(path)
        files = [path] if path.suffix != ".json" else read_safetensors_index(path)
        tensors: list[Tensor] = []
        metadata: dict[str, str] = {}
        for file in files:
            with file.open("rb") as opened:
                header = read_safetensors_header(opened)
            tensors += [placed.tensor for placed in header.tensors]
            metadata.update(header.metadata)
        return cls(_encoded(tensors, encodings), metadata)

    @classmethod
    def parse(cls, text: str | bytes) -> Manifest:
        """A manifest from its JSON. Raises SpecError: also for unknown, missing and repeated fields."""
        data = text.encode(errors="replace") if isinstance(text, str) else text
        if len(data) > TEXT_BYTES_MAX:
            raise SpecError(f"the manifest has {len(data)} bytes of text, at most {TEXT_BYTES_MAX} are allowed")
        return cls.from_dict(_load(text, "the manifest"))

    @classmethod
    def from_dict(cls, top: Any) -> Manifest:
        """As :meth:`parse`, from the JSON's objects."""
        _check_fields(top, {"tensors"}, {"metadata"}, "the manifest")
        if not isinstance(top["tensors"], list):
            raise SpecError("the manifest's 'tensors' is not an array")
        tensors = []
        for i, item in enumerate(top["tensors"][: TENSORS_MAX + 1]):
            _check_fields(item, {"name", "dtype", "shape"}, {"encoding"}, f"tensor {i}")
            tensors.append(_tensor_from_json(item, {"encoding": str} if "encoding" in item else {}))
            if item.get("encoding") == "":
                raise SpecError(f"tensor {item['name']!r}: the encoding is empty; leave it out")
        metadata = top.get("metadata", {})
        if not isinstance(metadata, dict):
            raise SpecError("the manifest's 'metadata' is not an object")
        return cls(tensors, metadata)

    def with_encodings(self, encodings: Mapping[str, str] | str | None) -> Manifest:
        """The same tensors with other encodings, as for :meth:`from_arrays`."""
        return Manifest(_encoded([replace(t, encoding="") for t in self.tensors], encodings), self.metadata)

    def json(self) -> str:
        """The JSON form, compact. :meth:`parse` reads it back to an equal manifest."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form as Python objects."""
        tensors = {"tensors": [t.to_dict() for t in self.tensors]}
        return {**tensors, "metadata": dict(sorted(self.metadata.items()))} if self.metadata else tensors

    @cached_property
    def canonical(self) -> bytes:
        """The encoding that the fingerprint is taken of."""
        parts = [b"ingestd-manifest-1\n", struct.pack("<I", len(self.tensors))]
        for t in self.tensors:
            name, dtype, encoding = t.name.encode(), t.dtype.encode(), t.encoding.encode()
            parts += [struct.pack("<H", len(name)), name, struct.pack("<B", len(dtype)), dtype]
            parts.append(struct.pack(f"<B{len(t.shape)}QB", len(t.shape), *t.shape, len(encoding)))
            parts.append(encoding)
        return b"".join(parts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of :attr:`canonical`, 64 hex digits; the same as the daemon's."""
        return hashlib.sha256(self.canonical).hexdigest()

    @cached_property
    def id(self) -> int:
        """The first 8 bytes of the fingerprint as a little-endian number, as in the headers of chunks."""
        return int.from_bytes(bytes.fromhex(self.fingerprint)[:8], "little")

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in order."""
        return [t.name for t in self.tensors]

    def index(self, name: str) -> int:
        """Number of the tensor of that name. Raises KeyError."""
        found = self._index.get(name)
        if found is None:
            names = ", ".join(repr(t.name) for t in self.tensors[:16])
            raise KeyError(f"no tensor {name!r}; there are {names}{', ...' if len(self) > 16 else ''}")
        return found

    def at(self, flat: int) -> int:
        """Number of the tensor that holds the byte at a flat offset, or is the next one; ``len`` at the end."""
        return bisect.bisect_right(self.ends, flat)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, key: str | int) -> Tensor:
        return self.tensors[self.index(key) if isinstance(key, str) else key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.tensors == other.tensors

    def __hash__(self) -> int:
        return hash(self.tensors)

    def __repr__(self) -> str:
        return f"<Manifest {self.fingerprint[:16]}: {len(self)} tensors, {self.data_bytes} bytes>"


def diff(got: Manifest, want: Manifest) -> list[Difference]:
    """How the tensors of ``got`` differ from those of ``want``; empty where both are equal."""
    found = []
    got_order = {name: k for k, name in enumerate(n for n in got.names if n in want)}
    want_order = {name: k for k, name in enumerate(n for n in want.names if n in got)}
    for i, w in enumerate(want):
        if w.name not in got:
            found.append(Difference(w.name, "", w.layout))
            continue
        j = got.index(w.name)
        here, there = got[j].layout, w.layout
        if got_order[w.name] != want_order[w.name]:
            here, there = f"{here} at index {j}", f"{there} at index {i}"
        if here != there:
            found.append(Difference(w.name, here, there))
    return found + [Difference(g.name, g.layout, "") for g in got if g.name not in want]


class Placed(NamedTuple):
    """A tensor of a safetensors file: its data are bytes ``begin`` to ``end`` (exclusive) of the file."""

    tensor: Tensor
    begin: int
    end: int


class Header(NamedTuple):
    """The header of a safetensors file: its tensors in the order in which they lie, and its metadata."""

    tensors: list[Placed]
    metadata: dict[str, str]


def read_safetensors_header(file: BinaryIO) -> Header:
    """Reads and checks the header at the start of a safetensors file. Raises SpecError that says what is wrong."""
    where = f"{getattr(file, 'name', 'the file')}"
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(8)
    if len(first) < 8:
        raise SpecError(f"{where} has {size} bytes; a safetensors file has 8 and a header at least")
    length = int.from_bytes(first, "little")
    if length > SAFETENSORS_HEADER_MAX:
        raise SpecError(f"{where}: the header says it has {length} bytes, at most {SAFETENSORS_HEADER_MAX} are allowed")
    if length > size - 8:
        raise SpecError(f"{where}: the header says it has {length} bytes, but only {size - 8} follow: cut short?")
    top = _load(file.read(length), f"{where}: the header")
    if not isinstance(top, dict):
        raise SpecError(f"{where}: the header is not a JSON object")
    metadata = top.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SpecError(f"{where}: '__metadata__' is not an object of texts")
    start = 8 + length
    placed = [_placed(name, item, start, where) for name, item in top.items()]
    placed.sort(key=lambda p: (p.begin, p.end, p.tensor.name.encode()))
    end = start
    for before, p in zip([None, *placed], placed):
        if p.begin != end:
            last = f"tensor {before.tensor.name!r} ends" if before is not None else "the data begins"
            what = "overlaps" if p.begin < end else "leaves a hole"
            at = f"{p.begin - start} where {last} at {end - start}"
            raise SpecError(f"{where}: tensor {p.tensor.name!r} {what}: it begins at {at}")
        end = p.end
    if end != size:
        raise SpecError(f"{where}: the tensors end at byte {end}, the file has {size}")
    return Header(placed, metadata)


def read_safetensors_index(path: Path) -> list[Path]:
    """The files that an index names, by name. Raises SpecError, OSError."""
    top = _load(path.read_bytes(), f"{path}")
    weights = top.get("weight_map") if isinstance(top, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(f, str) for f in weights.values()):
        raise SpecError(f"{path}: no 'weight_map' of tensor names and file names")
    names = sorted(set(weights.values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise SpecError(f"{path}: the file name {name!r} leads out of the folder")
    held: dict[str, str] = {}
    for name in names:
        with (path.parent / name).open("rb") as file:
            for p in read_safetensors_header(file).tensors:
                if held.setdefault(p.tensor.name, name) != name:
                    raise SpecError(f"{path}: tensor {p.tensor.name!r} is in {held[p.tensor.name]} and in {name}")
    for tensor, name in weights.items():
        if held.get(tensor) != name:
            raise SpecError(f"{path}: tensor {tensor!r} should be in {name}, and is in {held.get(tensor, 'no file')}")
    for tensor in held:
        if tensor not in weights:
            raise SpecError(f"{path}: tensor {tensor!r} of {held[tensor]} is not in the index")
    return [path.parent / name for name in names]


def _placed(name: str, item: Any, start: int, where: str) -> Placed:
    _check_fields(item, {"dtype", "shape", "data_offsets"}, set(), f"{where}: tensor {name!r}")
    tensor = _tensor_from_json({**item, "name": name}, {})
    offsets = item["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(x) is int and x >= 0 for x in offsets):
        raise SpecError(f"{where}: tensor {name!r}: data_offsets are {offsets!r}, want two whole numbers")
    begin, end = offsets
    if end - begin != tensor.nbytes:
        raise SpecError(f"{where}: tensor {name!r} has {tensor.nbytes} bytes, its data_offsets say {end - begin}")
    return Placed(tensor, start + begin, start + end)


def _tensor_from_json(item: dict[str, Any], more: dict[str, type]) -> Tensor:
    name = item["name"]
    for field, kind in {"name": str, "dtype": str, "shape": list, **more}.items():
        if not isinstance(item[field], kind):
            raise SpecError(f"tensor {name!r}: {field} {item[field]!r} is not {'an array' if kind is list else 'text'}")
    return Tensor(name, item["dtype"], tuple(item["shape"]), item["encoding"] if more else "")


def _encoded(tensors: list[Tensor], encodings: Mapping[str, str] | str | None) -> list[Tensor]:
    if not encodings:
        return tensors
    if isinstance(encodings, str):
        return [replace(t, encoding=_fitting(t, encodings)) for t in tensors]
    unknown = set(encodings) - {t.name for t in tensors}
    if unknown:
        raise SpecError(f"an encoding is given for {sorted(unknown)[0]!r}, which is no tensor")
    return [replace(t, encoding=encodings.get(t.name, "")) for t in tensors]


def _fitting(tensor: Tensor, encoding: str) -> str:
    """The encoding that all tensors shall have, for this one."""
    if tensor.dtype != "F32":
        return ""
    kind, _, k = encoding.partition(":")
    if kind == "topk" and k.isascii() and k.isdigit():
        return f"topk:{min(int(k), tensor.elements)}" if tensor.elements else ""
    return encoding


def _load(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(
            text if isinstance(text, str) else text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{what} is not valid JSON: {e}") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field appears twice in one object")
    return found


def _check_fields(got: Any, want: set[str], optional: set[str], where: str) -> None:
    if not isinstance(got, dict):
        raise SpecError(f"{where} is not an object")
    unknown, missing = sorted(set(got) - want - optional), sorted(want - set(got))
    if unknown:
        raise SpecError(f"{where} has the unknown field {unknown[0]!r}; the fields are {', '.join(sorted(want))}")
    if missing:
        raise SpecError(f"{where} has no field {missing[0]!r}")


def _check_text(text: Any, what: str, least: int, most: int) -> None:
    if not isinstance(text, str):
        raise SpecError(f"{what} {text!r} is not text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise SpecError(f"{what} {text!r} is not valid Unicode") from None
    if not least <= size <= most:
        raise SpecError(f"{what} {text[:64]!r} has {size} bytes, want {least} to {most}")
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise SpecError(f"{what} {text!r} contains a control character")


def _check_metadata(text: Any) -> None:
    if not isinstance(text, str):
        raise SpecError(f"the metadata holds {text!r}, which is not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SpecError(f"the metadata holds {text!r}, which is not valid Unicode") from None


def bytes_of(array: Array) -> memoryview:
    """The array's bytes, row-major: its own memory where that is contiguous, else a copy."""
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    return array.reshape(-1).view(np.uint8).data
