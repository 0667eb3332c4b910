"""The trainer's side of gradients: :class:`GradReader`."""

from __future__ import annotations

import contextlib
import select
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from . import _io
from ._io import Deadline
from .auth import Token
from .batch import Batch
from .errors import Closed, EndOfStream, Error, PeerClosed, StepOrder, StepTimeout, Timeout
from .gather import Heap, Held, Transaction
from .gradstep import GradStats, GradStep
from .intake import Intake, by_name
from .manifest import Manifest
from .reader import Reader
from .redial import PATIENCE_S, retried
from .remote_reader import MEMORY_BYTES, RemoteReader
from .sums import Floats, Plan, outputs
from .tls import TLS
from .version import CLIENT

__all__ = ["GradReader", "GradStats", "GradStep"]

#: Batches that a reader asks to hold at once; the daemon gives it half of what is left.
PREFETCH = 1 << 15
#: Batches that a reader asks to have on the way to it, or to hold, over a connection.
SENT_PREFETCH = 64
_TIDY_S = 1.0  # seconds between two looks for steps that nobody finishes
_PAUSE_S = 0.05  # between two tries to attach again


class GradReader:
    """Reads the steps of all producers of a table of kind ``tensors``, and sums them from where they lie.

    ::

        with GradReader("unix:///run/user/1000/ingestd.sock", "grads") as reader:
            with reader.step(1234, quorum=6, deadline=2.0, into=gradients) as step:
                step.mean(gradients)          # float32 arrays by name
                print(step.have, step.missing)

    A step of a producer is complete or absent: every byte has arrived and its sum agrees. The sum is that of the
    complete producers in the order of their names, so it repeats bit by bit.

    The daemon says in the stream which producers are connected. :meth:`step` waits for all of them; a producer that has
    left is waited for only as long as there are fewer than ``quorum``.

    The reader holds chunks of steps that are not returned yet where the daemon put them. When it holds as many as it
    may, it copies the oldest. Where the daemon dies, the reader attaches again; chunks that it held are checked, and
    come again where they must.

    A group has one such reader: two would get a part of each step. One call at a time, also of its steps, others wait;
    not for use after a fork (Closed).

    Args:
        address: ``unix:///path`` (``shm:///path`` means the same); ``tcp://host:port`` (``tls``, ``quic``) of a daemon
            anywhere, which sends the chunks.
        table: name of the table.
        group: the group of trainers to read for; every group gets every step.
        manifest: the tensors that producers must have; None takes those of the producer that came last.
        prefetch: most chunks held at once, None: as many as the daemon gives. Over a connection it is the most that are
            sent without an answer, half of which may be held; None: 64.
        keep_incomplete: seconds after its last chunk at which a step that is not complete, and that nobody waits for,
            is dropped.
        spill_bytes: most bytes that are copied to make room; what is beyond them waits in the ring, and then producers
            wait.
        reconnect: seconds without a daemon before PeerClosed; 0: at once; None: no limit.
        token: a :class:`Token`, or ``name:secret``; None: that in the environment variable ``INGESTD_TOKEN``, if any.
        tls: a :class:`TLS`, for ``tls://`` and ``quic://``: whom to trust, and this client's certificate.
        memory: over a connection, most bytes for chunks that were received and not released, beside ``spill_bytes``.
        client: free text for the daemon's status and logs.
        deadline: seconds for connecting and attaching.

    Raises:
        Refused, PeerClosed, Timeout, FormatError as :class:`Reader`; SpecError where the table has another kind.
    """

    def __init__(
        self,
        address: str,
        table: str,
        group: str = "default",
        *,
        manifest: Manifest | None = None,
        prefetch: int | None = None,
        keep_incomplete: float = 60.0,
        spill_bytes: int = 16 << 30,
        reconnect: float | None = PATIENCE_S,
        token: Token | str | None = None,
        tls: TLS | None = None,
        memory: int = MEMORY_BYTES,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self._reader: Reader | None = None
        #: name of the table
        self.table = table
        #: name of the group
        self.group = group
        #: counts
        self.stats = GradStats()
        where = _io.parse_address(address, token, tls)
        self._address, self._token, self._tls, self._memory_bytes = address, where.token, tls, memory
        self._sent = where.kind != "unix"  # over a connection, which is made again under the reader
        self._prefetch, self._client = prefetch or (SENT_PREFETCH if self._sent else PREFETCH), client
        self._keep, self._patience, self._spill_bytes = keep_incomplete, reconnect, spill_bytes
        self._forks = _io.forks()
        self._lock = threading.RLock()
        self._held: deque[Held] = deque()  # oldest first
        self._heap = Heap()
        self._away: float | None = None  # since when there is no daemon
        self._remade = 0  # connections that its reader has made again, as far as they are counted
        self._ended: EndOfStream | None = None
        self._tidied = time.monotonic()
        self._intake = Intake(where, table, client, manifest, self.stats, reconnect)
        reader = self._open(_io.deadline_of(deadline))
        try:
            self._intake.attach(reader)
        except BaseException:
            reader.close()
            raise
        self._reader = reader
        #: most batches held at once
        self.prefetch = self._most(reader)
        #: most data bytes of a chunk
        self.chunk_bytes = self._intake.chunk_bytes

    def step(
        self,
        step: int,
        quorum: int = 1,
        deadline: float | None = None,
        into: Mapping[str, Floats] | None = None,
    ) -> GradStep:
        """Step number ``step``, when every producer that is connected has sent it, or it is clear that it will not.

        At the deadline (seconds) it is returned all the same where at least ``quorum`` producers are complete. Steps
        are asked for in growing order; what comes later of this step and of those before is dropped.

        With ``into``, float32 arrays by tensor, sums are made there as chunks arrive; they are finished, and may be
        looked at, when :meth:`GradStep.sum` or :meth:`GradStep.mean` has returned.

        Raises StepTimeout with ``have`` and ``missing`` (the call may be made again), StepOrder; PeerClosed when there
        was no daemon for too long, EndOfStream when the last one had stopped in order.
        """
        if quorum < 1:
            raise ValueError(f"quorum={quorum}: want 1 or more")
        until = _io.deadline_of(deadline)
        with self._lock:
            reader, intake = self._check(), self._intake
            if step <= intake.done:
                raise StepOrder(f"step {step} is asked for after step {intake.done}; steps only grow")
            intake.wanted, intake.news = (step, None), True
            try:
                seen = 0 if self._sent else reader._segment.published
                plan = self._collect(step, quorum, until, into, seen)
                assert intake.current is not None
                missing = intake.missing(step)
                members = intake.finish(step)
            finally:
                intake.wanted = (-1, None)
            self.stats.completed_steps += 1
            self._trim()
            return GradStep(step, intake.current, members, missing, plan, self.chunk_bytes, self._lock, self._release)

    def close(self) -> None:
        """Detaches. Steps that were not released cannot be used any more."""
        with self._lock:
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.close()

    @property
    def manifest(self) -> Manifest | None:
        """The tensors in force; None before the first producer has come."""
        return self._intake.current

    @property
    def producers(self) -> list[str]:
        """Names of the producers that are connected, as far as is known from what was read."""
        return sorted((s.name for s in self._intake.sources.values() if s.live), key=by_name)

    @property
    def held(self) -> int:
        """Batches held at this time."""
        return sum(not held.released for held in self._held)

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._reader is None

    # -- waiting --------------------------------------------------------------------------------------------------

    def _collect(
        self, step: int, quorum: int, until: Deadline, into: Mapping[str, Floats] | None, seen: int
    ) -> Plan | None:
        """Reads until the step is to be returned. What was published before (``seen``) is looked at in any case."""
        intake, plan = self._intake, None
        while True:
            batch = self._next(Deadline(0)) if seen or self._more() else None
            if batch is not None:
                seen = 0 if batch.seq + 1 >= seen else seen
                self._take(batch)
            else:
                seen = 0
            if into is not None and intake.current is not None and (plan is None or plan.manifest != intake.current):
                plan = Plan(intake.current, outputs(intake.current, into), self.chunk_bytes)
                intake.wanted = (step, plan)
                plan.advance(intake.members(step))
            if not seen and (intake.news or batch is None):
                intake.news = False
                self._tidy()
                have = intake.complete(step)
                if len(have) >= quorum and (until.passed() or self._ended is not None or not intake.awaited(step)):
                    return plan
                if self._ended is not None:
                    raise self._ended
                if until.passed():
                    raise StepTimeout(step, until.seconds or 0.0, quorum, list(have), intake.missing(step))
            if batch is None:
                batch = self._next(self._soon(until))
                if batch is not None:
                    self._take(batch)

    def _more(self) -> bool:
        """Whether there is a batch to take, or something is wrong."""
        reader = self._reader
        return reader is None or reader.closed or reader._channel.delivered()

    def _soon(self, until: Deadline) -> Deadline:
        """When to look again although nothing comes."""
        look, left = max(self._keep, _TIDY_S), until.left()
        return until if left is not None and left <= look else Deadline(look)

    def _tidy(self) -> None:
        now = time.monotonic()
        if now - self._tidied >= min(_TIDY_S, self._keep):
            self._tidied = now
            self._intake.tidy(self._keep)

    def _next(self, until: Deadline) -> Batch | None:
        """The next batch, or None at the deadline, at the end, and after a daemon has gone."""
        reader = self._check()
        if self._ended is not None:
            return None
        try:
            while reader.held >= self.prefetch and self._held:
                if self._heap.bytes < self._spill_bytes:
                    self._spill()
                elif isinstance(reader, RemoteReader):
                    if not reader.failed(until):
                        return None
                    break
                else:
                    if _io.wait(reader._sock.fileno(), select.POLLIN, until):
                        reader._raise_end()
                    return None
            batch = reader.next(until.left())
            if isinstance(reader, RemoteReader):
                self.stats.reconnects += reader.reconnects - self._remade
                self._remade = reader.reconnects
            return batch
        except Timeout:
            return None
        except EndOfStream as e:  # the daemon stops, in order
            if self._patience == 0:
                self._ended = e
                self._intake.end()
            else:
                self._attach_again(until, e)
        except (PeerClosed, Closed) as e:
            if self._sent or self._patience == 0 or (not retried(e) and not reader.closed):
                raise
            self._attach_again(until, e)
        return None

    def _take(self, batch: Batch) -> None:
        held: Held | None = None
        try:
            held = self._intake.take(batch)
        finally:
            if held is None:  # the daemon has gone, or will get it back when there is no room left
                self._held.append(Held(batch))
            elif not held.released:
                self._held.append(held)

    def _spill(self) -> None:
        """Copies what is held of the oldest batch, and releases it."""
        held = self._held.popleft()
        if not held.released:
            self.stats.spilled_bytes += held.spill(self._heap) or 0
            held.release()

    def _release(self, members: list[Transaction]) -> None:
        with self._lock:
            for tx in members:
                tx.drop()
            self._trim()

    def _trim(self) -> None:
        """Forgets batches that are released."""
        self._held = deque(held for held in self._held if not held.released)

    # -- the daemon -----------------------------------------------------------------------------------------------

    def _open(self, until: Deadline) -> Reader:
        return Reader(
            self._address, self.table, None, group=self.group, prefetch=self._prefetch, on_lost="count", check=False,
            token=self._token, tls=self._tls, client=self._client, deadline=until.left(), reconnect=self._patience,
            memory=self._memory_bytes,
        )  # fmt: skip

    def _most(self, reader: Reader) -> int:
        """Batches that may be held. Of those that are sent only half, so that others are on their way all the time."""
        return max(1, reader.prefetch // 2) if self._sent else reader.prefetch

    def _attach_again(self, until: Deadline, why: Error) -> None:
        """Keeps what is whole of what was held, and attaches to the next daemon. Returns at the deadline, too."""
        reader = self._check()
        self._salvage()
        reader.close()
        now = time.monotonic()
        self._away = now if self._away is None else self._away
        while True:
            try:
                again = self._open(Deadline(5.0))
                break
            except Error as e:
                if not retried(e):
                    raise
                last = e
            if self._patience is not None and time.monotonic() - self._away >= self._patience:
                if isinstance(why, EndOfStream):
                    raise why
                raise PeerClosed(f"there was no daemon for {self._patience:g} s; the last try: {last}")
            if until.passed():
                return
            left = until.left()
            time.sleep(_PAUSE_S if left is None else min(_PAUSE_S, left))
        self._away = None
        self.stats.reconnects += 1
        self._reader, self._remade = again, 0
        self._intake.attach_again(again)
        self.prefetch, self.chunk_bytes = self._most(again), self._intake.chunk_bytes

    def _salvage(self) -> None:
        """Copies what is held and whole. What is not comes again, for it was not released."""
        for held in self._held:
            pieces = list(held.pieces)
            copied = 0 if held.released else held.spill(self._heap)
            if copied is None:
                self._intake.lose(pieces)
            self.stats.spilled_bytes += copied or 0
        self._held.clear()

    def _check(self) -> Reader:
        if self._reader is None:
            raise Closed("the reader is closed")
        if self._forks != _io.forks():
            raise Closed("this reader belongs to the parent process; attach a new one after the fork")
        return self._reader

    def __enter__(self) -> GradReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_reader", None) is not None:
            with contextlib.suppress(Exception):
                warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):
                self.close()

    def __repr__(self) -> str:
        return f"<GradReader {self._address} table={self.table!r} group={self.group!r}>"
