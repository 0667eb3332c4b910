"""QUIC: clients against a fake daemon; connections whose packets are carried by hand."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarded import Certificates
from ingestd import TLS, Error, PeerClosed, Producer, Refused, ShuttingDown, Timeout, TLSError, _io
from ingestd._io import Deadline, connect, parse_address
from ingestd.redial import retried

from fakes import BIG, PATIENCE, SPEC, Steps, big, big_encoded, encoded, sample

pytest.importorskip("aioquic", reason="quic:// needs the extra: pip install 'ingestd[quic]'")

from aioquic.quic.events import PingAcknowledged
from ingestd.quic_connection import IDLE_S, ROOM_BYTES, Connection
from ingestd.quic_socket import _KEPT_MAX, _TAKEN, QuicSocket
from quic_fakes import QuicListener, Stream, Wire, of_the_daemon


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def tls(certs: Certificates) -> TLS:
    return TLS(ca=certs.ca)


@pytest.fixture
def listener(certs: Certificates) -> Iterator[QuicListener]:
    made = QuicListener(of_the_daemon(certs.server))
    yield made
    made.finish()


def raw(listener: QuicListener, tls: TLS) -> QuicSocket:
    sock = connect(parse_address(listener.address, tls=tls), Deadline(PATIENCE))
    assert isinstance(sock, QuicSocket)
    sock.send(b"!")  # a stream is there once something was sent on it
    return sock


def wait(sock: Any, events: int) -> None:
    assert _io.wait(sock.fileno(), events, Deadline(PATIENCE))


def receive_all(sock: QuicSocket) -> bytes:
    got = bytearray()
    while True:
        try:
            part = sock.recv(1 << 16)
        except BlockingIOError:
            wait(sock, select.POLLIN)
            continue
        if not part:
            return bytes(got)
        got += part


def batch(first: int, end: int) -> dict[str, Any]:
    rows = [sample(k) for k in range(first, end)]
    return {"image": np.stack([r["image"] for r in rows]), "label": np.stack([r["label"] for r in rows])}


# -- over sockets -------------------------------------------------------------------------------------------------


def test_a_producer_closes_its_side_alone(listener: QuicListener, tls: TLS) -> None:
    def script(peer: Stream) -> None:
        peer.accept()
        assert peer.exactly(SPEC.sample_bytes) == encoded(1)
        peer.ack(1)
        assert peer.end() == b"".join(encoded(k) for k in range(2, 1000))
        peer.ack(998)  # when nothing comes any more

    listener.script(script)
    with Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE) as p:
        p.push(sample(1))
        p.flush(deadline=PATIENCE)
        for k in range(2, 500):
            p.push(sample(k), deadline=PATIENCE)
        p.push_batch(batch(500, 1000), deadline=PATIENCE)
        p.close(deadline=PATIENCE)
    assert p.acked == p.pushed == 999


@pytest.mark.parametrize("how", ["reset", "stopping", "internal"])
def test_a_session_goes_on_over_another_connection(listener: QuicListener, tls: TLS, how: str) -> None:
    def first(peer: Stream) -> None:
        peer.accept(ack="committed")
        assert peer.exactly(SPEC.sample_bytes) == encoded(0)
        peer.ack(1)
        peer.exactly(SPEC.sample_bytes // 2)
        if how == "reset":
            peer.cut()
        else:
            peer.close_connection(*((3,) if how == "stopping" else (1, 0, "sorry\n\x1b[0m")))

    def second(peer: Stream) -> None:
        peer.accept(ack="committed", held=1)
        for k in range(1, 100):
            assert peer.exactly(SPEC.sample_bytes) == encoded(k)
            peer.ack(1)
        assert peer.end() == b""

    listener.script(first)
    with Producer(listener.address, "t", SPEC, session="s", tls=tls, deadline=PATIENCE) as p:
        p.push(sample(0))
        p.flush(deadline=PATIENCE)
        listener.script(second)
        p.push_batch(batch(1, 100), deadline=PATIENCE)
        p.close(deadline=PATIENCE)
    assert p.reconnects == 1 and p.acked == 100


@pytest.mark.parametrize("session", [None, "s"])
def test_large_samples_and_a_daemon_that_reads_late(listener: QuicListener, tls: TLS, session: str | None) -> None:
    steps = Steps()
    n = 4  # of 2 MiB

    def script(peer: Stream) -> None:
        peer.accept(window_samples=n, window_bytes=1 << 40)
        steps.wait("pushed")
        for k in range(n):
            assert peer.exactly(BIG.sample_bytes) == big_encoded(k)
        peer.ack(n)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", BIG, session=session, tls=tls, deadline=PATIENCE) as p:
        for k in range(n):
            p.push(big(k), deadline=PATIENCE)
        steps.done("pushed")
        p.close(deadline=PATIENCE)
    assert p.acked == n


def test_reasons_arrive(listener: QuicListener, tls: TLS) -> None:
    def refuse(peer: Stream) -> None:
        peer.hello()
        peer.reply({"code": "unknown_table", "reason": "no such table"}, status=1)

    def stop(peer: Stream) -> None:
        peer.accept()
        peer.exactly(SPEC.sample_bytes)
        peer.ack(1)
        peer.notice("shutting_down", "the daemon is stopping")

    listener.script(refuse)
    with pytest.raises(Refused, match="no such table"):
        Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE)
    listener.script(stop)
    p = Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE)
    p.push(sample(0))
    with pytest.raises(ShuttingDown):
        while True:
            p.push(sample(1), deadline=PATIENCE)
            p.flush(deadline=PATIENCE)
    p.abort()


def test_how_a_socket_ends(listener: QuicListener, tls: TLS) -> None:
    """In order: nothing more; else an error, after all that came before."""
    ends: list[tuple[Any, str | None]] = [
        (lambda peer: None, None),  # it closes its side
        (lambda peer: peer.close_connection(0), None),
        (lambda peer: peer.cut(), "broke off the stream"),
        (lambda peer: peer.close_connection(2), "idle for too long"),
        (lambda peer: peer.close_connection(3), "the daemon is stopping"),
        (lambda peer: peer.close_connection(77, None, "sor\nry"), r"the daemon closed it: sor\?ry"),
        (lambda peer: peer.close_connection(1, 0, "Trouble"), "trouble"),
        (lambda peer: peer.close_connection(9, 0), "QUIC error 0x9"),
        (lambda peer: peer.close_connection(2, 0), "no more connections"),
    ]
    for end, says in ends:
        read = threading.Event()

        def script(peer: Stream, end: Any = end, read: threading.Event = read) -> None:
            peer.sock.sendall(b"abc")
            assert read.wait(PATIENCE)
            end(peer)

        listener.script(script)
        sock = raw(listener, tls)
        wait(sock, select.POLLIN)
        assert sock.recv(100) == b"abc"
        read.set()
        if says is None:
            assert receive_all(sock) == b"" and sock.recv_into(bytearray(5)) == 0
            assert select.POLLRDHUP & dict(_polled(sock))[sock.fileno()]
        else:
            for _ in range(2):
                with pytest.raises(ConnectionResetError, match=says):
                    receive_all(sock)
            with pytest.raises(ConnectionResetError, match=says):
                sock.recv_into(bytearray(5))
        sock.close()
        sock.close()


def _polled(sock: QuicSocket) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return poll.poll(PATIENCE * 1000)


def test_what_was_sent_arrives_after_close(listener: QuicListener, tls: TLS) -> None:
    got: list[bytes] = []

    def script(peer: Stream) -> None:
        got.append(peer.end())

    data = np.random.default_rng(1).bytes(100_000)
    listener.script(script)
    sock = raw(listener, tls)
    assert sock.sendmsg([data[:50_000], data[50_000:]]) == len(data)
    sock.close()
    for thread in listener.threads:
        thread.join(PATIENCE)
    assert got == [b"!" + data]
    sock._carrier.join(PATIENCE)
    assert not sock._carrier.is_alive()


def test_a_daemon_that_wants_no_more(listener: QuicListener, tls: TLS) -> None:
    """Sending fails, and what it had to say can still be read."""

    def script(peer: Stream) -> None:
        peer.within(lambda connection: connection.stop_stream(0, 1))
        peer.sock.sendall(b"reason")

    listener.script(script)
    sock = raw(listener, tls)
    with pytest.raises(BrokenPipeError):
        while True:
            try:
                sock.send(bytes(1000))
            except BlockingIOError:
                wait(sock, select.POLLOUT)
    assert receive_all(sock) == b"reason"
    sock.close()


def test_a_reader_that_does_not_read(listener: QuicListener, tls: TLS, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes is bounded by what was read, however much the daemon would send."""
    data = np.random.default_rng(1).bytes(3 * ROOM_BYTES)
    most, full = [0], threading.Event()
    received = Connection.received

    def counted(self: Connection) -> list[bytes]:
        parts = received(self)
        counted.came += sum(map(len, parts))  # type: ignore[attr-defined]
        most[0] = max(most[0], counted.came - self._took)  # type: ignore[attr-defined]
        if most[0] >= ROOM_BYTES // 2:
            full.set()
        return parts

    counted.came = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Connection, "received", counted)
    listener.script(lambda peer: peer.sock.sendall(data))
    sock = raw(listener, tls)
    assert full.wait(PATIENCE)
    assert receive_all(sock) == data
    assert ROOM_BYTES // 2 <= most[0] <= ROOM_BYTES
    sock.close()


def test_a_daemon_that_does_not_answer(listener: QuicListener, tls: TLS) -> None:
    """What it has not acknowledged is bounded, and the owner's socket is full then."""
    accepted = threading.Event()
    listener.script(lambda peer: accepted.set())
    sock = raw(listener, tls)
    assert accepted.wait(PATIENCE)
    deaf = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    deaf.bind(("127.0.0.1", 0))
    sock._carrier._udp.connect(deaf.getsockname())
    sent, most = 0, 8 << 20
    while sock._carrier.connection.kept < _KEPT_MAX:
        if _io.wait(sock.fileno(), select.POLLOUT, Deadline(0.05)):
            sent += sock.send(bytes(1 << 16))
    while sent < most and _io.wait(sock.fileno(), select.POLLOUT, Deadline(0.2)):
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(bytes(1 << 16))
    assert sent < most and sock._carrier.connection.kept < _KEPT_MAX + _TAKEN
    sock.close()
    deaf.close()
    sock._carrier.join(PATIENCE)  # though nobody says goodbye
    assert not sock._carrier.is_alive()


def test_a_client_that_has_nothing_to_say(listener: QuicListener, tls: TLS, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for an answer now and then, or the daemon would take it for dead."""
    pings, handle = queue.Queue[Any](), Connection._handle

    def counted(self: Connection, event: Any) -> list[bytes]:
        if isinstance(event, PingAcknowledged):
            pings.put(event)
        return handle(self, event)

    monkeypatch.setattr(Connection, "_handle", counted)
    monkeypatch.setattr("ingestd.quic_socket.PING_S", 0.01)
    listener.script(lambda peer: peer.end() and None)
    sock = raw(listener, tls)
    for _ in range(3):
        pings.get(timeout=PATIENCE)
    sock.close()


def test_datagrams_of_others_do_no_harm(listener: QuicListener, tls: TLS, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    genuine = Connection.receive_datagram

    def beset(self: Connection, data: bytes, addr: Any, now: float) -> None:
        changed = bytearray(data)
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        for junk in (rng.bytes(int(rng.integers(1, 1500))), b"", bytes(changed), data[: len(data) // 2]):
            genuine(self, junk, addr, now)
        genuine(self, data, addr, now)

    monkeypatch.setattr(Connection, "receive_datagram", beset)
    data = np.random.default_rng(2).bytes(300_000)

    def script(peer: Stream) -> None:
        peer.sock.sendall(data)
        assert peer.end() == b"!" + data

    listener.script(script)
    sock = raw(listener, tls)
    view = memoryview(data)
    while view:
        with contextlib.suppress(BlockingIOError):
            view = view[sock.send(view) :]
        wait(sock, select.POLLOUT)
    sock.shutdown(socket.SHUT_WR)
    assert receive_all(sock) == data
    sock.close()


def test_a_child_leaves_the_connection_alone(listener: QuicListener, tls: TLS) -> None:
    def script(peer: Stream) -> None:
        peer.accept()
        assert peer.end() == encoded(0) + encoded(1)
        peer.ack(2)

    listener.script(script)
    with Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE) as p:
        p.push(sample(0))
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                p.abort()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        p.push(sample(1))
        p.close(deadline=PATIENCE)


def test_a_process_ends_without_closing(listener: QuicListener, certs: Certificates) -> None:
    """What was sent arrives, nobody waits for a thread, and nothing is printed."""
    got: list[bytes] = []
    listener.script(lambda peer: got.append(peer.end()))
    code = (
        "import sys; from ingestd import TLS; from ingestd._io import *\n"
        f"s = connect(parse_address({listener.address!r}, tls=TLS(ca={str(certs.ca)!r})), Deadline({PATIENCE}))\n"
        "s.send(b'last words')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=PATIENCE)
    for thread in listener.threads:
        thread.join(PATIENCE)
    assert got == [b"last words"] and done.stdout == done.stderr == b""


# -- who is not there, or not believed --------------------------------------------------------------------------------


def test_nobody_listens(tls: TLS) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    address = f"quic://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(Timeout, match="handshake of QUIC"):
        Producer(address, "t", SPEC, tls=tls, deadline=0.05)
    sock.close()
    with pytest.raises(PeerClosed, match="refused; is ingestd running there") as error:
        Producer(address, "t", SPEC, tls=tls, deadline=PATIENCE)
    assert retried(error.value)


def test_without_aioquic(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("aioquic", "ingestd.quic_socket", "ingestd.quic_connection"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("ingestd.quic_socket", raising=False)
    with pytest.raises(Error, match=r"pip install 'ingestd\[quic\]'") as error:
        Producer("quic://127.0.0.1:1", "t", SPEC, session="s", deadline=PATIENCE)
    assert not retried(error.value)
    code = "import sys, ingestd, ingestd._io; sys.exit('aioquic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_authority(listener: QuicListener, certs: Certificates, tmp_path: Path) -> None:
    for tls in (TLS(ca=Certificates(tmp_path).ca), TLS(), TLS(ca=certs.ca, server_name="daemon.example.com")):
        with pytest.raises(TLSError, match="the daemon's certificate is not trusted") as error:
            Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE)
        assert not retried(error.value)
    assert "daemon.example.com" in str(error.value)


def test_names_and_no_names(listener: QuicListener, certs: Certificates) -> None:
    for tls in (
        TLS(ca=certs.ca, server_name="localhost"),
        TLS(server_name="daemon.example.com", insecure_skip_verify=True),
    ):
        listener.script(lambda peer: peer.accept() and peer.end() and None)
        Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE).close(deadline=PATIENCE)
    listener.script(lambda peer: peer.accept() and peer.end() and None)
    by_name = listener.address.replace("127.0.0.1", "localhost")  # of which ::1 comes first, where nobody listens
    Producer(by_name, "t", SPEC, tls=TLS(ca=certs.ca), deadline=PATIENCE).close(deadline=PATIENCE)


def test_an_address_that_must_be_proved_first(certs: Certificates, tls: TLS) -> None:
    """A daemon under load answers with a Retry, and the handshake begins anew."""
    listener = QuicListener(of_the_daemon(certs.server), retry=True)

    def script(peer: Stream) -> None:
        peer.accept()
        assert peer.protocol._quic._retry_source_connection_id is not None
        assert peer.end() == encoded(0)
        peer.ack(1)

    listener.script(script)
    with Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE) as p:
        p.push(sample(0))
        p.close(deadline=PATIENCE)
    listener.finish()


def test_client_certificates(certs: Certificates, tmp_path: Path) -> None:
    listener = QuicListener(of_the_daemon(certs.server), asks=True)
    both = tmp_path / "both.pem"
    both.write_text(certs.client[1].read_text() + certs.client[0].read_text())
    names: list[str] = []

    def script(peer: Stream) -> None:
        peer.accept()
        names.append(peer.certificate().subject.rfc4514_string())
        assert peer.end() == b""

    for tls in (TLS(certs.ca, *certs.client), TLS(certs.ca, both)):
        listener.script(script)
        Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE).close(deadline=PATIENCE)
    listener.finish()
    assert len(names) == 2 and all("client" in name for name in names)


def test_files_that_cannot_be_used(certs: Certificates, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for tls, says in (
        (TLS(ca=nothing), "ca='.*nothing' cannot be used: No such file"),
        (TLS(ca=certs.ca, cert=certs.client[0], key=certs.server[1]), "cannot be used"),
        (TLS(ca=certs.ca, key=certs.client[1]), "give cert= too"),
        (TLS(ca=certs.ca, server_name=""), "no name"),
        (TLS(ca=certs.ca, server_name="dämon"), "no name"),
    ):
        with pytest.raises(TLSError, match=says):
            Producer("quic://127.0.0.1:1", "t", SPEC, tls=tls, deadline=PATIENCE)


# -- packets that are carried by hand ---------------------------------------------------------------------------------


def test_flow_control_follows_the_reader(certs: Certificates) -> None:
    wire = Wire(certs)
    wire.client.send_stream_data(0, b"!")
    wire.carry()
    data = np.random.default_rng(1).bytes(3 * ROOM_BYTES)
    wire.daemon.send_stream_data(0, data, end_stream=True)
    wire.carry()
    assert len(wire.read) == ROOM_BYTES  # though nothing is lost or late
    wire.client.took(ROOM_BYTES // 4 - 1)
    wire.carry()
    assert len(wire.read) == ROOM_BYTES  # too little to say so
    wire.client.took(1)
    wire.carry()
    assert len(wire.read) == ROOM_BYTES + ROOM_BYTES // 4
    took = ROOM_BYTES // 4
    while took < len(wire.read):
        wire.client.took(len(wire.read) - took)
        took = len(wire.read)
        wire.carry()
    assert wire.read == data and wire.client.ended and not wire.client.broken
    assert not wire.client.finished
    wire.client.send_stream_data(0, b"", end_stream=True)
    wire.carry()
    assert wire.client.finished and wire.got == b"!"


def test_a_daemon_that_sends_beyond_its_limit(certs: Certificates) -> None:
    wire = Wire(certs)
    wire.client.send_stream_data(0, b"!")
    wire.carry()
    stream = wire.daemon._streams[0]
    stream.max_stream_data_remote = wire.daemon._remote_max_data = 1 << 40
    wire.daemon.send_stream_data(0, bytes(ROOM_BYTES + 1))
    wire.carry()
    assert len(wire.read) <= ROOM_BYTES
    ending = wire.client.ending()
    assert ending is not None and "data limit" in ending.words and not ending.final and not ending.in_order


def test_a_daemon_that_opens_streams(certs: Certificates) -> None:
    wire = Wire(certs)
    wire.daemon.send_stream_data(1, b"hello")
    wire.carry()
    assert wire.client.ending() is None and wire.read == b""  # it may not, and knows it
    for limit in ("_remote_max_streams_bidi", "_remote_max_streams_uni"):
        wire = Wire(certs)
        value: Any = getattr(wire.daemon, limit)
        if isinstance(value, int):
            setattr(wire.daemon, limit, 1)
        else:
            value.value = 1
        wire.daemon.send_stream_data(1 if limit.endswith("bidi") else 3, b"hello")
        wire.daemon._unblock_streams(limit.endswith("uni"))
        stream = next(iter(wire.daemon._streams.values()))
        stream.max_stream_data_remote = 100
        wire.carry()
        ending = wire.client.ending()
        assert ending is not None and "streams" in ending.words and wire.read == b""


def test_a_certificate_that_is_not_for_servers(certs: Certificates, tmp_path: Path) -> None:
    """Whoever has a client's certificate is not the daemon, even under the daemon's name."""
    for name, usage, says in (("plain", None, None), ("server", True, None), ("client", False, "not for servers")):
        pair = certs.issue(tmp_path, name, server=usage)
        wire = Wire(certs, pair=pair)
        ending = wire.client.ending()
        assert wire.client.trusted == (says is None) == (ending is None)
        assert ending is None or (says in ending.words and ending.final)  # type: ignore[operator]
    assert Wire(certs, TLS(insecure_skip_verify=True), pair=pair).client.trusted


def test_certificates_out_of_their_time(certs: Certificates, tmp_path: Path) -> None:
    for days, says in ((-3, "no longer valid"), (3, "not valid yet"), (0, None)):
        wire = Wire(certs, pair=certs.issue(tmp_path, f"days{days}", days=days))
        ending = wire.client.ending()
        assert (ending is None) == (says is None)
        assert ending is None or (says in ending.words and ending.final)  # type: ignore[operator]


def test_another_protocol(certs: Certificates) -> None:
    ending = Wire(certs, alpn="h3").client.ending()
    assert ending is not None and "the daemon says" in ending.words
    wire = Wire(certs, tls=TLS(ca=certs.ca))
    wire.client.trusted = False

    class Done:
        alpn_protocol = None

    wire.client._trust(Done())  # type: ignore[arg-type]
    ending = wire.client.ending()
    assert not wire.client.trusted and ending is not None and ending.final and "ingestd/1" in ending.words


def test_a_daemon_that_vanished(certs: Certificates) -> None:
    for seconds, over in ((IDLE_S - 1, False), (IDLE_S + 1, True)):
        wire = Wire(certs)
        wire.client.handle_timer(wire.now + seconds)
        ending = wire.client.ending()
        assert (ending is not None) == over
        assert ending is None or (ending.words == "idle timeout" and not ending.final and not ending.in_order)


def test_alerts_of_the_daemon(certs: Certificates) -> None:
    for alert, final in ((116, True), (120, True), (48, True), (45, True), (80, False), (255, False)):
        wire = Wire(certs)
        assert wire.client.ending() is None
        wire.daemon.close(0x100 + alert, 6, "")
        wire.carry()
        ending = wire.client.ending()
        assert ending is not None and ending.final == final and "the daemon says" in ending.words
        assert isinstance(ending.error(), TLSError) == final and isinstance(ending.error(), OSError)
