"""TLS under the protocol (``tls://``): :class:`TLSSocket`.

Only TLS 1.3, with ALPN ``ingestd/1``. A :class:`TLSSocket` looks like a non-blocking socket to the rest of the package;
it is made of ``ssl.SSLObject``, for ``ssl.SSLSocket`` can close its writing side only together with its reading side,
and has no ``sendmsg``.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from . import _io
from ._io import Deadline
from .errors import PeerClosed, TLSError
from .tls import TLS
from .tls_exporter import Exporting

__all__ = ["ALPN", "TLSSocket", "secure"]

ALPN = "ingestd/1"

_RECORD = 1 << 14  # most plain bytes of a record of TLS
_TAKEN_MAX = 1 << 18  # plain bytes that one call encrypts at most
_ROOM = 1 << 16  # encrypted bytes that are read at once

# What TLS says where one side does not trust the other. All else may pass: what broke may have been the network.
_FINAL = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "NO_APPLICATION_PROTOCOL", "PROTOCOL_VERSION", "WRONG_VERSION")


def context_of(tls: TLS) -> ssl.SSLContext:
    """Reads the files. Raises TLSError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.set_alpn_protocols([ALPN])
    if tls.key is not None and tls.cert is None:
        raise TLSError("key= is the key of a certificate: give cert= too")
    if tls.insecure_skip_verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    elif tls.ca is None:
        made.load_default_certs()
    else:
        with _naming(f"ca={str(tls.ca)!r}"):
            made.load_verify_locations(tls.ca)
    if tls.cert is not None:
        key = "" if tls.key is None else f", key={str(tls.key)!r}"
        with _naming(f"cert={str(tls.cert)!r}{key}"):
            made.load_cert_chain(tls.cert, tls.key, password="")  # a key that needs a password is refused
    return made


@contextlib.contextmanager
def _naming(files: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:
        raise TLSError(f"{files} cannot be used: {getattr(e, 'strerror', None) or e}") from e


def secure(
    sock: socket.socket, tls: TLS, host: str, deadline: Deadline, doing: str, exports: bool = False
) -> TLSSocket:
    """Does the handshake of TLS over a socket that is connected. Raises TLSError, PeerClosed or Timeout.

    ``exports``: :meth:`TLSSocket.exporter` will be called.
    """
    context = context_of(tls)
    with Exporting(context) if exports else contextlib.nullcontext() as exporting:
        made = TLSSocket(sock, context, host if tls.server_name is None else tls.server_name)
        _shake_hands(made, deadline, doing)
        if exporting is not None:
            made.exported = exporting.export()
    return made


def _shake_hands(made: TLSSocket, deadline: Deadline, doing: str) -> None:
    try:
        while not made.shake_hands():
            events = select.POLLOUT if made.unsent else select.POLLIN
            if not _io.wait(made.fileno(), events, deadline):
                raise deadline.timeout(f"{doing}: waiting for the handshake of TLS")
    except OSError as e:
        if isinstance(e, (TLSError, TimeoutError)):
            raise
        raise PeerClosed(
            f"{doing}: the handshake of TLS failed: {_words(e)}; does the daemon listen with TLS there?"
        ) from e


def _words(e: OSError) -> str:
    if isinstance(e, ssl.SSLCertVerificationError):
        return f"the daemon's certificate is not trusted: {e.verify_message}"
    return str(e.strerror or e)


def _trusted(e: ssl.SSLError) -> OSError:
    """The error to raise: TLSError where one side does not trust the other."""
    if isinstance(e, ssl.SSLCertVerificationError) or any(word in (e.reason or "").upper() for word in _FINAL):
        return TLSError(f"TLS: {_words(e)}")
    return e


class TLSSocket:
    """A non-blocking socket with TLS. Calls that cannot go on raise BlockingIOError; wait for :meth:`fileno` then.

    What was sent is encrypted at once, and may wait here for room in the system: while :attr:`unsent` is not 0, wait
    until the socket is writable and send again, be it nothing. Receive until there is nothing more before waiting:
    bytes that have come already may be here, where poll(2) does not see them.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str) -> None:
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()  # encrypted: to be read, to be sent
        try:
            self._tls: Any = context.wrap_bio(self._in, self._out, server_hostname=server_name)
        except ValueError as e:
            raise TLSError(f"TLS: {server_name!r} is no name that a certificate can have: {e}") from e
        self._left = memoryview(b"")  # of _out, taken and not sent
        self._room = memoryview(bytearray(_ROOM))
        self._early = bytearray()  # plain bytes that were taken before they were asked for
        self._error: OSError | None = None  # what reading ended with
        self._ended = False  # the daemon has said goodbye
        self._shut = False  # so have we
        self._forks = _io.forks()
        self.exported: bytes | None = None  # by this connection, for a token's proof

    def shake_hands(self) -> bool:
        """Goes on with the handshake; whether it is done. Raises TLSError and OSError."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._push()
            if self._fill():
                return self.shake_hands()
            return False
        except ssl.SSLError as e:
            with contextlib.suppress(OSError):
                self._push()  # the alert that says why
            raise _trusted(e) from e
        self._push()
        if self._tls.selected_alpn_protocol() != ALPN:
            raise TLSError(f"who listens there does not speak {ALPN} over TLS; is it an ingestd listener?")
        return not self.unsent

    def exporter(self) -> bytes:
        """What binds a token's proof to this connection."""
        if self.exported is None:
            raise TLSError("this connection was made for a client without a token")
        return self.exported

    # -- sending --------------------------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Encrypted bytes that wait for room in the system."""
        return len(self._left) + self._out.pending

    def _push(self) -> bool:
        """Sends what is encrypted; whether all of it went."""
        while True:
            if not self._left:
                if not self._out.pending:
                    return True
                self._left = memoryview(self._out.read())
            try:
                self._left = self._left[self._sock.send(self._left) :]
            except BlockingIOError:
                return False

    def send(self, data: Any) -> int:
        """Takes some of the bytes, at most 256 KiB; none, and raises BlockingIOError, while earlier ones wait."""
        return self.sendmsg([data])

    def sendmsg(self, buffers: Iterable[Any]) -> int:
        """As :meth:`send`, of several buffers, one after the other."""
        if not self._push():
            raise BlockingIOError(errno.EAGAIN, "the socket is full")
        taken = 0
        small: list[memoryview] = []  # of less than a record together
        size = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")[: _TAKEN_MAX - taken - size]
            if small and size + len(view) > _RECORD:
                taken += self._encrypt(b"".join(small))
                small, size = [], 0
            if len(view) >= _RECORD:
                taken += self._encrypt(view)
            elif view:
                small.append(view)
                size += len(view)
            if taken + size >= _TAKEN_MAX:
                break
        if small:
            taken += self._encrypt(small[0] if len(small) == 1 else b"".join(small))
        try:
            self._push()
        except OSError:
            if not taken:
                raise  # else the next call says it: the bytes were taken
        return taken

    def _encrypt(self, data: Any) -> int:
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        return len(data)

    # -- receiving ------------------------------------------------------------------------------------------------

    def recv(self, n: int) -> bytes:
        """All bytes that have come, at most ``n``; none at the end. Raises BlockingIOError, TLSError, OSError."""
        parts: deque[bytes] = deque()
        while n > 0:
            part = self._read(min(n, _RECORD), None, bool(parts))
            if not part:
                break
            parts.append(part)
            n -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def recv_into(self, buffer: Any) -> int:
        """As :meth:`recv`; how many bytes there were."""
        view = memoryview(buffer).cast("B")
        at = 0
        while at < len(view):
            n = self._read(len(view) - at, view[at:], at > 0)
            if not n:
                break
            at += n
        return at

    def _read(self, n: int, into: memoryview | None, some: bool) -> Any:
        """What one record has, bytes or how many went ``into``; nothing at the end, and if there is ``some`` already.

        With ``some``, errors wait for the next call.
        """
        if self._early:
            part = bytes(self._early[:n])
            del self._early[:n]
            if into is None:
                return part
            into[: len(part)] = part
            return len(part)
        try:
            while not self._ended:
                if self._error is not None:
                    raise self._error
                try:
                    got = self._tls.read(n) if into is None else self._tls.read(n, into)
                    if got:
                        return got
                    self._ended = True
                except ssl.SSLWantReadError:
                    if not self._fill():
                        raise BlockingIOError(errno.EAGAIN, "nothing has come") from None
                except ssl.SSLZeroReturnError:
                    self._ended = True
                except ssl.SSLError as e:
                    self._error = _trusted(e)
        except OSError:
            if not some:
                raise
        return b"" if into is None else 0

    def _fill(self) -> bool:
        """Takes what has come; False where that is nothing. An end without a goodbye is an error: it may be a cut."""
        try:
            n = self._sock.recv_into(self._room)
        except BlockingIOError:
            return False
        if not n:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was cut without the goodbye of TLS")
        self._in.write(self._room[:n])
        return True

    # -- the end --------------------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """Closes the writing side, well: what comes can still be read; or both sides of the connection, at once."""
        if how != socket.SHUT_WR:
            self._sock.shutdown(how)
        else:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self._shut:
            return
        self._shut = True
        with contextlib.suppress(ssl.SSLError):  # what is here would be in the way of the goodbye
            while not self._ended and (part := self._tls.read(_RECORD)):
                self._early += part
        with contextlib.suppress(ssl.SSLError):  # the daemon's goodbye comes later
            self._tls.unwrap()
        self._push()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Says goodbye if there is room for that, and closes. In the child of a fork it says nothing."""
        if self._sock.fileno() >= 0 and self._forks == _io.forks():
            with contextlib.suppress(OSError, ValueError):
                self._say_goodbye()
        self._sock.close()
