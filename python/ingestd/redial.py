"""Connecting, and connecting again: which failures are tried again, and how long is waited before each try."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from . import _io
from ._io import Deadline
from .compression import Compression
from .errors import Error, FormatError, PeerClosed, Refused, SessionTaken, ShuttingDown, Timeout
from .spec import Spec
from .wire import Reply, handshake

__all__ = ["PATIENCE_S", "Dialer", "Opened", "Redialer", "retried"]

#: Seconds without a connection since the last acknowledgement after which a producer gives up, unless told otherwise.
PATIENCE_S = 300.0
#: Seconds that one try may take.
TRY_S = 5.0
#: The pause before a try is drawn evenly from 0 to a sixteenth of the outage so far, or these at least and at most. So
#: it adds little to the outage, and producers that lost one daemon together do not come back together.
PAUSE_MIN_S, PAUSE_MAX_S = 0.01, 1.0

# Refusals that may be over the next time. Whatever else the daemon says to a hello stays true.
_PASSING = frozenset(("shutting_down", "too_many_connections", "handshake_timeout", "banned", "internal"))


def retried(error: Error) -> bool:
    """Whether a producer with a session connects again after ``error``."""
    if isinstance(error, Refused):
        return error.code in _PASSING
    return isinstance(error, (PeerClosed, Timeout)) and not isinstance(error, SessionTaken)


def longest_pause(outage: float) -> float:
    """Seconds that the pause before the next try may take at most, after so many of an outage."""
    return min(max(outage / 16, PAUSE_MIN_S), PAUSE_MAX_S)


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

    def __init__(
        self, address: _io.Address, body: dict[str, Any], spec: Spec | None, compression: Compression | None = None
    ) -> None:
        self.address = address
        self.body = body
        self.spec = spec
        self.compression = compression

    def open(self, until: Deadline) -> Opened:
        """One try. Raises Refused, DaemonUnproven, NotChallenged, TLSError, Ended, FormatError, PeerClosed, Timeout."""
        sock = _io.connect(self.address, until)
        fds: list[int] = []
        try:
            reply = handshake(sock, self.body, until, fds)
            if self.spec is not None and reply.body.get("fingerprint") not in (None, self.spec.fingerprint):
                raise FormatError("the daemon agreed to another spec than was offered")
            if self.compression is not None:
                if reply.body.get("compression") != self.compression.kind:
                    raise FormatError("the daemon agreed to another compression than was asked for")
                sock = self.compression.over(sock)
            return Opened(sock, reply, fds)
        except BaseException:
            sock.close()
            _io.close_fds(fds)
            raise

    def open_patiently(self, until: Deadline) -> Opened:
        """Tries until the deadline, as long as there is hope. Raises the error of the last try."""
        began = time.monotonic()
        while True:
            try:
                return self.open(until)
            except Error as e:
                left = until.left()
                pause = random.uniform(0, longest_pause(time.monotonic() - began))
                if not retried(e) or isinstance(e, Timeout) or (left is not None and left <= pause):
                    raise
            time.sleep(pause)


class Redialer:
    """Connects again after an outage. ``patience`` is in seconds, as for PATIENCE_S; None is without limit."""

    def __init__(self, dialer: Dialer, patience: float | None) -> None:
        self.dialer = dialer
        self.patience = patience
        self._spent = 0.0  # without a connection since the last acknowledgement, in earlier outages

    def acknowledged(self) -> None:
        """An acknowledgement came: the next outage is one of its own."""
        self._spent = 0.0

    def again(
        self, pause: Callable[[float | None], bool], needed: Callable[[], bool], failed: Callable[[Error], None]
    ) -> Opened | None:
        """Tries until one works. Raises what is final, or PeerClosed (ShuttingDown) when the patience is over.

        ``pause`` waits for so many seconds, or with None until the connection may be needed, and returns False to give
        up; then this returns None. ``needed`` says whether samples wait for the connection: while none do, patience
        does not end. ``failed`` is told of each failure.
        """
        began, last = time.monotonic(), None
        while True:
            outage = self._spent + time.monotonic() - began
            if self.patience is not None and outage >= self.patience:
                if needed():
                    raise self._over(last)
                if not pause(None):
                    return None
                if needed():
                    began, self._spent, outage = time.monotonic(), 0.0, 0.0
                else:
                    continue
            left = None if self.patience is None else self.patience - outage
            delay = random.uniform(0, longest_pause(outage))
            if not pause(delay if left is None else min(delay, left)):
                return None
            try:
                opened = self.dialer.open(Deadline(TRY_S if left is None else min(TRY_S, max(left, PAUSE_MIN_S))))
            except Error as e:
                failed(e)
                if not retried(e):
                    raise
                last = e
                continue
            self._spent += time.monotonic() - began
            return opened

    def _over(self, last: Error | None) -> Error:
        what = f"there was no connection for {self.patience:g} s"
        if isinstance(last, ShuttingDown):
            return ShuttingDown(last.code, f"{last.reason}; {what}")
        return PeerClosed(f"{what}; the last try: {last}")
