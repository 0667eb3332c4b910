"""The pushing side: :class:`Producer`."""

from __future__ import annotations

import contextlib
import warnings
from types import TracebackType
from typing import Any

import numpy as np

from . import _io
from .auth import Token
from .compression import Compression
from .errors import Error, Note, Timeout
from .link import Link
from .redial import PATIENCE_S, Dialer
from .session import Session
from .spec import Array, Spec
from .tls import TLS
from .version import CLIENT
from .wire import hello

__all__ = ["Producer"]

_SMALL_BYTES = 64 << 10  # below, a sample is copied and may wait for others; from here on it goes from where it lies
_CHUNK_BYTES = 512 << 10  # of a batch that is put together before it is sent


class Producer:
    """Pushes samples of one spec into one table.

    ::

        spec = Spec.from_example({"image": image, "label": np.int32(3)})
        with Producer("tcp://127.0.0.1:7420", "digits", spec) as producer:
            producer.push({"image": image, "label": np.int32(3)}, deadline=5.0)
            producer.push_batch({"image": images, "label": labels}, deadline=5.0)

    Leaves must have the spec's dtype and shape exactly; nothing is cast. When a call returns, its arrays may be changed
    again. Samples that are on the way but not acknowledged are bounded by the window; when it is full, the calls wait:
    that is the backpressure of the daemon. Every waiting call takes ``deadline`` in seconds from the call, None waits
    without limit. Small samples may wait for others until the acknowledgements that are due arrive; :meth:`flush`
    sends them and waits for theirs. A producer that is not closed before the program ends loses what is unacknowledged.

    With a ``session`` the producer keeps its samples until they are acknowledged, connects again when the connection
    breaks or the daemon stops, and sends again what the daemon does not hold: each sample gets into the ring once. It
    waits a random time before each try, up to a sixteenth of the outage so far (but 10 ms at least and 1 s at most). It
    gives up after ``reconnect`` seconds without a connection since the last acknowledgement, if any is due, and at once
    where the daemon refuses it for good or another producer has taken the session. What is kept is at most the window
    (or one larger sample) and 512 KiB; while there is no connection, the calls wait once that is full. Without a
    session the first error is final.

    May be used by several threads; not after a fork (Closed).

    Args:
        address: ``tcp://host:port``, ``tls://host:port``, ``quic://host:port`` or ``unix:///path``.
        table: name of the table.
        spec: a :class:`Spec`, or its text or JSON form.
        session: a name that survives reconnects and restarts; :attr:`held` says how many of its samples the daemon has
            already: go on after them. One producer has it at a time, the last one that asks (SessionTaken).
        ack: ``queued``: acknowledged once the daemon has queued it; ``committed``: once it is in the ring. None is
            ``committed`` with a session, for ``queued`` ones may be lost with the daemon, and else the table's.
        window_samples, window_bytes: most that may be on the way without acknowledgement; 0 lets the daemon choose.
        reconnect: with a session, seconds without a connection before PeerClosed; 0: at once; None: no limit.
        continue_after_loss: with a session, do not raise Lost, but count what is gone in :attr:`lost` and go on.
        token: a :class:`Token`, or ``name:secret``; None: that in the environment variable ``INGESTD_TOKEN``, if any.
        tls: a :class:`TLS`, for ``tls://`` and ``quic://``: whom to trust, and this client's certificate.
        compression: how samples are compressed on the way, ``s2``, ``zstd``, ``s2+shuffle`` or ``zstd+shuffle``, where
            the daemon offers it; None: they are not.
        client: free text for the daemon's status and logs.
        deadline: seconds for connecting and the handshake; with a session, also for trying again.

    Raises:
        Refused: with ``code``, ``reason`` and, where the spec differs from the table's, ``diff``.
        NotAuthenticated, Banned, DaemonUnproven, NotChallenged, TLSError: see :mod:`ingestd.errors`.
        PeerClosed: nobody listens there. Timeout: the deadline passed. SpecError, ValueError: an argument is not legal.
    """

    def __init__(
        self,
        address: str,
        table: str,
        spec: Spec | str,
        *,
        session: str | None = None,
        ack: str | None = None,
        window_samples: int = 0,
        window_bytes: int = 0,
        reconnect: float | None = PATIENCE_S,
        continue_after_loss: bool = False,
        token: Token | str | None = None,
        tls: TLS | None = None,
        compression: str | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self._link: Link | Session | None = None
        self.spec = Spec.parse(spec) if isinstance(spec, str) else spec
        self.address = _io.parse_address(address, token, tls)
        body = hello(
            "push", table, self.spec, session=session, ack=ack or ("committed" if session else None),
            window_samples=window_samples, window_bytes=window_bytes, notes=True, client=client,
            token=self.address.token, compression=compression,
        )  # fmt: skip
        if reconnect is not None and not reconnect >= 0:
            raise ValueError(f"reconnect={reconnect!r}: give seconds, 0 or more, or None to try without limit")
        until = _io.deadline_of(deadline)
        compressed = None if compression is None else Compression.of(compression, self.spec)
        dialer = Dialer(self.address, body, self.spec, compressed)
        opened = dialer.open_patiently(until) if session else dialer.open(until)
        reply = opened.reply
        try:
            #: name of the table
            self.table = table
            #: number of this stream in the daemon's life: the ``stream`` of its samples
            self.stream = opened.stream
            #: samples of this session that the daemon had when this producer began; go on after them
            self.held = opened.held
            #: ack mode in force
            self.ack = str(reply.body.get("ack", ack or "queued"))
            #: window in force when this producer began
            self.window_samples = reply.integer("window_samples", least=1)
            #: window in force when this producer began
            self.window_bytes = reply.integer("window_bytes", least=1)
            size = self.spec.sample_bytes
            if session:
                self._link = Session(session, dialer, opened, size, reconnect, continue_after_loss)
            else:
                self._link = Link(opened.sock, size, self.window_samples, self.window_bytes)
        except BaseException:
            opened.close()
            raise
        self._record_dtype: np.dtype[Any] | None = None

    def push(self, sample: Any, deadline: float | None = None) -> None:
        """Pushes one sample: a tree like the spec's example, leaves of shape ``leaf.shape``.

        Raises SpecError (nothing was pushed), Timeout (nothing was pushed; try again), its kind Full where the ring is
        full and the daemon said who keeps it so, ShuttingDown, Ended or PeerClosed; with a session also Lost and
        SessionTaken, and ShuttingDown and PeerClosed only when its patience is over.
        """
        leaves = self.spec.flatten(sample)
        until = _io.deadline_of(deadline)
        link = self._open()
        if self.spec.sample_bytes < _SMALL_BYTES:
            data = leaves[0].tobytes() if len(leaves) == 1 else b"".join([a.tobytes() for a in leaves])
            link.push_small(data, until)
        elif link.push_views([_bytes_of(a) for a in leaves], 1, until) == 0:
            raise link.timeout(until, "waiting for the daemon to read")

    def push_batch(self, batch: Any, deadline: float | None = None) -> int:
        """Pushes n samples at once: a tree of leaves ``(n, *leaf.shape)``. Returns n.

        The fast way for small samples: they are put together by numpy, some hundred KiB at a time. Raises as
        :meth:`push`; when the deadline passes, the Timeout's ``taken`` says how many of them, the first ones, were
        pushed.
        """
        n, leaves = self.spec.flatten_batch(batch)
        until = _io.deadline_of(deadline)
        link = self._open()
        size = self.spec.sample_bytes
        step = max(1, min(_CHUNK_BYTES // size, (link.window + 1) // 2))
        records = np.empty(min(step, n), self._record()) if len(leaves) > 1 and size < _SMALL_BYTES else None
        done = 0
        while done < n:
            k = min(step, n - done)
            rows = [a[done : done + k] for a in leaves]
            if records is not None:
                for i, row in enumerate(rows):
                    records[f"f{i}"][:k] = row.view(_unsigned(row.dtype))
                views = [_bytes_of(records[:k])]
            elif len(rows) == 1:
                views = [_bytes_of(rows[0])]
            else:
                views = [_bytes_of(a[i]) for i in range(k) for a in rows]
            try:
                taken = link.push_views(views, k, until)
            except Timeout as e:
                e.taken = done
                e.args = (f"{e} ({done} of {n} samples were taken)",)
                raise
            done += taken
            if taken < k:
                raise link.timeout(until, f"pushing: {done} of {n} samples were taken", done)
        return n

    def _record(self) -> np.dtype[Any]:
        """One sample as a numpy record: its leaves one after the other, as on the wire, as unsigned integers."""
        if self._record_dtype is None:
            formats = [(_unsigned(leaf.numpy_dtype), leaf.shape) for leaf in self.spec.leaves]
            self._record_dtype = np.dtype({"names": [f"f{i}" for i in range(len(formats))], "formats": formats})
        return self._record_dtype

    def flush(self, deadline: float | None = None) -> None:
        """Sends what waits and returns when every pushed sample is acknowledged. Raises as :meth:`push`."""
        self._open().flush(_io.deadline_of(deadline))

    def close(self, deadline: float | None = None) -> None:
        """Ends the stream well: returns when every pushed sample is acknowledged and the daemon has closed.

        Raises Ended or PeerClosed if samples remained without acknowledgement, Timeout when that takes too long: then
        the producer remains open; call again, or :meth:`abort`.
        """
        self._open().close(_io.deadline_of(deadline))

    def abort(self) -> None:
        """Drops the connection at once; samples that were not acknowledged may be lost."""
        self._open().abort()

    @property
    def pushed(self) -> int:
        """Samples pushed by this producer."""
        return self._open().pushed

    @property
    def acked(self) -> int:
        """Samples of those that the daemon has acknowledged."""
        return self._open().acked

    @property
    def unacked(self) -> int:
        """Samples that were pushed and are not acknowledged."""
        return self.pushed - self.acked

    @property
    def lost(self) -> int:
        """Samples that were acknowledged and are gone, where ``continue_after_loss`` has this producer go on."""
        link = self._open()
        return link.lost if isinstance(link, Session) else 0

    @property
    def reconnects(self) -> int:
        """Connections that were made after the first one."""
        link = self._open()
        return link.reconnects if isinstance(link, Session) else 0

    @property
    def note(self) -> Note | None:
        """What the daemon says that this producer waits for, until the next acknowledgement."""
        return self._open().note

    def _open(self) -> Link | Session:
        if self._link is None:
            raise Error("the producer was never connected")
        return self._link

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        link = getattr(self, "_link", None)
        if link is not None and not link.stopped:
            with contextlib.suppress(Exception):
                warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):
                link.abort()

    def __repr__(self) -> str:
        return f"<Producer {self.address} table={getattr(self, 'table', '?')!r}>"


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _bytes_of(array: Array) -> memoryview:
    """The array's bytes, row-major: its own memory where that is contiguous, else a copy."""
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    return array.reshape(-1).view(np.uint8).data
