"""Weights: whole generations of a model's tensors, published by one process and read by many (``docs/weights.md``).

======================  ===========================================================================================
:class:`Publisher`      writes generations, in place over ``unix://`` or streamed
:class:`Draft`          one that is being written
:class:`Subscription`   the newest generation, mapped over ``unix://`` or received over ``tcp://``
:class:`Weights`        one generation, pinned: read-only arrays by name
======================  ===========================================================================================
"""

from __future__ import annotations

import warnings
from types import TracebackType

from . import _io
from .auth import Token
from .redial import PATIENCE_S
from .tls import TLS
from .version import CLIENT
from .weights_draft import Draft, Published
from .weights_local import LocalSource
from .weights_publish import Publisher
from .weights_remote import RemoteSource, RemoteStats
from .weights_view import Weights

__all__ = ["Draft", "Published", "Publisher", "Subscription", "Weights", "subscribe"]


class Subscription:
    """Reads a table of weights: always whole generations, always verified ones, always the newest.

    ::

        with Subscription("unix:///run/user/1000/ingestd.sock", "weights") as sub:
            with sub.wait(deadline=60.0) as w:                 # the first one
                w["layers.0.w"]                                # (512, 64) float32, read-only: the memory itself
                seen = w.generation
            with sub.wait(newer_than=seen, deadline=5.0) as w:
                w.into(module.state_dict())                    # copies after verifying

    On the daemon's machine (``unix://``) the memory is mapped: :meth:`latest` is a look at it, without a round trip.
    Elsewhere (``tcp://``, or ``stream=True``) a thread receives the newest generation, of the next one only the tensors
    that differ, verifies it, and shows it then; a transfer that breaks goes on where it broke off.

    When the weights get another manifest the subscription attaches again by itself: ``w.manifest`` says which it is.
    Over ``unix://`` the call that finds the daemon gone raises PeerClosed or its kinds, and the next call connects
    again; over ``tcp://`` the thread does, for as long as ``reconnect`` says.

    :meth:`close` ends no generation that is held. May be used by several threads; not after a fork (Closed).

    Args:
        address: ``unix:///path``, ``shm:///path`` (the same), or ``tcp://host:port`` (``tls``, ``quic``).
        table: name of the table, of kind ``weights``.
        stream: receives the bytes over a unix socket too.
        delta: receives only the tensors that differ from the generation that is here; streamed only.
        buffers: most generations that there is memory for, those that are held included; streamed only.
        reconnect: seconds without a connection that brings something before one that is streamed gives up; None: no
            limit; 0: it does not connect again.
        token: a :class:`Token`, or ``name:secret``; None: that in the environment variable ``INGESTD_TOKEN``, if any.
        tls: a :class:`TLS`, for ``tls://`` and ``quic://``: whom to trust, and this client's certificate.
        client: free text for the daemon's status and logs, and for publishers that wait for this reader.
        deadline: seconds for connecting.

    Raises:
        Refused: with ``code`` (``unknown_table``, ``wrong_kind``) and ``reason``.
        PeerClosed: nobody listens there. Timeout: the deadline passed. FormatError: the daemon is of another version.
    """

    def __init__(
        self,
        address: str,
        table: str,
        *,
        stream: bool = False,
        delta: bool = True,
        buffers: int = 4,
        reconnect: float | None = PATIENCE_S,
        token: Token | str | None = None,
        tls: TLS | None = None,
        client: str = CLIENT,
        deadline: float | None = 10.0,
    ) -> None:
        self._closed = True
        self.address = _io.parse_address(address, token, tls)
        #: name of the table
        self.table = table
        if reconnect is not None and not reconnect >= 0:
            raise ValueError(f"reconnect={reconnect!r}: give seconds, 0 or more, or None to try without limit")
        until = _io.deadline_of(deadline)
        self._source: LocalSource | RemoteSource
        if self.address.kind == "unix" and not stream:
            self._source = LocalSource(self.address, table, client, until)
        else:
            self._source = RemoteSource(self.address, table, client, until, delta, buffers, reconnect)
        self._closed = False

    def latest(self, deadline: float | None = 10.0) -> Weights:
        """The newest generation, pinned; release it, best by using it as a context manager.

        ``deadline`` matters where the subscription must attach again, or is still receiving the first one. Raises
        NoGeneration where nothing was published yet, and as :meth:`wait`.
        """
        return self._source.latest(_io.deadline_of(deadline))

    def wait(self, newer_than: int | Weights = 0, deadline: float | None = None) -> Weights:
        """The newest generation, pinned, as soon as it is above ``newer_than``.

        Args:
            newer_than: number of a generation, or one that was taken; 0: any.
            deadline: seconds to wait; None waits without limit, 0 only looks.

        Raises:
            Timeout: there is none yet; the message says which is the newest.
            ShuttingDown, Ended, PeerClosed: the daemon ended the connection or went away.
            Refused, FormatError: when connecting again. Closed: after :meth:`close`, also of a call that waits.
        """
        number = newer_than.generation if isinstance(newer_than, Weights) else newer_than
        return self._source.wait(number, _io.deadline_of(deadline))

    def close(self) -> None:
        """Ends the subscription, and calls that wait. Generations that are held stay pinned until they are released."""
        if not self._closed:
            self._closed = True
            self._source.close()

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    @property
    def reader(self) -> int:
        """Number of this reader in the daemon's life, as publishers are told of it; 0 while it is not attached."""
        return self._source.reader

    @property
    def stats(self) -> RemoteStats | None:
        """What was received; None where the memory is mapped."""
        return self._source.stats if isinstance(self._source, RemoteSource) else None

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}; use 'with' or close()", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<Subscription {self.address} table={getattr(self, 'table', '?')!r}>"


#: ``subscribe(address, table, ...)``: a :class:`Subscription`.
subscribe = Subscription
