"""One pinned generation of weights: :class:`Weights`."""

from __future__ import annotations

import fnmatch
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import imported, to_jax, to_torch
from .batch import caller_level
from .dtypes import NUMPY, RAW
from .encodings import decode
from .errors import BadSum, PeerClosed, Released, SpecError
from .lease import Lease, Leased, LeasedBytes
from .manifest import Manifest, Tensor
from .spec import Array
from .weights_blocks import digest_of, sum_tensors

__all__ = ["Held", "Weights", "shown"]


class Held(NamedTuple):
    """What a source of weights knows of a generation that it holds for a reader."""

    manifest: Manifest
    generation: int
    published: int
    digest: bytes
    sums: Callable[[], NDArray[np.uint32]]
    memory: Any  # keeps the bytes mapped
    address: int  # of the flat bytes
    intact: Callable[[], bool]  # whether what was read so far was the generation's
    check: Callable[[], None]  # raises Closed where it may not be used


def _references(held: list[Array]) -> int:
    return sys.getrefcount(held[0])


#: What _references says of an array that nobody else holds.
_ALONE = _references([np.empty(0)])


def shown(tensor: Tensor) -> Tensor:
    """What is shown of a tensor: itself, or where it is encoded what is stored, as far as that has a dtype."""
    if not tensor.encoding:
        return tensor
    if tensor.encoding in ("bf16", "f16"):
        return Tensor(tensor.name, tensor.encoding.upper(), tensor.shape)
    return Tensor(tensor.name, "U8", (tensor.encoded_bytes,))


class Weights(Mapping[str, Array]):
    """One generation of a model's tensors, pinned: read-only arrays by name over the memory itself.

    A mapping, and a context manager that releases on exit. ``w["layers.0.w"]`` is a numpy array, 64-byte aligned and
    contiguous; it is made when it is asked for, so a generation costs the same however many tensors it has. A tensor
    with an encoding is shown as it is stored: ``bf16`` and ``f16`` as arrays of these, others as their bytes;
    :meth:`decoded` gives its values.

    **Arrays keep the pin**: the daemon does not overwrite the generation before it was released (or dropped) and the
    last array, view, tensor of torch or array of JAX over its memory is gone. So what was taken from it never changes.
    A ResourceWarning at the release names the tensors that still hold it, as publishers need the place.

    That ends with the connection: a daemon that ends it (:attr:`intact` says so) takes the pins back. Whoever has read
    for long from arrays of a generation can ask :attr:`intact` afterwards. :meth:`into`, :meth:`copy`, :meth:`rows` and
    :meth:`verify` ask themselves.
    """

    def __init__(self, held: Held, lease: Lease) -> None:
        #: the tensors, and where they lie
        self.manifest = held.manifest
        #: number of the generation; numbers only grow
        self.generation = held.generation
        #: Unix time in nanoseconds
        self.published = held.published
        #: says which bytes the generation has, 64 hex digits: equal ones have equal tensors
        self.digest = held.digest.hex()
        self._held = held
        self._lease = lease
        self._released = False
        self._roots: dict[int, Array] = {}

    @property
    def released(self) -> bool:
        """True after the release."""
        return self._released

    @property
    def intact(self) -> bool:
        """True if what was read so far was this generation: nobody has taken its memory.

        It is so as long as the generation, or an array of it, is held, unless the daemon ended the connection.
        """
        return not self._lease.over and self._held.intact()

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the manifest's order."""
        return self.manifest.names

    @property
    def sums(self) -> NDArray[np.uint32]:
        """The CRC-32C of each tensor's bytes, in the manifest's order. Raises Released, Closed."""
        self._check()
        return self._held.sums()

    def __getitem__(self, name: str) -> Array:
        """The tensor's array, read-only; it keeps the pin. Raises KeyError, Released, Closed."""
        return self._view(self.manifest.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.names)

    def __len__(self) -> int:
        return len(self.manifest)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest

    # A generation is an object of its own, not what it holds.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def decoded(self, name: str) -> Array:
        """The tensor's values: of one with an encoding a float32 array of its own, else as ``w[name]``.

        Raises KeyError, Released, Closed; PeerClosed as :meth:`copy`.
        """
        tensor = self.manifest[name]
        if not tensor.encoding:
            return self[name]
        found = decode(tensor, self[name].reshape(-1).view(np.uint8)).copy()
        self._check_intact()
        return found

    def select(self, pattern: str) -> dict[str, Array]:
        """The arrays of all tensors whose names match, as of a shell: ``layers.0.*``. Raises Released, Closed."""
        self._check()
        return {n: self[n] for n in self.manifest.names if fnmatch.fnmatchcase(n, pattern)}

    def rows(self, name: str, index: Any) -> Array:
        """A copy of some of a tensor's rows: ``w[name][index]`` as an array of its own, which holds nothing.

        Raises IndexError, and as :meth:`copy`.
        """
        found = np.array(self[name][index])
        self._check_intact()
        return found

    def copy(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Arrays of their own, writable, that hold nothing; of all tensors, or of those named.

        Raises KeyError, Released, Closed; PeerClosed when the daemon took the pin back meanwhile: they may be torn.
        """
        copies = {name: self[name].copy() for name in (self.manifest.names if names is None else names)}
        self._check_intact()
        return copies

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Sums all tensors, or those named, and compares with what the publisher summed.

        Raises BadSum with the tensor's name; KeyError, Released, Closed; PeerClosed when the daemon took the pin back.
        """
        sums = self.sums
        which = range(len(self.manifest)) if names is None else sorted({self.manifest.index(name) for name in names})
        found = sum_tensors(self.manifest, self._flat(), which)
        self._check_intact()
        if digest_of(self.manifest, sums) != self._held.digest:
            raise BadSum(f"the sums of generation {self.generation} do not agree with its digest")
        for i, crc in found.items():
            if crc != int(sums[i]):
                raise BadSum(
                    f"tensor {self.manifest.tensors[i].name!r} of generation {self.generation} is damaged: its "
                    f"CRC-32C is {crc:#010x}, published {int(sums[i]):#010x}"
                )

    def into(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Copies tensors into the arrays of ``state``, by name, after their sums have been verified.

        ``state`` holds writable numpy arrays and torch tensors (of any device), such as ``module.state_dict()``, of the
        tensors' dtypes and shapes: nothing is cast. Nothing is written before everything was checked. JAX arrays
        cannot be written (TypeError): make new ones with :meth:`jax`.

        Raises:
            KeyError: a name that is not in this generation; with ``strict`` also a tensor that ``state`` lacks.
            SpecError: another dtype or shape, or an array that is read-only.
            BadSum, Released, Closed: nothing was written. PeerClosed: the daemon took the pin back; copies may be torn.
        """
        self._check()
        for name in state:
            self.manifest.index(name)
        if strict and len(state) < len(self.manifest):
            missing = next(name for name in self.manifest.names if name not in state)
            raise KeyError(f"the state has no {missing!r}, which generation {self.generation} has; or strict=False")
        copies = [_copy_into(self, name, target) for name, target in state.items()]
        self.verify(state)
        for copy in copies:
            copy()
        self._check_intact()

    def dlpack(self, name: str) -> Leased:
        """The tensor for ``from_dlpack`` of any library, sharing the memory and keeping the pin: see :class:`Leased`.

        Raises KeyError, Released, Closed.
        """
        tensor = shown(self.manifest[name])
        return Leased(self._lease, self._held.memory, tensor, self[name])

    def torch(self, name: str | None = None, *, copy: bool = False) -> Any:
        """The tensor as one of torch, or without a name a dict of all; needs torch.

        They share the memory and keep the pin as long as they live. torch has no read-only tensors: a write into one of
        these ends the process with SIGSEGV. ``copy=True`` makes tensors of their own, writable, that hold nothing.
        Raises ImportError, KeyError, Released, Closed; PeerClosed as :meth:`copy`.
        """
        return self._converted(name, copy, to_torch)

    def jax(self, name: str | None = None, *, copy: bool = False) -> Any:
        """The tensor as a JAX array on the CPU, or without a name a dict of all; needs JAX.

        They share the memory and keep the pin as long as they live, but for BF16 and F8, which are copied, and for
        64-bit types while JAX has them disabled, which it narrows to 32 bits. ``copy=True`` copies all.
        Raises ImportError, KeyError, Released, Closed; PeerClosed as :meth:`copy`.
        """
        return self._converted(name, copy, to_jax)

    def _converted(self, name: str | None, copy: bool, convert: Callable[[Leased, bool], Any]) -> Any:
        self._check()
        names = self.manifest.names if name is None else [name]
        found = {n: convert(self.dlpack(n), copy) for n in names}
        self._check_intact()  # also where nothing was to be copied: some of it may have been all the same
        return found if name is None else found[name]

    def release(self) -> None:
        """Lets go of the generation; further calls do nothing. Arrays that are still in use keep it pinned."""
        if self._released:
            return
        self._released = True
        names = self._forget()
        self._lease.let_go()
        if names:
            more = f" and of {len(names) - 8} more" if len(names) > 8 else ""
            warnings.warn(
                f"generation {self.generation} was released and stays pinned: arrays of "
                f"{', '.join(map(repr, names[:8]))}{more} are still in use; copy them, or drop them before",
                ResourceWarning,
                stacklevel=caller_level(),
            )

    def _forget(self) -> list[str]:
        """Drops the arrays; the names of those that somebody else still has."""
        kept = []
        while self._roots:
            i, *root = self._roots.popitem()
            if _references(root) > _ALONE:
                kept.append(i)
        return [self.manifest.tensors[i].name for i in sorted(kept)]

    def _view(self, i: int) -> Array:
        # One array of bytes per tensor stays here and holds the pin; views of it go out. numpy makes it the base of
        # everything derived from them, so it lives as long as any of these.
        self._check()
        tensor = self.manifest.tensors[i]
        root = self._roots.get(i)
        if root is None:
            at = self._held.address + self.manifest.offsets[i]
            root = np.asarray(LeasedBytes(self._lease, self._held.memory, at, tensor.encoded_bytes, False))
            self._roots[i] = root
        tensor = shown(tensor)
        return root.view(NUMPY[tensor.dtype]).reshape(tensor.shape)

    def _flat(self) -> Array:
        """All bytes, for a moment."""
        held = self._held
        return np.asarray(LeasedBytes(self._lease, held.memory, held.address, self.manifest.data_bytes, False))

    def _check(self) -> None:
        if self._released:
            raise Released(f"generation {self.generation} was released; take it again, or copy what is needed longer")
        self._held.check()

    def _check_intact(self) -> None:
        if not self.intact:
            raise PeerClosed(
                f"the daemon ended the connection and took the pin of generation {self.generation} back; what was "
                "read of it may be torn"
            )

    def __enter__(self) -> Weights:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if not getattr(self, "_released", True):
            self._released = True
            self._roots.clear()
            self._lease.let_go()

    def __repr__(self) -> str:
        state = ", released" if self._released else ""
        return f"<Weights {self.generation}: {len(self.manifest)} tensors, {self.manifest.data_bytes} bytes{state}>"


_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64",
}  # fmt: skip


def _copy_into(weights: Weights, name: str, target: Any) -> Callable[[], None]:
    """Checks that a tensor can be copied into ``target``, and returns what does it."""
    tensor = shown(weights.manifest[name])
    module = type(target).__module__.partition(".")[0]
    if module.startswith("jax"):
        raise TypeError(f"{name!r}: JAX arrays cannot be written; make new ones with weights.jax(copy=True)")
    if isinstance(target, np.ndarray):
        if not target.flags.writeable:
            raise SpecError(f"{name!r}: the array is read-only")
        if target.dtype not in (tensor.numpy_dtype, RAW.get(tensor.dtype, tensor.numpy_dtype)):
            raise SpecError(f"{name!r}: the array has dtype {target.dtype}, want {tensor.numpy_dtype}; nothing is cast")
        _check_shape(name, target.shape, tensor)
        return lambda: np.copyto(target.view(tensor.numpy_dtype), weights[name])
    if hasattr(target, "copy_"):  # a tensor of torch, or a subclass elsewhere
        want = f"torch.{_TORCH[tensor.dtype]}"
        if str(target.dtype) != want:
            raise SpecError(f"{name!r}: the tensor has dtype {target.dtype}, want {want}; nothing is cast")
        _check_shape(name, tuple(target.shape), tensor)
        torch = imported("torch", "torch")

        def copy() -> None:
            with torch.no_grad():
                target.copy_(weights.torch(name))

        return copy
    raise TypeError(f"{name!r}: cannot copy into {type(target).__name__}; give numpy arrays or tensors of torch")


def _check_shape(name: str, shape: tuple[int, ...], tensor: Tensor) -> None:
    if shape != tensor.shape:
        raise SpecError(f"{name!r}: shape is {list(shape)}, want {list(tensor.shape)}")
