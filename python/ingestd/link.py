"""The connection under a producer: what was pushed, what is on the way, what was acknowledged.

Samples that are small wait together (Nagle's rule, applied to samples): they go out at once when nothing is
unacknowledged, else when 256 KiB have come together or the last acknowledgement arrives. One thread per connection
reads acknowledgements and sends what waits; the callers send everything else themselves.

All socket calls are made under one lock and never block; waiting happens outside of it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

from . import _io
from ._io import Deadline
from .errors import Closed, Ended, Error, FormatError, Full, Note, PeerClosed, Timeout
from .incoming import Incoming, ended

__all__ = ["COALESCE_BYTES", "Link", "Sending"]

#: Small samples that come together before they are sent without waiting for acknowledgements.
COALESCE_BYTES = 256 << 10

BUFFERS_MAX = 256  # of one sendmsg; the system allows 1,024
RECEIVE_BYTES = 1 << 16


_live: weakref.WeakSet[Sending] = weakref.WeakSet()


@atexit.register
def _abort_all() -> None:
    """Ends what was never closed while its thread can still be joined: later, the interpreter would wait for ever."""
    for link in list(_live):
        if not link.stopped:
            link.abort()


class Sending:
    """What a connection that ends with its error (:class:`Link`) and one that is made again have in common."""

    def __init__(self, sample_bytes: int, window_samples: int, window_bytes: int) -> None:
        self.sample_bytes = sample_bytes
        self.window = window_of(sample_bytes, window_samples, window_bytes)  # in samples
        self.pushed = 0  # samples taken from the caller
        self.acked = 0
        self._incoming = Incoming()
        self._state = threading.Condition(threading.Lock())
        self._callers = threading.Lock()  # one caller pushes at a time
        self._waiting: list[bytes] = []  # small samples that wait for others
        self._waiting_bytes = 0
        self._stop = False
        self._error: Error | None = None
        self._forks = _io.forks()
        self._wake = _io.Bell()  # for the thread
        _io.close_in_child(self)
        _live.add(self)

    @property
    def stopped(self) -> bool:
        return self._stop

    @property
    def note(self) -> Note | None:
        """What the daemon says that this connection waits for."""
        return self._incoming.note

    def timeout(self, deadline: Deadline, doing: str, taken: int = 0) -> Timeout:
        """The error of a call whose deadline has passed: Full while the daemon says that the ring is full."""
        note = self.note
        error = deadline.timeout(doing, taken)
        return error if note is None else Full(str(error), note, taken)

    def abort(self) -> None:
        raise NotImplementedError

    def _sleep(self, deadline: Deadline, doing: str) -> None:
        left = deadline.left()
        if left == 0 or not self._state.wait(left):
            raise self.timeout(deadline, doing)

    def _unacked(self) -> str:
        n = self.pushed - self.acked
        return f"; {n} samples were not acknowledged" if n else ""

    def _enter(self, deadline: Deadline) -> None:
        """Makes this thread the one that pushes, until it releases _callers."""
        if self._forks != _io.forks():
            raise Closed("this producer belongs to the parent process; make a new one after the fork")
        if not self._callers.acquire(False):
            left = deadline.left()
            if not self._callers.acquire(timeout=-1 if left is None else left):
                raise deadline.timeout("waiting for another thread that pushes")

    @contextlib.contextmanager
    def _caller(self, deadline: Deadline) -> Iterator[None]:
        self._enter(deadline)
        try:
            yield
        finally:
            self._callers.release()


def window_of(sample_bytes: int, window_samples: int, window_bytes: int) -> int:
    """Most samples without an acknowledgement: the tighter of both windows, at least one."""
    return max(1, min(window_samples, window_bytes // sample_bytes))


class Link(Sending):
    """Sends samples of ``sample_bytes`` bytes and keeps within the window. Takes the socket over."""

    def __init__(self, sock: _io.Conn, sample_bytes: int, window_samples: int, window_bytes: int) -> None:
        super().__init__(sample_bytes, window_samples, window_bytes)
        self._sock = sock
        self._tls = None if isinstance(sock, socket.socket) else sock
        self._out: deque[memoryview] = deque()  # on the way into the socket, in order
        self._queued = 0  # bytes ever put into _out
        self._sent = 0  # bytes ever taken by the kernel
        self._sending = False  # a caller drives _out
        self._torn = False  # a send was interrupted between the kernel and our count
        self._shut = False  # our writing side is closed
        self._finished = False  # the daemon closed after the last acknowledgement
        self._thread = threading.Thread(target=self._run, name="ingestd-acks", daemon=True)
        self._thread.start()

    # -- calls of the producer ------------------------------------------------------------------------------------

    def push_small(self, data: bytes, deadline: Deadline) -> None:
        """One sample that may wait for others. Raises Timeout with nothing taken."""
        self._enter(deadline)
        try:
            self._push_small(data, deadline)
        finally:
            self._callers.release()

    def _push_small(self, data: bytes, deadline: Deadline) -> None:
        with self._state:
            self._make_room(1, deadline)
            while self._queued - self._sent >= COALESCE_BYTES:
                self._check()
                self._wake.ring()
                self._sleep(deadline, "waiting for the daemon to read")
            idle = self.pushed - len(self._waiting) == self.acked
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            self.pushed += 1
            if idle or self._waiting_bytes >= COALESCE_BYTES:
                self._send_waiting()

    def push_views(self, views: Sequence[memoryview], samples: int, deadline: Deadline) -> int:
        """``samples`` whole samples (at most :attr:`window`) from the caller's memory; how many were taken.

        All are taken unless the deadline passes first. A sample of which the first byte has gone is taken: the rest of
        it is copied then and follows in the background. So nothing is ever torn.
        """
        total = samples * self.sample_bytes
        with self._caller(deadline):
            with self._state:
                self._make_room(samples, deadline)
                self._release_waiting()
                start = self._queued
                self._out.extend(views)
                self._queued += total
                self.pushed += samples
                self._sending = True
            try:
                return samples if self._drive(start + total, deadline) else self._take_back(start, samples)
            except BaseException:
                self._take_back(start, samples)
                raise
            finally:
                with self._state:
                    self._sending = False
                    if self._out or self._unsent():
                        self._wake.ring()

    def flush(self, deadline: Deadline) -> None:
        """Sends what waits, and waits until everything is acknowledged."""
        with self._caller(deadline), self._state:
            self._send_waiting()
            while self.acked < self.pushed:
                self._check()
                self._sleep(deadline, f"waiting for {self.pushed - self.acked} acknowledgements")
            self._check()

    def close(self, deadline: Deadline) -> None:
        """Ends the stream: sends what waits, closes the writing side, waits for the last acknowledgements."""
        with self._caller(deadline), self._state:
            if self._stop:
                return
            if not self._finished and self._error is None:
                self._send_waiting()
            while not self._finished and self._error is None and not self._stop:
                if not self._out and not self._shut:
                    self._shut = True
                    with contextlib.suppress(OSError):
                        self._sock.shutdown(socket.SHUT_WR)
                    if self._tls is not None:
                        self._wake.ring()  # its goodbye may wait for room, and acknowledgements may be here already
                self._sleep(deadline, f"closing, with {self.pushed - self.acked} samples not acknowledged")
        error = None if self.acked == self.pushed else self._error
        self.abort()
        if error is not None:
            raise error

    def abort(self) -> None:
        """Drops the connection at once. What was not acknowledged may be lost."""
        if self._forks != _io.forks():
            return
        with self._state:
            if self._stop:
                return
            self._stop = True
            self._wake.ring()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes a caller that waits to send
            self._state.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        busy = not self._callers.acquire(timeout=1)  # another thread leaves its call; a signal handler's own cannot
        self._sock.close()
        self._wake.close()
        if not busy:
            self._callers.release()

    # -- under the lock -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._stop or self._shut:
            raise Closed("the producer is closed")
        if self._torn:
            self._fail(PeerClosed("a send was interrupted half-way; connect again"))
        if self._error is not None:
            raise self._error
        if self._finished:
            raise PeerClosed("the daemon closed the connection")

    def _make_room(self, samples: int, deadline: Deadline) -> None:
        """Waits until ``samples`` more fit into the window."""
        self._check()
        if self.pushed - self.acked + samples <= self.window:
            return
        self._read()
        while self.pushed - self.acked + samples > self.window:
            self._check()
            self._send_waiting()
            self._sleep(deadline, f"waiting for acknowledgements: {self.pushed - self.acked} samples fill the window")
        self._check()

    def _send_waiting(self) -> None:
        self._release_waiting()
        self._pump()
        if self._out or self._unsent():
            self._wake.ring()

    def _release_waiting(self) -> None:
        if self._waiting:
            data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._out.append(memoryview(data))
            self._queued += len(data)

    def _pump(self) -> None:
        """Gives the kernel what it takes without waiting."""
        out = self._out
        while (out or self._unsent()) and self._error is None:
            try:
                self._torn = True
                n = self._sock.sendmsg(list(itertools.islice(out, BUFFERS_MAX)))
                self._sent += n
                while n:
                    first = out.popleft()
                    if n < len(first):
                        out.appendleft(first[n:])
                        n = 0
                    else:
                        n -= len(first)
                self._torn = False
            except BlockingIOError:
                self._torn = False
                return
            except OSError as e:
                self._torn = False
                self._read()  # the reason may have come before the reset
                self._fail(PeerClosed(f"the connection broke: {e.strerror or e}{self._unacked()}"))

    def _unsent(self) -> bool:
        """Whether bytes that were taken are still here: see :func:`ingestd._io.unsent`."""
        return self._tls is not None and self._tls.unsent > 0

    def _read(self) -> None:
        """Reads the acknowledgements that are there."""
        while self._error is None and not self._finished:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                self._fail(PeerClosed(f"the connection broke: {e.strerror or e}{self._unacked()}"))
                return
            if not data:
                self._at_end()
                return
            error: Error | None = None
            try:
                self._incoming.feed(data)
            except (Ended, FormatError) as e:
                error = e
            self.acked = self._incoming.acks
            if self.acked > self.pushed - len(self._waiting):
                error = FormatError("the daemon acknowledged more samples than were sent")
            if error is not None:
                self._fail(ended(error.code, error.reason, self._unacked()) if isinstance(error, Ended) else error)
            if len(data) < RECEIVE_BYTES:
                return

    def _at_end(self) -> None:
        if self._shut and self.acked == self.pushed:
            self._finished = True
        else:
            self._fail(
                PeerClosed(f"the daemon closed the connection without a reason{self._unacked()}; its log has more")
            )

    def _fail(self, error: Error) -> None:
        if self._error is None:
            self._error = error
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes a caller that waits to send
            self._state.notify_all()

    # -- sending from the caller's memory -------------------------------------------------------------------------

    def _drive(self, end: int, deadline: Deadline) -> bool:
        """Sends until ``end`` bytes have gone in all; False when the deadline passed first."""
        while True:
            with self._state:
                self._pump()
                if self._sent >= end:
                    return True
                self._check()
            if not _io.wait(self._sock.fileno(), select.POLLOUT, deadline):
                return False

    def _take_back(self, start: int, samples: int) -> int:
        """Keeps what has begun to go, as a copy, and forgets the rest; how many samples remain taken."""
        with self._state:
            taken = min(samples, -(-max(0, self._sent - start) // self.sample_bytes))
            end = start + taken * self.sample_bytes
            keep, kept = end - self._sent, bytearray()
            for view in self._out:
                kept += view[: max(0, keep - len(kept))]
            self._out.clear()
            if kept:
                self._out.append(memoryview(bytes(kept)))
            self._queued = end
            self.pushed -= samples - taken
            return taken

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Reads acknowledgements, sends what waits once nothing is unacknowledged, and what callers left behind."""
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        events = -1
        with self._state:
            self._read()  # with TLS it may have come already, where poll(2) does not see it
        while True:
            with self._state:
                if self._stop or self._error is not None or self._finished:
                    self._state.notify_all()
                    return
                want = select.POLLIN
                if (self._out or self._unsent()) and not self._sending:
                    want |= select.POLLOUT
            if want != events:
                poll.register(self._sock, want)
                events = want
            ready = dict(poll.poll())
            with self._state:
                if self._wake.fd in ready:
                    self._wake.clear()
                self._read()
                if not self._sending:
                    if self._waiting and self.pushed - len(self._waiting) == self.acked:
                        self._release_waiting()
                    self._pump()
                self._state.notify_all()

    def _forked(self) -> None:
        """In the child of a fork: the parent's connection must not stay open because of the child."""
        self._sock.close()
        self._wake.close()
        self._stop = True
