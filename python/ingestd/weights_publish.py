"""The publishing side: :class:`Publisher`."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from . import _io
from ._io import Deadline
from .auth import Token
from .chunks import BEGIN, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, CHUNK_BYTES_UNIT, Header
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
    Timeout,
)
from .manifest import Manifest
from .native import crc32c
from .redial import longest_pause, retried
from .spec import Array
from .tls import TLS
from .version import CLIENT
from .weights_draft import Draft, Published, Turn, bytes_of, pieces
from .weights_line import CHUNK, Line, message
from .weights_segment import WeightsSegment
from .wire import Reply, handshake, hello

__all__ = ["Publisher"]

_PLACE_S = 60.0  # of one request for a place, where the caller waits without limit
_GRACE_S = 5.0  # that the daemon may answer later than it was asked to
_PIECES_MAX = 16  # of a chunk; with more they are put together first


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
        address: ``unix:///path``, ``shm:///path`` (the same), or ``tcp://host:port`` (``tls``, ``quic``).
        table: name of the table, of kind ``weights``.
        tensors: a :class:`Manifest`, or a dict of arrays that are like those that will be published.
        in_place: True writes into the daemon's memory or raises Refused, False sends the bytes, None does what is
            permitted.
        token: a :class:`Token`, or ``name:secret``; None: that in the environment variable ``INGESTD_TOKEN``, if any.
        tls: a :class:`TLS`, for ``tls://`` and ``quic://``: whom to trust, and this client's certificate.
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
        token: Token | str | None = None,
        tls: TLS | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self._line: Line | None = None
        self._closed = True
        self.address = _io.parse_address(address, token, tls)
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
                    self.in_place, self._memory, self._segment = False, None, None
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
            "publish", self.table, manifest=self.manifest.to_dict(), in_place=self.in_place, client=self._client,
            token=self.address.token,
        )  # fmt: skip
        sock, fds = _io.connect(self.address, until), list[int]()
        try:
            reply = handshake(sock, body, until, fds)
            #: number of this publisher in the daemon's life
            self.publisher = reply.integer("publisher")
            #: the newest generation when it connected; 0: there was none
            self.newest = reply.integer("newest")
            self._chunk_bytes = (
                reply.integer("chunk_bytes", CHUNK_BYTES_MIN, CHUNK_BYTES_MAX) // CHUNK_BYTES_UNIT * CHUNK_BYTES_UNIT
            )
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
            parts = list(pieces(self.manifest, sources, flat, length))
            if len(parts) > _PIECES_MAX:
                parts = [np.concatenate(parts, out=scratch[:length])]
            crc = 0
            for part in parts:
                crc = crc32c(part, crc)
            tensor = self.manifest.at(flat)
            flags, offset = 0 if flat else BEGIN, flat - self.manifest.offsets[tensor]
            header = Header(
                flags, draft.generation, self.publisher, 0, self.manifest.id, offset, tensor, length, crc
            ).pack()
            line.send([struct.pack("<I", CHUNK | (len(header) + length)), header, *parts], until, doing)

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
