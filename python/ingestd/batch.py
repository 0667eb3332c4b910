"""One leased batch: :class:`Batch`, and the memory behind its arrays."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .channel import Descriptor, Fence
from .errors import Closed, PeerClosed, Released
from .lease import Lease, Leased
from .segment import LEASED, Segment

if TYPE_CHECKING:
    from .spec import Array, Leaf, Spec

__all__ = ["Batch", "Window", "caller_level"]

_POISON = 0xCC
_MAP_FIXED = 0x10  # the same on every Linux architecture that numpy runs on

# The columns that are no leaves, beside the leaves' numbers in spec order.
_STREAM, _NUMBER, _ARRIVAL = -3, -2, -1
_U64_SCALAR: tuple[np.dtype[Any], tuple[int, ...]] = (np.dtype(np.uint64), ())


class Window:
    """The bytes of one place of the segment, readable: ``memory`` from ``offset`` on."""

    def __init__(self, memory: Any, offset: int) -> None:
        self.memory = memory
        self.offset = offset

    def poison(self) -> None:
        """Called at the release when arrays over this memory are still in use."""


class CheckedWindow(Window):
    """A mapping of one batch for one lease, which shows 0xCC after it: what reads a stale view sees junk at once."""

    def __init__(self, fd: int, segment: Segment, place: int) -> None:
        stat = os.fstat(fd)
        page = max(mmap.ALLOCATIONGRANULARITY, stat.st_blksize)  # the size of a huge page where the segment has them
        first = segment.place(place)
        start = first // page * page
        end = min(-(-(first + segment.batch_stride) // page) * page, stat.st_size)
        self._length = end - start
        mapping = mmap.mmap(fd, self._length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
        super().__init__(mapping, first - start)

    def poison(self) -> None:
        # The array keeps the mapping alive, so its address range is still ours to replace.
        keep = np.frombuffer(self.memory, np.uint8)
        address = int(keep.ctypes.data)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        flags = _MAP_FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        at = libc.mmap(address, self._length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if at != address:
            raise OSError(ctypes.get_errno(), "cannot replace the memory of a released batch")
        ctypes.memset(address, _POISON, self._length)
        libc.mprotect(address, self._length, mmap.PROT_READ)


def _references(held: list[Array]) -> int:
    return sys.getrefcount(held[0])


#: What _references says of an array that nobody else holds.
_ALONE = _references([np.empty(0)])


def caller_level() -> int:
    """The stacklevel for warnings.warn, called by our caller, of the first frame outside of this package."""
    level, frame = 1, sys._getframe(1)
    here = os.path.dirname(__file__)
    while frame.f_back is not None and os.path.dirname(frame.f_code.co_filename) == here:
        level, frame = level + 1, frame.f_back
    return level


class Batch:
    """A batch of samples, leased from the daemon: zero-copy, read-only arrays over the shared memory itself.

    A context manager that releases on exit. Every leaf is an array ``(count, *leaf.shape)``, 64-byte aligned and
    contiguous: ``batch["obs/image"]``, ``batch.leaves`` in spec order, or ``batch.tree``, the tree that was pushed.

    After the release the memory belongs to the daemon again and other samples go there. The batch itself then raises
    Released. Arrays that were kept cannot be taken away: a ResourceWarning names their leaves, and with
    ``Reader(check=True)`` or ``INGESTD_CHECK=1`` they turn to 0xCC bytes. What is needed longer must be copied
    (:meth:`copy`), or the batch held. The same goes for ``torch.from_numpy`` and ``jax.numpy.asarray``, which share the
    memory of the array that they are given.

    A daemon that died and was started again on a segment that it keeps may give the memory to others although the
    batch is held. Who goes on reading arrays of a batch after PeerClosed must ask :attr:`intact` when they were read,
    before using what was read; where daemons are restarted like that, always, for the end may not have been seen yet.
    :meth:`copy`, :meth:`torch` and :meth:`jax` ask themselves, for what they copy.

    :meth:`torch`, :meth:`jax` and :meth:`dlpack` make arrays that may be kept: the batch goes back to the daemon when
    it was released (or dropped) and the last of them has been garbage-collected. Until then it counts against the
    reader's ``prefetch``.
    """

    def __init__(
        self,
        segment: Segment,
        spec: Spec,
        delivered: Descriptor,
        window: Window,
        give_back: Callable[[int, int], None],
    ) -> None:
        #: number of the batch; numbers only grow, also across restarts of the daemon, so that one that is known already
        #: is a second delivery
        self.seq = delivered.number
        #: rows that hold samples, at most the table's batch size
        self.count = delivered.rows
        #: place of the batch in the segment
        self.place = delivered.place
        #: spec of the samples
        self.spec = spec
        self._segment = segment
        self._window: Window | None = window
        self._lease = Lease(delivered.number, delivered.place, give_back)
        self._exported = False
        self._arrays: dict[int, Array] = {}
        self._tree: Any = None
        self._lost: str | None = None  # why the batch cannot be used although it was not released

    @property
    def released(self) -> bool:
        """True after the release."""
        return self._window is None

    @property
    def intact(self) -> bool:
        """True if what was read of the batch so far was whole: it still lies in its place, and nobody else's samples.

        It is so from the delivery on until the batch is given back, unless the daemon took it back: it cut this reader
        off, or died and its successor gave the memory to others. Then the batch is delivered again. May be asked after
        PeerClosed, and after the release as long as arrays keep the lease.
        """
        if self._lease.over:
            return False
        Fence()()  # the reads before do not slip behind the load; one of its own, as nobody may wait for another here
        return self._segment.state_word(self.place) == self.seq << 3 | LEASED

    def _check_intact(self) -> None:
        if not self.intact:
            raise PeerClosed(
                f"the daemon took batch {self.seq} back while it was held; what was copied of it may be torn; it is "
                "delivered again"
            )

    def __getitem__(self, name: str) -> Array:
        """The leaf's array ``(count, *leaf.shape)``. Raises KeyError, Released."""
        return self._view(self._number(name))

    def _number(self, name: str) -> int:
        for i, leaf in enumerate(self.spec.leaves):
            if leaf.name == name:
                return i
        names = ", ".join(repr(leaf.name) for leaf in self.spec.leaves[:16])
        raise KeyError(f"no leaf {name!r}; there are {names}{', ...' if len(self.spec) > 16 else ''}")

    @property
    def leaves(self) -> list[Array]:
        """Arrays of all leaves in spec order. Raises Released."""
        return [self._view(i) for i in range(len(self.spec))]

    @property
    def tree(self) -> Any:
        """The arrays as the tree that was pushed, each with a leading axis of ``count``. Raises Released."""
        self._check()
        if self._tree is None:
            self._tree = self.spec.unflatten(self.leaves)
        return self._tree

    @property
    def stream(self) -> NDArray[np.uint64]:
        """Number of the stream that each sample came from, ``(count,)``."""
        return self._view(_STREAM)

    @property
    def number(self) -> NDArray[np.uint64]:
        """Number of each sample in its stream, from 0, ``(count,)``."""
        return self._view(_NUMBER)

    @property
    def arrival(self) -> NDArray[np.uint64]:
        """Unix time in nanoseconds at which each sample's last byte was read, ``(count,)``."""
        return self._view(_ARRIVAL)

    def copy(self) -> Any:
        """The tree with arrays of its own, writable, that outlive the batch.

        Raises Released; PeerClosed when the batch was taken back meanwhile (:attr:`intact`): the copy may be torn.
        """
        copies = [a.copy() for a in self.leaves]
        self._check_intact()
        return self.spec.unflatten(copies)

    def dlpack(self, name: str) -> Leased:
        """The leaf for ``from_dlpack`` of any library, sharing the memory and keeping the lease: see :class:`Leased`.

        Raises KeyError, Released.
        """
        self._check()
        leaf = self._leaf(name)
        self._exported = True
        # The view is not kept in a variable: where this batch ends with the call, it would still be in use then.
        return Leased(self._lease, self._window, leaf, self[name])

    def torch(self, name: str | None = None, *, copy: bool = False) -> Any:
        """The leaf as a torch tensor, or without a name the whole tree; needs torch.

        The tensors share the memory and keep the batch leased as long as they live. torch has no read-only tensors: a
        write into one of these (also ``t += 1``) ends the process with SIGSEGV. ``copy=True`` makes tensors of their
        own, writable, that hold nothing. Raises ImportError, KeyError, Released; PeerClosed as :meth:`copy`.
        """
        from .arrays import to_torch

        return self._converted(name, copy, to_torch)

    def jax(self, name: str | None = None, *, copy: bool = False) -> Any:
        """The leaf as a JAX array on the CPU, or without a name the whole tree; needs JAX.

        The arrays share the memory and keep the batch leased as long as they live, but for BF16 and F8, which are
        copied, and for 64-bit types while JAX has them disabled, which it narrows to 32 bits. ``copy=True`` copies all.
        Raises ImportError, KeyError, Released; PeerClosed as :meth:`copy`.
        """
        from .arrays import to_jax

        return self._converted(name, copy, to_jax)

    def _converted(self, name: str | None, copy: bool, convert: Callable[[Leased, bool], Any]) -> Any:
        self._check()
        names = [leaf.name for leaf in self.spec.leaves] if name is None else [name]
        found = [convert(self.dlpack(x), copy) for x in names]
        self._check_intact()  # also where nothing was to be copied: some of it may have been all the same
        return self.spec.unflatten(found) if name is None else found[0]

    def _leaf(self, name: str) -> Leaf:
        return self.spec.leaves[self._number(name)]

    def release(self) -> None:
        """Gives the batch back to the daemon; further calls do nothing.

        While arrays of :meth:`dlpack`, :meth:`torch` or :meth:`jax` live, the daemon gets it when the last is gone.

        Raises PeerClosed when the daemon had taken the batch away before: then what was read since may be of another.
        """
        window = self._window
        if window is None:
            return
        self._check()
        intact = self.intact
        self._window = None
        self._tree = None
        escaped = self._escaped()
        if escaped:
            self._lease.before = window.poison
        self._lease.let_go()
        if not intact:
            raise PeerClosed(
                f"the daemon took batch {self.seq} back while it was held; what was read of it may be wrong"
            )
        if escaped:
            warnings.warn(
                f"batch {self.seq} was released while arrays of {', '.join(sorted(escaped))} are still in use: "
                "they will show other samples; copy them before the release, or release later",
                ResourceWarning,
                stacklevel=caller_level(),
            )

    def _escaped(self) -> list[str]:
        """Forgets the arrays; the names of those that somebody else still has."""
        escaped = []
        while self._arrays:
            column, *held = self._arrays.popitem()
            if _references(held) > _ALONE:
                escaped.append(self._name(column))
        return escaped

    def _lose(self, why: str) -> None:
        """The reader was closed, or this process is a fork of the one that leased: the batch can be used no more."""
        self._lost = why

    def _name(self, column: int) -> str:
        return repr(self.spec.leaves[column].name) if column >= 0 else ("stream", "number", "arrival")[column]

    def _view(self, column: int) -> Array:
        # One array per column stays here, and views of it go out: numpy makes it the base of everything derived from
        # them, so its reference count tells at the release whether any of them is left.
        self._check()
        root = self._arrays.get(column)
        if root is None:
            s, window = self._segment, self._window
            assert window is not None
            if column < 0:
                offset, layout = (s.stream_column, s.number_column, s.arrival_column)[column], _U64_SCALAR
            else:
                leaf = self.spec.leaves[column]
                offset, layout = s.columns[column].offset, (leaf.numpy_dtype, leaf.shape)
            dtype, shape = layout
            root = np.ndarray((self.count, *shape), dtype, buffer=window.memory, offset=window.offset + offset)
            self._arrays[column] = root
        return root.view()

    def _check(self) -> None:
        if self._window is None:
            raise Released(
                f"batch {self.seq} was released; its memory may hold other samples. Copy what is needed longer"
            )
        if self._lost is not None:
            raise Closed(self._lost)

    def __enter__(self) -> Batch:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._lost is None:
            self.release()

    def __del__(self) -> None:
        if getattr(self, "_window", None) is None or self._lost is not None:
            return
        if self._exported and not self._escaped():
            self._lease.let_go()  # what was made of it decides
        else:
            warnings.warn(
                f"batch {self.seq} was dropped without a release: its place stays taken until the reader is closed",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        return f"<Batch {self.seq}: {self.count} rows{', released' if self.released else ''}>"
