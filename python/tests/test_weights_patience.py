"""For how long a subscription over a connection tries to make another one, against a fake daemon."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
from ingestd import PeerClosed, ShuttingDown

from fakes import PATIENCE, Listener, Peer
from weights_fakes import accept_reader, end, give, subscribe


def test_patience(tcp: Listener) -> None:
    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        end(peer, "shutting_down", "it is so")

    tcp.script(script)
    with subscribe(tcp, reconnect=0) as sub, pytest.raises(ShuttingDown, match="it is so"):
        sub.wait(newer_than=1, deadline=PATIENCE)
    tcp.script(script)
    other = socket.create_server(("127.0.0.1", 0))  # nobody listens at its port afterwards
    other.close()
    with subscribe(tcp, reconnect=0.1) as sub:
        sub._source._address = sub.address._replace(port=other.getsockname()[1] if other.fileno() >= 0 else 1)  # type: ignore[union-attr]
        with pytest.raises(PeerClosed, match=r"no connection for 0\.1 s; the last try"):
            sub.wait(newer_than=1, deadline=PATIENCE)


def test_patience_with_breaks(tcp: Listener) -> None:
    """A daemon that accepts and ends each connection is given up as one that is gone is."""
    over = threading.Event()

    def breaking() -> None:
        while not over.is_set():
            with tcp.sock.accept()[0] as sock, contextlib.suppress(OSError, EOFError):
                if not over.is_set():
                    accept_reader(Peer(sock))

    thread = threading.Thread(target=breaking, daemon=True)
    thread.start()
    with subscribe(tcp, reconnect=0.3) as sub:
        with pytest.raises(PeerClosed, match=r"no connection for 0\.3 s; the last try"):
            sub.wait(newer_than=0, deadline=PATIENCE)
        assert sub.stats.reconnects > 0
    over.set()
    with socket.create_connection(tcp.sock.getsockname()):
        thread.join(PATIENCE)


def test_what_patience_counts(tcp: Listener) -> None:
    """Time without a connection, since one brought something or stood for long; not time with one."""

    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        peer.sock.recv(1)

    tcp.script(script)
    with subscribe(tcp, reconnect=100.0) as sub:
        sub.wait(newer_than=0, deadline=PATIENCE)
        source = sub._source
        source._pause = lambda seconds: None  # type: ignore[union-attr,method-assign,assignment]
        gone = PeerClosed("gone")

        def broke(stood: float, spent: float) -> float:
            source._down, source._spent = None, spent  # type: ignore[union-attr]
            source._since = time.monotonic() - stood  # type: ignore[union-attr]
            source._look_further(gone)  # type: ignore[union-attr]
            return source._spent  # type: ignore[union-attr]

        assert broke(99.0, 1.0) == 1.0 and broke(101.0, 99.0) == 0.0
        with pytest.raises(PeerClosed, match="no connection for 100 s"):
            broke(50.0, 100.0)
