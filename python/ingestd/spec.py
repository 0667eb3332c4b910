"""What one sample is: an ordered list of leaves with name, dtype and shape (``docs/wire-protocol.md``, "Spec").

Specs are immutable. They are made from an example (:meth:`Spec.from_example`), from text such as
``image:F32[8,8],label:I32``, or from JSON (:meth:`Spec.parse`); equal specs have equal fingerprints, here and in the
daemon. Arrays that are pushed are checked against the spec and never cast.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import tree as _tree
from .dtypes import ITEMSIZE, NUMPY, RAW, name_of
from .errors import Difference, SpecError

__all__ = ["Leaf", "Spec", "diff"]

NAME_BYTES_MAX = 128
DIMENSIONS_MAX = 8
LEAVES_MAX = 4096
SAMPLE_BYTES_MAX = 1 << 32
TEXT_BYTES_MAX = 2_097_152

Array = NDArray[Any]

# The text form: a name is bare, or quoted as in Go where it holds blanks or one of , : [ ] " \\ {
_BARE = r'[^\s,:\[\]"\\{]+'
_TEXT_LEAF = re.compile(
    rf"""\s*(?P<name>{_BARE}|"(?:[^"\\\n]|\\.)*")\s*:\s*(?P<dtype>{_BARE})\s*(?:\[(?P<shape>[^\]]*)\]\s*)?(?P<end>,|$)"""
)
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|[0-7]{3}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, '"': 34}


@dataclass(frozen=True)
class Leaf:
    """One array of a sample: ``name`` (``obs/image``), ``dtype`` (``F32``), ``shape`` (``()`` for a scalar)."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.dtype not in ITEMSIZE:
            raise SpecError(f"leaf {self.name!r}: unknown dtype {self.dtype!r}; use one of {' '.join(ITEMSIZE)}")
        shape = tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if len(shape) > DIMENSIONS_MAX:
            raise SpecError(f"leaf {self.name!r} has {len(shape)} dimensions, at most {DIMENSIONS_MAX} are allowed")
        for d in shape:
            if not isinstance(d, int) or isinstance(d, bool) or d < 1:
                raise SpecError(f"leaf {self.name!r}: dimension {d!r} in shape {list(shape)}; each must be 1 or more")
        if self.nbytes > SAMPLE_BYTES_MAX:
            raise SpecError(f"leaf {self.name!r} has {self.nbytes} bytes, at most {SAMPLE_BYTES_MAX} are allowed")

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf in one sample."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """dtype of the arrays handed out for this leaf."""
        return NUMPY[self.dtype]

    @property
    def layout(self) -> str:
        """dtype and shape as text: ``F32[8,8]``, or ``I32`` for a scalar."""
        return self.dtype + (f"[{','.join(map(str, self.shape))}]" if self.shape else "")

    def __str__(self) -> str:
        return f"{self.name}:{self.layout}"


class Spec:
    """The fixed layout of one sample. ``Spec(leaves)`` raises SpecError where a rule of the format is broken."""

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self.leaves: tuple[Leaf, ...] = tuple(leaves)
        if not 1 <= len(self.leaves) <= LEAVES_MAX:
            raise SpecError(f"a spec has 1 to {LEAVES_MAX} leaves, this one has {len(self.leaves)}")
        seen: set[str] = set()
        for leaf in self.leaves:
            if leaf.name in seen:
                raise SpecError(f"leaf name {leaf.name!r} appears twice; names must be unique")
            seen.add(leaf.name)
        #: bytes of one sample: the leaves one after the other, without padding.
        self.sample_bytes: int = sum(leaf.nbytes for leaf in self.leaves)
        if self.sample_bytes > SAMPLE_BYTES_MAX:
            raise SpecError(f"a sample has {self.sample_bytes} bytes, at most {SAMPLE_BYTES_MAX} are allowed")

    @classmethod
    def from_example(cls, tree: Any) -> Spec:
        """The spec of samples like ``tree``: nested dicts, lists and tuples of arrays, or one array.

        Leaves may be numpy, JAX or torch arrays, or Python numbers (``bool``, ``int`` as I64, ``float`` as F64). Dicts
        keep their own order, so producers of one table should build theirs alike. Raises SpecError.
        """
        leaves = []
        for name, value in _tree.names_and_leaves(tree):
            array = as_array(name, value)
            dtype = name_of(array.dtype)
            if dtype is None:
                raise SpecError(f"leaf {name!r} has {dtype_advice(array.dtype)}")
            leaves.append(Leaf(name, dtype, array.shape))
        return cls(leaves)

    @classmethod
    def parse(cls, text: str | bytes) -> Spec:
        """A spec from its text or JSON form (JSON where the first character is ``{``). Raises SpecError."""
        if len(text) > TEXT_BYTES_MAX:
            raise SpecError(f"the spec has {len(text)} bytes of text, at most {TEXT_BYTES_MAX} are allowed")
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as e:
                raise SpecError(f"the spec is not UTF-8: {e}") from None
        return cls(_leaves_from_json(text) if text.lstrip().startswith("{") else _leaves_from_text(text))

    def text(self) -> str:
        """The short form ``image:F32[8,8],label:I32``, without blanks; :meth:`parse` reads it back to an equal spec."""
        return ",".join(f"{_quoted(leaf.name)}:{leaf.layout}" for leaf in self.leaves)

    def json(self) -> str:
        """The JSON form, compact: ``{"leaves":[{"name":"image","dtype":"F32","shape":[8,8]}]}``."""
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form as Python objects."""
        return {"leaves": [{"name": x.name, "dtype": x.dtype, "shape": list(x.shape)} for x in self.leaves]}

    @cached_property
    def canonical(self) -> bytes:
        """The encoding that the fingerprint is taken of (``docs/wire-protocol.md``, "Fingerprint")."""
        parts = [b"ingestd-spec-1\n", struct.pack("<I", len(self.leaves))]
        for leaf in self.leaves:
            name, dtype = leaf.name.encode(), leaf.dtype.encode()
            parts += [struct.pack("<H", len(name)), name, struct.pack("<B", len(dtype)), dtype]
            parts.append(struct.pack(f"<B{len(leaf.shape)}Q", len(leaf.shape), *leaf.shape))
        return b"".join(parts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of :attr:`canonical`, 64 hex digits; the same as the daemon's."""
        return hashlib.sha256(self.canonical).hexdigest()

    @cached_property
    def structure(self) -> _tree.Node:
        """The tree that the names describe, with each leaf's number in its place."""
        return _tree.build([leaf.name for leaf in self.leaves])

    @cached_property
    def _expected(self) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        return [(leaf.numpy_dtype, leaf.shape) for leaf in self.leaves]

    def flatten(self, tree: Any) -> list[Array]:
        """The leaves of one sample in spec order, structure, dtype and shape checked. Raises SpecError."""
        out: list[Any] = [None] * len(self.leaves)
        _tree.collect(self.structure, tree, out)
        for i, (dtype, shape) in enumerate(self._expected):
            x = out[i]
            if type(x) is not np.ndarray or x.dtype is not dtype or x.shape != shape:
                out[i] = _checked(self.leaves[i], x, shape)
        return out

    def flatten_batch(self, tree: Any) -> tuple[int, list[Array]]:
        """``(n, leaves)`` of n samples: as :meth:`flatten`, with leaves of shape ``(n, *leaf.shape)``."""
        out: list[Any] = [None] * len(self.leaves)
        _tree.collect(self.structure, tree, out)
        n = -1
        for i, leaf in enumerate(self.leaves):
            x = as_array(leaf.name, out[i])
            if x.ndim == 0:
                raise SpecError(f"leaf {leaf.name!r} has no leading axis; a batch is (n, *{leaf.shape})")
            if n < 0:
                n = x.shape[0]
            elif n != x.shape[0]:
                raise SpecError(
                    f"leaf {leaf.name!r} holds {x.shape[0]} samples, leaf {self.leaves[0].name!r} holds {n}; "
                    "all leaves of a batch need the same leading axis"
                )
            out[i] = _checked(leaf, x, (n, *leaf.shape))
        return n, out

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The tree whose leaves, in spec order, are given; the opposite of :meth:`flatten`."""
        if len(leaves) != len(self.leaves):
            raise SpecError(f"got {len(leaves)} leaves, the spec has {len(self.leaves)}")
        return _tree.rebuild(self.structure, leaves)

    def diff(self, want: Spec) -> list[Difference]:
        """The leaves in which this spec differs from ``want``; empty when equal. See :func:`diff`."""
        return diff(self, want)

    def __len__(self) -> int:
        return len(self.leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.leaves == other.leaves

    def __hash__(self) -> int:
        return hash(self.leaves)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Spec {','.join(map(str, self.leaves[:8]))}{',...' if len(self.leaves) > 8 else ''}>"


def diff(got: Spec, want: Spec) -> list[Difference]:
    """The leaves that differ, in the order of ``want``, then those that it has not; empty for equal specs only.

    ``got`` and ``want`` of a difference are layouts such as ``F32[8,8]``, empty where the leaf is missing, and followed
    by ``at index N`` where the leaf stands in another place among those that both have.
    """
    got_at = {leaf.name: i for i, leaf in enumerate(got.leaves)}
    want_at = {leaf.name: i for i, leaf in enumerate(want.leaves)}
    got_order = [name for name in got_at if name in want_at]
    want_order = [name for name in want_at if name in got_at]
    moved = {a for a, b in zip(got_order, want_order) if a != b}
    found = []
    for i, leaf in enumerate(want.leaves):
        at = got_at.get(leaf.name)
        have = "" if at is None else got.leaves[at].layout
        need = leaf.layout
        if leaf.name in moved:
            have, need = f"{have} at index {at}", f"{need} at index {i}"
        if have != need:
            found.append(Difference(leaf.name, have, need))
    return found + [Difference(x.name, x.layout, "") for x in got.leaves if x.name not in want_at]


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise SpecError(f"leaf name {name!r} is not text")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise SpecError(f"leaf name {name!r} is not valid Unicode") from None
    if not 1 <= size <= NAME_BYTES_MAX:
        raise SpecError(f"leaf name {name!r} has {size} bytes, want 1 to {NAME_BYTES_MAX}")
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise SpecError(f"leaf name {name!r} contains a control character")


def _leaves_from_text(text: str) -> list[Leaf]:
    leaves: list[Leaf] = []
    at, more = 0, True
    while more:
        m = _TEXT_LEAF.match(text, at)
        if m is None:
            raise SpecError(
                f"cannot read the spec at {text[at : at + 40]!r} (character {at}): write name:DTYPE[d1,d2], separate "
                'leaves by commas, put names with blanks or any of , : [ ] " \\ { into double quotes, as in '
                "image:F32[8,8],label:I32"
            )
        name = _unquoted(m["name"])
        dims = (m["shape"] or "").strip()
        try:
            shape = tuple(_dimension(d) for d in dims.split(",")) if dims else ()
        except ValueError:
            raise SpecError(f"leaf {name!r}: shape [{dims}] is not a list of whole numbers") from None
        leaves.append(Leaf(name, m["dtype"], shape))
        if len(leaves) > LEAVES_MAX:
            break
        at, more = m.end(), m["end"] == ","
    return leaves


def _quoted(name: str) -> str:
    """``name`` as the text form writes it: bare where that can be read back, else quoted as Go's strconv.Quote does."""
    if re.fullmatch(_BARE, name) and name.isprintable():
        return name
    out = []
    for c in name:
        if c in '"\\':
            out.append("\\" + c)
        elif c.isprintable():
            out.append(c)
        else:
            out.append(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}")
    return '"' + "".join(out) + '"'


def _unquoted(name: str) -> str:
    if not name.startswith('"'):
        return name
    out, at = b"", 0
    body = name[1:-1]
    for m in _ESCAPE.finditer(body):
        out += body[at : m.start()].encode() + _unescaped(m[0][1:], name)
        at = m.end()
    try:
        return (out + body[at:].encode()).decode()
    except UnicodeDecodeError:
        raise SpecError(f"the quoted name {name} is not UTF-8") from None


def _unescaped(escape: str, name: str) -> bytes:
    try:
        if escape in _SIMPLE:
            return bytes([_SIMPLE[escape]])
        if escape[0] in "uU":
            return chr(int(escape[1:], 16)).encode()
        return bytes([int(escape[1:], 16) if escape[0] == "x" else int(escape, 8)])
    except (ValueError, OverflowError):
        raise SpecError(f"the quoted name {name} holds the escape \\{escape}, which Go does not know") from None


def _dimension(text: str) -> int:
    text = text.strip()
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError
    return int(text)


def _leaves_from_json(text: str) -> list[Leaf]:
    try:
        top = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise SpecError(f"the spec is not valid JSON: {e}") from None
    _check_fields(top, {"leaves"}, "the spec")
    if not isinstance(top["leaves"], list):
        raise SpecError("the spec's 'leaves' is not an array")
    leaves = []
    for i, item in enumerate(top["leaves"][: LEAVES_MAX + 1]):
        if not isinstance(item, dict):
            raise SpecError(f"leaf {i} is not an object with name, dtype and shape")
        _check_fields(item, {"name", "dtype", "shape"}, f"leaf {item.get('name', i)!r}")
        if not isinstance(item["shape"], list):
            raise SpecError(f"leaf {item['name']!r}: shape {item['shape']!r} is not an array of whole numbers")
        if not isinstance(item["dtype"], str):
            raise SpecError(f"leaf {item['name']!r}: dtype {item['dtype']!r} is not text")
        leaves.append(Leaf(item["name"], item["dtype"], tuple(item["shape"])))
    return leaves


def _check_fields(got: dict[str, Any], want: set[str], where: str) -> None:
    unknown, missing = sorted(set(got) - want), sorted(want - set(got))
    if unknown:
        raise SpecError(f"{where} has the unknown field {unknown[0]!r}; the fields are {', '.join(sorted(want))}")
    if missing:
        raise SpecError(f"{where} has no field {missing[0]!r}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field appears twice in one object")
    return found


def as_array(name: str, value: Any) -> Array:
    """``value`` as a numpy array that shares its memory where it can. Raises SpecError."""
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if isinstance(value, (bool, int, float, np.generic)):
        try:
            array = np.asarray(value)
        except OverflowError:
            array = np.asarray(None)
        if array.dtype == object:
            raise SpecError(f"leaf {name!r}: {value} does not fit into 64 bits")
        return array
    if type(value).__module__.partition(".")[0] == "torch":
        return _from_torch(name, value)
    try:
        if hasattr(value, "__array__"):
            return np.asarray(value)
        if hasattr(value, "numpy"):
            return np.asarray(value.numpy())
    except Exception as e:
        raise SpecError(f"leaf {name!r}: {type(value).__name__} cannot be read as an array: {e}") from e
    raise SpecError(f"leaf {name!r} is a {type(value).__name__}; a leaf is an array or a number")


def _from_torch(name: str, tensor: Any) -> Array:
    """A torch tensor as an array; the types that torch cannot give to numpy go over as raw bits."""
    kind = str(getattr(tensor, "device", "cpu"))
    if kind != "cpu":
        raise SpecError(f"leaf {name!r} is a tensor on {kind}; copy it to the host first (tensor.cpu())")
    raw = {"torch.bfloat16": ("int16", "BF16"), "torch.float8_e4m3fn": ("uint8", "F8_E4M3")}
    raw["torch.float8_e5m2"] = ("uint8", "F8_E5M2")
    try:
        tensor = tensor.detach()
        if str(tensor.dtype) in raw:
            carrier, dtype = raw[str(tensor.dtype)]
            bits: Array = tensor.view(getattr(sys.modules["torch"], carrier)).numpy()
            return bits.view(NUMPY[dtype])
        found: Array = tensor.numpy()
        return found
    except Exception as e:
        raise SpecError(f"leaf {name!r}: the tensor cannot be read as an array: {e}") from e


def _checked(leaf: Leaf, value: Any, shape: tuple[int, ...]) -> Array:
    """``value`` as an array of exactly the leaf's dtype and ``shape``; SpecError says what differs."""
    dtype = leaf.numpy_dtype
    if isinstance(value, (bool, int, float)) and not isinstance(value, np.generic):
        return _from_number(leaf, value)
    array = as_array(leaf.name, value)
    if array.dtype != dtype:
        if leaf.dtype not in RAW or array.dtype != RAW[leaf.dtype]:
            raise SpecError(
                f"leaf {leaf.name!r}: got {dtype_advice(array.dtype)}, want {leaf.dtype} ({dtype}); "
                "convert it first, nothing is cast silently"
            )
        array = array.view(dtype)
    if array.shape != shape:
        raise SpecError(f"leaf {leaf.name!r}: got shape {array.shape}, want {shape}")
    return array


def _from_number(leaf: Leaf, value: bool | int | float) -> Array:
    """A Python number has no width of its own: it takes the leaf's, where its kind and range allow."""
    dtype = leaf.numpy_dtype
    kind = {bool: "BOOL", int: "IU", float: "FB"}[bool if isinstance(value, bool) else type(value)]
    fits = leaf.dtype == "BOOL" if kind == "BOOL" else leaf.dtype[0] in kind and leaf.dtype != "BOOL"
    if not fits:
        raise SpecError(f"leaf {leaf.name!r}: got {type(value).__name__} {value!r}, want {leaf.layout}")
    if leaf.shape:
        raise SpecError(f"leaf {leaf.name!r}: got a single number, want shape {leaf.shape}")
    if kind == "IU":
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max:
            raise SpecError(f"leaf {leaf.name!r}: {value} does not fit into {leaf.dtype}")
    elif leaf.dtype in RAW and dtype == RAW[leaf.dtype]:
        raise SpecError(f"leaf {leaf.name!r}: install ml_dtypes to push numbers as {leaf.dtype}, or push raw bits")
    with np.errstate(over="ignore"):
        array = np.asarray(value, dtype=dtype)
        if kind == "FB" and math.isfinite(value) and not math.isfinite(float(array)):
            raise SpecError(f"leaf {leaf.name!r}: {value} does not fit into {leaf.dtype}")
    return array


def dtype_advice(dtype: np.dtype[Any]) -> str:
    if dtype.newbyteorder("=") != dtype:
        return f"the big-endian dtype {dtype}; convert it with .astype(a.dtype.newbyteorder('='))"
    name = name_of(dtype)
    return f"dtype {name} ({dtype})" if name else f"dtype {dtype}, which no leaf can have"
