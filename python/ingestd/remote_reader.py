"""A Reader whose batches are sent to it: :class:`RemoteReader`, which ``Reader("tcp://...")`` makes."""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections import deque
from typing import Any, Literal

from . import _io
from ._io import Deadline
from .auth import Token
from .batch import Batch
from .channel import Descriptor
from .errors import AllHeld
from .reader import Reader
from .received import Places, ReceivedWindow, Receiver
from .redial import PATIENCE_S
from .spec import Spec
from .tls import TLS
from .version import CLIENT
from .wire import hello

__all__ = ["RemoteReader"]

#: Most bytes for batches, unless told otherwise.
MEMORY_BYTES = 4 << 30


class RemoteReader(Reader):
    """A Reader of a daemon on another machine. Make it with ``Reader("tcp://host:port", ...)``.

    One thread receives batches into memory of this process, ``prefetch`` of them at most, and connects again by itself.
    What was not released when a connection broke the daemon offers again to the group: ``batch.seq`` tells.
    """

    def __init__(
        self,
        address: str,
        table: str,
        spec: Spec | str | None = None,
        *,
        group: str | None = None,
        prefetch: int | None = None,
        on_lost: Literal["raise", "count"] = "raise",
        check: bool | None = None,
        client: str = CLIENT,
        token: Token | str | None = None,
        tls: TLS | None = None,
        deadline: float | None = 10.0,
        reconnect: float | None = PATIENCE_S,
        memory: int = MEMORY_BYTES,
    ) -> None:
        self._closed = True
        self.address = _io.parse_address(address, token, tls)
        want = Spec.parse(spec) if isinstance(spec, str) else spec
        if on_lost not in ("raise", "count"):
            raise ValueError(f"on_lost={on_lost!r}: want 'raise' or 'count'")
        self._checked = os.environ.get("INGESTD_CHECK", "0") not in ("", "0") if check is None else check
        self._forks = _io.forks()
        self._taking, self._giving = threading.Lock(), threading.Lock()
        self._returned: deque[tuple[int, int]] = deque()
        self._retired = False
        self._raise_lost = on_lost == "raise"
        self.lost = 0
        self._held: weakref.WeakValueDictionary[int, Batch] = weakref.WeakValueDictionary()
        self._leased = 0
        body = hello(
            "train",
            table,
            want,
            group=group,
            prefetch=prefetch or 0,
            session=secrets.token_hex(16),  # the daemon takes back what an earlier connection of this reader holds
            token=self.address.token,
            client=client,
        )
        if self.address.kind == "unix":
            body["stream"] = True
        self._receiver = Receiver(self.address, body, _io.deadline_of(deadline), reconnect, memory)
        self._channel: Any = self._receiver
        places = self._receiver.places
        assert places is not None
        self._segment: Any = places
        self._places = places
        reply = self._receiver.reply
        self.spec, self.batch_size, self.table = places.spec, places.batch_size, table
        self.trainer = reply.integer("trainer")
        self.group = str(reply.body.get("group", group or "default"))
        self.prefetch = self._receiver.capacity
        self._closed = False
        _io.close_in_child(self)

    @property
    def reconnects(self) -> int:
        """Connections made after the first."""
        return self._receiver.reconnects

    @property
    def places(self) -> Places:
        """Where batches lie."""
        return self._places

    def failed(self, until: Deadline) -> bool:
        """Waits until it has failed for good; whether it has by then."""
        return self._receiver.failed(until)

    def _wait(self, until: Deadline) -> None:
        with self._locked():
            if self._leased >= self._receiver.capacity and self._receiver.full():
                raise AllHeld(
                    f"this reader holds {self._leased} batches and may hold {self._receiver.capacity}; release one "
                    "(and the arrays that keep it) before the next, or attach with a larger prefetch"
                )
        self._receiver.wait(until, f"waiting for a batch of table {self.table!r}")

    def _batch(self, lease: Descriptor) -> Batch:
        window = ReceivedWindow(self._places.memory[lease.place], self._checked)
        batch = Batch(self._segment, self.spec, lease, window, self._give_back)
        with self._locked():
            self._leased += 1
            self._held[lease.number] = batch
        return batch

    def _disconnect(self, why: str) -> None:
        with self._locked():
            self._closed = True
            for batch in list(self._held.values()):
                batch._lose(why)
        self._receiver.close()

    def _forked(self) -> None:
        self._closed = True
        for batch in list(self._held.values()):
            batch._lose("this batch belongs to the parent process; attach a new reader after the fork")
        self._receiver.sock.close()
