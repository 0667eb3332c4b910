"""The pushing side on the daemon's machine, which writes where trainers read: :class:`FillProducer`."""

from __future__ import annotations

import contextlib
import warnings
from types import TracebackType
from typing import Any

from . import _io
from .auth import Token
from .errors import Error, Note, Released
from .filler import Filler, Reserved
from .redial import PATIENCE_S, Dialer
from .spec import Array, Spec
from .version import CLIENT
from .wire import hello

__all__ = ["FillProducer", "Slots"]


class Slots:
    """Reserved rows of one place, to be filled by the caller: ``slots["obs"][i] = ...``.

    A context manager that commits all rows on exit, and abandons them on an exception. ``len(slots)`` is how many there
    are. The arrays are the shared memory itself, writable, ``(len(slots), *leaf.shape)``; they hold old bytes, so every
    leaf of each row must be filled. After the commit the rows belong to the daemon: writing to an array that was
    kept spoils samples that trainers read.
    """

    def __init__(self, filler: Filler, reserved: Reserved, spec: Spec, deadline: float | None) -> None:
        self._filler = filler
        self._reserved: Reserved | None = reserved
        self._deadline = deadline
        self.spec = spec

    def __len__(self) -> int:
        return 0 if self._reserved is None else self._reserved.n

    def __getitem__(self, name: str) -> Array:
        """The leaf's array ``(len(slots), *leaf.shape)``. Raises KeyError; Released after commit or abandon."""
        for leaf, array in zip(self.spec.leaves, self._rows()):
            if leaf.name == name:
                return array
        names = ", ".join(repr(leaf.name) for leaf in self.spec.leaves[:16])
        raise KeyError(f"no leaf {name!r}; there are {names}{', ...' if len(self.spec) > 16 else ''}")

    @property
    def tree(self) -> Any:
        """The arrays as the tree that the spec describes. Raises Released."""
        return self.spec.unflatten(self._rows())

    def commit(self, n: int | None = None, deadline: float | None = None) -> None:
        """Hands the first ``n`` rows over (None: all); the others are free to be reserved again.

        It waits only where the place was lost with its daemon: then the rows are copied into the next ones, and a
        Timeout's ``taken`` says how many of them. Raises Released, and as :meth:`FillProducer.reserve`.
        """
        reserved, until = self._take(), _io.deadline_of(deadline)
        if n is not None and not 1 <= n <= reserved.n:
            raise ValueError(f"commit({n}): {reserved.n} rows are reserved; abandon() commits none")
        self._reserved = None
        self._filler.commit(reserved, reserved.n if n is None else n, until)

    def abandon(self) -> None:
        """Drops the reservation; the rows will be reserved again. Does nothing after a commit."""
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            self._filler.abandon(reserved)

    def _take(self) -> Reserved:
        if self._reserved is None:
            raise Released("these rows were committed or abandoned before")
        return self._reserved

    def _rows(self) -> list[Array]:
        return self._take().rows

    def __enter__(self) -> Slots:
        self._take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
        elif self._reserved is not None:
            self.commit(deadline=self._deadline)

    def __repr__(self) -> str:
        return f"<Slots: {len(self)} rows>"


class FillProducer:
    """Writes samples of one stream into the shared memory in which trainers read them: no copy, no socket.

    ::

        with FillProducer("unix:///run/user/1000/ingestd.sock", "digits") as producer:
            with producer.reserve(32, deadline=5.0) as slots:  # at least 1, at most 32 rows
                for i in range(len(slots)):
                    slots["image"][i] = image
                    slots["label"][i] = 3
            producer.push({"image": image, "label": 3}, deadline=5.0)  # copies once

    The daemon lends whole batches. Rows are published when their batch is full, or when the daemon
    settles them because they have waited for long; :meth:`settle` asks for that. The daemon must trust this process (by
    default: it runs as the same user), for it maps the segment writable; where it does not, use :class:`Producer`.

    With a ``session`` the producer connects again when the daemon goes away, as :class:`Producer` does, and what was
    committed and is not in the ring is copied over from the old memory: each sample gets into the ring once. Rows
    that are reserved at that time are copied when they are committed; commit them within 30 s after the daemon is
    back, for a daemon that keeps its segments keeps their place for no longer.

    May be used by several threads, one call at a time, with one reservation at a time; not after a fork (Closed).

    Args:
        address: ``unix:///path`` (``shm:///path`` means the same).
        table: name of the table.
        spec: what the samples must look like; None takes the table's spec.
        session: as for :class:`Producer`.
        prefetch: most batches lent at once; None takes the daemon's default.
        reconnect, continue_after_loss, token, client, deadline: as for :class:`Producer`.

    Raises:
        Refused: with ``code`` (``not_permitted``: the daemon does not trust this process) and ``reason``.
        PeerClosed: nobody listens there. Timeout: the deadline passed. FormatError: the daemon is of another version.
    """

    def __init__(
        self,
        address: str,
        table: str,
        spec: Spec | str | None = None,
        *,
        session: str | None = None,
        prefetch: int | None = None,
        reconnect: float | None = PATIENCE_S,
        continue_after_loss: bool = False,
        token: Token | str | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self._filler: Filler | None = None
        self.address = _io.parse_address(address, token)
        if self.address.kind != "unix":
            raise ValueError(f"address {address!r}: memory is shared over a unix socket; write unix:///path")
        if reconnect is not None and not reconnect >= 0:
            raise ValueError(f"reconnect={reconnect!r}: give seconds, 0 or more, or None to try without limit")
        want = Spec.parse(spec) if isinstance(spec, str) else spec
        options: dict[str, Any] = {"session": session, "prefetch": prefetch or 0, "notes": True, "client": client}
        options["token"] = self.address.token
        dialer = Dialer(self.address, hello("fill", table, want, **options), want)
        until = _io.deadline_of(deadline)
        opened = dialer.open_patiently(until) if session else dialer.open(until)
        try:
            self._filler = filler = Filler(session or None, dialer, opened, reconnect, continue_after_loss)
        except BaseException:
            opened.close()
            raise
        if want is None:  # after a reconnect the table must still have this one
            dialer.body, dialer.spec = hello("fill", table, filler.spec, **options), filler.spec
        #: name of the table
        self.table = table
        #: the table's spec
        self.spec = filler.spec
        #: number of this stream: the ``stream`` of its samples
        self.stream = opened.stream
        #: samples of this session that the daemon had when this producer began; go on after them
        self.held = opened.held
        #: rows of a full batch
        self.batch_size = filler.batch_size
        #: most batches lent at once
        self.prefetch = filler.prefetch

    def reserve(self, n: int, deadline: float | None = None) -> Slots:
        """Rows to fill: at least 1, at most ``n``, and no more than the batch being filled has left.

        One reservation at a time. Raises Timeout, its kind Full where no place is free and the daemon said who keeps it
        so, EndOfStream when the table takes no more samples, ShuttingDown, Ended or PeerClosed; with a session also
        Lost and SessionTaken, and ShuttingDown and PeerClosed only when its patience is over.
        """
        filler = self._open()
        return Slots(filler, filler.reserve(n, _io.deadline_of(deadline)), self.spec, deadline)

    def push(self, sample: Any, deadline: float | None = None) -> None:
        """Copies one sample in: a tree like the spec's example. Raises SpecError, or as :meth:`reserve`."""
        self._open().push([a[None] for a in self.spec.flatten(sample)], 1, _io.deadline_of(deadline))

    def push_batch(self, batch: Any, deadline: float | None = None) -> int:
        """Copies n samples in: a tree of leaves ``(n, *leaf.shape)``. Returns n.

        Raises as :meth:`push`; a Timeout's ``taken`` says how many of them, the first ones, were taken.
        """
        n, leaves = self.spec.flatten_batch(batch)
        self._open().push(leaves, n, _io.deadline_of(deadline))
        return n

    def settle(self, deadline: float | None = None) -> None:
        """Asks the daemon not to wait for the rest of the batch being filled: its rows are copied to a shared one.

        For producers that pause. It does not wait until that is done. Raises as :meth:`reserve`.
        """
        self._open().settle(_io.deadline_of(deadline))

    def flush(self, deadline: float | None = None) -> None:
        """Returns when every committed sample is in the ring (trainers may not see it yet). Raises as `reserve`."""
        self._open().flush(_io.deadline_of(deadline))

    def close(self, deadline: float | None = None) -> None:
        """Flushes and detaches. Rows that are reserved are abandoned; what is committed is published.

        Raises as :meth:`reserve` if samples did not get into the ring; after a Timeout the producer remains open.
        """
        self._open().close(_io.deadline_of(deadline))

    def abort(self) -> None:
        """Detaches at once. The daemon still takes what was committed, if it lives."""
        self._open().abort()

    @property
    def pushed(self) -> int:
        """Samples committed by this producer."""
        return self._open().pushed

    @property
    def acked(self) -> int:
        """Samples of those that are in the ring, as far as is known; :meth:`flush` finds out."""
        return self._open().acked

    @property
    def unacked(self) -> int:
        """Samples that were committed and are not known to be in the ring."""
        return self.pushed - self.acked

    @property
    def lost(self) -> int:
        """Samples that were in the ring and are gone, where ``continue_after_loss`` has this producer go on."""
        return self._open().lost

    @property
    def reconnects(self) -> int:
        """Attachments that were made after the first one."""
        return self._open().reconnects

    @property
    def note(self) -> Note | None:
        """What the daemon says that this producer waits for."""
        return self._open().note

    def _open(self) -> Filler:
        if self._filler is None:
            raise Error("the producer was never attached")
        return self._filler

    def __enter__(self) -> FillProducer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        filler = getattr(self, "_filler", None)
        if filler is not None and not filler.stopped:
            with contextlib.suppress(Exception):
                warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):
                filler.abort()

    def __repr__(self) -> str:
        return f"<FillProducer {self.address} table={getattr(self, 'table', '?')!r}>"
