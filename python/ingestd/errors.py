"""The errors of this package. Every one is an :class:`Error`; each says what was wrong and what to do.

====================  ===================================================================================
:class:`Timeout`      a deadline passed; nothing was lost, the call may be made again
:class:`EndOfStream`  every batch was delivered and none will follow
:class:`PeerClosed`   the connection to the daemon is gone without a reason
:class:`Ended`        the daemon ended the connection and said why
:class:`Refused`      the daemon refused the handshake and said why
:class:`Released`     a batch was used after its release
:class:`AllHeld`      every batch that this reader may hold is held already
:class:`SpecError`    a spec, or data that does not fit a spec
:class:`FormatError`  bytes from the daemon that break the documented formats
====================  ===================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "AllHeld",
    "Closed",
    "Difference",
    "EndOfStream",
    "Ended",
    "Error",
    "FormatError",
    "PeerClosed",
    "Refused",
    "Released",
    "SpecError",
    "Timeout",
]


class Difference(NamedTuple):
    """One leaf in which two specs differ; ``got`` or ``want`` is empty where the leaf is missing."""

    leaf: str
    got: str
    want: str

    def __str__(self) -> str:
        if not self.got:
            return f"leaf {self.leaf!r} is missing (want {self.want})"
        if not self.want:
            return f"leaf {self.leaf!r} is not expected (got {self.got})"
        return f"leaf {self.leaf!r}: got {self.got}, want {self.want}"


class Error(Exception):
    """Base of all errors of this package."""


class Timeout(Error, TimeoutError):
    """A deadline passed. ``taken`` says how many samples of a batched push were taken before it."""

    def __init__(self, message: str, taken: int = 0) -> None:
        super().__init__(message)
        self.taken = taken


class EndOfStream(Error):
    """The table was closed: every batch was delivered and none will follow."""


class PeerClosed(Error, ConnectionError):
    """The connection to the daemon is gone, or could not be made."""


class Ended(PeerClosed):
    """The daemon ended the connection with a closing notice.

    ``code`` is one of the codes in ``docs/wire-protocol.md``, ``reason`` a sentence for a person.
    """

    def __init__(self, code: str, reason: str, detail: str = "") -> None:
        super().__init__(f"the daemon ended the connection ({code}): {reason}{detail}")
        self.code = code
        self.reason = reason


class Refused(Error, ConnectionError):
    """The daemon refused the handshake.

    ``code`` and ``reason`` as in ``docs/wire-protocol.md``; for ``spec_mismatch`` also ``diff`` (the leaves that
    differ) and ``spec`` (the table's spec as JSON text).
    """

    def __init__(self, code: str, reason: str, diff: list[Difference] | None = None, spec: str | None = None) -> None:
        self.code = code
        self.reason = reason
        self.diff = diff or []
        self.spec = spec
        lines = [f"the daemon refused ({code}): {reason}", *(f"  {d}" for d in self.diff)]
        super().__init__("\n".join(lines))


class Released(Error):
    """A batch was used after its release, when its memory may hold other samples."""


class AllHeld(Error):
    """Every batch that this reader may hold is held: release one, or attach with a larger ``prefetch``."""


class Closed(Error):
    """The producer or reader was closed before the call, or belongs to the process that forked this one."""


class SpecError(Error, ValueError):
    """A spec that breaks a rule, or data that does not fit its spec."""


class FormatError(Error, ValueError):
    """Bytes from the daemon that are not what ``docs/`` says; both sides should be of the same version."""
