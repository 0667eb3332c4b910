"""The lease of one batch, or the pin of one generation of weights: what it is of holds it, and every array that must
outlive that; and how such arrays are made.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from .dtypes import RAW
from .spec import Array

__all__ = ["Lease", "Leased", "LeasedBytes", "Named"]

_CPU = (1, 0)  # kDLCPU, device 0
#: Whether numpy can tell a consumer of DLPack that memory is read-only (DLPack 1.0).
_VERSIONED = tuple(int(x) for x in np.__version__.split(".")[:2]) >= (2, 1)


class Lease:
    """Given back once, when the last of its holders lets go.

    Holders may let go from a finalizer, in any thread and in the middle of anything, so there is no lock here: each
    step is one call of a deque, which nothing can come in between.
    """

    def __init__(self, number: int, place: int, give_back: Callable[[int, int], None]) -> None:
        self.number = number
        self.place = place
        #: called before the lease is given back
        self.before: Callable[[], None] | None = None
        self._give_back = give_back
        self._holders = deque([None])  # the first one is the batch's
        self._once = deque([None])

    def hold(self) -> None:
        """One holder more; by somebody who holds it."""
        self._holders.append(None)

    def let_go(self) -> None:
        """One holder less."""
        self._holders.pop()
        if not self._holders:
            with contextlib.suppress(IndexError):
                self._once.pop()
                self._end()

    def _end(self) -> None:
        if self.before is not None:
            self.before()
        self._give_back(self.number, self.place)

    @property
    def over(self) -> bool:
        """Whether it was given back, or is about to be."""
        return not self._holders

    @property
    def shared(self) -> bool:
        """Whether anybody holds it beside the batch."""
        return len(self._holders) > 1


class _Holder:
    """Keeps a lease as long as it lives. Also the base of arrays: numpy keeps it as long as any view of them lives."""

    def __init__(self, lease: Lease, memory: Any) -> None:
        self._memory = memory
        self._lease: Lease | None = lease
        lease.hold()

    def __del__(self) -> None:
        lease, self._lease = getattr(self, "_lease", None), None
        if lease is not None:
            lease.let_go()


class LeasedBytes(_Holder):
    """A holder whose memory numpy takes as an array: ``size`` bytes at ``address``, which lies in ``memory``."""

    def __init__(self, lease: Lease, memory: Any, address: int, size: int, writable: bool) -> None:
        super().__init__(lease, memory)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, not writable)}


class Named(Protocol):
    """What an array is: a leaf of a batch, or a tensor of a generation of weights."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...


class Leased(_Holder):
    """A leaf or a tensor for any library that takes DLPack: ``np.from_dlpack(x)``, ``torch.from_dlpack(x)``.

    What they make shares the memory and keeps the lease as long as it lives, and so does this object. Leaves of
    BF16 and F8 go over as unsigned integers of their width. The memory is read-only: libraries that can be told so
    are (DLPack 1.0 and numpy 2.1); a write through the others ends the process with SIGSEGV.
    """

    def __init__(self, lease: Lease, memory: Any, leaf: Named, array: Array) -> None:
        super().__init__(lease, memory)
        #: the leaf or tensor that this is
        self.leaf = leaf
        #: of a batch: rows first
        self.shape = array.shape
        self._dtype = RAW.get(leaf.dtype, array.dtype)
        # Not the array itself: the batch looks at its release whether anybody has one that does not keep the lease.
        self._address, self._nbytes = int(array.ctypes.data), array.nbytes

    def array(self, writable: bool = False) -> Array:
        """A numpy array that keeps the lease.

        ``writable`` only makes it look so, for those that cannot be told otherwise: the mapping remains read-only.
        """
        assert self._lease is not None
        base = np.asarray(LeasedBytes(self._lease, self._memory, self._address, self._nbytes, writable))
        return base.view(self._dtype).reshape(self.shape)

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        if stream is not None:
            raise BufferError("this memory is the host's: there is no stream to wait for")
        if _VERSIONED and options.get("max_version") is not None:
            return self.array().__dlpack__(**options)
        return self.array(writable=True).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU
