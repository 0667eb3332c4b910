"""The samples of a session under a producer: kept until they are acknowledged, and sent again after a reconnect.

The samples of a session are numbered from 0, and the daemon says with each connection how many of them it holds. What
lies below is dropped here, the rest is sent again, so each gets into the ring once. Kept is only what is not
acknowledged: at most the window in force (one sample where that is larger), and up to 512 KiB more, because samples
that were pushed together are freed together.

One thread per session connects, reads acknowledgements and sends what waits. Callers copy their samples here, and send
what the socket takes at once. All socket calls on a connection are made under one lock and never block.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import _io
from ._io import Deadline
from .errors import Closed, Ended, Error, FormatError, Lost, Note, PeerClosed, SessionTaken
from .incoming import Incoming
from .link import BUFFERS_MAX, COALESCE_BYTES, RECEIVE_BYTES, Sending, window_of
from .redial import TRY_S, Dialer, Opened, Redialer, retried

if TYPE_CHECKING:
    from .tls_socket import TLSSocket

__all__ = ["Pieces", "Queued", "Session"]


class Pieces:
    """Bytes that lie in one or more pieces of memory."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: list[memoryview], size: int) -> None:
        self.parts = parts
        self.size = size

    def cut(self, start: int, end: int) -> list[memoryview]:
        """Bytes ``start`` to ``end`` (exclusive; cut to those there are), as pieces."""
        if len(self.parts) == 1:
            return [self.parts[0][start:end]]
        found = []
        for part in self.parts:
            n = len(part)
            if start < n and end > 0:
                found.append(part if start <= 0 and end >= n else part[max(start, 0) : end])
            start, end = start - n, end - n
            if end <= 0:
                break
        return found


class Queued(NamedTuple):
    """Whole samples that are kept: numbers ``first`` to ``end`` (exclusive) of this producer."""

    first: int
    end: int
    data: Pieces


def _whole(first: int, end: int, data: bytes) -> Queued:
    return Queued(first, end, Pieces([memoryview(data)], len(data)))


class Session(Sending):
    """Sends the samples of session ``name``; takes the first connection over and makes others with ``dialer``.

    ``patience``: seconds without a connection after which it gives up; None is without limit, 0 does not connect again.
    """

    def __init__(
        self, name: str, dialer: Dialer, first: Opened, sample_bytes: int, patience: float | None, go_on: bool
    ) -> None:
        super().__init__(sample_bytes, *_windows(first))
        self.name = name
        #: samples that were acknowledged and are gone, where the producer goes on without them
        self.lost = 0
        #: connections made after the first one
        self.reconnects = 0
        self._redialer = Redialer(dialer, patience)
        self._base = first.held  # number in the session of sample 0 of this producer
        self._go_on = go_on
        self._sock: _io.Conn | None = None
        self._tls: TLSSocket | None = None  # the same, where it is one
        self._sent: deque[Queued] = deque()  # gone, not acknowledged
        self._out: deque[Queued] = deque()  # on the way into the socket
        self._offset = 0  # bytes of _out[0] that have gone
        self._start = 0  # number of the first sample of this connection
        self._gone = 0  # bytes of this connection that have gone
        self._pumping = False
        self._closing = False
        self._finished = False
        self._why = ""  # why there is no connection
        self._thread = threading.Thread(target=self._run, name="ingestd-session", daemon=True)
        with self._state:
            self._install(first)
        self._thread.start()

    # -- calls of the producer ------------------------------------------------------------------------------------

    def push_small(self, data: bytes, deadline: Deadline) -> None:
        """One sample that may wait for others. Raises Timeout with nothing taken."""
        with self._caller(deadline), self._state:
            self._make_room(1, deadline)
            idle = self.pushed - len(self._waiting) == self.acked
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            self.pushed += 1
            if idle or self._waiting_bytes >= COALESCE_BYTES:
                self._send_waiting()

    def push_views(self, views: Sequence[memoryview], samples: int, deadline: Deadline) -> int:
        """``samples`` whole samples (at most the window), which are copied. All are taken, or Timeout is raised."""
        with self._caller(deadline):
            with self._state:
                self._make_room(samples, deadline)
            data = b"".join(views)
            with self._state:
                self._check()
                self._release_waiting()
                self._out.append(_whole(self.pushed, self.pushed + samples, data))
                self.pushed += samples
                self._send_waiting()
        return samples

    def flush(self, deadline: Deadline) -> None:
        """Sends what waits, and waits until everything is acknowledged, over as many connections as that takes."""
        with self._caller(deadline), self._state:
            self._check()
            self._flush(deadline)

    def close(self, deadline: Deadline) -> None:
        """Flushes, then ends the connection well. After a Timeout it may be called again."""
        with self._caller(deadline), self._state:
            if self._stop:
                return
            self._closing = True
            if self._error is None:
                self._flush(deadline)
            while not self._finished and self._error is None and not self._stop:
                self._wake.ring()
                self._sleep(deadline, "closing: everything is acknowledged, but the daemon has not closed its side")
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
            self._state.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(TRY_S)  # it may be within a try to connect, and cleans up behind itself

    # -- under the lock -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._stop or self._closing:
            raise Closed("the producer is closed")
        if self._error is not None:
            raise self._error

    def _flush(self, deadline: Deadline) -> None:
        self._send_waiting()
        while self.acked < self.pushed:
            if self._stop:
                raise Closed("the producer is closed")
            if self._error is not None:
                raise self._error
            self._sleep(deadline, self._doing(f"waiting for {self.pushed - self.acked} acknowledgements"))
        if self._error is not None:
            raise self._error

    def _make_room(self, samples: int, deadline: Deadline) -> None:
        """Waits until ``samples`` more fit into the window, or nothing is under way."""
        self._check()
        while self.pushed - self.acked + samples > self.window and self.pushed > self.acked:
            self._send_waiting()
            n = self.pushed - self.acked
            self._sleep(deadline, self._doing(f"waiting for acknowledgements: {n} samples fill the window"))
            self._check()

    def _doing(self, what: str) -> str:
        return f"{what}; there is no connection: {self._why}" if self._sock is None else what

    def _release_waiting(self) -> None:
        n = len(self._waiting)
        if n:
            data = self._waiting[0] if n == 1 else b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._out.append(_whole(self.pushed - n, self.pushed, data))

    def _send_waiting(self) -> None:
        self._release_waiting()
        self._pump()
        if self._out or self._sock is None or self._unsent():
            self._wake.ring()

    def _pump(self) -> None:
        """Gives the kernel what it takes without waiting, within the window of this connection."""
        while (self._out or self._unsent()) and self._sock is not None:
            if self._pumping:  # an interrupt came between the kernel's taking the bytes and our counting them
                self._drop(PeerClosed("a send was interrupted half-way"))
                return
            room = (self.acked + self.window - self._start) * self.sample_bytes - self._gone
            buffers: list[memoryview] = []
            offset = self._offset
            for chunk in self._out:
                if room <= 0 or len(buffers) >= BUFFERS_MAX:
                    break
                buffers += chunk.data.cut(offset, offset + room)
                room -= chunk.data.size - offset
                offset = 0
            if not buffers and not self._unsent():
                return
            try:
                self._pumping = True
                n = self._sock.sendmsg(buffers[:BUFFERS_MAX])
                self._gone += n
                self._offset += n
                while self._out and self._offset >= self._out[0].data.size:
                    self._offset -= self._out[0].data.size
                    self._sent.append(self._out[0])  # an interrupt here leaves it in both; _install takes it once
                    self._out.popleft()
                self._pumping = False
            except BlockingIOError:
                self._pumping = False
                return
            except OSError as e:
                self._pumping = False
                self._read()  # the reason may have come before the reset
                self._drop(PeerClosed(f"the connection broke: {e.strerror or e}"))

    def _unsent(self) -> bool:
        """Whether bytes that were taken are still here: see :func:`ingestd._io.unsent`."""
        return self._tls is not None and self._tls.unsent > 0

    def _read(self) -> None:
        """Reads the acknowledgements that are there."""
        while self._sock is not None:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                self._drop(PeerClosed(f"the connection broke: {e.strerror or e}"))
                return
            if not data:
                self._drop(PeerClosed("the daemon closed the connection without a reason"))
                return
            error: Error | None = None
            try:
                self._incoming.feed(data)
            except (Ended, FormatError) as e:
                error = e
            while self._incoming.refused:
                self._refused(self._incoming.refused.pop())
            if self._incoming.acks > self._gone // self.sample_bytes:
                self._drop(FormatError("the daemon acknowledged more samples than were sent"))
                return
            self._acknowledge(self._start + self._incoming.acks)
            if error is not None:
                self._drop(error)

    def _acknowledge(self, acked: int) -> None:
        if acked > self.acked:
            self._redialer.acknowledged()
        self.acked = acked
        while self._sent and self._sent[0].end <= acked:
            self._sent.popleft()

    def _drop(self, error: Error) -> None:
        """The connection is over; ``error`` says why. What is not acknowledged waits for the next one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = self._tls = None
        self._pumping = False
        self._why = str(error)
        if self._closing and self.acked == self.pushed:
            self._finished = True
        elif not retried(error) or self._redialer.patience == 0:
            self._fail(error)
        self._wake.ring()
        self._state.notify_all()

    def _fail(self, error: Error) -> None:
        if self._error is None:
            if isinstance(error, Ended):
                error = type(error)(error.code, error.reason, self._unacked())
            elif isinstance(error, PeerClosed):
                error = PeerClosed(f"{error}{self._unacked()}")
            self._error = error
        self._state.notify_all()

    def _install(self, opened: Opened) -> None:
        """Takes a connection: drops what the daemon holds, and queues the rest to be sent again."""
        self._release_waiting()
        held = opened.held + self.lost - self._base  # in numbers of this producer
        if held > self.pushed:
            opened.close()
            self._fail(
                SessionTaken(
                    "session_taken",
                    f"the daemon holds {opened.held} samples of session {self.name!r}, this producer pushed "
                    f"{self.pushed} after the first {self._base}: another producer has gone on with it",
                )
            )
            return
        if held < self.acked:
            if not self._go_on:
                opened.close()
                self._fail(Lost(self.name, opened.held, opened.held + self.acked - held))
                return
            self.lost += self.acked - held
            held = self.acked
        again = [*self._sent, *self._out]
        self._sent.clear()
        self._out.clear()
        self.acked = held
        at = held
        for chunk in again:
            if chunk.end > at:
                self._out.append(Queued(at, chunk.end, self._after(chunk.data, at - chunk.first)))
                at = chunk.end
        self.window = window_of(self.sample_bytes, *_windows(opened))
        self._start, self._gone, self._offset = held, 0, 0
        self._incoming = Incoming()
        self._sock = opened.sock
        self._tls = None if isinstance(opened.sock, socket.socket) else opened.sock
        self._why = ""
        self._pump()
        self._state.notify_all()

    def _after(self, data: Pieces, samples: int) -> Pieces:
        """Without the first ``samples``."""
        skip = samples * self.sample_bytes
        return Pieces(data.cut(skip, data.size), data.size - skip) if skip else data

    def _refused(self, note: Note) -> None:
        """The daemon does not use a step."""

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._serve() and self._reconnect():
                pass
        finally:
            with self._state:
                self._stop = True
                if self._sock is not None:
                    self._sock.close()
                    self._sock = self._tls = None
                self._wake.close()
                self._state.notify_all()

    def _serve(self) -> bool:
        """Serves one connection until it is over; whether there shall be another."""
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        watched: tuple[int, int] | None = None
        shut = False
        with self._state:
            self._read()  # with TLS it may have come already, where poll(2) does not see it
        while True:
            with self._state:
                if self._stop or self._finished:
                    return False
                if self._error is not None:
                    self._await_stop()
                    return False
                sock = self._sock
                if sock is None:
                    return True
                if self._closing and self.acked == self.pushed and not shut:
                    shut = True
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
                full = self._gone >= (self.acked + self.window - self._start) * self.sample_bytes
                due = (self._out and not full) or self._unsent()
                want = sock.fileno(), select.POLLIN | (select.POLLOUT if due else 0)
            if want != watched:
                poll.register(*want)
                watched = want
            ready = dict(poll.poll())
            with self._state:
                if self._wake.fd in ready:
                    self._wake.clear()
                self._read()
                if self._waiting and self.pushed - len(self._waiting) == self.acked:
                    self._release_waiting()
                self._pump()
                self._state.notify_all()

    def _await_stop(self) -> None:
        """Keeps the pipe for callers until the producer is closed."""
        while not self._stop:
            self._state.wait()

    def _reconnect(self) -> bool:
        """Connects again; False when the session is stopped or has nothing left to do."""
        try:
            opened = self._redialer.again(self._pause, lambda: self.acked < self.pushed, self._failed)
        except Error as e:
            with self._state:
                self._fail(e)
            return True
        if opened is None:
            return False
        with self._state:
            if self._stop:
                opened.close()
                return False
            self._install(opened)
            if self._error is None:
                self.reconnects += 1
        return True

    def _failed(self, error: Error) -> None:
        with self._state:
            self._why = str(error)

    def _pause(self, seconds: float | None) -> bool:
        """Waits, without a limit until samples want to be sent; False when the session was stopped, or is done."""
        deadline = Deadline(seconds)
        while True:
            with self._state:
                if self._closing and self.acked == self.pushed:
                    self._finished = True
                if self._stop or self._finished:
                    self._state.notify_all()
                    return False
                if seconds is None and self.acked < self.pushed:
                    return True
            if deadline.passed():
                return True
            if _io.wait(self._wake.fd, select.POLLIN, deadline):
                self._wake.clear()

    def _forked(self) -> None:
        """In the child of a fork: the parent's connection must not stay open because of the child."""
        if self._sock is not None:
            self._sock.close()
        self._wake.close()
        self._stop = True


def _windows(opened: Opened) -> tuple[int, int]:
    return opened.reply.integer("window_samples", least=1), opened.reply.integer("window_bytes", least=1)
