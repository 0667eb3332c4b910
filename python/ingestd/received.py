"""Batches that come over a connection: one thread receives them into memory of this process's own."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from . import _io
from ._io import Deadline
from .batch import Window
from .channel import Descriptor
from .errors import Closed, Ended, EndOfStream, Error, FormatError, PeerClosed
from .incoming import ended
from .redial import TRY_S, longest_pause, retried
from .segment import LEASED, Column
from .spec import Spec
from .wire import NOTICE, NOTICE_BYTES_MAX, Reply, handshake, parse_notice

__all__ = ["Places", "ReceivedWindow", "Receiver"]

#: Most rows of a batch, and bytes of a segment (``docs/segment-format.md``).
BATCH_SIZE_MAX, SEGMENT_MAX = 1 << 30, 1 << 46
_MAGIC = 0x48435442  # BTCH
_HEADER = struct.Struct("<IIQQQQI20s")
_ANSWER = struct.Struct("<Q")
_LEAVES = 1 << 63  # in an answer: the reader leaves, and the rest is how many batches it has begun
_LOST_MAX = (1 << 63) - 1
_POISON = 0xCC
_DROPPED = 1 << 16  # bytes that are read and dropped at once
#: Seconds that an answer may not get away. The daemon reads them at once, and they are few bytes.
ANSWER_S = 10.0
#: Seconds that a daemon which does not end a connection in its turn holds up the end of a reader.
PARTING_S = 1.0


class Places:
    """Where batches lie that were received: what a Batch asks a segment for, with a place for each batch."""

    def __init__(self, spec: Spec, batch_size: int) -> None:
        self.spec = spec
        self.batch_size = batch_size
        self.columns: list[Column] = []
        row_bytes = [8, 8, 8, *(leaf.nbytes for leaf in spec.leaves)]
        self.bytes, offsets = 0, []
        for n in row_bytes:
            offsets.append(self.bytes)
            self.bytes = (self.bytes + n * batch_size + 63) & ~63
        self.stream_column, self.number_column, self.arrival_column = offsets[:3]
        self.parts = [Column(offset, n) for offset, n in zip(offsets, row_bytes)]
        self.columns = self.parts[3:]
        self.memory: list[Any] = []  # arrays of bytes
        self.words: list[int] = []  # state and number of the batch in each place, as in a segment
        #: when the ring was made that each place's batch is of: with another one, numbers begin anew
        self.created: list[int] = []

    def state_word(self, place: int) -> int:
        return self.words[place]

    def add(self) -> int:
        """Memory for one more batch, starting on a multiple of 64."""
        raw = np.empty(self.bytes + 63, np.uint8)
        skip = -int(raw.ctypes.data) % 64
        self.memory.append(raw[skip : skip + self.bytes])
        self.words.append(0)
        self.created.append(0)
        return len(self.memory) - 1


class ReceivedWindow(Window):
    """The memory of one place, read-only. ``checked``: it turns to 0xCC bytes when arrays outlive the batch."""

    def __init__(self, memory: Any, checked: bool) -> None:
        super().__init__(memoryview(memory).toreadonly(), 0)
        self._array, self._checked = memory, checked

    def poison(self) -> None:
        if self._checked:
            self._array.fill(_POISON)


class _Stopped(Exception):
    """The receiver was closed."""


class Receiver:
    """Receives batches and answers them; makes another connection when one breaks. In place of a Reader's channel."""

    def __init__(
        self, address: _io.Address, body: dict[str, Any], until: Deadline, patience: float | None, memory_bytes: int
    ) -> None:
        self._address, self._body, self._patience, self._memory_bytes = address, body, patience, memory_bytes
        self._state = threading.Condition(threading.Lock())
        self._returned: deque[tuple[int, int]] = deque()  # (number, place) of leases that are over
        self._bell = _io.Bell()
        self._closed = False
        self._arrived: deque[Descriptor] = deque()
        self._over = False
        self._error: Error | None = None  # why it has ended
        self._trouble: Error | None = None  # why there is no connection now
        self._begun = 0  # batches of this connection that take has given out
        self._given = False  # one of them was, since the last outage
        self.reconnects = 0
        self.places: Places | None = None
        # Of the thread alone, but for the constructor.
        self._free: list[int] = []
        self._out: dict[int, int] = {}  # place and number of the batches of this connection
        self._spent = 0.0  # without a connection since the last batch, in earlier outages
        self._created = 0  # when this connection's ring was made
        self.sock, self.reply = self._connect(until)
        self._since = time.monotonic()  # when this connection was made
        self.capacity = self.reply.integer("prefetch", 1, 1 << 15)
        self._thread = threading.Thread(target=self._run, name="ingestd-reader", daemon=True)
        self._thread.start()

    # -- calls of the reader --------------------------------------------------------------------------------------

    def take(self) -> Descriptor | None:
        """What came first and was not taken; a loss has no rows. Raises EndOfStream, or why the thread has ended."""
        with self._state:
            if self._closed:
                raise Closed("the reader is closed")
            if self._arrived:
                first = self._arrived.popleft()
                if first.rows:
                    self._begun += 1
                    self._given = True
                return first
            if self._over:
                raise EndOfStream("the table is closed and every batch was delivered")
            if self._error is not None:
                raise self._error
            return None

    def wait(self, until: Deadline, doing: str) -> None:
        """Waits until take has something to say. Raises Timeout."""
        with self._state:
            while not (self._arrived or self._over or self._error or self._closed):
                left = until.left()
                if left == 0 or not self._state.wait(left):
                    raise until.timeout(f"{doing}; {self._trouble}" if self._trouble else doing)

    def delivered(self) -> bool:
        """Whether take has something to say."""
        with self._state:
            return bool(self._arrived or self._over or self._error or self._closed)

    def failed(self, until: Deadline) -> bool:
        """Waits until the thread has ended; whether it has by then."""
        with self._state:
            return self._state.wait_for(lambda: self._error is not None or self._closed, until.left())

    def full(self) -> bool:
        """Whether the daemon can send nothing before something is given back."""
        with self._state:
            return len(self._out) >= self.capacity and not self._arrived and not self._returned

    def drained(self) -> bool:
        return False  # take says so

    def give_back(self, number: int, place: int) -> None:
        """May come from a finalizer, in the middle of anything: nothing is waited for."""
        self._returned.append((number, place))
        self._bell.ring()

    def close(self) -> None:
        with self._state:
            self._closed = True
        self._bell.ring()
        if self._thread is not threading.current_thread():
            self._thread.join()
        with self._state:
            self._state.notify_all()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _connect(self, until: Deadline) -> tuple[_io.Conn, Reply]:
        sock = _io.connect(self._address, until)
        try:
            reply = handshake(sock, self._body, until)
            self._agree(reply)
            return sock, reply
        except BaseException:
            sock.close()
            raise

    def _agree(self, reply: Reply) -> None:
        """Judges what the daemon says of its batches, before any memory is asked for."""
        batch_size, prefetch = reply.integer("batch_size", 1, BATCH_SIZE_MAX), reply.integer("prefetch", 1, 1 << 15)
        spec = Spec.parse(json.dumps(reply.body.get("spec")))
        if reply.body.get("fingerprint") != spec.fingerprint:
            raise FormatError("the fingerprint that the daemon sent is not that of its spec")
        places = self.places or Places(spec, batch_size)
        if places.spec.fingerprint != spec.fingerprint or places.batch_size != batch_size:
            raise FormatError("the table was made anew, with other batches; attach again")
        if places.bytes > SEGMENT_MAX:
            raise FormatError(f"a batch of {places.bytes} bytes is larger than any segment")
        if prefetch * places.bytes > self._memory_bytes:
            raise Error(
                f"{prefetch} batches may come at once, of {places.bytes} bytes each, and memory={self._memory_bytes}; "
                "ask for a smaller prefetch, or raise it"
            )
        self.places, self.capacity = places, prefetch
        self._created = reply.integer("created") if "created" in reply.body else 0

    def _run(self) -> None:
        error: Error | None = None
        try:
            while True:
                try:
                    self._receive()
                except (Error, OSError) as e:
                    self._broken(e if isinstance(e, Error) else PeerClosed(f"the connection failed: {e}"))
        except _Stopped:
            with contextlib.suppress(OSError, Error):
                self._leave()
        except Error as e:
            error = e
        except BaseException as e:  # no memory for a batch, say: nobody must wait for a thread that is gone
            error = Error(f"receiving batches failed: {e!r}")
            error.__cause__ = e
        finally:
            with contextlib.suppress(OSError):
                self.sock.close()
            with self._state:
                self._error = error
                self._state.notify_all()

    def _leave(self) -> None:
        """Says what was begun of the batches that were sent, and lets the daemon end the connection.

        What it still sends is read and dropped: closing over that would reset the connection, and the last answers
        might never arrive.
        """
        until, doing = Deadline(PARTING_S), "leaving"
        self._answer()
        with self._state:
            begun = self._begun
        _io.send_all(self.sock, _ANSWER.pack(_LEAVES | begun), until, doing)
        self.sock.shutdown(socket.SHUT_WR)
        while _io.receive(self.sock, _DROPPED, until, doing):
            pass

    def _receive(self) -> None:
        header = bytearray(_HEADER.size)
        view = memoryview(header)
        while True:
            self._read(view[:1])
            if header[0] == NOTICE:
                self._notice()
            self._read(view[1:])
            magic, count, number, first, lost, payload, columns, rest = _HEADER.unpack(header)
            self._check(magic, count, number, lost, payload, columns, rest)
            if lost:
                self._arrive(Descriptor(first, lost, 0))
            if count:
                self._batch(number, count)

    def _check(self, magic: int, count: int, number: int, lost: int, payload: int, columns: int, rest: bytes) -> None:
        assert self.places is not None
        spec, most = self.places.spec, self.places.batch_size
        want = (count * (spec.sample_bytes + 24), len(spec) + 3) if count else (0, 0)
        if magic != _MAGIC or any(rest) or count > most or (payload, columns) != want or (not count and not lost):
            raise FormatError(
                f"the daemon sent a header that is none of this table's batches: magic {magic:#x}, batch {number}, "
                f"{count} rows, {payload} bytes, {columns} columns"
            )

    def _batch(self, number: int, count: int) -> None:
        places = self.places
        assert places is not None
        if len(self._out) >= self.capacity:
            raise FormatError(f"the daemon sent more than the {self.capacity} batches that it may without an answer")
        place = self._free.pop() if self._free else places.add()
        arrived = False
        try:
            self._out[place] = number
            places.words[place] = number << 3 | LEASED
            places.created[place] = self._created
            memory = memoryview(places.memory[place])
            for part in places.parts:
                self._read(memory[part.offset : part.offset + part.slot_bytes * count])
            # If it has ended, the batch's memory may have been others' already when it was read, and it comes again.
            arrived = not _io.hung_up(self.sock, 0)
        finally:
            if not arrived:
                self._recycle(place)
        if arrived:
            self._arrive(Descriptor(number, place, count))

    def _arrive(self, what: Descriptor) -> None:
        with self._state:
            self._line(what)
            self._state.notify_all()

    def _line(self, what: Descriptor) -> None:
        """Puts it behind what has arrived. A loss after a loss is one with it: no daemon can make the line long."""
        if not what.rows and self._arrived and not self._arrived[-1].rows:
            last = self._arrived.pop()
            what = Descriptor(last.number, min(last.place + what.place, _LOST_MAX), 0)
        self._arrived.append(what)

    def _notice(self) -> None:
        head = bytearray(4)
        self._read(memoryview(head))
        length = int.from_bytes(head, "little")
        if not 2 <= length <= NOTICE_BYTES_MAX:
            raise FormatError(f"the daemon's closing notice says it has {length} bytes")
        body = bytearray(length)
        self._read(memoryview(body))
        code, reason = parse_notice(bytes(body))
        if code != "end_of_stream":
            raise ended(code, reason)
        with self._state:
            self._over = True
            self._state.notify_all()
        try:
            self._read(memoryview(bytearray(1)))  # answers go out until the other side ends
        except (Error, OSError) as e:
            with self._state:
                if not any(d.rows for d in self._arrived):
                    raise _Stopped from None
                self._over = False  # the daemon took back what was not given out
            raise PeerClosed(f"the daemon went away at the end of the stream: {e}") from e
        raise FormatError("the daemon sent more after the end of the stream")

    def _read(self, into: memoryview) -> None:
        while into:
            if self._returned:
                self._answer()
            try:
                n = self.sock.recv_into(into)
            except BlockingIOError:
                self._sleep(None)
                continue
            if n == 0:
                raise PeerClosed("the daemon went away; its log says why")
            into = into[n:]

    def _sleep(self, seconds: float | None) -> None:
        """Waits for the socket, or without it for so long, and for the bell. Raises _Stopped."""
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        if seconds is None:
            poll.register(self.sock.fileno(), select.POLLIN)
        if not self._closed:
            poll.poll(None if seconds is None else seconds * 1000)
        self._bell.clear()
        if self._closed:
            raise _Stopped

    def _answer(self) -> None:
        data = bytearray()
        while self._returned:
            number, place = self._returned.popleft()
            self._recycle(place)
            if self._out.get(place) == number:
                del self._out[place]
                data += _ANSWER.pack(number)
        if data:
            _io.send_all(self.sock, bytes(data), Deadline(ANSWER_S), "answering batches")

    def _recycle(self, place: int) -> None:
        assert self.places is not None
        self.places.words[place] = 0
        self._free.append(place)

    def _broken(self, error: Error) -> None:
        """Connects again. Raises what is final."""
        self.sock.close()
        began = time.monotonic()
        with self._state:
            arrived, self._arrived = self._arrived, deque()
            for d in arrived:  # which the daemon offers again
                if d.rows:
                    self._recycle(d.place)
                else:
                    self._line(d)
            self._trouble = error
            # A connection over which no batch comes is no end of an outage, unless it stands for long.
            if self._given or (self._patience is not None and began - self._since >= self._patience):
                self._spent = 0.0
            self._given = False
        self._out.clear()
        while True:
            outage = self._spent + time.monotonic() - began
            if not retried(error) or (isinstance(error, Ended) and error.code == "bad_peer"):
                raise error
            if self._patience is not None and outage >= self._patience:
                if isinstance(error, Ended):
                    raise error
                raise PeerClosed(f"there was no connection for {self._patience:g} s; the last try: {error}")
            self._sleep(random.uniform(0, longest_pause(outage)))
            try:
                self.sock, self.reply = self._connect(Deadline(TRY_S))
            except Error as e:
                error = e
                continue
            with self._state:
                self._trouble = None
                self._begun = 0
            self._since = time.monotonic()
            self._spent += self._since - began
            self.reconnects += 1
            return
