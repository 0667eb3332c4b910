"""Weights on the daemon's machine: the segment is mapped, and a page of pins says what is held of it."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np

from . import _io
from ._io import Deadline
from .channel import Fence
from .errors import Closed, Error, FormatError, NoGeneration, PeerClosed, Refused, Timeout
from .incoming import ended
from .lease import Lease
from .weights_segment import PINS_BYTES, Pins, WeightsSegment
from .weights_view import Held, Weights
from .wire import NOTICE, NOTICE_BYTES_MAX, handshake, hello, parse_notice

__all__ = ["LocalSource"]

_NEWS = b"\x01"
_NOTICE_HEAD_BYTES = 5


class Attachment:
    """One attachment of a reader. It lasts until it is retired and the last generation taken of it is given back.

    What it has mapped stays readable for those who hold it, also after the daemon has ended it.
    """

    def __init__(self, address: _io.Address, table: str, wait: bool, client: str, until: Deadline) -> None:
        self._forks = _io.forks()
        self._lock = threading.Lock()
        self._returned: deque[int] = deque()  # places of leases that are over
        self._times: dict[int, int] = {}  # place -> how many leases of it there are
        self._retired = False
        self._rest = b""
        self.table = table
        self.sock = _io.connect(address, until)
        fds: list[int] = []
        try:
            reply = handshake(
                self.sock, hello("subscribe", table, wait=wait, token=address.token, client=client), until, fds
            )
            #: number of this reader in the daemon's life
            self.reader = reply.integer("reader") if "reader" in reply.body else 0
            if len(fds) != 2:
                raise FormatError(f"the daemon passed {len(fds)} descriptors, want 2")
            size = os.fstat(fds[0]).st_size
            if size < reply.integer("segment_bytes", 1):
                raise FormatError(f"the segment has {size} bytes, the daemon said {reply.body['segment_bytes']}")
            if os.fstat(fds[1]).st_size < PINS_BYTES:
                raise FormatError(f"the page of pins has {os.fstat(fds[1]).st_size} bytes, want {PINS_BYTES}")
            self._memory = mmap.mmap(fds[0], size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self.segment = WeightsSegment(self._memory)
            self._pins = Pins(mmap.mmap(fds[1], PINS_BYTES, flags=mmap.MAP_SHARED), self.segment)
        except BaseException:
            self.sock.close()
            raise
        finally:
            _io.close_fds(fds)
        self._address = int(np.frombuffer(self._memory, np.uint8).ctypes.data)
        _io.close_in_child(self)

    def take(self) -> Weights | None:
        """Pins the newest generation; None where there is none. Raises FormatError."""
        segment = self.segment
        with self._locked():
            found = self._pins.pin_newest()
            if found is None:
                return None
            generation, place = found
            self._times[place] = self._times.get(place, 0) + 1
        held = Held(
            segment.manifest,
            generation,
            segment.published(place),
            segment.digest(place),
            lambda: segment.sums(place).copy(),
            self._memory,
            self._address + segment.data(place),
            lambda: self._holds(generation, place),
            self._check,
        )
        return Weights(held, Lease(generation, place, self._give_back))

    def listen(self) -> None:
        """Takes what the daemon has written to the socket. Raises Ended, PeerClosed or FormatError when it ended it."""
        while True:
            try:
                data = self.sock.recv(1 << 12)
            except BlockingIOError:
                return
            except OSError as e:
                raise PeerClosed(f"the daemon went away: {e.strerror or e}") from e
            if not data:
                raise PeerClosed("the daemon went away; its log says why")
            data = self._rest + data if self._rest else data.lstrip(_NEWS)
            if data:
                self._read_notice(data)

    def _read_notice(self, data: bytes) -> None:
        if data[0] != NOTICE:
            raise FormatError(f"the daemon sent {data[0]:#04x} where news (0x01) or a closing notice was due")
        self._rest = data
        if len(data) < _NOTICE_HEAD_BYTES:
            return
        length = int.from_bytes(data[1:_NOTICE_HEAD_BYTES], "little")
        if not 2 <= length <= NOTICE_BYTES_MAX:
            raise FormatError(f"the daemon's closing notice says it has {length} bytes")
        if len(data) >= _NOTICE_HEAD_BYTES + length:
            raise ended(*parse_notice(data[_NOTICE_HEAD_BYTES : _NOTICE_HEAD_BYTES + length]))

    def retire(self) -> None:
        """Detaches when the last generation, and the last array that keeps one, is given back; at once if none is."""
        with self._locked():
            self._retired = True

    def _holds(self, generation: int, place: int) -> bool:
        Fence()()  # what was read before does not slip behind the load; its own, as nobody may wait for another here
        return self.segment.generation(place) == generation

    def _check(self) -> None:
        if self._forks != _io.forks():
            raise Closed("this generation belongs to the parent process; subscribe after the fork")

    def _give_back(self, generation: int, place: int) -> None:
        self._returned.append(place)
        self._settle()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, and then does what others could not do meanwhile."""
        try:
            with self._lock:
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Ends the pins of leases that are over, or leaves that to the one that holds the lock.

        The end of a lease may come from a finalizer, even of this thread in the middle of such a section, so it must
        not wait for the lock. Whoever holds it looks again afterwards.
        """
        while self._due() and self._lock.acquire(False):
            try:
                while self._returned:
                    place = self._returned.popleft()
                    self._times[place] -= 1
                    if self._times[place] == 0:
                        del self._times[place]
                        if self._forks == _io.forks():  # the page of pins is the parent's too
                            self._pins.let_go(place)
                if self._retired and not self._times:
                    self.sock.close()
            finally:
                self._lock.release()

    def _due(self) -> bool:
        return bool(self._returned) or (self._retired and not self._times and self.sock.fileno() >= 0)

    def _forked(self) -> None:
        """In the child of a fork: the parent's attachment must not stay open because of the child."""
        self.sock.close()


class LocalSource:
    """Attaches, and attaches again when the weights have another manifest, or when the daemon had gone.

    Of the threads that call it, one at a time looks after the socket. The others look at the memory alone, and wait for
    that one.
    """

    def __init__(self, address: _io.Address, table: str, client: str, until: Deadline) -> None:
        self._address, self._table, self._client = address, table, client
        self._attached: Attachment | None = None
        self._state = threading.Condition(threading.Lock())
        self._led = False
        self._bell = _io.Bell()
        self._closed = False
        self._forks = _io.forks()
        self._last = 0  # the newest generation that was seen
        self._before = 0  # numbers up to this one are of an earlier life of the daemon
        with contextlib.suppress(NoGeneration):
            self._attach(False, until)

    def latest(self, until: Deadline) -> Weights:
        """The newest generation. Raises NoGeneration, Closed, Timeout, Refused, and as the daemon ended the socket."""
        while True:
            with self._leading() as leads:
                attached = self._current(False, until) if leads else self._attached
                if attached is not None:
                    weights = self._take(attached, 0)
                    if weights is None:
                        raise self._nothing()
                    return weights
            self._follow(until, "waiting for another thread that attaches")

    def wait(self, newer_than: int, until: Deadline) -> Weights:
        """The newest generation, when it is above ``newer_than``. Raises as :meth:`latest`, but for NoGeneration."""
        while True:
            with self._leading() as leads:
                attached = self._current_patiently(until) if leads else self._attached
                weights = self._take(attached, newer_than) if attached is not None else None
                if weights is not None:
                    return weights
                if leads and attached is not None:
                    self._sleep(attached, newer_than, until)
                    continue
            self._follow(until, f"waiting for a generation of table {self._table!r} above {newer_than}")

    def close(self) -> None:
        """Ends waiting calls (Closed). What is held stays so."""
        self._closed = True
        if self._forks == _io.forks():  # in a child the bell is the parent's
            self._bell.ring()
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.retire()

    @property
    def reader(self) -> int:
        """Number of this reader in the daemon's life; 0 while it is not attached."""
        return self._attached.reader if self._attached is not None else 0

    def _take(self, attached: Attachment, newer_than: int) -> Weights | None:
        """Numbers from before a restart of the daemon are above those of the one that serves now, and older."""
        newest = attached.segment.newest()
        if newest is None:
            return None
        generation = newest.generation
        if generation < self._last:
            self._before = max(self._before, self._last)
        self._last = generation
        return attached.take() if generation > newer_than or generation < newer_than <= self._before else None

    def _current(self, wait: bool, until: Deadline) -> Attachment:
        """The attachment, made again where it has ended. Raises as the daemon ended it, once."""
        attached = self._attached
        if attached is not None:
            try:
                attached.listen()
                return attached
            except Error as e:
                self._attached = None
                attached.retire()
                if getattr(e, "code", "") != "replaced":
                    raise
        return self._attach(wait, until)

    def _current_patiently(self, until: Deadline) -> Attachment:
        try:
            return self._current(True, until)
        except Timeout as e:
            raise until.timeout(f"attaching to table {self._table!r} and waiting for its first generation") from e

    def _attach(self, wait: bool, until: Deadline) -> Attachment:
        try:
            attached = Attachment(self._address, self._table, wait, self._client, until)
        except Refused as e:
            if e.code == "no_generation":
                raise self._nothing() from None
            raise
        self._attached = attached
        if self._closed:
            self.close()
            raise Closed("the subscription is closed")
        return attached

    def _nothing(self) -> NoGeneration:
        return NoGeneration(f"nothing was published to table {self._table!r} yet; wait() waits for it")

    def _sleep(self, attached: Attachment, newer_than: int, until: Deadline) -> None:
        """Until there may be a newer generation, or the connection has ended."""
        poll = select.poll()
        for fd in (attached.sock.fileno(), self._bell.fd):
            poll.register(fd, select.POLLIN)
        if not poll.poll(until.milliseconds()):
            newest = attached.segment.newest()
            there = f"the newest is {newest.generation}" if newest else "there is none"
            raise until.timeout(f"waiting for a generation of table {self._table!r} above {newer_than}; {there}")

    @contextlib.contextmanager
    def _leading(self) -> Iterator[bool]:
        """Whether this thread is the one that looks after the socket meanwhile."""
        if self._forks != _io.forks():
            raise Closed("this subscription belongs to the parent process; subscribe after the fork")
        with self._state:
            if self._closed:
                raise Closed("the subscription is closed")
            leads, self._led = not self._led, True
        try:
            yield leads
        finally:
            if leads:
                with self._state:
                    self._led = False
                    self._state.notify_all()

    def _follow(self, until: Deadline, doing: str) -> None:
        """Until the one that looks after the socket has seen something."""
        with self._state:
            left = until.left()
            if self._led and (left == 0 or not self._state.wait(left)):
                raise until.timeout(doing)
