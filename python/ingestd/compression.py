"""Compressed samples of a producer (``docs/wire-protocol.md``, Compression): :class:`Compression`.

``zstd`` needs the package ``zstandard``, ``s2`` the package ``cramjam``. What is sent as S2 is a stream of Snappy,
which S2 extends: it shrinks a little less. Both are flushed whenever the socket takes bytes, so that nothing waits in
them that the daemon could acknowledge.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from . import _io
from .dtypes import ITEMSIZE
from .errors import Error
from .native import crc32c
from .spec import Spec

__all__ = ["KINDS", "CompressedSocket", "Compression"]

#: What a daemon may offer.
KINDS = ("s2", "zstd", "s2+shuffle", "zstd+shuffle")

_PACKAGES = {"s2": "cramjam", "zstd": "zstandard"}
_TAKEN_MAX = 1 << 18  # plain bytes that one call takes at most
_PIECE = 1 << 16  # bytes that are shuffled among themselves
_BLOCK = 1 << 16  # of Snappy, plain
_LEVEL = 1  # of zstd: the others cost more than they save
_WINDOW_LOG = 20  # of zstd: every daemon takes that much
_SNAPPY = b"\xff\x06\x00\x00sNaPpY"
_COMPRESSED, _PLAIN = 0x00, 0x01  # kinds of chunks


class Compression(NamedTuple):
    """How the samples of a spec travel."""

    kind: str
    spec: Spec

    @classmethod
    def of(cls, kind: str, spec: Spec) -> Compression:
        """Raises ValueError for what there is not, and Error where the package for it is missing."""
        if kind not in KINDS:
            raise ValueError(f"compression={kind!r}: want one of {', '.join(KINDS)}")
        made = cls(kind, spec)
        made.encoder()
        return made

    def encoder(self) -> Snappy | Zstd:
        method = self.kind.partition("+")[0]
        try:
            package = importlib.import_module(_PACKAGES[method])
        except ImportError as e:
            raise Error(
                f"compression={self.kind!r} needs {_PACKAGES[method]}, pip install 'ingestd[compression]': {e}"
            ) from e
        return Snappy(package) if method == "s2" else Zstd(package)

    def over(self, sock: _io.Conn) -> CompressedSocket:
        """A new stream over a connection."""
        return CompressedSocket(sock, self.encoder(), Shuffle(self.spec) if self.kind.endswith("+shuffle") else None)


class Snappy:
    """Makes Snappy's framing format."""

    def __init__(self, package: Any) -> None:
        self._compress = package.snappy.compress_raw
        self._begun = False

    def encode(self, data: bytes) -> bytes:
        parts = [] if self._begun else [_SNAPPY]
        self._begun = True
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            body, kind = bytes(self._compress(block)), _COMPRESSED
            if len(body) >= len(block):
                body, kind = block, _PLAIN
            crc = crc32c(block)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            parts += [bytes([kind]), (4 + len(body)).to_bytes(3, "little"), masked.to_bytes(4, "little"), body]
        return b"".join(parts)

    def end(self) -> bytes:
        return b""


class Zstd:
    """Makes one frame of Zstandard."""

    def __init__(self, package: Any) -> None:
        parameters = package.ZstdCompressionParameters.from_level(
            _LEVEL, window_log=_WINDOW_LOG, write_checksum=True, write_content_size=False
        )
        self._stream = package.ZstdCompressor(compression_params=parameters).compressobj()
        self._flush_block, self._flush_all = package.COMPRESSOBJ_FLUSH_BLOCK, package.COMPRESSOBJ_FLUSH_FINISH

    def encode(self, data: bytes) -> bytes:
        return bytes(self._stream.compress(data) + self._stream.flush(self._flush_block))

    def end(self) -> bytes:
        return bytes(self._stream.flush(self._flush_all))


class Shuffle:
    """Brings the bytes of each leaf's elements together: all first ones, all second ones, and so on."""

    def __init__(self, spec: Spec) -> None:
        self._sample_bytes = spec.sample_bytes
        self._pieces: list[tuple[int, int, int]] = []  # where each starts in a sample, its bytes, those of an element
        at = 0
        for leaf in spec.leaves:
            for start in range(0, leaf.nbytes, _PIECE):
                self._pieces.append((at + start, min(_PIECE, leaf.nbytes - start), ITEMSIZE[leaf.dtype]))
            at += leaf.nbytes
        self._next = 0  # the piece that comes next
        self._part = bytearray()  # of it, not all yet

    def shuffle(self, data: bytes) -> bytes:
        """What is complete; the rest, less than a piece, comes with what follows."""
        view, parts = memoryview(data), []
        while view:
            if self._next == 0 and not self._part and len(view) >= self._sample_bytes:
                n = len(view) - len(view) % self._sample_bytes
                parts.append(self._samples(view[:n]))
                view = view[n:]
                continue
            _, size, item = self._pieces[self._next]
            take = view[: size - len(self._part)]
            view = view[len(take) :]
            self._part += take
            if len(self._part) == size:
                piece = np.frombuffer(bytes(self._part), np.uint8)
                parts.append(piece.reshape(-1, item).T.tobytes())
                self._part.clear()
                self._next = (self._next + 1) % len(self._pieces)
        return b"".join(parts)

    def _samples(self, data: memoryview) -> bytes:
        rows = np.frombuffer(data, np.uint8).reshape(-1, self._sample_bytes)
        out = rows.copy()
        for at, size, item in self._pieces:
            if 1 < item < size:
                elements = rows[:, at : at + size].reshape(len(rows), -1, item)
                out[:, at : at + size] = elements.transpose(0, 2, 1).reshape(len(rows), size)
        return out.tobytes()


class CompressedSocket:
    """A non-blocking socket whose sending side is compressed. Counts are of plain bytes.

    As with :class:`ingestd.tls_socket.TLSSocket`, what was taken may wait here for room in the system.
    """

    def __init__(self, sock: _io.Conn, encoder: Snappy | Zstd, shuffle: Shuffle | None) -> None:
        self._sock = sock
        self._encoder, self._shuffle = encoder, shuffle
        self._left = memoryview(b"")  # compressed, not sent
        self._ending = False  # the writing side is to be closed, once all is sent

    @property
    def unsent(self) -> int:
        """Bytes that wait, be it for the end alone."""
        return len(self._left) + self._ending + _io.unsent(self._sock)

    def _push(self) -> bool:
        """Sends what is compressed; whether all of it went."""
        try:
            while self._left or _io.unsent(self._sock):
                self._left = self._left[self._sock.send(self._left) :]
        except BlockingIOError:
            return False
        if self._ending:
            self._ending = False
            self._sock.shutdown(socket.SHUT_WR)
        return True

    def send(self, data: Any) -> int:
        """Takes some of the bytes, at most 256 KiB; none, and raises BlockingIOError, while earlier ones wait."""
        return self.sendmsg([data])

    def sendmsg(self, buffers: Iterable[Any]) -> int:
        """As :meth:`send`, of several buffers, one after the other."""
        if not self._push():
            raise BlockingIOError(errno.EAGAIN, "the socket is full")
        parts: list[memoryview] = []
        room = _TAKEN_MAX
        for buffer in buffers:
            parts.append(memoryview(buffer).cast("B")[:room])
            room -= len(parts[-1])
            if not room:
                break
        if room == _TAKEN_MAX:
            return 0
        data = b"".join(parts)
        if self._shuffle is not None:
            data = self._shuffle.shuffle(data)
        self._left = memoryview(self._encoder.encode(data) if data else b"")
        with contextlib.suppress(OSError):  # the next call says it: the bytes were taken
            self._push()
        return _TAKEN_MAX - room

    def recv(self, n: int) -> bytes:
        return self._sock.recv(n)

    def recv_into(self, buffer: Any) -> int:
        return self._sock.recv_into(buffer)

    def shutdown(self, how: int) -> None:
        """Ends the stream and closes the writing side, when there is room for that; or ends both sides, at once."""
        if how != socket.SHUT_WR:
            self._sock.shutdown(how)
            return
        self._left = memoryview(bytes(self._left) + self._encoder.end())
        self._ending = True
        self._push()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
