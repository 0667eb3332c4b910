"""Deadlines, addresses and the sockets under them. Private to the package."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import select
import socket
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from .auth import Token, token_of
from .errors import Error, PeerClosed, Timeout
from .tls import TLS

if TYPE_CHECKING:
    from .compression import CompressedSocket
    from .quic_socket import QuicSocket
    from .tls_socket import TLSSocket

    Conn = Union[socket.socket, TLSSocket, QuicSocket, CompressedSocket]

#: Seconds that the end of a daemon's socket is waited for when what it delivered is not so in the segment: where it
#: has died, its successor may have given the place to others before this side saw the end.
STALE_S = 1.0

_forks = 0
_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def forks() -> int:
    """How many forks lie between the process that loaded this package and this one."""
    return _forks


def close_in_child(owner: Any) -> None:
    """Has ``owner._forked()`` called in the child of a fork: the child must not keep the parent's connection open."""
    _owners.add(owner)


def _after_fork() -> None:
    global _forks
    _forks += 1
    for owner in list(_owners):
        owner._forked()


os.register_at_fork(after_in_child=_after_fork)


_ending: weakref.WeakSet[Any] = weakref.WeakSet()


#: Seconds that the end of the process may wait for connections to end well, all of them together.
EXIT_S = 3.0


def finish_at_exit(owner: Any) -> None:
    """Has ``owner.leave()`` and ``owner.finish(deadline)`` called at the end of the process, after every abort."""
    _ending.add(owner)


@atexit.register
def _finish_all() -> None:
    owners, until = list(_ending), Deadline(EXIT_S)
    for owner in owners:
        owner.leave()
    for owner in owners:
        owner.finish(until)


class Bell:
    """A pipe that wakes whoever polls ``fd``. Without :meth:`close` it lasts as long as somebody refers to it."""

    def __init__(self) -> None:
        self.fd, self._w = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._w, False)

    def ring(self) -> None:
        if self._w >= 0:
            with contextlib.suppress(BlockingIOError):  # full: it rings already
                os.write(self._w, b"\0")

    def clear(self) -> None:
        drain(self.fd)

    def close(self) -> None:
        """Closes it, once. Nobody may poll it any more."""
        fds, self.fd, self._w = (self.fd, self._w), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_w"):
            self.close()


class Deadline:
    """A point in time, ``seconds`` from now; None is never."""

    __slots__ = ("at", "seconds")

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"deadline={seconds!r}: give seconds from now, 0 or more, or None to wait without limit")
        self.seconds = seconds
        self.at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds left, 0 when it has passed, None without limit."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def milliseconds(self) -> int | None:
        """:meth:`left` for poll(2), rounded up."""
        left = self.left()
        return None if left is None else min(int(left * 1000) + (left > 0), 1 << 30)

    def passed(self) -> bool:
        return self.at is not None and time.monotonic() >= self.at

    def timeout(self, doing: str, taken: int = 0) -> Timeout:
        return Timeout(f"timed out after {self.seconds:g} s while {doing}", taken)


_NEVER = Deadline(None)


def deadline_of(seconds: float | None) -> Deadline:
    """The deadline of a call that was given ``deadline=seconds``. Raises ValueError."""
    return _NEVER if seconds is None else Deadline(seconds)


class Address(NamedTuple):
    """Where a daemon is, and how: ``tcp``, ``tls`` or ``quic`` with host and port, or ``unix`` with a path."""

    kind: str
    host: str
    port: int
    token: Token | None = None
    tls: TLS | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix://{self.host}" if self.kind == "unix" else f"{self.kind}://{host}:{self.port}"


def parse_address(text: str, token: Token | str | None = None, tls: TLS | None = None) -> Address:
    """Reads ``tcp://``, ``tls://`` and ``quic://host:port``, ``unix:///path`` and ``shm:///path`` (the same as unix).

    Without a ``token`` it is that of the environment, where that has one. Raises ValueError.
    """
    scheme, sep, rest = text.partition("://")
    if tls is not None and scheme not in ("tls", "quic"):
        raise ValueError(f"address {text!r}: the options of TLS are for tls://host:port and quic://host:port")
    if sep and scheme in ("unix", "shm") and rest:
        return Address("unix", rest, 0, token_of(token))
    if sep and scheme in ("tcp", "tls", "quic"):
        host, colon, port = rest.rpartition(":")
        if colon and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535:
            host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
            if host:
                return Address(scheme, host, int(port), token_of(token), tls)
    raise ValueError(f"address {text!r}: write tcp://host:port (or tls, quic) or unix:///path")


def wait(fd: int, events: int, deadline: Deadline) -> bool:
    """Waits until ``fd`` is ready for ``events`` or has failed; False when the deadline passed first."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(deadline.milliseconds()))


def hung_up(sock: Conn, seconds: float) -> bool:
    """Whether the other side has ended the connection, or does so within that time."""
    return wait(sock.fileno(), select.POLLRDHUP, Deadline(seconds))


def connect(address: Address, deadline: Deadline) -> Conn:
    """A connected, non-blocking socket, with TLS or QUIC where wanted.

    Raises PeerClosed with advice, TLSError, Timeout, and Error where a package is missing.
    """
    doing = f"connecting to {address}"
    try:
        if address.kind == "quic":
            return _connect_quic(address, deadline, doing)
        sock = _connect(address, deadline)
    except Error:
        raise
    except (TimeoutError, socket.timeout, BlockingIOError):
        raise deadline.timeout(doing) from None
    except OSError as e:
        advice = "is ingestd running there, and is this the address that it printed?"
        if e.errno == errno.EACCES:
            advice = "this user may not use that socket"
        raise PeerClosed(f"{doing}: {e.strerror or e}; {advice}") from e
    if address.kind != "tls":
        return sock
    from .tls_socket import secure  # here: whoever needs no TLS does not wait for it to load

    try:
        return secure(sock, address.tls or TLS(), address.host, deadline, doing, address.token is not None)
    except BaseException:
        sock.close()
        raise


def _connect(address: Address, deadline: Deadline) -> socket.socket:
    if address.kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_timeout(deadline))
            sock.connect(address.host)
        except BaseException:
            sock.close()
            raise
    else:
        sock = socket.create_connection((address.host, address.port), _timeout(deadline))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setblocking(False)
    return sock


def _connect_quic(address: Address, deadline: Deadline, doing: str) -> QuicSocket:
    try:
        from . import quic_socket
    except ImportError as e:
        raise Error(f"{doing}: quic:// needs the package aioquic, pip install 'ingestd[quic]': {e}") from e
    return quic_socket.connect(address.tls or TLS(), address.host, address.port, deadline, doing)


def _timeout(deadline: Deadline) -> float | None:
    left = deadline.left()
    return None if left is None else max(left, 1e-3)


def unsent(sock: Conn) -> int:
    """Bytes that the socket has taken and the system not yet: TLS encrypts, and a compressed stream shrinks, before it
    is known whether there is room.

    Whoever sends goes on with :func:`send_all`, or sends nothing, until there are none.
    """
    return getattr(sock, "unsent", 0)


def send_all(sock: Conn, data: bytes, deadline: Deadline, doing: str) -> None:
    view = memoryview(data)
    while view or unsent(sock):
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            if not wait(sock.fileno(), select.POLLOUT, deadline):
                raise deadline.timeout(doing) from None


def receive(sock: Conn, n: int, deadline: Deadline, doing: str, fds: list[int] | None = None) -> bytes:
    """Exactly ``n`` bytes, fewer only at the end of the stream; descriptors that come along go to ``fds``."""
    got = bytearray()
    while len(got) < n:
        try:
            if fds is None or not isinstance(sock, socket.socket):
                part = sock.recv(min(n - len(got), 1 << 16))
            else:
                part, found, flags, _ = socket.recv_fds(sock, n - len(got), 8, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
                fds += found
                for fd in found:
                    os.set_inheritable(fd, False)
                if flags & socket.MSG_CTRUNC:
                    raise Error("descriptors of the attachment were lost; raise this process' limit of open files")
        except BlockingIOError:
            if not wait(sock.fileno(), select.POLLIN, deadline):
                raise deadline.timeout(doing) from None
            continue
        if not part:
            break
        got += part
    return bytes(got)


def drain(fd: int) -> None:
    """Reads a non-blocking pipe or eventfd empty."""
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)


def close_fds(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
