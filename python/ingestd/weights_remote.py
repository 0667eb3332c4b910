"""Weights over a connection: one thread receives the newest generation, verifies it, and then shows it."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _io
from ._io import Deadline
from .errors import BadSum, Closed, Error, FormatError, NoGeneration, PeerClosed, Refused, Timeout
from .incoming import ended
from .lease import Lease
from .manifest import Manifest
from .redial import longest_pause, retried
from .spec import Array
from .weights_receive import ANNOUNCEMENT_BYTES_MAX, Announcement, Buffer, Transfer
from .weights_view import Held, Weights
from .wire import NOTICE, NOTICE_BYTES_MAX, Reply, handshake, hello, json_object, parse_notice

__all__ = ["RemoteSource", "RemoteStats"]

#: Bytes that are received at once: they are summed while the caches hold them.
RECEIVE_BYTES = 256 << 10
#: Seconds without a byte inside a generation after which the connection is made anew.
STALL_S = 30.0
#: Seconds that one try to connect may take.
TRY_S = 5.0
#: Seconds after which a connection on which the first generation is waited for is made anew.
FIRST_S = 60.0
_SHOWN, _DAMAGED = b"\x01", b"\x02"


class RemoteStats(NamedTuple):
    """What a subscription over a connection has done so far."""

    generations: int = 0  #: shown
    deltas: int = 0  #: of those, received as what differs from the one before
    bytes: int = 0  #: received
    resumed: int = 0  #: transfers that went on where they had broken off
    bad_sums: int = 0  #: generations that came damaged, and were asked for again
    reconnects: int = 0  #: connections made after the first
    buffers: int = 0  #: generations that there is memory for


class _Stopped(Exception):
    """The subscription was closed."""


class _NoAnswer(Exception):
    """Nothing was published yet, as far as that is known."""


class _Full(Exception):
    """Callers hold all the memory that there may be."""


class RemoteSource:
    """Receives a table's generations, always the newest, each into memory that nobody looks at before it is whole.

    While callers hold all the memory there may be, there is no connection: the daemon is not to wait for them. A
    connection that breaks is made again, and a transfer goes on where it broke off.
    """

    def __init__(
        self,
        address: _io.Address,
        table: str,
        client: str,
        until: Deadline,
        delta: bool,
        buffers: int,
        reconnect: float | None,
    ) -> None:
        if buffers < 2:
            raise ValueError(f"buffers={buffers}: at least 2 are needed, one to show and one to receive into")
        self._address, self._table, self._client = address, table, client
        self._delta, self._buffers_max, self._patience = delta, buffers, reconnect
        self._forks = _io.forks()
        self._state = threading.Condition(threading.Lock())
        self._returned: deque[Buffer] = deque()  # of leases that are over
        self._bell = _io.Bell()  # for the thread
        self._closed = False
        self._error: Error | None = None  # why it has ended
        self._trouble: Error | None = None  # why there is no connection now, or the last generation was not shown
        self._none_yet = False  # the daemon says that nothing was published
        self._full = False
        self._before = 0  # numbers up to this one are of an earlier life of the daemon
        self._latest: Buffer | None = None
        self._spare: list[Buffer] = []
        self._buffers = 0
        self.stats = RemoteStats()
        #: number of this reader in the daemon's life
        self.reader = 0
        self._manifest: Manifest | None = None
        self._sock: _io.Conn | None = None
        # Of the thread alone.
        self._partial: Transfer | None = None  # a whole generation of which a part is here
        self._since = time.monotonic()  # when the newest connection was made
        self._down: float | None = None  # when it ended; None: there is one
        self._spent = 0.0  # without a connection before, since one brought something
        self._damaged: float | None = None  # since when generations come damaged
        try:
            self._connect(False, until, until)
        except Refused as e:
            if e.code != "no_generation":
                raise
            self._none_yet = True
        self._thread = threading.Thread(target=self._run, name="ingestd-weights", daemon=True)
        self._thread.start()
        _io.close_in_child(self)

    # -- calls of the subscription --------------------------------------------------------------------------------

    def latest(self, until: Deadline) -> Weights:
        """The newest generation that is here; waits for the first one while it is on its way."""
        with self._locked():
            while True:
                self._check()
                if self._error is not None:
                    raise self._error
                if self._latest is not None:
                    return self._take(self._latest)
                if self._none_yet:
                    raise NoGeneration(f"nothing was published to table {self._table!r} yet; wait() waits for it")
                self._sleep(until, "receiving the first generation")

    def wait(self, newer_than: int, until: Deadline) -> Weights:
        """The newest generation that is here, when it is above ``newer_than``."""
        with self._locked():
            while True:
                self._check()
                latest = self._latest
                if latest is not None and self._newer(latest.generation, newer_than):
                    return self._take(latest)
                if self._error is not None:
                    raise self._error
                there = f"the newest is {latest.generation}" if latest is not None else "there is none"
                self._sleep(until, f"waiting for a generation of table {self._table!r} above {newer_than}; {there}")

    def close(self) -> None:
        """Ends waiting calls (Closed). What is held stays so."""
        if self._forks != _io.forks():
            return
        with self._locked():
            self._closed = True
            self._spare.clear()
            self._state.notify_all()
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
        self._bell.ring()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _newer(self, generation: int, than: int) -> bool:
        """Numbers from before a restart of the daemon are above those of the one that serves now, and older."""
        return generation > than or generation < than <= self._before

    def _check(self) -> None:
        if self._closed:
            raise Closed("the subscription is closed")

    def _sleep(self, until: Deadline, doing: str) -> None:
        left = until.left()
        if left == 0 or not self._state.wait(left):
            error = until.timeout(doing)
            if self._full:
                error = Timeout(f"{error}; callers hold all {self._buffers} generations that there is memory for")
            elif self._trouble is not None:
                error = Timeout(f"{error}; {self._trouble}")
            raise error

    def _take(self, buffer: Buffer) -> Weights:
        buffer.holds += 1
        held = Held(
            buffer.manifest,
            buffer.generation,
            buffer.published,
            buffer.digest,
            buffer.sums.copy,
            buffer.memory,
            buffer.address,
            lambda: True,
            self._check_fork,
        )
        return Weights(held, Lease(buffer.generation, 0, lambda generation, place: self._give_back(buffer)))

    def _check_fork(self) -> None:
        if self._forks != _io.forks():
            raise Closed("this generation belongs to the parent process; subscribe after the fork")

    def _give_back(self, buffer: Buffer) -> None:
        self._returned.append(buffer)
        self._settle()
        if self._full:
            self._bell.ring()  # the thread looks for itself, where somebody else had the lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, and then does what others could not do meanwhile."""
        if self._forks != _io.forks():
            raise Closed("this subscription belongs to the parent process; subscribe after the fork")
        try:
            with self._state:
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Takes buffers back, or leaves that to the one that holds the lock: see weights_local."""
        while self._returned and self._state.acquire(False):
            try:
                self._take_back()
            finally:
                self._state.release()

    def _take_back(self) -> None:
        """Takes back what callers have let go of. Wants the lock."""
        while self._returned:
            buffer = self._returned.popleft()
            buffer.holds -= 1
            if buffer.holds == 0 and buffer is not self._latest:
                self._recycle(buffer)

    def _recycle(self, buffer: Buffer) -> None:
        """Keeps memory that nobody uses for the next generation, or lets it go where there is some. Wants the lock."""
        if not self._spare and not self._closed and buffer.manifest is self._manifest:
            self._spare.append(buffer)
        else:
            self._buffers -= 1
        if self._full:
            self._bell.ring()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Receives until the subscription ends, and connects again as long as there is patience."""
        error: Error | None = None
        try:
            while not self._closed:
                try:
                    if self._sock is None:
                        self._reconnect()
                    else:
                        self._receive()
                except _Full:
                    self._disconnect()
                    self._await_room()
                except Error as e:
                    self._disconnect()
                    self._look_further(e)
        except _Stopped:
            pass
        except Error as e:
            error = e
        except BaseException as e:
            error = Error(f"receiving weights failed: {e!r}")
            error.__cause__ = e
        finally:
            self._disconnect()
            with self._locked():
                self._error = error
                self._state.notify_all()

    def _look_further(self, error: Error) -> None:
        """Raises what is final: errors that stay true, and any when patience is over."""
        if self._closed:
            raise _Stopped
        if isinstance(error, Refused) and error.code == "no_generation":
            self._down, self._spent = None, 0.0
            with self._locked():
                self._none_yet = True
            return
        now = time.monotonic()
        if self._down is None:
            self._down = now
            # A connection over which nothing comes is no end of an outage, unless it stands for long.
            if self._patience is not None and now - self._since >= self._patience:
                self._spent = 0.0
        outage = self._spent + now - self._down
        if not retried(error):
            raise error
        if self._patience is not None and outage >= self._patience:
            if self._patience == 0:
                raise error
            raise PeerClosed(f"there was no connection for {self._patience:g} s; the last try: {error}")
        with self._locked():
            self._trouble = error
        if outage:  # the first try is made at once
            self._pause(random.uniform(0, longest_pause(outage)))

    def _reconnect(self) -> None:
        try:
            self._connect(True, Deadline(TRY_S), Deadline(FIRST_S))
        except _NoAnswer:
            self._down, self._spent = None, 0.0
            return  # there is a daemon, and nothing was published yet
        self._since = time.monotonic()
        if self._down is not None:
            self._spent, self._down = self._spent + self._since - self._down, None
        with self._locked():
            self._none_yet, self._trouble = False, None
            self.stats = self.stats._replace(reconnects=self.stats.reconnects + 1)

    def _connect(self, wait: bool, until: Deadline, answered: Deadline) -> None:
        options: dict[str, Any] = {"wait": wait, "stream": self._address.kind == "unix", "client": self._client}
        options.update(delta=self._delta, token=self._address.token)
        latest, partial = self._latest, self._partial
        if latest is not None:
            options.update(have=latest.generation, have_digest=latest.digest.hex())
        if partial is not None:
            of = partial.announced
            options.update(resume=of.generation, resume_digest=of.digest.hex(), resume_offset=partial.came)
        sock = _io.connect(self._address, until)
        with self._locked():
            self._sock = sock
        try:
            if self._closed:  # it was before there was a socket to shut down
                raise _Stopped
            self._agree(handshake(sock, hello("subscribe", self._table, **options), answered))
        except Timeout as e:
            self._disconnect()
            if wait:
                raise _NoAnswer from e
            raise
        except BaseException:
            self._disconnect()
            raise

    def _agree(self, reply: Reply) -> None:
        """Takes the manifest of a reply: another one replaces the one before, and all memory that nobody holds."""
        try:
            manifest = Manifest.from_dict(reply.body.get("manifest"))
        except (Error, ValueError) as e:
            raise FormatError(f"the manifest of the table cannot be read: {e}") from e
        self.reader = reply.integer("reader") if "reader" in reply.body else 0
        if manifest == self._manifest:
            return
        self._forget_partial()
        with self._locked():
            self._manifest = manifest
            self._buffers -= len(self._spare)
            self._spare.clear()

    def _disconnect(self) -> None:
        with self._locked():
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _receive(self) -> None:
        """One generation, from its announcement to the answer."""
        manifest = self._manifest
        assert manifest is not None
        (length,) = struct.unpack("<I", self._exactly(4, None))
        if length == 0:
            self._read_notice()
        if not 2 <= length <= ANNOUNCEMENT_BYTES_MAX:
            raise FormatError(f"a generation was announced with {length} bytes, want 2 to {ANNOUNCEMENT_BYTES_MAX}")
        fields = json_object(self._exactly(length, STALL_S), "the announcement of a generation")
        announced = Announcement.parse(fields, manifest)
        base, buffer = self._prepare(announced, manifest)
        sums = np.frombuffer(self._exactly(4 * len(manifest), STALL_S), np.dtype("<u4"))
        transfer = self._begin(announced, manifest, sums, buffer, base)
        before = transfer.came
        try:
            self._fill(transfer)
        except BaseException:
            self._keep(transfer, base)
            raise
        finally:
            self._count(bytes=transfer.came - before)
        if transfer.damaged:
            error = BadSum(f"generation {announced.generation} came damaged: tensor {transfer.damaged!r}")
            self._count(bad_sums=1)
            with self._locked():
                self._trouble = error
                self._recycle(transfer.buffer)
            if self._damaged is None:
                self._damaged = time.monotonic()
            self._send(_DAMAGED)
            self._pause(random.uniform(0, longest_pause(time.monotonic() - self._damaged)))
            return
        try:
            self._send(_SHOWN)
        finally:
            self._show(transfer, base is not None)

    def _prepare(self, announced: Announcement, manifest: Manifest) -> tuple[Buffer | None, Buffer | None]:
        """What the generation differs from, and memory for it; that is None where a part of it is here."""
        partial, latest = self._partial, self._latest
        if announced.start:
            of = None if partial is None else partial.announced
            if partial is None or of is None or (of.generation, of.digest, partial.came) != (
                announced.generation, announced.digest, announced.start,
            ):  # fmt: skip
                raise FormatError(
                    f"generation {announced.generation} was announced from byte {announced.start} on, which is not "
                    "what was asked for"
                )
            return None, None
        self._forget_partial()
        base = latest if announced.base else None
        if announced.base and (base is None or base.generation != announced.base or base.manifest is not manifest):
            raise FormatError(
                f"generation {announced.generation} was announced as what differs from {announced.base}, which is "
                "not here"
            )
        with self._locked():
            self._take_back()
            if self._spare:
                return base, self._spare.pop()
            if self._buffers >= self._buffers_max:
                self._full = True
                raise _Full
            self._buffers += 1
        try:
            return base, Buffer(manifest)
        except BaseException:
            with self._locked():
                self._buffers -= 1
            raise

    def _begin(
        self,
        announced: Announcement,
        manifest: Manifest,
        sums: NDArray[np.uint32],
        buffer: Buffer | None,
        base: Buffer | None,
    ) -> Transfer:
        if buffer is None:
            partial, self._partial = self._partial, None
            assert partial is not None
            partial.check_digest(sums)
            self._count(resumed=1)
            return partial
        try:
            return Transfer(manifest, announced, sums, buffer, base)
        except BaseException:
            with self._locked():
                self._recycle(buffer)
            raise

    def _fill(self, transfer: Transfer) -> None:
        """Receives the bytes of a generation."""
        moved = 0
        while True:
            room = transfer.room()
            if room is None:
                return
            n = self._some(room[:RECEIVE_BYTES], STALL_S)
            transfer.take(n)
            moved += n
            if moved >= RECEIVE_BYTES:
                self._spent = 0.0

    def _keep(self, transfer: Transfer, base: Buffer | None) -> None:
        """Keeps what came of a whole generation for the next connection. A difference is sent again: it is little."""
        if base is None and transfer.came and not transfer.damaged:
            self._partial = transfer
            return
        with self._locked():
            self._recycle(transfer.buffer)

    def _forget_partial(self) -> None:
        partial, self._partial = self._partial, None
        if partial is not None:
            with self._locked():
                self._recycle(partial.buffer)

    def _show(self, transfer: Transfer, delta: bool) -> None:
        of, buffer = transfer.announced, transfer.buffer
        buffer.generation, buffer.published, buffer.digest = of.generation, of.published, of.digest
        self._spent, self._damaged = 0.0, None
        with self._locked():
            old, self._latest = self._latest, buffer
            self._none_yet, self._trouble = False, None
            if old is not None:
                if of.generation <= old.generation:
                    self._before = max(self._before, old.generation)
                if old.holds == 0:
                    self._recycle(old)
            self.stats = self.stats._replace(
                generations=self.stats.generations + 1, deltas=self.stats.deltas + delta, buffers=self._buffers
            )
            self._state.notify_all()

    def _count(self, **more: int) -> None:
        with self._locked():
            self.stats = self.stats._replace(**{name: getattr(self.stats, name) + n for name, n in more.items()})

    def _await_room(self) -> None:
        while True:
            with self._locked():
                self._take_back()
                self._full = not self._spare and self._buffers >= self._buffers_max
                if not self._full:
                    return
            self._pause(None)

    # -- the socket -----------------------------------------------------------------------------------------------

    def _exactly(self, n: int, patience: float | None) -> bytes:
        got = np.empty(n, np.uint8)
        at = 0
        while at < n:
            at += self._some(got[at:], patience)
            patience = STALL_S
        return got.tobytes()

    def _some(self, into: Array, patience: float | None) -> int:
        """Receives 1 byte or more; without ``patience`` it waits for as long as it takes."""
        sock = self._sock
        assert sock is not None
        while True:
            try:
                n = sock.recv_into(into.data)
            except BlockingIOError:
                self._await(sock, select.POLLIN, patience)
                continue
            except OSError as e:
                raise PeerClosed(f"the connection to the daemon failed: {e.strerror or e}") from e
            if n == 0:
                raise PeerClosed("the daemon closed the connection")
            return n

    def _send(self, answer: bytes) -> None:
        sock = self._sock
        assert sock is not None
        while answer or _io.unsent(sock):
            try:
                answer = answer[sock.send(answer) :]
            except BlockingIOError:
                self._await(sock, select.POLLOUT, STALL_S)
            except OSError as e:
                raise PeerClosed(f"the connection to the daemon failed: {e.strerror or e}") from e

    def _await(self, sock: _io.Conn, events: int, patience: float | None) -> None:
        poll = select.poll()
        poll.register(sock, events)
        poll.register(self._bell.fd, select.POLLIN)
        until = Deadline(patience)
        while True:
            ready = poll.poll(until.milliseconds())
            self._bell.clear()
            if self._closed:
                raise _Stopped
            if not ready:
                raise PeerClosed(f"nothing came for {patience:g} s in the middle of a generation")
            if any(fd != self._bell.fd for fd, _ in ready):
                return

    def _read_notice(self) -> NoReturn:
        head = self._exactly(5, STALL_S)
        length = int.from_bytes(head[1:], "little")
        if head[0] != NOTICE or not 2 <= length <= NOTICE_BYTES_MAX:
            raise FormatError(f"the daemon's closing notice begins with {head.hex()}")
        raise ended(*parse_notice(self._exactly(length, STALL_S)))

    def _pause(self, seconds: float | None) -> None:
        """Waits; the bell wakes it."""
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        poll.poll(Deadline(seconds).milliseconds())
        self._bell.clear()
        if self._closed:
            raise _Stopped

    def _forked(self) -> None:
        """In the child of a fork: the parent's connection must not stay open because of the child."""
        if self._sock is not None:
            self._sock.close()
