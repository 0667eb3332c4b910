"""The channel between a trainer or filler and the daemon: two queues of descriptors in shared memory, two eventfds.

The layout and the rules are those of ``docs/segment-format.md``, "Channel". Each side writes only its own words; the
other side's are loaded once, checked, and then used.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
from typing import Any, NamedTuple

from ._io import Deadline
from .errors import FormatError

__all__ = ["Channel", "Descriptor", "Fence"]

MAGIC = b"INGDCHN1"
VERSION = 1
HEADER_BYTES = 64
CAPACITY_MAX = 65_536

# Offsets inside a queue.
_PRODUCED, _CONSUMED, _WAITING, _CLOSED, _ITEMS = 0, 64, 128, 192, 256


class Fence:
    """Orders every access before the call with every access after it.

    Taking and freeing a lock is an atomic read-modify-write. On x86 one of them is a full fence. On arm64 the
    release of the first and the acquire of the second, which are not reordered with each other, make one together.
    """

    def __init__(self) -> None:
        self._a, self._b = threading.Lock(), threading.Lock()

    def __call__(self) -> None:
        with self._a:
            pass
        with self._b:
            pass


class Descriptor(NamedTuple):
    """Two words: ``number``, and ``place`` and ``rows`` as the low and high half of the second.

    Of a trainer: number of the batch, place where it lies, rows that hold samples (0 on the way back). Of a filler: the
    lease, its place (0 rows); on the way back the lease, how many rows, and what is said of them (a VERB).
    """

    number: int
    place: int
    rows: int


class _Queue:
    """One queue in shared memory. Words are read and written whole: memoryview items are single loads and stores."""

    def __init__(self, memory: memoryview, offset: int, capacity: int) -> None:
        size = _ITEMS + 16 * capacity
        self.words = memory[offset : offset + size].cast("Q")
        self.halves = memory[offset : offset + size].cast("I")
        self.capacity = capacity
        self.fence = Fence()
        self.mine = 0  # this side's cursor; the shared word is only ever written from it
        self.theirs = 0  # the other side's cursor as last read

    def take(self) -> Descriptor | None:
        """The next descriptor, as the consumer; None when there is none now."""
        words = self.words
        if self.theirs == self.mine:
            produced = words[_PRODUCED // 8]
            if not 0 <= produced - self.mine <= self.capacity:
                raise FormatError(
                    f"channel: {produced} descriptors produced after {self.mine} consumed; detach and attach"
                )
            self.theirs = produced
            if produced == self.mine:
                return None
            self.fence()  # edge(deliver): acquire - after the load of produced, descriptors below it are complete
        at = (_ITEMS + 16 * (self.mine & (self.capacity - 1))) // 8
        number, place = words[at], words[at + 1]
        self.fence()  # edge(consume): release - the descriptor was read before its slot is given back
        self.mine += 1
        words[_CONSUMED // 8] = self.mine
        return Descriptor(number, place & 0xFFFFFFFF, place >> 32)

    def room(self) -> int:
        """How many descriptors may be pushed now, as the producer."""
        return self.capacity - (self.mine - self.taken())

    def taken(self) -> int:
        """How many descriptors the consumer has taken, as the producer."""
        consumed = self.words[_CONSUMED // 8]
        if not self.theirs <= consumed <= self.mine:
            raise FormatError(f"channel: {consumed} descriptors consumed of {self.mine}; detach and attach again")
        self.theirs = consumed
        self.fence()  # edge(consume): acquire - slots below consumed are ours to write again, what they asked is done
        return consumed

    def put(self, item: Descriptor) -> bool:
        """Pushes one descriptor, as the producer, and says whether the consumer must be woken."""
        words = self.words
        if self.mine - self.theirs >= self.capacity and self.room() <= 0:
            raise FormatError(f"channel: the daemon does not take descriptors back; {self.capacity} are waiting")
        at = (_ITEMS + 16 * (self.mine & (self.capacity - 1))) // 8
        words[at] = item.number
        words[at + 1] = item.rows << 32 | item.place
        # edge(giveback): release - the descriptor, reads of the batch and rows of the place come before the new count
        self.fence()
        self.mine += 1
        words[_PRODUCED // 8] = self.mine
        self.fence()  # the count is seen before consumer_waiting is read: one of both sides sees the other
        return self.halves[_WAITING // 4] != 0

    def empty(self) -> bool:
        return self.words[_PRODUCED // 8] == self.mine

    @property
    def closed(self) -> bool:
        return self.halves[_CLOSED // 4] != 0

    def close(self) -> None:
        """Says that nothing follows what was put, as the producer."""
        self.fence()  # edge(shared-close): release - produced has its last value before this store is seen
        self.halves[_CLOSED // 4] = 1

    def set_waiting(self, waiting: bool) -> None:
        self.halves[_WAITING // 4] = 1 if waiting else 0


class Channel:
    """The side of a trainer, or of a producer that fills in place.

    ``memory`` is the channel's memory, writable; ``wake`` the eventfd that wakes this side, ``signal`` the one that
    wakes the daemon. Raises FormatError where the header is not sound. The descriptors remain the caller's.
    """

    def __init__(self, memory: Any, wake: int, signal: int) -> None:
        view = memoryview(memory).cast("B")
        if len(view) < HEADER_BYTES:
            raise FormatError(f"the channel has {len(view)} bytes, its header alone has {HEADER_BYTES}")
        magic, version, capacity, deliver, giveback, size = struct.unpack_from("<8sIIQQQ", view)
        if magic != MAGIC:
            raise FormatError(f"the memory starts with {magic!r}, a channel with {MAGIC!r}")
        if version != VERSION:
            raise FormatError(f"the channel has version {version}; this package reads version {VERSION}")
        if not 2 <= capacity <= CAPACITY_MAX or capacity & (capacity - 1):
            raise FormatError(f"the channel's capacity is {capacity}, want a power of two of 2 to {CAPACITY_MAX}")
        if not HEADER_BYTES <= size <= len(view):
            raise FormatError(f"the channel says it has {size} bytes, its memory has {len(view)}")
        need = _ITEMS + 16 * capacity
        for name, offset in (("deliver", deliver), ("giveback", giveback)):
            if offset % 64 or offset < HEADER_BYTES or offset + need > size:
                raise FormatError(
                    f"the channel's queue {name} at {offset} is not aligned or does not fit into {size} bytes"
                )
        if abs(deliver - giveback) < need:
            raise FormatError("the channel's queues overlap")
        self.capacity = int(capacity)
        self._deliver = _Queue(view, deliver, capacity)
        self._giveback = _Queue(view, giveback, capacity)
        self._wake = wake
        self._signal = signal

    def take(self) -> Descriptor | None:
        """The next descriptor that the daemon delivered, or None when there is none now."""
        return self._deliver.take()

    def give_back(self, number: int, place: int) -> None:
        """Gives a batch back, and wakes the daemon where it sleeps."""
        self.say(number, place, 0)

    def say(self, number: int, low: int, verb: int) -> int:
        """Pushes a descriptor to the daemon and wakes it where it sleeps; how many were pushed in all."""
        if self._giveback.put(Descriptor(number, low, verb)):
            with contextlib.suppress(BlockingIOError):  # full: it is awake already
                os.write(self._signal, b"\1\0\0\0\0\0\0\0")

        return self._giveback.mine

    def room(self) -> int:
        """How many descriptors may be pushed to the daemon now. Raises FormatError."""
        return self._giveback.room()

    def taken(self) -> int:
        """How many descriptors the daemon has taken, and done what they say. Raises FormatError."""
        return self._giveback.taken()

    def leave(self) -> None:
        """Says that nothing follows what was given back, so that this side is not taken for dead."""
        self._giveback.close()

    @property
    def closed(self) -> bool:
        """True when nothing follows what was delivered so far."""
        return self._deliver.closed

    def announce(self, waiting: bool) -> None:
        """Says whether this side sleeps, or is about to. After True, look again before sleeping."""
        self._deliver.set_waiting(waiting)
        self._deliver.fence()  # consumer_waiting is seen before the queues are read again

    def delivered(self) -> bool:
        """Whether there is something to take, or nothing more will be."""
        return not self._deliver.empty() or self._deliver.closed

    def drained(self) -> bool:
        """True at the end of the stream: closed, and everything that was delivered was taken."""
        if not self._deliver.closed:
            return False
        self._deliver.fence()  # closed is stored after the last descriptor
        return self._deliver.empty()

    def wait(self, sock: int, deadline: Deadline) -> tuple[bool, bool]:
        """Sleeps until something may have been delivered; ``(woken, socket is readable or at its end)``."""
        queue = self._deliver
        queue.set_waiting(True)
        try:
            queue.fence()  # consumer_waiting is seen before the queue is read again
            if not queue.empty() or queue.closed:
                return True, False
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(sock, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(deadline.milliseconds())}
        finally:
            queue.set_waiting(False)
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 8)
        return self._wake in ready, sock in ready
