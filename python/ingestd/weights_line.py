"""What a publisher of weights and the daemon say to each other after the handshake (``docs/weights.md``)."""

from __future__ import annotations

import json
import select
import struct
from collections import deque
from itertools import islice
from typing import Any, NoReturn

from . import _io
from ._io import Deadline
from .errors import FormatError, PeerClosed, Timeout
from .incoming import ended
from .wire import NOTICE, NOTICE_BYTES_MAX, json_object, parse_notice

__all__ = ["MESSAGE_BYTES_MAX", "STALL_S", "Line", "message"]

MESSAGE_BYTES_MAX = 65_536
CHUNK = 1 << 31  # in a length: a chunk follows
#: Seconds without a byte after which a connection is given up where the caller gave no deadline.
STALL_S = 60.0

_LENGTH = struct.Struct("<I")
_NOTICE_HEAD_BYTES = 5
_BUFFERS_MAX = 256  # of one sendmsg; the system allows 1,024


def message(fields: dict[str, Any]) -> bytes:
    """The bytes of a message: its length and a JSON object."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text


class Line:
    """The connection of a publisher. Raises Ended or PeerClosed where it is over; what it was used for is lost then."""

    def __init__(self, sock: _io.Conn) -> None:
        self.sock = sock
        self._in = bytearray()
        self._over = False  # the daemon says nothing more

    def send(self, parts: list[Any], until: Deadline, doing: str) -> None:
        """Sends buffers, one after the other. What the daemon says meanwhile can only be that the connection ends."""
        out = deque(memoryview(part).cast("B") for part in parts if len(part))
        while out or _io.unsent(self.sock):
            try:
                sent = self.sock.sendmsg(list(islice(out, _BUFFERS_MAX)))
            except BlockingIOError:
                if self._wait(select.POLLIN | select.POLLOUT, until, doing) & ~select.POLLOUT:
                    self._interrupted()
                continue
            except OSError as e:
                self._end(e)
            while sent:
                if sent < len(out[0]):
                    out[0] = out[0][sent:]
                    break
                sent -= len(out.popleft())

    def hear(self, until: Deadline, doing: str) -> dict[str, Any]:
        """The next message. Raises Ended, PeerClosed, FormatError, Timeout."""
        while True:
            found = self._message()
            if found is not None:
                return found
            if self._over:
                raise PeerClosed("the daemon closed the publisher's connection; its log says why")
            if not self._fill():
                self._wait(select.POLLIN, until, doing)

    def close(self) -> None:
        self.sock.close()

    def _message(self) -> dict[str, Any] | None:
        """Takes a message of what has come, if there is one."""
        data = self._in
        if len(data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(data)
        if length == 0:
            self._read_notice(bytes(data[_LENGTH.size :]))
            return None
        if not 2 <= length <= MESSAGE_BYTES_MAX:
            raise FormatError(f"the daemon's message says it has {length} bytes, want 2 to {MESSAGE_BYTES_MAX}")
        end = _LENGTH.size + length
        if len(data) < end:
            return None
        fields = json_object(bytes(data[_LENGTH.size : end]), "the daemon's message")
        del data[:end]
        return fields

    def _read_notice(self, data: bytes) -> None:
        if data and data[0] != NOTICE:
            raise FormatError(f"the daemon's closing notice starts with {data[0]:#04x}, want 0x00")
        if len(data) < _NOTICE_HEAD_BYTES:
            return
        length = int.from_bytes(data[1:_NOTICE_HEAD_BYTES], "little")
        if not 2 <= length <= NOTICE_BYTES_MAX:
            raise FormatError(f"the daemon's closing notice says it has {length} bytes")
        if len(data) >= _NOTICE_HEAD_BYTES + length:
            raise ended(*parse_notice(data[_NOTICE_HEAD_BYTES : _NOTICE_HEAD_BYTES + length]))

    def _fill(self) -> bool:
        """Takes what has come; False where that is nothing."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError as e:
            raise PeerClosed(f"the connection to the daemon failed: {e.strerror or e}") from e
        self._over = not data
        self._in += data
        return True

    def _interrupted(self) -> None:
        """Something came while this side was sending."""
        self._fill()
        said = self._message()
        if said is not None:
            raise FormatError(f"the daemon said {str(said)[:200]} while it was sent a generation")
        if self._over:
            raise PeerClosed("the daemon closed the publisher's connection; its log says why")

    def _end(self, error: OSError) -> NoReturn:
        """Raises why nothing can be sent any more: the daemon may have left a notice."""
        until = Deadline(1)
        try:
            while True:
                self.hear(until, "reading why the daemon ended the connection")
        except Timeout:
            raise PeerClosed(f"the connection to the daemon failed: {error.strerror or error}") from error

    def _wait(self, events: int, until: Deadline, doing: str) -> int:
        poll = select.poll()
        poll.register(self.sock, events)
        ready = poll.poll(until.milliseconds() if until.at is not None else int(STALL_S * 1000))
        if not ready:
            if until.at is None:
                raise PeerClosed(f"nothing moved for {STALL_S:g} s while {doing}; is the daemon stopped?")
            raise until.timeout(doing)
        return ready[0][1]
