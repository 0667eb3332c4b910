"""The errors of this package. Every one is an :class:`Error`; each says what was wrong and what to do.

====================  ===================================================================================
:class:`Timeout`      a deadline passed; nothing was lost, the call may be made again
:class:`Full`         a Timeout while the ring was full: names the trainer that everybody waits for
:class:`EndOfStream`  every batch was delivered and none will follow
:class:`PeerClosed`   the connection to the daemon is gone without a reason
:class:`Ended`        the daemon ended the connection and said why (a PeerClosed)
:class:`ShuttingDown` the daemon is stopping: it ended the connection, or refused a new one (an Ended)
:class:`SessionTaken` another producer has opened the same session (an Ended)
:class:`Refused`      the daemon refused the handshake and said why
:class:`NotAuthenticated` the daemon serves only who has proved to have a token (a Refused)
:class:`Banned`       too many handshakes failed from this machine's address; later it may be well (a Refused)
:class:`DaemonUnproven` the daemon does not know this token with this secret, or is not the daemon
:class:`NotChallenged` the daemon accepted a client with a token and proved nothing itself
:class:`TLSError`     TLS could not be set up, or one side does not trust the other's certificate
:class:`Lost`         acknowledged samples of a session are gone: the daemon holds fewer than it had acknowledged
:class:`LostBatches`  batches that this reader's group was too slow for were dropped; reading goes on after them
:class:`Released`     a batch was used after its release
:class:`AllHeld`      every batch that this reader may hold is held already
:class:`Closed`       use after close, or after a fork
:class:`SpecError`    a spec, or data that does not fit a spec
:class:`FormatError`  bytes from the daemon that break the documented formats
:class:`Pinned`       a Timeout: readers hold every generation of a table of weights, and these are they
:class:`NoGeneration` nothing was published to a table of weights yet
:class:`BadSum`       bytes of a tensor are not those that were published
:class:`NotWritten`   a generation was committed before all of its tensors were written
:class:`OldGeneration` the number asked for is not above the newest generation
:class:`ChunkError`   a chunk of a tensor that is damaged or in a wrong place (a FormatError)
:class:`StepRefused`  the daemon does not use a step: it is too old
:class:`StepTimeout`  a Timeout: too few producers were complete in a step; says who is missing, and why
:class:`StepIncomplete` a step was committed before all of its tensors were put
:class:`StepOrder`    a step's number goes back, or another step is not finished
:class:`TensorMismatch` an array is not what the manifest says of its tensor (a SpecError)
====================  ===================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "AllHeld",
    "BadSum",
    "Banned",
    "ChunkError",
    "Closed",
    "DaemonUnproven",
    "Difference",
    "EndOfStream",
    "Ended",
    "Error",
    "FormatError",
    "Full",
    "Lost",
    "LostBatches",
    "NoGeneration",
    "NotAuthenticated",
    "NotChallenged",
    "NotWritten",
    "Note",
    "OldGeneration",
    "PeerClosed",
    "Pin",
    "Pinned",
    "Refused",
    "Released",
    "SessionTaken",
    "ShuttingDown",
    "SpecError",
    "StepIncomplete",
    "StepOrder",
    "StepRefused",
    "StepTimeout",
    "TLSError",
    "TensorMismatch",
    "Timeout",
]


class Note(NamedTuple):
    """What the daemon says a stream waits for (``docs/wire-protocol.md``, a note).

    Of the trainer that has held a batch for longest, where there is one (``trainer`` is 0 where there is none):
    its number, ``group``, what it calls itself, its process, the number of the batch, and since when it holds it, in
    Unix nanoseconds.
    """

    code: str
    reason: str
    trainer: int = 0
    group: str = ""
    client: str = ""
    pid: int = 0
    batch: int = 0
    since: int = 0
    step: int = 0  # of step_refused: the transaction that is not used


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


class Full(Timeout):
    """A deadline passed while the ring was full, as the daemon had said in a :class:`Note`.

    It is a :class:`Timeout`: nothing was lost, the call may be made again. ``trainer``, ``group``, ``client``,
    ``pid``, ``batch`` and ``since`` say who has held a batch for longest, as in the ``note``.
    """

    def __init__(self, message: str, note: Note, taken: int = 0) -> None:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(note.since // 10**9))
        who = f"trainer {note.trainer} ({note.client!r}, group {note.group!r}, pid {note.pid}) has held batch"
        held = f"{who} {note.batch} since {since}: " if note.trainer else ""
        super().__init__(f"{message}: the ring is full: {held}{note.reason}", taken)
        self.note = note
        self.code = note.code
        self.reason = note.reason
        self.trainer = note.trainer
        self.group = note.group
        self.client = note.client
        self.pid = note.pid
        self.batch = note.batch
        self.since = note.since


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


class ShuttingDown(Ended):
    """The daemon is stopping: it ended the connection, or refused a new one. Connect again later."""


class SessionTaken(Ended):
    """Another producer has opened the same session. This one must not open it again by itself."""


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


class NotAuthenticated(Refused):
    """The daemon serves only who has proved to have one of its tokens, and never says what was wrong."""


class Banned(Refused):
    """Too many handshakes failed from this machine's address: it is refused until 5 minutes after the last failure."""


class DaemonUnproven(Error, ConnectionError):
    """The daemon does not know this token with this secret, or who answers is not the daemon. Nothing was proved to it.

    It is final: nothing connects again after it by itself.
    """


class NotChallenged(Error, ConnectionError):
    """This client named a token, and was accepted without a challenge: who answers did not prove to know the token.

    Somebody in between may have taken the token out of the handshake, or the daemon has no tokens. It is final.
    """


class TLSError(Error, ConnectionError):
    """TLS could not be set up: a certificate or key that cannot be used, or that the other side does not trust.

    It is final: nothing connects again after it by itself. QUIC has the same TLS.
    """


class Lost(Error):
    """Samples of a session were acknowledged, and the daemon does not have them any more.

    These are the samples ``first`` to ``end`` (exclusive) of the session. It happens to samples acknowledged as
    ``queued`` when the daemon dies, and to all where its segment was not kept. The daemon's count goes on from
    ``first``: a new producer of the session has ``held == first``.
    """

    def __init__(self, session: str, first: int, end: int) -> None:
        super().__init__(
            f"samples {first} to {end - 1} of session {session!r} were acknowledged, but the daemon has them no more; "
            "push them again with a new producer, or give continue_after_loss=True to go on without them"
        )
        self.session = session
        self.first = first
        self.end = end


class LostBatches(Error):
    """``n`` batches from number ``first`` on were dropped unread: this reader's group was too slow for them.

    Raised once per loss; the next call reads on.
    """

    def __init__(self, group: str, first: int, n: int) -> None:
        last = f" to {first + n - 1}" if n > 1 else ""
        super().__init__(
            f"group {group!r} was too slow: batch {first}{last} was dropped unread; the next call reads on"
        )
        self.group = group
        self.first = first
        self.n = n


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


class Pin(NamedTuple):
    """A reader that holds a generation of weights, as the daemon names it to a publisher; ``since`` in Unix ns."""

    reader: int
    client: str = ""
    pid: int = 0
    generation: int = 0
    since: int = 0
    addr: str = ""  # of a reader elsewhere

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since // 10**9))
        where = f", pid {self.pid}" if self.pid else f" at {self.addr}" if self.addr else ""
        who = f"reader {self.reader} ({self.client!r}{where})"
        return f"{who} holds generation {self.generation} since {since}"


class Pinned(Timeout):
    """A deadline passed while readers held every generation that a table of weights has a place for.

    ``pins`` says who holds which; the daemon names 16 at most.
    """

    def __init__(self, reason: str, pins: list[Pin]) -> None:
        super().__init__("\n".join([f"no place for another generation: {reason}", *(f"  {pin}" for pin in pins)]))
        self.reason = reason
        self.pins = pins


class NoGeneration(Error):
    """Nothing was published to this table of weights yet; ``wait`` waits for it."""


class BadSum(Error):
    """The bytes of a tensor are not those that were published: they have another CRC-32C."""


class NotWritten(Error):
    """A generation was committed before all of its tensors were written; readers see nothing of it."""


class OldGeneration(Error, ValueError):
    """The number asked for is not above that of the newest generation."""


class ChunkError(FormatError):
    """A chunk that is damaged, or not where it may be: ``tensor`` (empty where unknown), ``offset`` in its bytes."""

    def __init__(self, reason: str, tensor: str = "", offset: int = 0) -> None:
        where = f"tensor {tensor!r} at byte {offset}: " if tensor else ""
        super().__init__(f"bad chunk: {where}{reason}")
        self.tensor = tensor
        self.offset = offset
        self.reason = reason


class StepRefused(Error):
    """The daemon does not use this step, for the ``reason`` given; go on with a newer one."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step} was refused: {reason}")
        self.step = step
        self.reason = reason


class StepTimeout(Timeout):
    """The deadline of ``GradReader.step`` passed with fewer complete producers than the quorum.

    ``have`` are the names of those that are complete, ``missing`` why each other one is not. Nothing was lost: the
    call may be made again.
    """

    def __init__(self, step: int, seconds: float, quorum: int, have: list[str], missing: Mapping[str, str]) -> None:
        lines = [f"timed out after {seconds:g} s waiting for step {step}: {len(have)} of {quorum} producers complete"]
        super().__init__("\n".join([*lines, *(f"  {name}: {why}" for name, why in missing.items())]))
        self.step = step
        self.quorum = quorum
        self.have = have
        self.missing = dict(missing)


class StepIncomplete(Error, ValueError):
    """A step was committed and bytes of these tensors were not put: ``missing``, by name. Nobody will see it."""

    def __init__(self, step: int, missing: Mapping[str, int]) -> None:
        first = ", ".join(f"{name!r} ({n} bytes)" for name, n in list(missing.items())[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        super().__init__(f"step {step} lacks {first}{more}: put all of every tensor, or announce a subset")
        self.step = step
        self.missing = dict(missing)


class StepOrder(Error, ValueError):
    """Steps of a producer, and of a reader, only grow, and one is finished before the next begins."""


class TensorMismatch(SpecError):
    """An array is not what the manifest says: ``tensor`` is its name, ``got`` and ``want`` are dtype and shape."""

    def __init__(self, tensor: str, got: str, want: str) -> None:
        super().__init__(f"tensor {tensor!r}: got {got}, want {want}; nothing is cast silently")
        self.tensor = tensor
        self.got = got
        self.want = want
