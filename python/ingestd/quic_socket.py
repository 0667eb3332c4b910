"""QUIC under the protocol (``quic://``): :class:`QuicSocket`.

Each is one connection of QUIC with one stream, and one thread that lives between two sockets: a UDP socket, and one end
of a socket pair, of which the other end is what the rest of the package writes to, reads from and polls. So the system
keeps what is on the way, and tells how much room there is. The thread outlives :meth:`QuicSocket.close` for a moment,
as the system's side of a TCP connection does: until the daemon has everything and has ended its side, at most 2 s.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from . import _io
from ._io import Deadline
from .errors import PeerClosed, TLSError
from .quic_connection import Connection, Ending, configuration_of
from .tls import TLS

__all__ = ["QuicSocket", "connect"]

#: Seconds without a packet of the daemon after which it is asked for one.
PING_S = 5.0
#: Seconds that a connection whose owner has closed it may need to end well.
LINGER_S = 2.0

_KEPT_MAX = 1 << 20  # bytes that the daemon has not acknowledged, beyond which no more are taken
_TAKEN = 1 << 18  # bytes that are taken at once
_DATAGRAMS = 64  # that are received before any is sent
_DATAGRAM_BYTES_MAX = 1 << 16
_RECEIVE_BUFFER = 4 << 20  # of the UDP socket: as much as the daemon may send at once
_BUFFERS_MAX = 256  # of one sendmsg
_PEER = ("daemon", 0)  # the address of all datagrams: the socket is connected


def connect(options: TLS, host: str, port: int, deadline: Deadline, doing: str) -> QuicSocket:
    """A connection whose handshake is done. Raises TLSError, PeerClosed, Timeout, and OSError where there is no way."""
    configuration = configuration_of(options, host)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    for k, (family, _, _, _, where) in enumerate(found):
        try:
            udp = socket.socket(family, socket.SOCK_DGRAM)
            try:
                udp.setblocking(False)
                udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
                udp.connect(where)
                made = QuicSocket(udp, Connection(configuration))
            except BaseException:
                udp.close()
                raise
            made.shake_hands(deadline, doing)
            return made
        except (OSError, PeerClosed) as e:
            if isinstance(e, (TLSError, TimeoutError)) or k == len(found) - 1:
                raise
    raise OSError(errno.EADDRNOTAVAIL, "the name has no address")


class QuicSocket:
    """A non-blocking socket whose bytes travel over a stream of QUIC. Takes ``udp`` over, which is connected."""

    unsent = 0  # what was taken, the system has

    def __init__(self, udp: socket.socket, connection: Connection) -> None:
        self._end, other = socket.socketpair()
        try:
            self._end.setblocking(False)
            other.setblocking(False)
            self._carrier = _Carrier(udp, other, connection)
            self._forks = _io.forks()
            self._carrier.start()
        except BaseException:
            self._end.close()
            other.close()
            raise
        _io.finish_at_exit(self)

    def shake_hands(self, deadline: Deadline, doing: str) -> None:
        """Waits for the handshake of QUIC. Where that fails the socket is closed."""
        try:
            if not self._carrier.decided.wait(deadline.left()):
                raise deadline.timeout(f"{doing}: waiting for the handshake of QUIC")
            ending = self._carrier.ending
            if ending is not None and ending.final:
                raise ending.error()
            if ending is not None:
                raise PeerClosed(f"{doing}: {ending.words}; is ingestd running there, and does it listen with QUIC?")
        except BaseException:
            self.close()
            raise

    def exporter(self) -> bytes:
        """What binds a token's proof to this connection."""
        exported = self._carrier.connection.exported
        if exported is None:
            raise TLSError("the handshake of QUIC is not done")
        return exported

    def send(self, data: Any) -> int:
        return self._end.send(data)

    def sendmsg(self, buffers: Iterable[Any]) -> int:
        return self._end.sendmsg(buffers)

    def recv(self, n: int) -> bytes:
        """As of a socket; where the connection has not ended in order, an error follows what came before."""
        with self._said():
            data = self._end.recv(n)
        if not data and n:
            self._judge()
        return data

    def recv_into(self, buffer: Any) -> int:
        with self._said():
            n = self._end.recv_into(buffer)
        if not n and len(buffer):
            self._judge()
        return n

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError:
            self._judge()
            raise

    def _judge(self) -> None:
        ending = self._carrier.ending
        if ending is not None and not ending.in_order:
            raise ending.error()

    def shutdown(self, how: int) -> None:
        self._end.shutdown(how)

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        """The daemon still gets what was sent. In the child of a fork this closes what the child has of it."""
        self._end.close()
        if self._forks != _io.forks():
            self._carrier.close()

    def leave(self) -> None:
        """Ends the connection, though nobody has closed it: the process is about to end."""
        if self._forks == _io.forks():
            with contextlib.suppress(OSError):
                self._end.shutdown(socket.SHUT_RDWR)

    def finish(self, deadline: Deadline) -> None:
        """Waits until it has ended."""
        if self._forks == _io.forks():
            self._carrier.join(deadline.left())


class _Carrier(threading.Thread):
    """Carries bytes between ``near``, one end of a pair, and ``udp``. What has no doc is of this thread alone."""

    def __init__(self, udp: socket.socket, near: socket.socket, connection: Connection) -> None:
        super().__init__(name="ingestd-quic", daemon=True)
        self.connection = connection
        #: set when the handshake is done or has failed; ``ending`` says which
        self.decided = threading.Event()
        #: why the connection is over
        self.ending: Ending | None = None
        self._udp, self._near = udp, near
        self._poll = select.poll()
        self._watched: dict[socket.socket, int] = {}
        self._out: deque[bytes] = deque()  # datagrams
        self._in: deque[memoryview] = deque()  # of the stream, for the owner
        self._open = False  # the handshake is done
        self._taken_all = False  # the owner writes no more
        self._told_end = False  # and has been told that nothing more comes
        self._gone_at: float | None = None  # when the owner has closed its end
        self._heard = self._asked = time.monotonic()

    def run(self) -> None:
        try:
            self.connection.connect(_PEER, time.monotonic())
            self._transmit()
            while not self._over():
                self._wait()
                self._go_on()
            if self.ending is None:
                self.connection.close()
                self._transmit()
        except Exception as e:  # whatever it is, nobody may wait for this thread in vain
            if self.ending is None:
                self.ending = Ending(f"QUIC: {e or type(e).__name__}")
        finally:
            if self.ending is None:
                self.ending = Ending("it was closed", in_order=True)
            self.close()
            self.decided.set()

    def close(self) -> None:
        self._near.close()
        self._udp.close()

    def _over(self) -> bool:
        if self._gone_at is not None and (
            self.ending or not self._open or time.monotonic() >= self._gone_at + LINGER_S
        ):
            return True
        return not self._in and (self.ending is not None or (self._open and self.connection.finished))

    def _wait(self) -> None:
        """Waits until there is something to do, and takes what has come from both sides."""
        self._watch(self._udp, None if self.ending else select.POLLIN | (select.POLLOUT if self._out else 0))
        events = select.POLLIN if self._may_take() else 0
        if self._gone_at is None:
            self._watch(self._near, events | (select.POLLOUT if self._in else 0))  # and its end, always
        else:
            self._watch(self._near, events or None)
        ready = dict(self._poll.poll(self._patience()))
        near, udp = ready.get(self._near.fileno(), 0), ready.get(self._udp.fileno(), 0)
        if near & select.POLLHUP and self._gone_at is None:
            self._gone_at = time.monotonic()
        if near & (select.POLLIN | select.POLLHUP) and self._may_take():
            self._take()
        if udp:
            self._receive()

    def _go_on(self) -> None:
        """Does what is due, and passes on what there is."""
        connection, now = self.connection, time.monotonic()
        if self.ending is None:
            timer = connection.get_timer()
            if timer is not None and now >= timer:
                connection.handle_timer(now)
            self._in.extend(memoryview(part) for part in connection.received())
            self.ending = connection.ending()
        if connection.trusted and not self._open:
            self._open = True
            connection.send_stream_data(0, b"")
            self.decided.set()
        if self._open and now >= max(self._heard, self._asked) + PING_S:
            self._asked = now
            connection.send_ping(0)
        if connection.refusing and not self._taken_all:
            self._taken_all = True
            with contextlib.suppress(OSError):
                self._near.shutdown(socket.SHUT_RD)
        self._deliver()
        self._transmit()

    # -- the owner ------------------------------------------------------------------------------------------------

    def _may_take(self) -> bool:
        return self._open and not self._taken_all and self.ending is None and self.connection.kept < _KEPT_MAX

    def _take(self) -> None:
        try:
            data = self._near.recv(_TAKEN)
        except BlockingIOError:
            return
        except OSError:  # it was closed before all was read
            data = b""
        self._taken_all = not data
        self.connection.send_stream_data(0, data, end_stream=not data)

    def _deliver(self) -> None:
        while self._in:
            try:
                n = self._near.sendmsg(list(islice(self._in, _BUFFERS_MAX)))
            except BlockingIOError:
                return
            except OSError:  # the owner reads no more
                n = sum(map(len, self._in))
            self.connection.took(n)
            while n:
                first = self._in.popleft()
                if n < len(first):
                    self._in.appendleft(first[n:])
                n -= min(n, len(first))
        if self.connection.broken and self.ending is None:
            self.ending = Ending("the daemon broke off the stream")
        elif self.connection.ended and not self._told_end:
            self._told_end = True
            with contextlib.suppress(OSError):
                self._near.shutdown(socket.SHUT_WR)

    # -- the daemon -----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        for _ in range(_DATAGRAMS):
            try:
                data = self._udp.recv(_DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as e:
                self._unreachable(e)
                return
            self._heard = time.monotonic()
            self.connection.receive_datagram(data, _PEER, self._heard)

    def _transmit(self) -> None:
        if not self._out:
            self._out.extend(data for data, _ in self.connection.datagrams_to_send(time.monotonic()))
        while self._out:
            try:
                self._udp.send(self._out[0])
            except BlockingIOError:
                return
            except OSError as e:
                self._unreachable(e)  # and lost; what of it matters is sent again
            self._out.popleft()

    def _unreachable(self, e: OSError) -> None:
        """Nobody listens there, says its system. Once somebody has been there that may pass, as with TCP."""
        if not self._open and self.ending is None:
            self.ending = Ending(e.strerror or str(e))

    # -- waiting --------------------------------------------------------------------------------------------------

    def _watch(self, sock: socket.socket, events: int | None) -> None:
        if self._watched.get(sock) == events:
            return
        if events is None:
            self._poll.unregister(sock)
            del self._watched[sock]
        else:
            self._poll.register(sock, events)
            self._watched[sock] = events

    def _patience(self) -> float | None:
        """Milliseconds until something is due."""
        due = [] if self._gone_at is None else [self._gone_at + LINGER_S]
        if self.ending is None:
            timer = self.connection.get_timer()
            due += [] if timer is None else [timer]
            due += [max(self._heard, self._asked) + PING_S] if self._open else []
        return max(0.0, min(due) - time.monotonic()) * 1000 if due else None
