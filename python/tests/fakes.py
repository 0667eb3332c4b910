"""The daemon's side of the protocols, written from docs/ for the tests."""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from ingestd import Spec
from ingestd.native import crc32c

HEAD = struct.Struct("<8sHHI")
MAGIC = b"INGESTD\n"
PATIENCE = 60  # seconds before a test that hangs fails instead; no test waits for it


class Peer:
    """One accepted connection, with the blocking calls that scripts are written in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.peeked = b""
        sock.settimeout(PATIENCE)

    def peek(self, n: int) -> bytes:
        """The next bytes, which are still to come after that."""
        self.peeked = self.exactly(n)
        return self.peeked

    def exactly(self, n: int) -> bytes:
        got = bytearray(self.peeked[:n])
        self.peeked = self.peeked[n:]
        while len(got) < n:
            part = self.sock.recv(min(n - len(got), 1 << 18))
            assert part, f"the client closed after {len(got)} of {n} bytes"
            got += part
        return bytes(got)

    def nothing(self) -> None:
        """Asserts that the client has sent nothing more so far."""
        self.sock.setblocking(False)
        try:
            got = self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        finally:
            self.sock.settimeout(PATIENCE)
        assert not got, f"unexpected: {got!r}"

    def end(self) -> bytes:
        """Everything until the client closes its writing side."""
        got = bytearray(self.peeked)
        self.peeked = b""
        while part := self.sock.recv(1 << 16):
            got += part
        return bytes(got)

    def frame(self) -> bytes:
        """A hello or a proof, as it came."""
        head = self.exactly(HEAD.size)
        return head + self.exactly(HEAD.unpack(head)[3])

    def hello(self) -> dict[str, Any]:
        frame = self.frame()
        assert HEAD.unpack(frame[: HEAD.size])[:3] == (MAGIC, 1, 1)
        body: dict[str, Any] = json.loads(frame[HEAD.size :])
        return body

    def reply(self, body: dict[str, Any], status: int = 0, fds: list[int] | None = None) -> None:
        text = json.dumps(body).encode()
        data = HEAD.pack(MAGIC, 1, status, len(text)) + text
        if fds is None:
            self.sock.sendall(data)
        else:
            sent = socket.send_fds(self.sock, [data], fds)
            if sent < len(data):
                self.sock.sendall(data[sent:])

    def accept(self, window_samples: int = 4096, window_bytes: int = 8 << 20, **more: Any) -> dict[str, Any]:
        body = self.hello()
        agreed = {"table": body["table"], "fingerprint": body["fingerprint"], "stream": 7, "ack": "queued", "held": 0}
        self.reply({**agreed, "window_samples": window_samples, "window_bytes": window_bytes, **more})
        return body

    def ack(self, n: int) -> None:
        self.sock.sendall(b"\x01" * n)

    def notice(self, code: str, reason: str) -> None:
        text = json.dumps({"code": code, "reason": reason}).encode()
        self.sock.sendall(b"\0" + struct.pack("<I", len(text)) + text)

    def note(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.sock.sendall(b"\2" + struct.pack("<I", len(text)) + text)

    def close(self) -> None:
        self.sock.close()


class Listener:
    """Accepts connections and runs one script for each, in threads; what a script raises fails the test at the end."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock, self.address = sock, address
        self.make: Callable[[socket.socket], Peer] = Peer  # of each connection that was accepted
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    @classmethod
    def tcp(cls) -> Listener:
        sock = socket.create_server(("127.0.0.1", 0))
        return cls(sock, f"tcp://127.0.0.1:{sock.getsockname()[1]}")

    @classmethod
    def unix(cls, path: str) -> Listener:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
        sock.listen()
        return cls(sock, f"unix://{path}")

    def script(self, run: Callable[[Peer], None]) -> threading.Thread:
        def work() -> None:
            try:
                self.sock.settimeout(PATIENCE)
                sock = self.sock.accept()[0]
                peer = self.make(sock)
                with peer.sock:
                    run(peer)
            except BaseException as e:
                self.errors.append(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a script of the fake daemon hangs"
        self.sock.close()
        if self.errors:
            raise self.errors[0]


def align(n: int, to: int) -> int:
    return -(-n // to) * to


class SegmentMaker:
    """A segment in a memfd, laid out by hand from docs/segment-format.md."""

    def __init__(self, spec: Spec, batch_size: int = 4, batches: int = 3, table: str = "t", sessions: int = 2) -> None:
        self.spec, self.batch_size, self.batches = spec, batch_size, batches
        text = spec.json().encode()
        sizes = [leaf.nbytes for leaf in spec.leaves]
        n = len(sizes)
        states = align(512 + 16 * n + len(text), 64)
        self.states_offset = states
        self.sessions_offset = states + 64 * batches
        self.groups_offset = self.sessions_offset + 256 * sessions
        self.data_offset = align(self.groups_offset + 256 * 64, 4096)
        at, columns = 0, []
        for size in [8, 8, 8, *sizes]:
            columns.append(at)
            at = align(at + size * batch_size, 64)
        self.columns = columns
        self.stride = align(at, 4096)
        total = self.data_offset + batches * self.stride
        table_bytes = struct.pack("<" + "QQ" * n, *(x for pair in zip(columns[3:], sizes) for x in pair))
        fixed = struct.pack(
            "<14Q32sQ32s3Q32x", total, batch_size, batches, n, sum(sizes), 512, 512 + 16 * n, len(text), states,
            self.data_offset, self.stride, *columns[:3], bytes.fromhex(spec.fingerprint), 1_700_000_000_000_000_005,
            table.encode(), sessions, self.sessions_offset, self.groups_offset,
        )  # fmt: skip
        crc = crc32c(table_bytes + text, crc32c(fixed))
        self.fd = os.memfd_create("segment")
        os.truncate(self.fd, total)
        self.memory = mmap.mmap(self.fd, total)
        header = b"INGDSEG1" + struct.pack("<II", 2, crc) + fixed
        self.memory[: len(header)] = header
        self.memory[512 : 512 + len(table_bytes) + len(text)] = table_bytes + text
        self.bytes = total

    def place(self, index: int) -> int:
        return self.data_offset + index * self.stride

    def word(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self.memory, offset, value)

    def state(self, place: int, number: int, phase: int, count: int, pending: int = 1) -> None:
        at = self.states_offset + 64 * place
        self.word(at + 8, count)
        self.word(at + 16, count)
        self.word(at + 32, pending)
        self.word(at, number << 3 | phase)

    def lend(self, place: int, stream: int) -> None:
        at = self.states_offset + 64 * place
        for offset in (8, 16, 32, 48):
            self.word(at + offset, 0)
        self.word(at + 40, stream)
        self.word(at, 5)

    def entry(self, at: int, name: str, seen: int, stream: int = 0, held: int = 0) -> None:
        """One entry of the session or of the group table."""
        for offset, value in ((8, stream), (16, seen), (24, len(name.encode())), (64, held)):
            self.word(at + offset, value)
        self.memory[at + 128 : at + 128 + len(name.encode())] = name.encode()
        self.word(at, 1)

    def fill(self, place: int, number: int, samples: list[Any], stream: int = 1, phase: int = 4) -> None:
        """Puts samples into a place and marks the batch leased."""
        base = self.place(place)
        for row, sample in enumerate(samples):
            self.word(base + self.columns[0] + 8 * row, stream)
            self.word(base + self.columns[1] + 8 * row, number * self.batch_size + row)
            self.word(base + self.columns[2] + 8 * row, 1_700_000_001_000_000_000 + row)
            for column, array in zip(self.columns[3:], self.spec.flatten(sample)):
                at = base + column + row * array.nbytes
                self.memory[at : at + array.nbytes] = array.tobytes()
        self.state(place, number, phase, len(samples))


class ChannelMaker:
    """The daemon's side of a channel, laid out by hand from docs/segment-format.md."""

    def __init__(self, capacity: int = 8) -> None:
        self.capacity = capacity
        size = 256 + 16 * capacity
        self.deliver, self.giveback = 64, 64 + align(size, 64)
        total = self.giveback + size
        self.fd = os.memfd_create("channel")
        os.truncate(self.fd, total)
        self.memory = mmap.mmap(self.fd, total)
        header = struct.pack("<8sIIQQQ", b"INGDCHN1", 1, capacity, self.deliver, self.giveback, total)
        self.memory[: len(header)] = header
        self.bytes = total
        self.to_trainer, self.to_daemon = eventfd(), eventfd()
        self.words = memoryview(self.memory).cast("Q")

    def push(self, number: int, place: int, count: int) -> None:
        produced = self.words[self.deliver // 8]
        at = (self.deliver + 256 + 16 * (produced % self.capacity)) // 8
        self.words[at], self.words[at + 1] = number, count << 32 | place
        self.words[self.deliver // 8] = produced + 1
        self.wake()

    def wake(self) -> None:
        os.write(self.to_trainer, struct.pack("<Q", 1))

    def close(self) -> None:
        struct.pack_into("<I", self.memory, self.deliver + 192, 1)
        self.wake()

    def given(self) -> list[tuple[int, int]]:
        """Takes what was given back: (batch number, word 1)."""
        produced, consumed = self.words[self.giveback // 8], self.words[(self.giveback + 64) // 8]
        found = []
        for n in range(consumed, produced):
            at = (self.giveback + 256 + 16 * (n % self.capacity)) // 8
            found.append((self.words[at], self.words[at + 1]))
        self.words[(self.giveback + 64) // 8] = produced
        return found

    def waiting(self) -> bool:
        """Whether the trainer sleeps, or is about to."""
        return struct.unpack_from("<I", self.memory, self.deliver + 128)[0] != 0

    def set_daemon_waiting(self) -> None:
        struct.pack_into("<I", self.memory, self.giveback + 128, 1)

    def signalled(self) -> bool:
        """Whether the trainer woke the daemon since the last call."""
        poll = select.poll()
        poll.register(self.to_daemon, select.POLLIN)
        return bool(poll.poll(0)) and bool(os.read(self.to_daemon, 8))


def eventfd() -> int:
    if hasattr(os, "eventfd"):
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    import ctypes  # Python 3.9

    fd = ctypes.CDLL(None).eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
    assert fd >= 0
    return int(fd)


class FakeDaemon:
    """A table, one trainer's channel, and the unix socket to attach at."""

    def __init__(
        self,
        path: str,
        spec: Spec,
        *,
        batch_size: int = 4,
        batches: int = 3,
        prefetch: int = 2,
        capacity: int = 8,
        sessions: int = 2,
        **reply: Any,
    ) -> None:
        self.segment = SegmentMaker(spec, batch_size, batches, sessions=sessions)
        self.channel = ChannelMaker(capacity)
        self.listener = Listener.unix(path)
        self.address = self.listener.address
        self.prefetch = prefetch
        self.hello: dict[str, Any] = {}
        self.peer: Peer | None = None
        self.attached = threading.Event()
        self.detached = threading.Event()
        self.fds = [self.segment.fd, self.channel.fd, self.channel.to_trainer, self.channel.to_daemon]
        self.over: dict[str, Any] = reply
        self._end = threading.Event()
        self._stop_r, self._stop_w = os.pipe()
        self._goodbye: Callable[[Peer], None] | None = None
        self.listener.script(self._serve)

    def _serve(self, peer: Peer) -> None:
        self.hello = peer.hello()
        spec = self.segment.spec
        body = {
            "table": "t", "spec": spec.to_dict(), "fingerprint": spec.fingerprint, "trainer": 5,
            "batch_size": self.segment.batch_size, "batches": self.segment.batches,
            "segment_bytes": self.segment.bytes, "channel_bytes": self.channel.bytes, "prefetch": self.prefetch,
        }  # fmt: skip
        peer.reply({**body, **self.over}, fds=self.fds)
        self.peer = peer
        self.attached.set()
        peer.sock.setblocking(True)
        poll = select.poll()
        poll.register(peer.sock, select.POLLIN)
        poll.register(self._stop_r, select.POLLIN)
        poll.poll()
        if not self._end.is_set():
            assert peer.sock.recv(1) == b"", "a trainer sends nothing after its hello"
            self.detached.set()
        elif self._goodbye:
            self._goodbye(peer)

    def __enter__(self) -> FakeDaemon:
        return self

    def die(self, goodbye: Callable[[Peer], None] | None = None) -> None:
        """Closes the connection, after ``goodbye`` was said."""
        self._goodbye = goodbye
        self._end.set()
        os.write(self._stop_w, b"x")
        for thread in self.listener.threads:
            thread.join(PATIENCE)

    def deliver(self, number: int, samples: list[Any], place: int | None = None) -> None:
        place = number % self.segment.batches if place is None else place
        self.segment.fill(place, number, samples)
        self.channel.push(number, place, len(samples))

    def __exit__(self, *_: object) -> None:
        if not self.detached.is_set() and not self._end.is_set():
            self.die()
        self.listener.finish()
        for fd in {*self.fds, self.segment.fd, self.channel.fd, self._stop_r, self._stop_w}:
            os.close(fd)


def image(k: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(4, dtype=np.float32).reshape(2, 2) + np.float32(10 * k)


def sample(k: int) -> dict[str, Any]:
    """Sample number k of the spec that the tests share."""
    return {"image": image(k), "label": np.int16(100 + k)}


SPEC = Spec.from_example(sample(0))


def encoded(k: int) -> bytes:
    return image(k).tobytes() + struct.pack("<h", 100 + k)


class Steps:
    """Named points that the two sides of a test wait for."""

    def __init__(self) -> None:
        self.events: dict[str, threading.Event] = {}
        self.lock = threading.Lock()

    def _event(self, name: str) -> threading.Event:
        with self.lock:
            return self.events.setdefault(name, threading.Event())

    def done(self, name: str) -> None:
        self._event(name).set()

    def wait(self, name: str) -> None:
        assert self._event(name).wait(PATIENCE), f"nobody reached {name!r}"


MEBI = 1 << 20
BIG = Spec.parse("a:U8[1048576],b:U32[262144]")  # 2 MiB


def big(k: int) -> dict[str, Any]:
    return {"a": np.full(MEBI, k, np.uint8), "b": np.full(MEBI // 4, k, np.uint32)}


def big_encoded(k: int) -> bytes:
    return bytes([k]) * MEBI + struct.pack("<I", k) * (MEBI // 4)


class Filling:
    """The daemon's side of one attachment of a producer that fills in place: lends, and takes what is complete."""

    def __init__(self, segment: SegmentMaker, stream: int, places: list[int], capacity: int = 8) -> None:
        self.segment, self.stream, self.channel = segment, stream, ChannelMaker(capacity)
        self.leases = 0
        self.lent: list[list[int]] = []  # lease, place, rows complete
        self.resumed = False
        self.settled: list[int] = []
        for place in places:
            self.lend(place)

    @property
    def fds(self) -> list[int]:
        return [self.segment.fd, self.channel.fd, self.channel.to_trainer, self.channel.to_daemon]

    def lend(self, place: int) -> None:
        self.leases += 1
        self.segment.lend(place, self.stream)
        self.lent.append([self.leases, place, 0])
        self.channel.push(self.leases, place, 0)

    def accept(self, peer: Peer, held: int = 0, prefetch: int = 2, **more: Any) -> dict[str, Any]:
        body = peer.hello()
        assert body["role"] == "fill"
        spec = self.segment.spec
        reply = {
            "table": "t", "spec": spec.to_dict(), "fingerprint": spec.fingerprint, "stream": self.stream, "held": held,
            "batch_size": self.segment.batch_size, "batches": self.segment.batches, "prefetch": prefetch,
            "segment_bytes": self.segment.bytes, "channel_bytes": self.channel.bytes,
        }  # fmt: skip
        peer.reply({**reply, **more}, fds=self.fds)
        return body

    def row(self, place: int, row: int) -> bytes:
        """One sample as it lies in a place."""
        at = self.segment.place(place)
        sizes = [leaf.nbytes for leaf in self.segment.spec.leaves]
        columns = zip(self.segment.columns[3:], sizes)
        return b"".join(self.segment.memory[at + c + row * n : at + c + (row + 1) * n] for c, n in columns)

    def take(self, done: bool = True) -> list[bytes] | None:
        """The samples of the next descriptor, as the protocol has it; None when there is none."""
        c = self.channel
        consumed = c.words[(c.giveback + 64) // 8]
        if consumed == c.words[c.giveback // 8]:
            return None
        at = (c.giveback + 256 + 16 * (consumed % c.capacity)) // 8
        lease, word = c.words[at], c.words[at + 1]
        found: list[bytes] = []
        verb, n = word >> 32, word & 0xFFFFFFFF
        if verb == 1:
            due = self.lent[0]
            assert lease == due[0] and 1 <= n <= self.segment.batch_size - due[2], "rows out of order"
            found = [self.row(due[1], due[2] + k) for k in range(n)]
            due[2] += n
            if due[2] == self.segment.batch_size:
                self.lent.pop(0)
        elif verb == 2:
            assert n == 0 and lease <= self.leases
            self.settled.append(lease)
        else:
            assert (lease, word) == (0, 3 << 32) and not self.resumed, (lease, word)
            self.resumed = True
        if done:
            c.words[(c.giveback + 64) // 8] = consumed + 1
            if c.waiting():
                c.wake()
        return found

    def close(self) -> None:
        for fd in (self.channel.fd, self.channel.to_trainer, self.channel.to_daemon):
            os.close(fd)


class FillDaemon:
    """A fake daemon for producers that fill in place.

    It serves one script per connection, each with a segment of its own unless ``keep``.
    """

    def __init__(self, path: str, spec: Spec = SPEC, batches: int = 4, places: int = 2, keep: bool = False) -> None:
        self.listener, self.spec, self.batches, self.places = Listener.unix(path), spec, batches, places
        self.address = self.listener.address
        self.made: list[SegmentMaker] = []
        self.keep = keep
        self.batch_size = 4
        self.fillings: list[Filling] = []

    def segment(self) -> SegmentMaker:
        if not self.made or not self.keep:
            self.made.append(SegmentMaker(self.spec, self.batch_size, self.batches))
        return self.made[-1]

    def serve(self, *scripts: Callable[[Peer, Filling], None]) -> None:
        def work() -> None:
            try:
                self.listener.sock.settimeout(PATIENCE)
                for script in scripts:
                    peer = Peer(self.listener.sock.accept()[0])
                    with peer.sock:
                        self.fillings.append(Filling(self.segment(), 7, list(range(self.places))))
                        script(peer, self.fillings[-1])
            except BaseException as e:
                self.listener.errors.append(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.listener.threads.append(thread)

    def finish(self) -> None:
        self.listener.finish()
        for filling in self.fillings:
            filling.close()
        for segment in self.made:
            os.close(segment.fd)
