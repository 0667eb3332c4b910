"""A generation that is being written: :class:`Draft`, and the bytes of what is put into it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _io
from .batch import caller_level
from .dtypes import RAW
from .encodings import encode
from .errors import Error, NotWritten, Released, SpecError
from .manifest import DENSE, Manifest, Tensor
from .spec import Array, as_array, dtype_advice
from .weights_blocks import copy_tensors, sum_tensors
from .weights_view import shown

if TYPE_CHECKING:
    from .weights_publish import Publisher

__all__ = ["Draft", "Published", "Turn", "bytes_of", "pieces"]

_ZEROS = np.zeros(256, np.uint8)


class Published(NamedTuple):
    """A generation that readers see: its number, and the digest of its bytes (64 hex digits)."""

    generation: int
    digest: str


def _references(held: list[Array]) -> int:
    return sys.getrefcount(held[0])


_ALONE = _references([np.empty(0)])


class Turn:
    """One place that the daemon gave, for one generation."""

    def __init__(self, generation: int, place: int) -> None:
        self.generation, self.place = generation, place


class Draft:
    """A generation that is being written; readers see nothing of it before the commit.

    A context manager that commits on exit, and aborts on an exception. ``draft["layers.0.w"]`` is a writable array,
    which holds old bytes until it is filled; every tensor must be written, by filling its array or by :meth:`put`. Over
    a unix socket the arrays are the memory that readers will map. After the commit nothing may be written to arrays
    that were kept: a ResourceWarning names them.
    """

    def __init__(self, publisher: Publisher, turn: Turn, memory: Any, offset: int) -> None:
        #: number that it will have
        self.generation = turn.generation
        #: what came of it, after the commit
        self.published: Published | None = None
        self._publisher = publisher
        self._turn = turn  # while the publisher has the same one, this is what is being written
        self._memory, self._offset = memory, offset
        self._manifest = publisher.manifest
        self._roots: dict[int, Array] = {}
        self._sums: dict[int, int] = {}
        self._written: set[int] = set()
        self._over = False

    def __getitem__(self, name: str) -> Array:
        """The tensor's array, writable: write it as a whole. Raises KeyError; Released after commit or abort."""
        self._check()
        i = self._manifest.index(name)
        tensor = shown(self._manifest.tensors[i])
        self._written.add(i)
        self._sums.pop(i, None)
        return self._root(i).view(tensor.numpy_dtype).reshape(tensor.shape)

    def put(self, name: str, value: Any) -> None:
        """Copies one tensor in, and sums it on the way. Raises KeyError, SpecError; Released after commit or abort."""
        self._check()
        i = self._manifest.index(name)
        self._copy({i: bytes_of(self._manifest.tensors[i], value)})

    def commit(self, deadline: float | None = None) -> Published:
        """Makes it the newest generation. After an error nothing of it is seen, and nothing was lost.

        Raises NotWritten (it may be written and committed then), Released, Timeout, ShuttingDown, Ended, PeerClosed. A
        Timeout or PeerClosed leaves open whether readers see it: the daemon may have had all of it.
        """
        self._check()
        missing = [t.name for i, t in enumerate(self._manifest.tensors) if t.encoded_bytes and i not in self._written]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise NotWritten(
                f"generation {self.generation} has no {', '.join(map(repr, missing[:8]))}{more} yet: write every "
                "tensor before the commit"
            )
        self._over = True
        self.published = self._publisher._commit(self, _io.deadline_of(deadline))
        self._warn("is published", "readers see")
        return self.published

    def abort(self) -> None:
        """Gives it up; readers see nothing of it. Does nothing after a commit."""
        if not self._over:
            self._over = True
            self._publisher._abort(self)
            self._warn("was given up", "readers of another generation see")

    def _copy(self, sources: dict[int, Array]) -> None:
        self._sums.update(copy_tensors(self._manifest, self._flat(), sources))
        self._written.update(sources)

    def _finish(self) -> dict[int, int]:
        """The sums of all tensors, those of filled arrays made now."""
        due = [i for i in range(len(self._manifest)) if i not in self._sums]
        self._sums.update(sum_tensors(self._manifest, self._flat(), due))
        return self._sums

    def _flat(self) -> Array:
        return np.ndarray((self._manifest.data_bytes,), np.uint8, buffer=self._memory, offset=self._offset)

    def _root(self, i: int) -> Array:
        # One array per tensor stays here, and views of it go out: see Weights.
        root = self._roots.get(i)
        if root is None:
            at = self._offset + self._manifest.offsets[i]
            size = self._manifest.tensors[i].encoded_bytes
            root = self._roots[i] = np.ndarray((size,), np.uint8, buffer=self._memory, offset=at)
        return root

    def _warn(self, what: str, who: str) -> None:
        kept = []
        while self._roots:
            i, *root = self._roots.popitem()
            if _references(root) > _ALONE:
                kept.append(i)
        if kept:
            names = ", ".join(repr(self._manifest.tensors[i].name) for i in sorted(kept)[:8])
            warnings.warn(
                f"generation {self.generation} {what} while arrays of {names}{', ...' if len(kept) > 8 else ''} are "
                f"still in use: {who} what is written to them now; drop them before",
                ResourceWarning,
                stacklevel=caller_level(),
            )

    def _check(self) -> None:
        if self._over:
            raise Released(f"generation {self.generation} was committed or given up before")

    def __enter__(self) -> Draft:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._over:
            return
        if kind is None:
            try:
                self.commit()
            finally:
                self.abort()
        else:
            with contextlib.suppress(Error):  # the exception under way says more
                self.abort()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            with contextlib.suppress(Exception):
                self.abort()

    def __repr__(self) -> str:
        return f"<Draft {self.generation}{': ended' if self._over else ''}>"


def bytes_of(tensor: Tensor, value: Any) -> Array:
    """The bytes of an array of exactly the tensor's dtype and shape, without a copy where it is contiguous.

    Of a tensor with an encoding they are made of its values, or are what ``value`` holds of them as they are stored;
    with ``topk`` always that. Raises SpecError.
    """
    want = shown(tensor)
    array = as_array(tensor.name, value)
    if tensor.kind in DENSE and array.dtype == np.float32 and array.shape == tensor.shape:
        return encode(tensor, np.ascontiguousarray(array))
    if array.dtype not in (want.numpy_dtype, RAW.get(want.dtype, want.numpy_dtype)):
        raise SpecError(
            f"tensor {tensor.name!r}: got {dtype_advice(array.dtype)}, want {want.dtype} ({want.numpy_dtype}); "
            "convert it first, nothing is cast silently"
        )
    if array.shape != want.shape:
        raise SpecError(f"tensor {tensor.name!r}: got shape {list(array.shape)}, want {list(want.shape)}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def pieces(manifest: Manifest, sources: dict[int, Array], flat: int, length: int) -> Iterator[Array]:
    """The flat bytes ``flat`` to ``flat + length``: runs of tensors, and zeros between them."""
    end = flat + length
    i = manifest.at(flat)
    while flat < end:
        if i == len(manifest):
            yield _ZEROS[: end - flat]
            return
        start, source = manifest.offsets[i], sources[i]
        if flat < start:
            gap = min(start, end) - flat
            yield _ZEROS[:gap]
            flat += gap
        taken = source[flat - start : end - start] if flat < end else source[:0]
        if len(taken):
            yield taken
            flat += len(taken)
        i += 1
