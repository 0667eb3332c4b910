"""Filling places of the segment, under :class:`FillProducer`: what is lent, what is complete, and reconnects.

The daemon lends whole places; their rows are filled in order and called complete through the giveback queue, and a
descriptor that the daemon has taken stands for samples that are in the ring. Rows that were called complete and not
taken stay where they are: after a reconnect they are copied from the old mapping into new places.

One thread per filler watches the socket, connects again, and copies those rows. Everything else happens in the calls.
Shared words are read and written as :mod:`ingestd.channel` says. Rows are plain numpy stores: the fence before the new
``produced`` orders them before it (on x86 stores are not reordered anyway).
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from . import _io
from ._io import Deadline
from .attach import attach
from .errors import (
    Closed,
    Ended,
    EndOfStream,
    Error,
    FormatError,
    Full,
    Lost,
    Note,
    PeerClosed,
    SessionTaken,
    Timeout,
)
from .incoming import Incoming
from .redial import Dialer, Opened, Redialer, retried
from .segment import LENT
from .spec import Array, Spec

__all__ = ["Attached", "Filler", "Reserved"]

_ROWS, _SETTLE, _RESUMED = 1, 2, 3  # verbs of the giveback queue
_T = TypeVar("_T")


class _Place:
    """A lent place: the first ``row`` rows were called complete, and ``settled`` of them are to be settled."""

    def __init__(self, lease: int, index: int) -> None:
        self.lease = lease
        self.index = index
        self.row = 0
        self.settled = 0


class _Run(NamedTuple):
    """Complete rows: samples ``first`` to ``end`` of this producer; descriptor number ``said`` calls them complete."""

    first: int
    end: int
    rows: list[Array]
    said: int

    def after(self, n: int) -> _Run:
        """Without the first ``n`` of them."""
        return self._replace(first=self.first + n, rows=[a[n:] for a in self.rows])


class Attached:
    """One attachment."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.sock = opened.sock
        self.segment, self._memory, self.channel = attach(opened.reply, opened.fds, writable=True)
        self.spec = self.segment.spec
        #: most places lent at once
        self.prefetch = opened.reply.integer("prefetch", 1, self.channel.capacity)
        self.wake = opened.fds[2]
        self.incoming = Incoming()
        self.places: deque[_Place] = deque()
        self.taken = 0  # descriptors that the daemon has taken, as last seen
        self.drained = False  # nothing more will be lent
        self._over = False  # the daemon has died, and what it still lent is not ours
        self._lease = 0
        self._columns: dict[int, list[Array]] = {}

    def accept(self) -> bool:
        """Takes the places that were lent; whether there were any. Raises FormatError.

        A place that is another's already was lent by a daemon that is dead: it is passed over, as all that follow, and
        the socket says the rest.
        """
        found = False
        while (lent := self.channel.take()) is not None:
            if self._over:
                continue
            self._lease += 1
            if lent.number != self._lease or lent.rows or lent.place >= self.segment.batches:
                raise FormatError(f"the daemon lent {lent}, want lease {self._lease} of a place of this segment")
            state = self.segment.state(lent.place)
            if state.phase != LENT or state.stream != self.opened.stream:
                if _io.hung_up(self.sock, _io.STALE_S):
                    self._over = True
                    continue
                raise FormatError(f"the daemon lent place {lent.place}, but the segment says {state}")
            self.places.append(_Place(lent.number, lent.place))
            found = True
        self.drained = self.channel.drained()
        return found

    def columns(self, index: int) -> list[Array]:
        """The leaves of a place, writable, ``(batch_size, *shape)`` each."""
        found = self._columns.get(index)
        if found is None:
            s, at = self.segment, self.segment.place(index)
            found = [
                np.ndarray((s.batch_size, *x.shape), x.numpy_dtype, buffer=self._memory, offset=at + c.offset)
                for x, c in zip(self.spec.leaves, s.columns)
            ]
            self._columns[index] = found
        return found

    def say_rows(self, first: int, n: int) -> _Run:
        """Calls the next ``n`` rows of the place being filled complete: samples ``first`` and so on."""
        place = self.places[0]
        rows = [a[place.row : place.row + n] for a in self.columns(place.index)]
        place.row += n
        if place.row == self.segment.batch_size:
            self.places.popleft()
        return _Run(first, first + n, rows, self.channel.say(place.lease, n, _ROWS))

    def close(self) -> None:
        """Ends the attachment, which promises that nothing is written to its places any more."""
        self.opened.close()


class Reserved(NamedTuple):
    """Rows of one place that a caller fills: ``rows`` are arrays ``(n, *shape)``."""

    attached: Attached
    n: int
    rows: list[Array]


class Filler:
    """Fills places over ``first`` and, where ``session`` names one, over the attachments after it.

    ``patience`` and ``go_on`` as for :class:`ingestd.session.Session`.
    """

    def __init__(self, session: str | None, dialer: Dialer, first: Opened, patience: float | None, go_on: bool) -> None:
        self.pushed = 0  # samples that were committed here
        self.acked = 0  # of those, in the ring
        self.lost = 0
        self.reconnects = 0
        self._session = session
        self._base = first.held
        self._go_on = go_on
        self._redialer = Redialer(dialer, patience)
        self._attached: Attached | None = Attached(first)
        self._incoming = self._attached.incoming
        self.spec: Spec = self._attached.spec
        self.batch_size = self._attached.segment.batch_size
        self.prefetch = self._attached.prefetch
        self._runs: deque[_Run] = deque()  # called complete at this attachment, not taken
        self._backlog: deque[_Run] = deque()  # complete, for the next attachment
        self._open: Reserved | None = None
        self._left: Attached | None = None  # an earlier attachment, to be closed when its reservation ends
        self._resume_due = False  # the daemon waits to hear that nothing of an earlier attachment is needed
        self._why = ""
        self._error: Error | None = None
        self._stop = False
        self._forks = _io.forks()
        self._state = threading.Lock()
        self._callers = threading.Lock()
        self._wake = _io.Bell()  # for the thread
        self._news = _io.Bell()  # for the caller that waits
        _io.close_in_child(self)
        self._thread = threading.Thread(target=self._run, name="ingestd-filler", daemon=True)
        self._thread.start()

    # -- calls of the producer ------------------------------------------------------------------------------------

    def reserve(self, n: int, deadline: Deadline) -> Reserved:
        """At least one row and at most ``n``, of one place."""
        if n < 1:
            raise ValueError(f"reserve({n}): want 1 or more rows")
        with self._caller(deadline):
            if self._open is not None:
                raise Error("rows are reserved already: commit or abandon them before the next")
            return self._await(lambda: self._reserve(n), deadline, "waiting for a place to fill")

    def _reserve(self, n: int) -> Reserved | None:
        a = self._attached
        if a is None:
            return None
        if not a.places:
            if a.drained and self._session is None:
                raise EndOfStream("the table takes no more samples")
            return None
        if a.channel.room() < 1:
            return None
        place = a.places[0]
        n = min(n, a.segment.batch_size - place.row)
        self._open = Reserved(a, n, [x[place.row : place.row + n] for x in a.columns(place.index)])
        return self._open

    def commit(self, slots: Reserved, n: int, deadline: Deadline) -> None:
        """Calls the first ``n`` of the rows complete. Waits only where the place was lost with its daemon."""
        with self._caller(deadline):
            with self._state:
                try:
                    self._check()
                    a = self._attached
                    rows = [x[:n] for x in slots.rows]
                    if a is slots.attached:
                        self._runs.append(a.say_rows(self.pushed, n))
                    elif a is None:  # the thread is on its way to the next attachment, and takes these with it
                        self._backlog.append(_Run(self.pushed, self.pushed + n, rows, 0))
                        self._wake.ring()
                    else:
                        rows = [x.copy() for x in rows]
                    if a is slots.attached or a is None:
                        self.pushed += n
                        return
                finally:
                    self._end_reservation()
            self._copy(rows, n, deadline)

    def abandon(self, slots: Reserved) -> None:
        """The rows will be reserved again."""
        with self._state:
            if slots is self._open:
                self._end_reservation()

    def push(self, rows: list[Array], n: int, deadline: Deadline) -> None:
        """Copies ``n`` samples in. Raises Timeout with ``taken``."""
        with self._caller(deadline):
            if self._open is not None:
                raise Error("rows are reserved: commit or abandon them before pushing")
            self._copy(rows, n, deadline)

    def _copy(self, rows: list[Array], n: int, deadline: Deadline) -> None:
        done = 0
        while done < n:
            try:
                slots = self._await(partial(self._reserve, n - done), deadline, "waiting for a place to fill")
            except Timeout as e:
                e.taken = done
                raise
            try:
                for into, array in zip(slots.rows, rows):
                    into[...] = array[done : done + slots.n]
                with self._state:
                    self._check()
                    a = self._attached
                    if a is slots.attached:
                        self._runs.append(a.say_rows(self.pushed, slots.n))
                        self.pushed += slots.n
                        done += slots.n
            finally:
                with self._state:  # where the place was lost meanwhile, the same rows go to the next one
                    self._end_reservation()

    def flush(self, deadline: Deadline) -> None:
        """Waits until everything committed is in the ring."""
        with self._caller(deadline):
            self._await(
                lambda: True if self.acked == self.pushed else None,
                deadline,
                "waiting for the daemon to take what was committed",
            )

    def settle(self, deadline: Deadline) -> None:
        """Asks the daemon not to wait for the rest of the place that is being filled."""
        with self._caller(deadline):
            if self._open is not None:
                raise Error("rows are reserved: commit or abandon them before settling")
            self._await(self._settle, deadline, "waiting for room in the queue to the daemon")

    def _settle(self) -> bool | None:
        a = self._attached
        if a is None:
            return None
        place = a.places[0] if a.places else None
        if place is None or place.row == place.settled:
            return True
        if a.channel.room() < 1:
            return None
        a.channel.say(place.lease, 0, _SETTLE)
        place.settled = place.row
        return True

    def close(self, deadline: Deadline) -> None:
        """Flushes and detaches. After a Timeout it may be called again."""
        if self._stop:
            return
        error = None
        try:
            self.flush(deadline)
        except Timeout:
            raise
        except Error as e:
            error = e if self.acked < self.pushed else None
        self.abort()
        if error is not None:
            raise error

    def abort(self) -> None:
        """Detaches at once. The daemon takes what was committed, if it lives."""
        if self._forks != _io.forks():
            return
        with self._state:
            if self._stop:
                return
            self._stop = True
            self._wake.ring()
            self._news.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)  # it may be within a try to connect, and cleans up behind itself

    @property
    def stopped(self) -> bool:
        return self._stop

    @property
    def note(self) -> Note | None:
        """What the daemon says that this producer waits for."""
        return self._incoming.note

    # -- under the lock -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._stop:
            raise Closed("the producer is closed")
        if self._error is not None:
            raise self._error

    def _end_reservation(self) -> None:
        self._open = None
        if self._left is not None:
            self._left.close()
            self._left = None
        self._say_resumed()

    def _say_resumed(self) -> None:
        a = self._attached
        if self._resume_due and self._open is None and a is not None and a.channel.room() > 0:
            a.channel.say(0, 0, _RESUMED)
            self._resume_due = False

    def _advance(self, a: Attached) -> None:
        """Takes what the daemon has lent and learns what it has taken. Raises FormatError."""
        progress = a.accept()
        taken = a.channel.taken()
        if taken != a.taken:
            a.taken, progress = taken, True
            while self._runs and self._runs[0].said <= taken:
                self.acked = self._runs.popleft().end
                self._redialer.acknowledged()
        if progress:
            a.incoming.note = None

    def _await(self, attempt: Callable[[], _T | None], deadline: Deadline, doing: str) -> _T:
        """Waits until ``attempt``, called under the lock, returns something."""
        while True:
            with self._state:
                self._check()
                a = self._attached
                if a is not None:
                    try:
                        self._advance(a)
                        self._say_resumed()
                    except FormatError as e:
                        self._fail(e)
                        raise
                found = attempt()
                if found is not None:
                    return found
                if a is not None and self._announce(a):
                    continue
                poll = select.poll()
                poll.register(self._news.fd, select.POLLIN)
                if a is not None:
                    poll.register(a.wake, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(deadline.milliseconds())}
            with self._state:
                if a is not None and a is self._attached:
                    a.channel.announce(False)
                    if a.wake in ready:
                        _io.drain(a.wake)
                if self._news.fd in ready:
                    self._news.clear()
                if not ready:
                    raise self._timeout(deadline, doing)

    @staticmethod
    def _announce(a: Attached) -> bool:
        """Says that this side is about to sleep; True when it need not, because something has come."""
        a.channel.announce(True)
        if a.channel.taken() != a.taken or (a.channel.delivered() and not a.drained):
            a.channel.announce(False)
            return True
        return False

    def _timeout(self, deadline: Deadline, doing: str) -> Timeout:
        if self._attached is None:
            doing = f"{doing}; there is no connection: {self._why}" if self._why else f"{doing}: it is being resumed"
        error = deadline.timeout(doing)
        return error if self.note is None else Full(str(error), self.note)

    def _fail(self, error: Error) -> None:
        if self._error is None:
            n = self.pushed - self.acked
            rest = f"; {n} samples were not acknowledged" if n else ""
            if isinstance(error, Ended):
                error = type(error)(error.code, error.reason, rest)
            elif isinstance(error, PeerClosed):
                error = PeerClosed(f"{error}{rest}")
            self._error = error
        self._news.ring()
        self._wake.ring()

    @contextlib.contextmanager
    def _caller(self, deadline: Deadline) -> Iterator[None]:
        if self._forks != _io.forks():
            raise Closed("this producer belongs to the parent process; make a new one after the fork")
        left = deadline.left()
        if not self._callers.acquire(timeout=-1 if left is None else left):
            raise deadline.timeout("waiting for another thread that uses this producer")
        try:
            yield
        finally:
            self._callers.release()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        a = self._attached
        try:
            while a is not None and self._watch(a):
                a = self._reconnect()
        except BaseException as e:
            with self._state:
                self._fail(Error(f"the thread of this producer failed: {e!r}"))
            raise
        finally:
            while not self._stop:  # the producer may still have rows reserved
                _io.wait(self._wake.fd, select.POLLIN, Deadline(None))
                self._wake.clear()
            with self._state:
                for attached in (self._attached, self._left):
                    if attached is not None:
                        attached.close()
                self._attached = self._left = None

    def _watch(self, a: Attached) -> bool:
        """Reads the socket until it ends; whether to connect again."""
        poll = select.poll()
        poll.register(a.sock, select.POLLIN)
        poll.register(self._wake.fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            with self._state:
                if self._stop or self._error is not None:
                    return False
                if self._wake.fd in ready:
                    self._wake.clear()
                error = self._listen(a) if a.sock.fileno() in ready else None
                if error is not None:
                    return self._drop(a, error)

    def _listen(self, a: Attached) -> Error | None:
        """Reads what the daemon wrote to the socket; why the attachment is over, if it is."""
        try:
            data = a.sock.recv(1 << 16)
            self._advance(a)  # what the daemon did before it wrote a note does not end the note
            if not data:
                return PeerClosed("the daemon closed the attachment without a reason; its log has more")
            a.incoming.feed(data)
            while a.incoming.refused:
                self._refused(a.incoming.refused.pop())
            if a.incoming.acks:
                return FormatError("the daemon acknowledged samples on the socket of an attachment")
        except BlockingIOError:
            return None
        except Error as e:
            return e
        except OSError as e:
            return PeerClosed(f"the attachment broke: {e.strerror or e}")
        return None

    def _refused(self, note: Note) -> None:
        """The daemon does not use a step."""

    def _drop(self, a: Attached, error: Error) -> bool:
        """The attachment is over; whether to connect again. What is not in the ring waits for the next one."""
        with contextlib.suppress(FormatError):
            self._advance(a)
        self._attached = None
        self._resume_due = False
        self._why = str(error)
        self._backlog.extendleft(reversed(self._runs))
        self._runs.clear()
        if self._open is not None and self._open.attached is a:
            self._left = a  # somebody writes to its place
        else:
            a.close()
        if self._session is None or not retried(error) or self._redialer.patience == 0:
            self._fail(error)
        self._incoming = Incoming()
        self._news.ring()
        return self._error is None

    def _reconnect(self) -> Attached | None:
        """The next attachment, with everything from before in it; None when there shall be none."""
        while True:
            try:
                opened = self._redialer.again(self._pause, lambda: bool(self._backlog), self._failed)
                if opened is None:
                    return None
                try:
                    a = Attached(opened)
                except BaseException:
                    opened.close()
                    raise
            except Error as e:
                with self._state:
                    self._fail(e)
                return None
            with self._state:
                if not self._go_on_from(opened):
                    a.close()
                    return None
                self._incoming = a.incoming
            if self._resume(a):
                return a
            with self._state:
                if self._stop or self._error is not None:
                    return None

    def _failed(self, error: Error) -> None:
        with self._state:
            self._why = str(error)

    def _pause(self, seconds: float | None) -> bool:
        deadline = Deadline(seconds)
        while not self._stop and self._error is None:
            if (seconds is None and self._backlog) or deadline.passed():
                return True
            if _io.wait(self._wake.fd, select.POLLIN, deadline):
                self._wake.clear()
        return False

    def _go_on_from(self, opened: Opened) -> bool:
        """Drops from the backlog what the daemon holds; False when the session cannot be gone on with."""
        held = opened.held + self.lost - self._base  # in numbers of this producer
        name = self._session or ""
        if held > self.pushed:
            reason = (
                f"the daemon holds {opened.held} samples of session {name!r}, this producer committed {self.pushed} "
                f"after the first {self._base}: another producer has gone on with it"
            )
            self._fail(SessionTaken("session_taken", reason))
            return False
        if held < self.acked:
            if not self._go_on:
                self._fail(Lost(name, opened.held, opened.held + self.acked - held))
                return False
            self.lost += self.acked - held
            held = self.acked
        self.acked = held
        while self._backlog and self._backlog[0].end <= held:
            self._backlog.popleft()
        if self._backlog and self._backlog[0].first < held:
            self._backlog[0] = self._backlog[0].after(held - self._backlog[0].first)
        return True

    def _resume(self, a: Attached) -> bool:
        """Copies the backlog into places of ``a`` and puts it in force; False when it ended before."""
        poll = select.poll()
        for fd in (a.sock.fileno(), a.wake, self._wake.fd):
            poll.register(fd, select.POLLIN)
        while True:
            with self._state:
                error: Error | None = None
                try:
                    self._advance(a)
                except FormatError as e:
                    error = e
                if self._stop or self._error is not None:
                    a.close()
                    return False
                if error is None and not self._backlog:
                    self._attached = a
                    self._why = ""
                    self.reconnects += 1
                    self._resume_due = True
                    self._say_resumed()
                    self._news.ring()
                    return True
                run = self._backlog[0] if error is None and a.places and a.channel.room() > 0 else None
                sleeping = run is None and error is None and not self._announce(a)
            if run is not None:
                self._move(a, run)
                continue
            if error is None:
                if not sleeping:
                    continue
                ready = {fd for fd, _ in poll.poll()}
                a.channel.announce(False)
                if a.wake in ready:
                    _io.drain(a.wake)
                if self._wake.fd in ready:
                    self._wake.clear()
            with self._state:
                if error is None and a.sock.fileno() in ready:
                    error = self._listen(a)
                if error is not None:
                    self._drop(a, error)
                    return False

    def _move(self, a: Attached, run: _Run) -> None:
        """Copies rows of the backlog's first run into the place being filled, and calls them complete."""
        place = a.places[0]
        n = min(run.end - run.first, a.segment.batch_size - place.row)
        for into, rows in zip(a.columns(place.index), run.rows):
            into[place.row : place.row + n] = rows[:n]
        with self._state:
            self._runs.append(a.say_rows(run.first, n))
            if n == run.end - run.first:
                self._backlog.popleft()
            else:
                self._backlog[0] = run.after(n)

    def _forked(self) -> None:
        """In the child of a fork: the parent's attachment must not stay open because of the child."""
        for attached in (self._attached, self._left):
            if attached is not None:
                attached.close()
        self._stop = True
