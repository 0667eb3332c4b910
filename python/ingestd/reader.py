"""The reading side: :class:`Reader`."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, NoReturn

from . import _io
from ._io import Deadline
from .attach import attach
from .auth import Token
from .batch import Batch, CheckedWindow, Window
from .channel import Descriptor
from .errors import AllHeld, Closed, EndOfStream, Error, FormatError, LostBatches, PeerClosed
from .incoming import ended
from .redial import PATIENCE_S
from .segment import LEASED
from .spec import Spec
from .tls import TLS
from .version import CLIENT
from .wire import NOTICE_BYTES_MAX, Reply, handshake, hello, parse_notice

__all__ = ["Reader"]


class Reader:
    """A trainer in a process of its own: leases batches of one table, in order, each to one trainer.

    ::

        with Reader("unix:///run/user/1000/ingestd.sock", "digits") as reader:
            with reader.next(deadline=1.0) as batch:
                image = batch["image"]            # (batch.count, 8, 8), the shared memory itself
            for batch in reader:                  # until the end of the stream; each is released by the next step
                train(batch.tree)

    The trainers of one ``group`` share its batches; every group gets every batch. A batch whose trainer died is offered
    to another one of the group, so it may come a second time: ``batch.seq`` tells. Where the table lets a group
    lose what it is too slow for, :class:`LostBatches` is raised once per loss, and the next call reads on (it also ends
    a ``for`` loop; ``on_lost="count"`` only counts them in :attr:`lost`).

    A daemon that died and was started again on a segment that it keeps may give the memory of batches that are still
    held to others: what is read of them after PeerClosed was whole only if :attr:`Batch.intact` says so afterwards.

    Several batches may be held at once, at most ``prefetch``. ``next`` and ``release`` may run in different threads.
    Not for use after a fork (Closed): attach in the child.

    Args:
        address: ``unix:///path`` (``shm:///path`` means the same): the daemon's memory is mapped; or
            ``tcp://host:port`` (``tls``, ``quic``) of a daemon anywhere, which sends its batches.
        table: name of the table.
        spec: what the samples must look like; None takes the table's spec.
        group: the group to read for; None is the group ``default``.
        prefetch: most batches held at once; None takes the daemon's default.
        on_lost: ``raise`` LostBatches, or ``count`` only.
        check: replace the memory of released batches by 0xCC bytes for everyone who kept an array; slower. Default: on
            when the environment has ``INGESTD_CHECK=1``.
        token: a :class:`Token`, or ``name:secret``; None: that in the environment variable ``INGESTD_TOKEN``, if any.
        tls: a :class:`TLS`, for ``tls://`` and ``quic://``: whom to trust, and this client's certificate.
        client: free text for the daemon's status and logs.
        deadline: seconds for connecting and attaching.
        reconnect: over TCP, seconds without a connection, in all since the last batch, after which the reader gives up;
            None never does. Batches that were not released when a connection broke are delivered again: ``batch.seq``
            tells.
        memory: over TCP, most bytes for batches that were received and not released.

    Raises:
        Refused: with ``code``, ``reason`` and, where the spec differs from the table's, ``diff``.
        PeerClosed: nobody listens there. Timeout: the deadline passed. FormatError: the daemon is of another version.
    """

    def __new__(cls, address: str, *args: Any, **options: Any) -> Reader:
        if cls is Reader and address.partition("://")[0] in ("tcp", "tls", "quic"):
            from .remote_reader import RemoteReader

            return super().__new__(RemoteReader)
        return super().__new__(cls)

    def __init__(
        self,
        address: str,
        table: str,
        spec: Spec | str | None = None,
        *,
        group: str | None = None,
        prefetch: int | None = None,
        on_lost: Literal["raise", "count"] = "raise",
        check: bool | None = None,
        token: Token | str | None = None,
        tls: TLS | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
        reconnect: float | None = PATIENCE_S,
        memory: int = 4 << 30,
    ) -> None:
        self._closed = True
        self.address = _io.parse_address(address, token, tls)
        want = Spec.parse(spec) if isinstance(spec, str) else spec
        self._checked = os.environ.get("INGESTD_CHECK", "0") not in ("", "0") if check is None else check
        self._forks = _io.forks()
        self._taking, self._giving = threading.Lock(), threading.Lock()
        self._returned: deque[tuple[int, int]] = deque()  # (number, place) of leases that are over
        self._retired = False
        if on_lost not in ("raise", "count"):
            raise ValueError(f"on_lost={on_lost!r}: want 'raise' or 'count'")
        self._raise_lost = on_lost == "raise"
        #: batches that this reader's group lost, as far as this reader was told
        self.lost = 0
        self._held: weakref.WeakValueDictionary[int, Batch] = weakref.WeakValueDictionary()
        self._leased = 0  # taken and not given back
        body = hello("train", table, want, group=group, prefetch=prefetch or 0, token=self.address.token, client=client)
        until = _io.deadline_of(deadline)
        sock = _io.connect(self.address, until)
        fds: list[int] = []
        try:
            reply = handshake(sock, body, until, fds)
            self._attach(reply, fds)
            #: name of the table
            self.table = table
            #: number of this trainer in the daemon's life
            self.trainer = reply.integer("trainer") if "trainer" in reply.body else 0
            #: the group that it reads for
            self.group = str(reply.body.get("group", group or "default"))
            #: most batches held at once
            self.prefetch = reply.integer("prefetch", 1, self._channel.capacity)
        except BaseException:
            sock.close()
            _io.close_fds(fds)
            raise
        self._sock, self._fds = sock, fds
        self._closed = False
        _io.close_in_child(self)

    def _attach(self, reply: Reply, fds: list[int]) -> None:
        self._segment, self._memory, self._channel = attach(reply, fds, writable=False)
        #: the table's spec
        self.spec = self._segment.spec
        #: rows of a full batch
        self.batch_size = self._segment.batch_size

    def next(self, deadline: float | None = None) -> Batch:
        """Leases the next batch; release it, best by using it as a context manager.

        Args:
            deadline: seconds to wait; None waits without limit, 0 only looks.

        Raises:
            Timeout: no batch came in time; try again.
            EndOfStream: the table was closed, every batch was delivered.
            AllHeld: this reader already holds ``prefetch`` batches, so none can come before one is released.
            LostBatches: the group was too slow; the next call reads on.
            ShuttingDown, Ended, PeerClosed: the daemon ended the attachment or went away. Who goes on reading arrays
                of a batch that is held must check :attr:`Batch.intact` then.
        """
        until = _io.deadline_of(deadline)
        left = until.left()
        self._check()
        if not self._taking.acquire(timeout=-1 if left is None else left):
            raise until.timeout("waiting for another thread that waits for a batch")
        try:
            while True:
                self._check()
                delivered = self._channel.take()
                if delivered is not None and delivered.rows == 0:
                    self._note_loss(delivered)
                    continue
                if delivered is not None:
                    return self._batch(delivered)
                if self._channel.drained():
                    raise EndOfStream(f"table {self.table!r} is closed and every batch was delivered")
                self._wait(until)
        finally:
            self._taking.release()

    def _wait(self, until: Deadline) -> None:
        with self._locked():
            if self._leased >= self.prefetch:
                raise AllHeld(
                    f"this reader holds {self._leased} batches and may hold {self.prefetch}; release one (and the "
                    "arrays that keep it) before the next, or attach with a larger prefetch"
                )
        woken, ended = self._channel.wait(self._sock.fileno(), until)
        if ended and not self._channel.closed:
            self._raise_end()
        if not woken and not ended:
            raise until.timeout(f"waiting for a batch of table {self.table!r}")

    def _raise_end(self) -> NoReturn:
        """Says why the socket is readable: a closing notice, or the end."""
        notice = None
        with contextlib.suppress(OSError, Error):
            until, doing = Deadline(1), "reading the closing notice"
            head = _io.receive(self._sock, 5, until, doing)
            if len(head) == 5 and head[0] == 0:
                length = min(int.from_bytes(head[1:], "little"), NOTICE_BYTES_MAX)
                notice = parse_notice(_io.receive(self._sock, length, until, doing))
        self._disconnect("the daemon ended the attachment of this batch's reader")
        if notice is not None:
            raise ended(*notice)
        raise PeerClosed("the daemon went away; its log says why")

    def _note_loss(self, loss: Descriptor) -> None:
        if loss.place == 0:
            raise FormatError(f"the daemon delivered {loss}, which is neither a batch nor a loss; attach again")
        self.lost += loss.place
        if self._raise_lost:
            raise LostBatches(self.group, loss.number, loss.place)

    def _batch(self, lease: Descriptor) -> Batch:
        """Checks a descriptor against the segment before anything is read through it."""
        segment = self._segment
        if lease.place >= segment.batches or not 1 <= lease.rows <= segment.batch_size:
            raise FormatError(f"the daemon delivered {lease}, which is not in this segment; attach again")
        state = segment.state(lease.place)
        if (state.number, state.phase, state.count) != (lease.number, LEASED, lease.rows):
            if _io.hung_up(self._sock, _io.STALE_S):
                self._raise_end()
            raise FormatError(f"the daemon delivered {lease}, but the segment says {state}; attach again")
        window = CheckedWindow(self._fds[0], segment, lease.place) if self._checked else None
        batch = Batch(
            segment, self.spec, lease, window or Window(self._memory, segment.place(lease.place)), self._give_back
        )
        with self._locked():
            self._leased += 1
            self._held[lease.number] = batch
        return batch

    def _give_back(self, number: int, place: int) -> None:
        self._returned.append((number, place))
        self._settle()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds _giving, and then does what others could not do meanwhile."""
        try:
            with self._giving:
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Gives back what is over, or leaves it to the one that holds the lock.

        The end of a lease may come from a finalizer, even of this thread in the middle of such a section, so it must
        not wait for the lock. Whoever holds it looks again afterwards.
        """
        while self._returned and self._giving.acquire(False):
            try:
                while self._returned:
                    number, place = self._returned.popleft()
                    if not self._closed:
                        self._held.pop(number, None)
                        self._leased -= 1
                        self._channel.give_back(number, place)
                over = self._retired and self._leased == 0 and not self._closed
            finally:
                self._giving.release()
            if over:
                self._disconnect("the reader of this batch was retired")

    def __iter__(self) -> Iterator[Batch]:
        """Batches until the end of the stream; each is released when the next one is asked for."""
        while True:
            try:
                batch = self.next()
            except EndOfStream:
                return
            try:
                yield batch
            finally:
                if not batch.released and not self._closed:
                    batch.release()

    def close(self) -> None:
        """Detaches. The daemon takes back what is still held; batches of this reader raise Closed afterwards."""
        self._disconnect("the reader of this batch was closed")

    def retire(self) -> None:
        """Closes when the last batch, and the last array that keeps one, is given back; at once if there is none."""
        with self._locked():
            self._retired = True
            idle = self._leased == 0 and not self._closed
        if idle:
            self._disconnect("the reader of this batch was retired")

    @property
    def closed(self) -> bool:
        """True after :meth:`close`, or when the daemon has gone."""
        return self._closed

    @property
    def held(self) -> int:
        """Batches leased and not given back: not released, or kept by an array of theirs."""
        return self._leased

    def _disconnect(self, why: str) -> None:
        with self._locked():
            self._closed = True
            for batch in list(self._held.values()):
                batch._lose(why)
            self._channel.leave()
            self._sock.close()
            _io.close_fds(self._fds)

    def _check(self) -> None:
        if self._retired:
            raise Closed("the reader is retired")
        if self._forks != _io.forks():
            raise Closed("this reader belongs to the parent process; attach a new one after the fork")
        if self._closed:
            raise Closed("the reader is closed")

    def _forked(self) -> None:
        """In the child of a fork: the parent's attachment must not stay open because of the child."""
        self._closed = True
        for batch in list(self._held.values()):
            batch._lose("this batch belongs to the parent process; attach a new reader after the fork")
        self._sock.close()
        _io.close_fds(self._fds)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            self._disconnect("the reader of this batch was dropped")

    def __repr__(self) -> str:
        return f"<Reader {self.address} table={getattr(self, 'table', '?')!r}>"
