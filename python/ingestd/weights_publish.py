"""The publishing side: :class:`Publisher`, and :class:`Draft`, a generation that is being written."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from . import _io
from ._io import Deadline
from .batch import caller_level
from .dtypes import RAW
from .errors import (
    BadSum,
    Closed,
    Ended,
    Error,
    FormatError,
    NotWritten,
    OldGeneration,
    PeerClosed,
    Pin,
    Pinned,
    Refused,
    Released,
    SpecError,
    Timeout,
)
from .manifest import Manifest, Tensor
from .native import crc32c
from .redial import longest_pause, retried
from .spec import Array, as_array, dtype_advice
from .version import CLIENT
from .weights_blocks import copy_tensors, sum_tensors
from .weights_line import CHUNK, Line, message
from .weights_segment import WeightsSegment
from .weights_view import shown
from .wire import Reply, handshake, hello

__all__ = ["Draft", "Published", "Publisher"]

_PLACE_S = 60.0  # of one request for a place, where the caller waits without limit
_GRACE_S = 5.0  # that the daemon may answer later than it was asked to
_CHUNK_MIN, _CHUNK_MAX = 1 << 16, 64 << 20
_PIECES_MAX = 16  # of a chunk; with more they are put together first
_HEADER = struct.Struct("<4sHH5Q3I")
_BEGIN = 1
_ZEROS = np.zeros(256, np.uint8)
_TRY_S = 5.0


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


class Publisher:
    """Publishes generations of a model's tensors: each whole and at once, or not at all.

    ::

        with Publisher("unix:///run/user/1000/ingestd.sock", "weights", model) as pub:  # model: a dict of arrays
            pub.publish(model, deadline=5.0)               # copies and sums in one pass
            with pub.begin(deadline=5.0) as draft:         # or writes where readers will map it
                for name in model:
                    compute_into(draft[name])

    Over ``unix://`` it writes into the daemon's memory, where the daemon trusts this process (by default: it runs as
    the same user), and else sends the bytes over the socket, as over ``tcp://``. A table has one publisher at a time.

    A call that finds the daemon gone raises PeerClosed or its kinds; :meth:`begin` and :meth:`publish` connect again
    after that. May be used by several threads, with one generation at a time; not after a fork (Closed).

    Args:
        address: ``unix:///path``, ``shm:///path`` (the same) or ``tcp://host:port``.
        table: name of the table, of kind ``weights``.
        tensors: a :class:`Manifest`, or a dict of arrays that are like those that will be published.
        in_place: True writes into the daemon's memory or raises Refused, False sends the bytes, None does what is
            permitted.
        client: free text for the daemon's status and logs.
        deadline: seconds for connecting, and for a publisher before this one to end.

    Raises:
        Refused: with ``code`` (``publisher_active``: the table has one; ``wrong_kind``) and ``reason``.
        PeerClosed: nobody listens there. Timeout: the deadline passed. FormatError: the daemon is of another version.
        SpecError: tensors that no manifest can have.
    """

    def __init__(
        self,
        address: str,
        table: str,
        tensors: Manifest | Mapping[str, Any],
        *,
        in_place: bool | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self._line: Line | None = None
        self._closed = True
        self.address = _io.parse_address(address)
        if in_place and self.address.kind != "unix":
            raise ValueError(f"address {address!r}: memory is shared over a unix socket; write unix:///path")
        #: name of the table
        self.table = table
        #: the tensors, and where they lie
        self.manifest = tensors if isinstance(tensors, Manifest) else Manifest.from_arrays(tensors)
        #: whether it writes into the daemon's memory
        self.in_place = self.address.kind == "unix" if in_place is None else in_place
        self._may_stream = in_place is None
        self._client = client
        self._forks = _io.forks()
        self._turn = threading.RLock()
        self._writing: Turn | None = None
        self._segment: WeightsSegment | None = None
        self._memory: Any = None  # the segment's, or where what is sent is put together
        self._dial(_io.deadline_of(deadline))
        self._closed = False
        _io.close_in_child(self)

    def begin(self, deadline: float | None = None, generation: int | None = None) -> Draft:
        """A place for another generation.

        Args:
            deadline: seconds to wait while readers hold all places; None waits without limit, 0 only looks.
            generation: the number that it shall have, above the newest; None takes the next one.

        Raises:
            Pinned: the deadline passed; ``pins`` says who holds which generation. It is a Timeout.
            OldGeneration: the number is not above the newest.
            ShuttingDown, Ended, PeerClosed: the daemon ended the connection or went away.
            Refused: when connecting again; Error: another generation is being written; Closed.
        """
        until = _io.deadline_of(deadline)
        with self._calling(until):
            return self._begin(until, generation)

    def publish(
        self, tensors: Mapping[str, Any], deadline: float | None = None, generation: int | None = None
    ) -> Published:
        """Copies all tensors in, or sends them, and makes them the newest generation.

        ``tensors`` are numpy, torch (CPU) or JAX arrays by name: all of the manifest, dtype and shape as there, nothing
        is cast. ``deadline`` is for all of it. Raises KeyError, SpecError (nothing was done), and as :meth:`begin` and
        :meth:`Draft.commit`.
        """
        until = _io.deadline_of(deadline)
        for name in tensors:
            self.manifest.index(name)
        missing = [name for name in self.manifest.names if name not in tensors]
        if missing:
            raise KeyError(f"there is no {missing[0]!r} to publish: all of the manifest's tensors are needed")
        sources = {i: bytes_of(t, tensors[t.name]) for i, t in enumerate(self.manifest.tensors)}
        with self._calling(until), self._begin(until, generation) as draft:
            if self.in_place:
                draft._copy(sources)
            draft._over = True
            draft.published = self._commit(draft, until, sources)
            return draft.published

    def close(self) -> None:
        """Ends the connection; a generation that is being written is given up."""
        self._closed = True
        self._drop()

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    # -- the connection -------------------------------------------------------------------------------------------

    def _dial(self, until: Deadline) -> None:
        """Connects; waits for the publisher before this one, or a daemon that is not there yet, until the deadline."""
        began, refused = time.monotonic(), None  # the last refusal that another try may overcome
        while True:
            try:
                self._connect(until)
                return
            except Timeout:
                if refused is not None:
                    raise refused from None
                raise
            except Error as e:
                if isinstance(e, Refused) and self.in_place and self._may_stream and e.code == "not_permitted":
                    self.in_place = False
                    continue
                left = until.left()
                pause = random.uniform(0, longest_pause(time.monotonic() - began))
                again = isinstance(e, Refused) and (e.code == "publisher_active" or retried(e))
                if not again or (left is not None and left <= pause):
                    raise
                refused = e
            time.sleep(pause)

    def _connect(self, until: Deadline) -> None:
        body = hello(
            "publish", self.table, manifest=self.manifest.to_dict(), in_place=self.in_place, client=self._client
        )
        sock, fds = _io.connect(self.address, until), list[int]()
        try:
            reply = handshake(sock, body, until, fds)
            #: number of this publisher in the daemon's life
            self.publisher = reply.integer("publisher")
            #: the newest generation when it connected; 0: there was none
            self.newest = reply.integer("newest")
            self._chunk_bytes = reply.integer("chunk_bytes", _CHUNK_MIN, _CHUNK_MAX) // 4096 * 4096
            if self.in_place:
                self._map(reply, fds)
        except BaseException:
            sock.close()
            raise
        finally:
            _io.close_fds(fds)
        self._line = Line(sock)

    def _map(self, reply: Reply, fds: list[int]) -> None:
        if len(fds) != 1:
            raise FormatError(f"the daemon passed {len(fds)} descriptors, want 1")
        size = os.fstat(fds[0]).st_size
        if size < reply.integer("segment_bytes", 1):
            raise FormatError(f"the segment has {size} bytes, the daemon said {reply.body['segment_bytes']}")
        self._memory = mmap.mmap(fds[0], size, flags=mmap.MAP_SHARED)
        self._segment = WeightsSegment(self._memory)
        if self._segment.manifest != self.manifest:
            raise FormatError("the segment's manifest is not the one that this publisher gave")

    def _drop(self) -> None:
        line, self._line, self._writing = self._line, None, None
        if line is not None:
            line.close()

    @contextlib.contextmanager
    def _calling(self, until: Deadline) -> Iterator[None]:
        """Holds the turn; a connection that was left in the middle of something is closed."""
        if self._forks != _io.forks():
            raise Closed("this publisher belongs to the parent process; make a new one after the fork")
        left = until.left()
        if not self._turn.acquire(timeout=-1 if left is None else left):
            raise until.timeout("waiting for another thread that publishes")
        try:
            if self._closed:
                raise Closed("the publisher is closed")
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _saying(self) -> Iterator[Line]:
        """The line, for a question and its answer; whatever happens between leaves it useless."""
        if self._line is None:
            raise PeerClosed("the connection to the daemon was lost before")
        try:
            yield self._line
        except BaseException:
            self._drop()
            raise

    # -- generations ----------------------------------------------------------------------------------------------

    def _begin(self, until: Deadline, generation: int | None) -> Draft:
        if self._writing is not None:
            raise Error(f"generation {self._writing.generation} is being written: commit or abort it first")
        if self._line is None:
            self._dial(until)
        while True:
            answer = self._ask_for_place(until, generation)
            if answer["op"] == "place":
                break
            error = _failure(answer)
            if not isinstance(error, Pinned) or until.at is not None:
                raise error
        number, place = _whole(answer, "generation", 1), _whole(answer, "place", 0)
        if not self.in_place:
            if self._memory is None:
                self._memory = mmap.mmap(-1, max(self.manifest.data_bytes, mmap.PAGESIZE))
            self._writing = turn = Turn(number, place)
            return Draft(self, turn, self._memory, 0)
        segment = self._segment
        assert segment is not None
        try:
            offset = segment.data(place)
            if segment.generation(place) != 0:
                raise FormatError(f"the daemon gave place {place}, which holds generation {segment.generation(place)}")
        except FormatError:
            self._drop()
            raise
        self._writing = turn = Turn(number, place)
        return Draft(self, turn, self._memory, offset)

    def _ask_for_place(self, until: Deadline, generation: int | None) -> dict[str, Any]:
        left = until.left()
        seconds = _PLACE_S if left is None else left
        asked = {"op": "begin", "deadline_ms": int(seconds * 1000)}
        if generation is not None:
            asked["generation"] = generation
        patience = Deadline(seconds + _GRACE_S)
        pins: list[Pin] = []
        with self._saying() as line:
            line.send([message(asked)], patience, "asking for a place")
            while True:
                try:
                    answer = line.hear(patience, "waiting for a place for another generation")
                except Timeout as e:
                    if pins:
                        raise Pinned("the daemon gave no answer in time", pins) from e
                    raise
                if answer.get("op") in ("place", "failed"):
                    return answer
                if answer.get("op") != "waiting":
                    raise FormatError(f"the daemon answered {str(answer)[:200]} to a publisher that asked for a place")
                pins = _pins(answer)

    def _commit(self, draft: Draft, until: Deadline, sources: dict[int, Array] | None = None) -> Published:
        """Publishes what was written; over the socket from ``sources``, or from where the draft was put together."""
        with self._calling(until):
            if self._writing is not draft._turn:
                raise PeerClosed(f"the connection on which generation {draft.generation} was begun is gone")
            try:
                with self._saying() as line:
                    if self.in_place:
                        self._write_sums(draft)
                    else:
                        self._stream(line, draft, sources, until)
                    said = {"op": "commit", "generation": draft.generation}
                    line.send([message(said)], until, "committing a generation")
                    answer = line.hear(until, "waiting for the daemon to publish a generation")
                    if answer.get("op") not in ("published", "failed"):
                        raise FormatError(f"the daemon answered {str(answer)[:200]} to a commit")
                    if answer["op"] == "published":
                        if _whole(answer, "generation", 1) != draft.generation:
                            raise FormatError(f"the daemon published {str(answer)[:200]}, want {draft.generation}")
                        self.newest = draft.generation
                        return Published(draft.generation, str(answer.get("digest", "")))
                raise _failure(answer)
            finally:
                self._writing = None

    def _abort(self, draft: Draft) -> None:
        if self._writing is not draft._turn or self._forks != _io.forks():
            return
        until = Deadline(_GRACE_S)
        with self._turn:
            self._writing = None
            with self._saying() as line:
                line.send([message({"op": "abort"})], until, "giving a generation up")
                answer = line.hear(until, "giving a generation up")
                if answer.get("op") != "aborted":
                    raise FormatError(f"the daemon answered {str(answer)[:200]} to an abort")

    def _write_sums(self, draft: Draft) -> None:
        assert self._segment is not None
        sums = draft._finish()
        self._segment.sums(draft._turn.place)[:] = [sums[i] for i in range(len(self.manifest))]

    def _stream(self, line: Line, draft: Draft, sources: dict[int, Array] | None, until: Deadline) -> None:
        doing = f"sending generation {draft.generation}"
        if sources is None:
            sources = {i: draft._root(i) for i in range(len(self.manifest))}
        scratch = np.empty(self._chunk_bytes, np.uint8)
        for flat in range(0, self.manifest.data_bytes, self._chunk_bytes):
            length = min(self._chunk_bytes, self.manifest.data_bytes - flat)
            pieces = list(_pieces(self.manifest, sources, flat, length))
            if len(pieces) > _PIECES_MAX:
                pieces = [np.concatenate(pieces, out=scratch[:length])]
            crc = 0
            for piece in pieces:
                crc = crc32c(piece, crc)
            tensor = self.manifest.at(flat)
            header = _HEADER.pack(
                b"ICHK", 1, 0 if flat else _BEGIN, draft.generation, self.publisher, 0, self.manifest.id,
                flat - self.manifest.offsets[tensor], tensor, length, crc,
            )  # fmt: skip
            head = struct.pack("<I", CHUNK | (64 + length)) + header + struct.pack("<I", crc32c(header))
            line.send([head, *pieces], until, doing)

    def _forked(self) -> None:
        """In the child of a fork: the parent's connection must not stay open because of the child."""
        self._drop()
        self._closed = True

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<Publisher {self.address} table={getattr(self, 'table', '?')!r}>"


def bytes_of(tensor: Tensor, value: Any) -> Array:
    """The bytes of an array of exactly the tensor's dtype and shape, without a copy where it is contiguous.

    Raises SpecError.
    """
    want = shown(tensor)
    array = as_array(tensor.name, value)
    if array.dtype not in (want.numpy_dtype, RAW.get(want.dtype, want.numpy_dtype)):
        raise SpecError(
            f"tensor {tensor.name!r}: got {dtype_advice(array.dtype)}, want {want.dtype} ({want.numpy_dtype}); "
            "convert it first, nothing is cast silently"
        )
    if array.shape != want.shape:
        raise SpecError(f"tensor {tensor.name!r}: got shape {list(array.shape)}, want {list(want.shape)}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _pieces(manifest: Manifest, sources: dict[int, Array], flat: int, length: int) -> Iterator[Array]:
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


def _whole(answer: dict[str, Any], field: str, least: int) -> int:
    value = answer.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
        raise FormatError(f"the daemon's answer has {field} = {value!r}, want a whole number of at least {least}")
    return value


def _pins(answer: dict[str, Any]) -> list[Pin]:
    """Who holds what; fields that are missing or of another type are left empty."""
    found = []
    for item in answer.get("pins") or []:
        if isinstance(item, dict):
            known = Pin(0)
            more = {f: item[f] for f, empty in zip(known._fields, known) if type(item.get(f)) is type(empty)}
            found.append(known._replace(**more))
    return found


def _failure(answer: dict[str, Any]) -> Error:
    """The error for an answer ``failed``."""
    code, reason = str(answer.get("code", "unknown")), str(answer.get("reason", "no reason given"))
    if code == "pinned":
        return Pinned(reason, _pins(answer))
    kinds: dict[str, type[Error]] = {"old_generation": OldGeneration, "incomplete": NotWritten, "bad_sum": BadSum}
    return kinds[code](reason) if code in kinds else Ended(code, reason)
