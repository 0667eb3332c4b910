"""Gradients on their way to the trainer, step by step: :class:`StepProducer`."""

from __future__ import annotations

import contextlib
import select
import struct
import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from . import _io
from ._io import Deadline
from .auth import Token
from .chunks import ABORT, HEADER_BYTES, Chunk, Cutter, chunk_bytes_of, chunk_spec, producer_id
from .dtypes import RAW, name_of
from .encodings import Feedback, encode
from .errors import (
    ChunkError,
    Closed,
    Error,
    FormatError,
    Note,
    SpecError,
    StepIncomplete,
    StepOrder,
    StepRefused,
    TensorMismatch,
    Timeout,
)
from .filler import Attached, Filler
from .manifest import Manifest, Tensor
from .native import PAST_CACHES_BYTES, copy_crc, crc32c
from .redial import PATIENCE_S, Dialer, Opened
from .session import Pieces, Queued, Session
from .spec import Array, as_array, dtype_advice
from .tls import TLS
from .version import CLIENT
from .wire import hello

__all__ = ["StepProducer", "StepTx"]

_STREAM_AT, _SUM_AT = 16, 60  # in a header
_ABORT_S = 1.0  # seconds that a place in the ring is waited for, to tell readers at once that a step was given up


def _restamp(header: Any, stream: int) -> None:
    """Makes a header, in writable memory, that of a stream which got another number."""
    if struct.unpack_from("<Q", header, _STREAM_AT)[0] != stream:
        struct.pack_into("<Q", header, _STREAM_AT, stream)
        struct.pack_into("<I", header, _SUM_AT, crc32c(bytes(header[:_SUM_AT])))


class _Way(Protocol):
    """How chunks get into the ring."""

    chunk_bytes: int
    stream: int
    lost: int
    reconnects: int
    #: why steps are not used
    refused: dict[int, str]

    @property
    def note(self) -> Note | None: ...
    @property
    def stopped(self) -> bool: ...
    def send(self, chunk: Chunk, deadline: Deadline) -> None: ...
    def flush(self, deadline: Deadline) -> None: ...
    def give_up(self, abort: Chunk) -> None: ...
    def close(self, deadline: Deadline) -> None: ...
    def abort(self) -> None: ...


class _Stamp:
    """Makes the headers of one producer."""

    def __init__(self, name: str, manifest: Manifest, summed: bool) -> None:
        self.producer = producer_id(name)
        self.manifest = manifest.id
        self.summed = summed
        self.past_caches = manifest.data_bytes >= PAST_CACHES_BYTES

    def __call__(self, chunk: Chunk, stream: int, crc: int) -> bytearray:
        return bytearray(chunk.header(stream, self.producer, self.manifest, crc if self.summed else None).pack())


class _StepSession(Session):
    """A session whose samples are chunks in memory that is borrowed until they are acknowledged, or given up."""

    def __init__(self, name: str, dialer: Dialer, first: Opened, stamp: _Stamp, patience: float | None) -> None:
        self.chunk_bytes = first.reply.integer("chunk_bytes", 1)
        self.refused: dict[int, str] = {}
        self.stream = first.stream
        self._stamp = stamp
        self._padding = np.zeros(self.chunk_bytes, np.uint8).data
        super().__init__(name, dialer, first, HEADER_BYTES + self.chunk_bytes, patience, go_on=True)

    def send(self, chunk: Chunk, deadline: Deadline) -> None:
        """Queues a chunk as it lies. Raises Timeout with nothing taken."""
        with self._caller(deadline):
            with self._state:
                self._make_room(1, deadline)
            crc = chunk.crc() if self._stamp.summed else 0
            with self._state:
                self._check()
                self._queue(chunk, crc)
                self._send_waiting()

    def _queue(self, chunk: Chunk, crc: int) -> None:
        header = memoryview(self._stamp(chunk, self.stream, crc))
        parts = [header, *(piece.data for piece in chunk.pieces), self._padding[chunk.length :]]
        self._out.append(Queued(self.pushed, self.pushed + 1, Pieces(parts, self.sample_bytes)))
        self.pushed += 1

    def give_up(self, abort: Chunk) -> None:
        """Lets go of the transaction's memory: what has not begun to go is dropped, and ``abort`` follows the rest.

        What has gone and is not acknowledged keeps its number: if it must go again, ``abort`` goes in its place.
        """
        with self._state:
            if self._stop or self._error is not None:
                self._sent.clear()
                self._out.clear()
                return
            begun = 1 if self._out and self._offset else 0
            while len(self._out) > begun:
                self.pushed = self._out.pop().first
            if begun:  # the rest of it must follow
                whole = memoryview(bytearray(b"".join(self._out[0].data.parts)))
                self._out[0] = self._out[0]._replace(data=Pieces([whole], self.sample_bytes))
            header = memoryview(self._stamp(abort, self.stream, 0))
            instead = Pieces([header, self._padding], self.sample_bytes)
            for k, queued in enumerate(self._sent):
                self._sent[k] = queued._replace(data=instead)
            self._queue(abort, 0)
            self._send_waiting()

    def _install(self, opened: Opened) -> None:
        self.stream = opened.stream
        for queued in (*self._sent, *self._out):
            _restamp(queued.data.parts[0], opened.stream)
        super()._install(opened)

    def _refused(self, note: Note) -> None:
        self.refused[note.step] = note.reason
        self._state.notify_all()


class _StepFiller(Filler):
    """Writes chunks where readers read them."""

    def __init__(self, name: str, dialer: Dialer, first: Opened, stamp: _Stamp, patience: float | None) -> None:
        self.refused: dict[int, str] = {}
        self.stream = first.stream
        self._stamp = stamp
        super().__init__(name, dialer, first, patience, go_on=True)
        try:
            self.chunk_bytes = chunk_bytes_of(self.spec)
        except BaseException:
            self.abort()
            raise

    def send(self, chunk: Chunk, deadline: Deadline) -> None:
        """Copies a chunk in. Raises Timeout with nothing taken."""
        reserved = self.reserve(1, deadline)
        try:
            header, data = (rows[0] for rows in reserved.rows)
            at = crc = 0
            for piece in chunk.pieces:
                if self._stamp.summed:
                    crc = copy_crc(data[at : at + len(piece)], piece, crc, self._stamp.past_caches)
                else:
                    data[at : at + len(piece)] = piece
                at += len(piece)
            data[at:] = 0
            header[:] = np.frombuffer(self._stamp(chunk, self.stream, crc), np.uint8)
        except BaseException:
            self.abandon(reserved)
            raise
        self.commit(reserved, 1, deadline)

    def give_up(self, abort: Chunk) -> None:
        """Sends ``abort``, where there is room for it soon: readers find out without it, too, with the next step."""
        with contextlib.suppress(Timeout, Error):
            self.send(abort, Deadline(_ABORT_S))

    def flush(self, deadline: Deadline) -> None:
        """Waits until everything is in the ring, and what the daemon wrote before it said so was read."""
        super().flush(deadline)
        while True:
            with self._state:
                a = self._attached
                if a is None or self._stop or not _io.wait(a.sock.fileno(), select.POLLIN, Deadline(0)):
                    return
            if not _io.wait(self._news.fd, select.POLLIN, deadline):
                raise deadline.timeout("reading what the daemon says of the step")
            self._news.clear()

    def _listen(self, a: Attached) -> Error | None:
        error = super()._listen(a)
        self._news.ring()
        return error

    def _go_on_from(self, opened: Opened) -> bool:
        self.stream = opened.stream
        going = super()._go_on_from(opened)
        if going:  # rows of memory that nobody else has where the number differs: the new daemon did not keep it
            for run in self._backlog:
                for header in run.rows[0]:
                    _restamp(header.data, opened.stream)
        return going

    def _refused(self, note: Note) -> None:
        self.refused[note.step] = note.reason
        self._news.ring()


class StepTx:
    """One step of a producer: complete, or absent. Leaving the ``with`` block commits, an exception aborts.

    The arrays are borrowed until the commit has returned: they are sent from where they lie, and again after a
    reconnect, so they must not be changed before. Arrays that are not contiguous are copied, and so are those of
    tensors with an encoding.
    """

    def __init__(self, producer: StepProducer, step: int, subset: Iterable[str] | None, deadline: float | None) -> None:
        #: number of the step
        self.step = step
        self._producer = producer
        self._manifest = producer.manifest
        self._subset = None if subset is None else [self._manifest.index(name) for name in subset]
        self._deadline = deadline
        self._until = _io.deadline_of(None)
        self._way = producer._way
        self._lost = self._way.lost
        self._chunks: list[Chunk] = []
        self._whole: set[int] = set()  # tensors that were put whole
        self._failed: BaseException | None = None
        self._over = False
        self._cutter = producer._cutter
        self._cutter.begin(step)

    def put(self, name: str, array: Any, deadline: float | None = None) -> None:
        """A whole tensor: a numpy, torch (CPU) or JAX array of its dtype and shape.

        Raises KeyError, TensorMismatch; SpecError where some of it was put before; StepRefused; Timeout and the other
        errors of the connection, after which the step can only be aborted.
        """
        self._check()
        i = self._manifest.index(name)
        tensor = self._manifest[i]
        value = _checked(tensor, array)
        if value.shape != tensor.shape:
            raise TensorMismatch(name, f"shape {list(value.shape)}", f"shape {list(tensor.shape)}")
        if i in self._whole:
            raise SpecError(f"tensor {name!r} was put in this step before")
        encoded = self._producer.feedback.encode(tensor, value) if tensor.kind == "topk" else encode(tensor, value)
        self._put(i, 0, encoded, deadline)
        self._whole.add(i)

    def put_slice(self, name: str, array: Any, offset: int, deadline: float | None = None) -> None:
        """A part of a tensor: the elements from number ``offset`` on, row-major; ``array`` may have any shape.

        Not for 8-bit encodings and ``topk``, which look at the whole tensor. Raises as :meth:`put`.
        """
        self._check()
        i = self._manifest.index(name)
        tensor = self._manifest[i]
        value = _checked(tensor, array)
        if tensor.kind.startswith("f8") or tensor.kind == "topk":
            raise SpecError(f"tensor {name!r} is sent as {tensor.encoding}, which needs all of it: put it whole")
        if offset < 0 or offset + value.size > tensor.elements:
            raise TensorMismatch(
                name, f"elements {offset} to {offset + value.size - 1}", f"elements below {tensor.elements}"
            )
        size = tensor.encoded_bytes // tensor.elements if tensor.elements else 0
        self._put(i, offset * size, encode(tensor, value), deadline)

    def put_all(self, arrays: Mapping[str, Any], deadline: float | None = None) -> None:
        """Each of a dict of whole tensors, in the manifest's order. Raises as :meth:`put`."""
        for name in sorted(arrays, key=self._manifest.index):
            self.put(name, arrays[name], deadline)

    def commit(self, deadline: float | None = None) -> None:
        """Returns when all of the step is in the ring, for readers to see as a whole.

        Raises StepIncomplete (put the rest, or abort), StepRefused, Timeout (call again, or abort), and the errors of
        the connection.
        """
        self._check()
        self._until = self._wait(deadline)
        try:
            missing = self._cutter.finish(self._subset)
        except ChunkError as e:
            raise SpecError(f"step {self.step}: tensor {e.tensor!r}: {e.reason}") from None
        except BaseException as e:
            self._failed = e
            raise
        if missing:
            raise StepIncomplete(self.step, missing)
        self._check_refused()
        self._way.flush(self._until)
        while self._way.lost != self._lost:  # some of it was in the ring of a daemon that is gone: all of it again
            self._lost = self._way.lost
            for chunk in self._chunks:
                self._way.send(chunk, self._until)
            self._way.flush(self._until)
        self._check_refused()
        self._end()
        self._chunks = []
        self._producer._committed(self.step)

    def abort(self) -> None:
        """Gives the step up; does nothing after a commit. The arrays are the caller's again."""
        if self._over:
            return
        self._end()
        self._producer.feedback.abort()
        if self._chunks and not self._way.stopped:
            self._way.give_up(Chunk(ABORT, self.step))
        self._chunks = []

    def _put(self, i: int, offset: int, data: Any, deadline: float | None) -> None:
        self._check()
        self._check_refused()
        self._until = self._wait(deadline)
        try:
            self._cutter.put(i, offset, data)
        except ChunkError as e:
            raise SpecError(f"tensor {e.tensor!r} at byte {e.offset}: {e.reason}") from None
        except BaseException as e:
            self._failed = e
            raise

    def _send(self, chunk: Chunk) -> None:
        """What the cutter has cut."""
        self._way.send(chunk, self._until)
        self._chunks.append(chunk)

    def _wait(self, deadline: float | None) -> Deadline:
        return _io.deadline_of(self._deadline if deadline is None else deadline)

    def _check(self) -> None:
        if self._over:
            raise Closed(f"step {self.step} is over")
        if self._failed is not None:
            raise Error(f"step {self.step} has failed and can only be aborted: {self._failed}") from self._failed

    def _check_refused(self) -> None:
        reason = self._way.refused.get(self.step)
        if reason is not None:
            self.abort()
            raise StepRefused(self.step, reason)

    def _end(self) -> None:
        self._over = True
        self._producer._open = None
        self._cutter.begin(self.step)  # lets go of the arrays

    def __enter__(self) -> StepTx:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None and not self._over:
            try:
                self.commit()
            except BaseException:
                self.abort()
                raise
        else:
            self.abort()

    def __repr__(self) -> str:
        return f"<StepTx {self.step}{': over' if self._over else ''}>"


class StepProducer:
    """Sends steps of named tensors, such as gradients, into a table of kind ``tensors``.

    ::

        with StepProducer("tcp://127.0.0.1:7420", "grads", "worker-1", gradients, encodings="bf16") as producer:
            with producer.step(1234, deadline=5.0) as tx:
                for name, array in gradients.items():
                    tx.put(name, array)

    A step is seen by readers as a whole or not at all. Its name is the producer's session: it connects again when the
    connection breaks or the daemon restarts, and what is not in the ring is sent again from the arrays. Where a daemon
    lost what it had (its segment was not kept), the step that is under way is sent again from its start, and
    :attr:`lost` counts the chunks that are gone, also of steps before.

    On the daemon's machine, chunks are written where readers read them with ``shm:///path`` as the address, or
    ``in_place=True``; the daemon must trust this process (by default: the same user).

    May be used by several threads, one call at a time; not after a fork.

    Args:
        address: ``tcp://host:port`` (``tls``, ``quic``), ``unix:///path`` or ``shm:///path``.
        table: name of the table.
        name: the producer's name. One producer has it at a time: an older one is ended with SessionTaken.
        tensors: a :class:`Manifest`, or a dict of example arrays.
        encodings: how tensors travel, as for :meth:`Manifest.from_arrays`; for a dict of examples only.
        in_place: write in place; None does so for ``shm://``.
        crc: sum the chunks, so that readers notice damage.
        window_bytes: most bytes on the way without acknowledgement; 0 lets the daemon choose.
        reconnect: seconds without a connection before PeerClosed; 0: at once; None: no limit.
        token: a :class:`Token`, or ``name:secret``; None: that in the environment variable ``INGESTD_TOKEN``, if any.
        tls: a :class:`TLS`, for ``tls://`` and ``quic://``: whom to trust, and this client's certificate.
        client: free text for the daemon's status and logs.
        deadline: seconds for connecting and the handshake, also for trying again.

    Raises:
        Refused: with ``code``, ``reason`` and, where other producers have another manifest, ``diff``.
        PeerClosed: nobody listens there. Timeout: the deadline passed. SpecError, ValueError: an argument is not legal.
    """

    def __init__(
        self,
        address: str,
        table: str,
        name: str,
        tensors: Manifest | Mapping[str, Any],
        *,
        encodings: Mapping[str, str] | str | None = None,
        in_place: bool | None = None,
        crc: bool = True,
        window_bytes: int = 0,
        reconnect: float | None = PATIENCE_S,
        token: Token | str | None = None,
        tls: TLS | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self.address = _io.parse_address(address, token, tls)
        if in_place is None:
            in_place = address.startswith("shm://")
        if in_place and self.address.kind != "unix":
            raise ValueError(f"address {address!r}: memory is shared over a unix socket; write unix:///path")
        if reconnect is not None and not reconnect >= 0:
            raise ValueError(f"reconnect={reconnect!r}: give seconds, 0 or more, or None to try without limit")
        if not name:
            raise ValueError("name='': a producer of tensors needs a name")
        if isinstance(tensors, Manifest):
            if encodings:
                raise ValueError("encodings are part of the manifest: use manifest.with_encodings(...)")
            self.manifest = tensors
        else:
            self.manifest = Manifest.from_arrays(tensors, encodings)
        options: dict[str, Any] = {
            "session": name,
            "notes": True,
            "manifest": self.manifest.to_dict(),
            "client": client,
            "token": self.address.token,
        }
        if not in_place:
            options.update(ack="committed", window_bytes=window_bytes)
        dialer = Dialer(self.address, hello("fill" if in_place else "push", table, None, **options), None)
        opened = dialer.open_patiently(_io.deadline_of(deadline))
        stamp = _Stamp(name, self.manifest, crc)
        try:
            self._way: _Way
            if in_place:
                filler = _StepFiller(name, dialer, opened, stamp, reconnect)
                dialer.spec = filler.spec
                self._way = filler
            else:
                dialer.spec = _agreed(opened)
                self._way = _StepSession(name, dialer, opened, stamp, reconnect)
        except BaseException:
            opened.close()
            raise
        #: name of the table
        self.table = table
        #: name of this producer
        self.name = name
        #: steps committed
        self.committed = 0
        #: most data bytes of a chunk
        self.chunk_bytes = self._way.chunk_bytes
        #: what ``topk`` keeps back, by tensor
        self.feedback = Feedback()
        self._last = -1
        self._open: StepTx | None = None
        self._cutter = Cutter(self.manifest, self.chunk_bytes, self._cut)

    def step(self, step: int, *, subset: Iterable[str] | None = None, deadline: float | None = None) -> StepTx:
        """Begins a step: a number that grows; the last one may be sent again, and is ignored if it was complete.

        ``subset`` names the tensors of which it consists, where these are not all. ``deadline`` is for each waiting
        call of the step that is given none. Raises StepOrder, KeyError.
        """
        if self._way.stopped:
            raise Closed("the producer is closed")
        if not 0 <= step < 1 << 64:
            raise ValueError(f"step({step}): want a number of 0 to 2^64 - 1")
        if self._open is not None:
            raise StepOrder(f"step {self._open.step} is not finished: commit or abort it before the next")
        if step < self._last:
            raise StepOrder(f"step {step} comes after step {self._last}: the numbers of steps only grow")
        self._open = StepTx(self, step, subset, deadline)
        return self._open

    def send(self, step: int, arrays: Mapping[str, Any], deadline: float | None = None) -> None:
        """A whole step at once. Raises as :meth:`StepTx.put` and :meth:`StepTx.commit`."""
        with self.step(step, deadline=deadline) as tx:
            tx.put_all(arrays)

    def close(self, deadline: float | None = None) -> None:
        """Ends the stream well. A step that is not finished is aborted. Raises as :meth:`StepTx.commit`."""
        if self._open is not None:
            self._open.abort()
        self._way.close(_io.deadline_of(deadline))

    def abort(self) -> None:
        """Drops the connection at once."""
        self._way.abort()

    @property
    def stream(self) -> int:
        """Number of the stream in force."""
        return self._way.stream

    @property
    def reconnects(self) -> int:
        """Connections that were made after the first one."""
        return self._way.reconnects

    @property
    def lost(self) -> int:
        """Chunks that were in the ring of a daemon that is gone, and that its successor does not have."""
        return self._way.lost

    @property
    def note(self) -> Note | None:
        """What the daemon says that this producer waits for."""
        return self._way.note

    def _cut(self, chunk: Chunk) -> None:
        assert self._open is not None
        self._open._send(chunk)

    def _committed(self, step: int) -> None:
        self.feedback.commit()
        self.committed += 1
        self._last = step
        self._way.refused.clear()

    def __enter__(self) -> StepProducer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        way = getattr(self, "_way", None)
        if way is not None and not way.stopped:
            with contextlib.suppress(Exception):
                warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):
                way.abort()

    def __repr__(self) -> str:
        return (
            f"<StepProducer {self.address} table={getattr(self, 'table', '?')!r} name={getattr(self, 'name', '?')!r}>"
        )


def _agreed(opened: Opened) -> Any:
    """The spec of the table's chunks. Raises FormatError where the daemon says what cannot be."""
    size = opened.reply.integer("chunk_bytes", 1, 1 << 32)
    spec = chunk_spec(size)
    try:
        chunk_bytes_of(spec)
    except SpecError:
        raise FormatError(f"the daemon's chunks have {size} bytes, which no table may have") from None
    if opened.reply.body.get("fingerprint") not in (None, spec.fingerprint):
        raise FormatError("the daemon's fingerprint is not that of chunks of the size that it says")
    return spec


def _checked(tensor: Tensor, value: Any) -> Array:
    """``value`` as a contiguous array of the tensor's dtype. Raises TensorMismatch."""
    array = as_array(tensor.name, value)
    if array.dtype != tensor.numpy_dtype:
        if tensor.dtype not in RAW or array.dtype != RAW[tensor.dtype]:
            got = name_of(array.dtype) or dtype_advice(array.dtype)
            raise TensorMismatch(tensor.name, got, tensor.dtype)
        array = array.view(tensor.numpy_dtype)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(array.shape)
