"""The daemon's side of QUIC for the tests: a listener of scripts, and connections carried by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from aioquic.asyncio import QuicConnectionProtocol, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent, StreamDataReceived
from guarded import Certificates
from ingestd import TLS
from ingestd.quic_connection import Connection, configuration_of

from fakes import PATIENCE, Listener, Peer

ALPN = "ingestd/1"
CLIENT, SERVER = ("client", 1), ("server", 2)


def of_the_daemon(pair: tuple[Path, Path], alpn: str = ALPN, **more: Any) -> QuicConfiguration:
    made = QuicConfiguration(is_client=False, alpn_protocols=[alpn], idle_timeout=PATIENCE, **more)
    made.load_cert_chain(*pair)
    return made


class Wire:
    """A client's connection and a daemon's, and the packets between them."""

    def __init__(self, certs: Certificates, tls: TLS | None = None, **daemon: Any) -> None:
        tls = TLS(ca=certs.ca) if tls is None else tls
        self.now = 1.0
        self.client = Connection(configuration_of(tls, "127.0.0.1"))
        self.client.connect(SERVER, self.now)
        self.daemon = QuicConnection(
            configuration=of_the_daemon(daemon.pop("pair", certs.server), **daemon),
            original_destination_connection_id=self.client.original_destination_connection_id,
        )
        self.got = bytearray()  # by the daemon
        self.read = bytearray()  # by the client
        self.events: list[QuicEvent] = []  # of the daemon
        self.carry()

    def carry(self) -> None:
        """Until neither side has more to say."""
        quiet = 0
        while quiet < 3:
            quiet += 1
            self.now += 0.05
            for here, there, sender in ((self.client, self.daemon, CLIENT), (self.daemon, self.client, SERVER)):
                timer = here.get_timer()
                if timer is not None and self.now >= timer:
                    here.handle_timer(self.now)
                for data, _ in here.datagrams_to_send(self.now):
                    there.receive_datagram(data, sender, self.now)
                    quiet = 0
            self.read += b"".join(self.client.received())
            while (event := self.daemon.next_event()) is not None:
                self.events.append(event)
                if isinstance(event, StreamDataReceived):
                    self.got += event.data


class Stream(Peer):
    """A stream that was accepted. ``cut`` and ``close_connection`` do what a socket cannot."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, protocol: QuicConnectionProtocol) -> None:
        super().__init__(sock)
        self.loop, self.protocol = loop, protocol

    def within(self, call: Callable[[QuicConnection], None]) -> None:
        def run() -> None:
            call(self.protocol._quic)
            self.protocol.transmit()

        self.loop.call_soon_threadsafe(run)

    def cut(self) -> None:
        """RESET_STREAM and STOP_SENDING."""

        def reset(connection: QuicConnection) -> None:
            connection.reset_stream(0, 1)
            connection.stop_stream(0, 1)

        self.within(reset)

    def close_connection(self, code: int, frame_type: int | None = None, reason: str = "") -> None:
        self.within(lambda connection: connection.close(code, frame_type, reason))

    def certificate(self) -> Any:
        return self.protocol._quic.tls._peer_certificate


class QuicListener(Listener):
    """Runs one script for each stream.

    ``asks``: for the client's certificate, of which aioquic knows but half. ``retry``: has the client's address proved.
    """

    def __init__(self, configuration: QuicConfiguration, asks: bool = False, retry: bool = False) -> None:
        self.configuration, self.asks, self.retry = configuration, asks, retry
        self.loop = asyncio.new_event_loop()
        self.waiting: list[Future[Stream]] = []
        self.cancelled = threading.Event()
        started: Future[int] = Future()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self.serve(started)), daemon=True)
        self.thread.start()
        super().__init__(socket.socket(), f"quic://127.0.0.1:{started.result(PATIENCE)}")

    async def serve(self, started: Future[int]) -> None:
        self.over = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        listener = self

        class Protocol(QuicConnectionProtocol):
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more)
                if listener.asks:
                    initialize = self._quic._initialize

                    def asking(peer_cid: bytes) -> None:
                        initialize(peer_cid)
                        self._quic.tls._request_client_certificate = True

                    self._quic._initialize = asking  # type: ignore[method-assign]
                self._stream_handler = self.accepted

            def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = listener.loop.create_task(listener.stream(self, reader, writer))
                listener.tasks.add(task)
                task.add_done_callback(listener.tasks.discard)

        server = await serve(
            "127.0.0.1", 0, configuration=self.configuration, create_protocol=Protocol, retry=self.retry
        )
        started.set_result(server._transport.get_extra_info("sockname")[1])  # type: ignore[union-attr]
        await self.over.wait()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        server.close()

    async def stream(
        self, protocol: QuicConnectionProtocol, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        self.waiting.pop(0).set_result(Stream(theirs, self.loop, protocol))

        async def inwards() -> None:
            while data := await reader.read(1 << 16):
                await self.loop.sock_sendall(mine, data)
            mine.shutdown(socket.SHUT_WR)

        async def outwards() -> None:
            with contextlib.suppress(ConnectionResetError):  # closed with bytes that it did not read
                while data := await self.loop.sock_recv(mine, 1 << 16):
                    writer.write(data)
            if protocol._quic._close_event is None:
                with contextlib.suppress(RuntimeError):  # it was reset
                    writer.write_eof()

        try:
            with mine:
                await asyncio.gather(inwards(), outwards(), return_exceptions=True)
        finally:
            writer.transport._closing = True  # type: ignore[attr-defined]  # else it has its say when the loop is gone

    def script(self, run: Callable[[Any], None]) -> threading.Thread:
        accepted: Future[Stream] = Future()
        self.waiting.append(accepted)

        def work() -> None:
            try:
                peer = accepted.result(PATIENCE)
                with peer.sock:
                    run(peer)
            except BaseException as e:
                self.errors.append(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.loop.call_soon_threadsafe(self.over.set)
            self.thread.join(PATIENCE)
            self.loop.close()
