"""A step that was read: :class:`GradStep`. And what a reader counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from .encodings import decode
from .errors import PeerClosed, Released
from .gather import Transaction
from .manifest import Manifest
from .spec import Array
from .sums import Floats, Out, Plan, outputs

__all__ = ["GradStats", "GradStep"]


@dataclass
class GradStats:
    """Counts of one :class:`GradReader`."""

    #: steps that were returned
    completed_steps: int = 0
    #: steps of a producer that were dropped before they were complete
    dropped_incomplete: int = 0
    #: chunks of steps that had been returned before
    late: int = 0
    #: chunks that were damaged, in a wrong place, or overlapped others
    bad_chunks: int = 0
    #: chunks of steps that were complete already, or that had come before
    duplicates: int = 0
    #: chunks that the daemon marked as too old
    refused: int = 0
    #: bytes that were copied because the reader may hold no more batches
    spilled_bytes: int = 0
    #: attachments that were made after the first one
    reconnects: int = 0


class GradStep:
    """A step of those producers that were complete: ``have``, by name; ``missing`` says why each other one is not.

    A context manager that releases on exit. Until the release its bytes stay in the daemon's memory, or are copied
    where the reader must make room.
    """

    def __init__(
        self,
        step: int,
        manifest: Manifest,
        members: Mapping[str, Transaction],
        missing: dict[str, str],
        plan: Plan | None,
        cell_bytes: int,
        lock: threading.RLock,
        release: Callable[[list[Transaction]], None],
    ) -> None:
        #: number of the step
        self.step = step
        #: the tensors of the step
        self.manifest = manifest
        #: names of the producers that are complete, in the order in which they are summed
        self.have = list(members)
        #: why each other producer that is known is not complete
        self.missing = missing
        self._members: list[Transaction] | None = list(members.values())
        self._plan = plan
        self._cell_bytes = cell_bytes
        self._lock = lock  # the reader's: it must not move bytes that are being summed
        self._give_back = release

    def sum(self, out: Mapping[str, Floats] | None = None) -> Out:
        """The sums by tensor, in float32, into ``out``: contiguous arrays of the tensors' shapes.

        None takes the arrays that were given as ``into``, or makes new ones for all tensors of F32, F16 and BF16. Of a
        dict only the tensors in it are summed. Raises Released, KeyError, TensorMismatch, SpecError; PeerClosed when
        the daemon took the memory back meanwhile, which it does only where it died and was started again.
        """
        with self._lock:
            members, plan = self._ready(out)
            plan.finish(members)
            self._check_intact(members)
            return plan.out

    def mean(self, out: Mapping[str, Floats] | None = None) -> Out:
        """As :meth:`sum`, each divided by the number of producers that have the tensor, in float32."""
        with self._lock:
            members, plan = self._ready(out)
            plan.finish(members)
            plan.divide(members)
            self._check_intact(members)
            return plan.out

    def tensor(self, producer: str, name: str) -> Array:
        """A copy of what one producer sent of a tensor: in its dtype, or as float32 where it has an encoding.

        Raises KeyError where the producer is not in :attr:`have`, or did not send it; Released, PeerClosed.
        """
        with self._lock:
            members = self._check()
            if producer not in self.have:
                raise KeyError(f"producer {producer!r} is not complete in step {self.step}")
            tx, i = members[self.have.index(producer)], self.manifest.index(name)
            if not tx.has_tensor(i):
                raise KeyError(f"producer {producer!r} sent a step without tensor {name!r}")
            raw = tx.assembled(i)
            self._check_intact([tx])
        return decode(self.manifest[i], raw)

    def release(self) -> None:
        """Gives the memory back; further calls do nothing."""
        members, self._members, self._plan = self._members, None, None
        if members is not None:
            self._give_back(members)

    def _ready(self, out: Mapping[str, Floats] | None) -> tuple[list[Transaction], Plan]:
        members = self._check()
        plan = self._plan
        if plan is None or (out is not None and not _same(out, plan.out)):
            plan = Plan(self.manifest, outputs(self.manifest, out), self._cell_bytes)
            if self._plan is None:
                self._plan = plan
        return members, plan

    def _check(self) -> list[Transaction]:
        if self._members is None:
            raise Released(f"step {self.step} was released; its memory may hold other steps")
        return self._members

    def _check_intact(self, members: list[Transaction]) -> None:
        if not all(tx.intact() for tx in members):
            raise PeerClosed(f"the daemon took chunks of step {self.step} back while they were read")

    def __enter__(self) -> GradStep:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<GradStep {self.step}: {len(self.have)} producers{', released' if self._members is None else ''}>"


def _same(a: Mapping[str, Floats], b: Mapping[str, Floats]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
