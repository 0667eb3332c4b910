"""Connecting, and connecting again: which failures are tried again, and how long is waited before each try."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from . import _io
from ._io import Deadline
from .errors import Ended, Error, FormatError, PeerClosed, Refused, SessionTaken, Timeout
from .spec import Spec
from .wire import Reply, handshake

__all__ = ["PATIENCE_S", "Dialer", "Opened", "delays", "retried"]

#: Seconds that a producer tries to connect again before it gives up, unless told otherwise.
PATIENCE_S = 60.0
#: Seconds that one try may take.
TRY_S = 5.0
#: The wait before try number n, from 0, is drawn evenly from 0 to this much, doubled n times, and at most the other.
BACKOFF_S = 0.01
BACKOFF_MAX_S = {"unix": 0.1, "tcp": 1.0}

# What may be over the next time. Everything else that the daemon says stays true however often it is asked.
_PASSING = frozenset(
    (
        "shutting_down",
        "too_many_connections",
        "handshake_timeout",
        "idle_timeout",
        "stalled",
        "cut_short",
        "ack_timeout",
    )
)


def retried(error: Error) -> bool:
    """Whether a producer with a session connects again after ``error``."""
    if isinstance(error, SessionTaken):
        return False
    if isinstance(error, (Ended, Refused)):
        return error.code in _PASSING
    return isinstance(error, (PeerClosed, Timeout))


def delays(kind: str) -> Iterator[float]:
    """Seconds to wait before each try ("full jitter"): many producers that lost one daemon do not come back at once."""
    most = BACKOFF_S
    while True:
        yield random.uniform(0.0, most)
        most = min(2 * most, BACKOFF_MAX_S[kind])


class Opened:
    """One connection, accepted: the socket, what the daemon said, and the descriptors that came along."""

    def __init__(self, sock: Any, reply: Reply, fds: list[int]) -> None:
        self.sock = sock
        self.reply = reply
        self.fds = fds
        #: number of the stream: the ``stream`` of its samples
        self.stream = reply.integer("stream") if "stream" in reply.body else 0
        #: samples of the session that the daemon has
        self.held = reply.integer("held") if "held" in reply.body else 0

    def close(self) -> None:
        self.sock.close()
        _io.close_fds(self.fds)


class Dialer:
    """Opens connections with one hello. ``spec`` is what the daemon must agree to; None: whatever the table has."""

    def __init__(self, address: _io.Address, body: dict[str, Any], spec: Spec | None) -> None:
        self.address = address
        self.body = body
        self.spec = spec

    def open(self, until: Deadline) -> Opened:
        """One try. Raises Refused, Ended, FormatError, PeerClosed or Timeout."""
        sock = _io.connect(self.address, until)
        fds: list[int] = []
        try:
            reply = handshake(sock, self.body, until, fds)
            if self.spec is not None and reply.body.get("fingerprint") not in (None, self.spec.fingerprint):
                raise FormatError("the daemon agreed to another spec than was offered")
            return Opened(sock, reply, fds)
        except BaseException:
            sock.close()
            _io.close_fds(fds)
            raise

    def open_patiently(self, until: Deadline) -> Opened:
        """Tries until the deadline, as long as there is hope. Raises the error of the last try."""
        for delay in delays(self.address.kind):
            try:
                return self.open(until)
            except Error as e:
                left = until.left()
                if not retried(e) or isinstance(e, Timeout) or (left is not None and left <= delay):
                    raise
            time.sleep(delay)
        raise AssertionError  # delays never end
