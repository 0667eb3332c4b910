"""TLS: clients against a fake daemon; half-closed connections, full ones, cuts, wrong certificates."""

from __future__ import annotations

import gc
import hashlib
import hmac
import json
import os
import select
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarded import SECRET, TOKEN, Certificates, over_tls, proofs, that_fails
from ingestd import (
    TLS,
    DaemonUnproven,
    FillProducer,
    GradReader,
    Manifest,
    PeerClosed,
    Producer,
    Publisher,
    Refused,
    ShuttingDown,
    StepProducer,
    Subscription,
    Timeout,
    TLSError,
    tls_exporter,
)
from ingestd._io import Deadline, connect, parse_address
from ingestd.redial import retried
from tensors import C, receive
from tensors import accept as accept_steps
from test_auth import ARRAYS, OPEN, REMOTE

from fakes import BIG, PATIENCE, SPEC, Listener, Peer, Steps, big, big_encoded, encoded, sample
from weights_fakes import MANIFEST, accept_reader, check, give, gone, tensors
from weights_table import Table


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def tls(certs: Certificates) -> TLS:
    return TLS(ca=certs.ca)


@pytest.fixture
def listener(certs: Certificates) -> Iterator[Listener]:
    made = over_tls(Listener.tcp(), certs.context())
    yield made
    made.finish()


@pytest.fixture
def failing(certs: Certificates) -> Iterator[Listener]:
    """A listener of which nobody is served."""
    made = Listener.tcp()
    made.address = made.address.replace("tcp://", "tls://")
    yield made
    made.finish()


def batch(first: int, end: int) -> dict[str, Any]:
    rows = [sample(k) for k in range(first, end)]
    return {"image": np.stack([r["image"] for r in rows]), "label": np.stack([r["label"] for r in rows])}


def test_a_producer_closes_its_side_alone(listener: Listener, tls: TLS) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        sock: Any = peer.sock
        assert (sock.version(), sock.selected_alpn_protocol()) == ("TLSv1.3", "ingestd/1")
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


def test_a_session_goes_on_over_another_connection(listener: Listener, tls: TLS) -> None:
    def first(peer: Peer) -> None:
        peer.accept(ack="committed")
        assert peer.exactly(SPEC.sample_bytes) == encoded(0)
        peer.ack(1)
        peer.exactly(SPEC.sample_bytes // 2)
        peer.sock.shutdown(socket.SHUT_RDWR)  # cut, without a goodbye

    def second(peer: Peer) -> None:
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
def test_large_samples_and_a_daemon_that_reads_late(listener: Listener, tls: TLS, session: str | None) -> None:
    steps = Steps()
    n = 24  # of 2 MiB: more than the system keeps for a connection

    def script(peer: Peer) -> None:
        peer.accept(window_samples=64, window_bytes=1 << 30, ack="committed")
        steps.wait("full")
        for k in range(n):
            assert peer.exactly(BIG.sample_bytes) == big_encoded(k)
            peer.ack(1)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", BIG, session=session, tls=tls, deadline=PATIENCE) as p:
        if session:
            for k in range(n):
                p.push(big(k), deadline=PATIENCE)
            with pytest.raises(Timeout, match="acknowledgements"):
                p.flush(deadline=0.05)
        else:
            with pytest.raises(Timeout):
                for _ in range(n):
                    p.push(big(p.pushed), deadline=0.05)
            assert 0 < p.pushed < n
        steps.done("full")
        while p.pushed < n:
            p.push(big(p.pushed), deadline=PATIENCE)
        p.close(deadline=PATIENCE)
    assert p.acked == n


def test_what_comes_with_the_reply_is_seen(listener: Listener, tls: TLS) -> None:
    for session in (None, "s"):

        def script(peer: Peer) -> None:
            body = peer.hello()
            raw = peer.sock
            peer.sock = Gathering(raw)  # type: ignore[assignment]
            agreed = {"table": "t", "fingerprint": body["fingerprint"], "stream": 1, "ack": "queued", "held": 0}
            peer.reply({**agreed, "window_samples": 9, "window_bytes": 1 << 20})
            peer.notice("shutting_down", "later")
            raw.sendall(bytes(peer.sock.kept))  # type: ignore[attr-defined]
            peer.sock = raw
            assert peer.end() == b""

        listener.script(script)
        p = Producer(listener.address, "t", SPEC, session=session, reconnect=0, tls=tls, deadline=PATIENCE)
        with pytest.raises(ShuttingDown):
            while True:
                p.push(sample(1), deadline=PATIENCE)
                p.flush(deadline=PATIENCE)
        p.abort()


class Gathering:
    """Keeps what is sent, so that it goes in one record."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.kept = sock, bytearray()

    def sendall(self, data: bytes) -> None:
        self.kept += data


def test_steps(listener: Listener, tls: TLS) -> None:
    arrays = {"w": np.arange(3 * C // 4, dtype=np.float32)}

    def script(peer: Peer) -> None:
        accept_steps(peer)
        chunks = [receive(peer) for _ in range(3)]
        assert b"".join(c.data for c in chunks) == arrays["w"].tobytes()
        peer.ack(3)
        assert peer.end() == b""

    listener.script(script)
    with StepProducer(listener.address, "t", "w", Manifest.from_arrays(arrays), tls=tls, deadline=PATIENCE) as p:
        p.send(3, arrays, deadline=PATIENCE)
        assert p.committed == 1


def test_a_subscription(listener: Listener, tls: TLS) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 3)
        steps.wait("first")
        give(peer, 4)
        gone(peer)

    listener.script(script)
    with Subscription(listener.address, "w", tls=tls, deadline=PATIENCE) as sub:
        with sub.wait(deadline=PATIENCE) as w:
            check(w, 3)
        steps.done("first")
        with sub.wait(newer_than=3, deadline=PATIENCE) as w:
            check(w, 4)


def test_a_publisher(listener: Listener, tls: TLS) -> None:
    table = Table(listener, False)

    def script(peer: Peer) -> None:
        table.accept(peer)
        table.take(peer, 7)
        table.take(peer, 8)
        assert peer.end() == b""

    listener.script(script)
    with Publisher(listener.address, "w", MANIFEST, tls=tls, deadline=PATIENCE) as pub:
        pub.publish(tensors(7), generation=7, deadline=PATIENCE)
        pub.publish(tensors(8), deadline=PATIENCE)


def raw(listener: Listener, tls: TLS) -> Any:
    return connect(parse_address(listener.address, tls=tls), Deadline(PATIENCE))


def wait(sock: Any, events: int) -> None:
    poll = select.poll()
    poll.register(sock, events)
    assert poll.poll(PATIENCE * 1000)


def receive_all(sock: Any) -> bytes:
    got = bytearray()
    while True:
        try:
            part = sock.recv(1000)
        except BlockingIOError:
            wait(sock, select.POLLIN)
            continue
        if not part:
            return bytes(got)
        got += part


def test_bytes_that_wait_for_room_are_sent_in_order(listener: Listener, tls: TLS) -> None:
    data = np.random.default_rng(1).bytes(8 << 20)
    steps = Steps()
    got: list[bytes] = []

    def script(peer: Peer) -> None:
        steps.wait("full")
        got.append(peer.end())
        peer.sock.sendall(data[:100_000])
        peer.sock.unwrap()  # type: ignore[attr-defined]

    listener.script(script)
    sock = raw(listener, tls)
    sizes = [1, 0, 16_383, 3, 16_384, 5, 5, 40_000, 1 << 20, 7]
    pieces: list[memoryview] = []
    view, k = memoryview(data), 0
    while view:
        pieces.append(view[: sizes[k % len(sizes)]])
        view, k = view[len(pieces[-1]) :], k + 1
    full = False
    while pieces or sock.unsent:
        try:
            n = sock.sendmsg(pieces[:50])
            assert n <= 1 << 18
        except BlockingIOError:
            full = True
            steps.done("full")
            wait(sock, select.POLLOUT)
            continue
        while pieces and n >= len(pieces[0]):
            n -= len(pieces.pop(0))
        if n:
            pieces[0] = pieces[0][n:]
    assert full
    sock.shutdown(socket.SHUT_WR)
    sock.shutdown(socket.SHUT_WR)  # the second time nothing happens
    assert receive_all(sock) == data[:100_000]
    assert got == [data]
    assert sock.recv(5) == b"" and sock.recv_into(bytearray(5)) == 0
    sock.close()
    sock.close()


def test_receiving_into_memory(listener: Listener, tls: TLS) -> None:
    data = np.random.default_rng(1).bytes(3_000_000)
    listener.script(lambda peer: peer.sock.sendall(data))
    sock = raw(listener, tls)
    into, at = np.zeros(len(data), np.uint8), 0
    while at < len(data):
        try:
            at += sock.recv_into(into[at:].data)
        except BlockingIOError:
            wait(sock, select.POLLIN)
    assert into.tobytes() == data
    sock.close()


def test_an_end_without_a_goodbye_is_an_error(listener: Listener, tls: TLS) -> None:
    def script(peer: Peer) -> None:
        peer.sock.sendall(b"abc")
        peer.sock.shutdown(socket.SHUT_RDWR)

    listener.script(script)
    sock = raw(listener, tls)
    for thread in listener.threads:
        thread.join(PATIENCE)
    assert sock.recv(100) == b"abc"  # what came before is not lost
    with pytest.raises(ConnectionResetError, match="without the goodbye of TLS"):
        sock.recv(100)
    sock.close()


def test_bytes_that_were_changed_on_the_way(certs: Certificates, tls: TLS, failing: Listener) -> None:
    """A record that is not what was sent ends the connection."""

    def script(peer: Peer) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = certs.context().wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                server.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.sock.sendall(outgoing.read())
                incoming.write(peer.sock.recv(1 << 16))
        server.write(b"abc")
        changed = bytearray(outgoing.read())
        changed[-1] ^= 1
        peer.sock.sendall(changed)
        peer.end()

    failing.script(script)
    sock = raw(failing, tls)
    for _ in range(2):
        with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac|decryption"):
            receive_all(sock)
    sock.close()


def refused(listener: Listener, context: ssl.SSLContext, tls: TLS, **options: Any) -> tuple[TLSError, str]:
    """The errors of both sides."""
    errors: list[str] = []
    listener.make = that_fails(context, errors)
    listener.script(lambda peer: None)
    with pytest.raises(TLSError) as error:
        Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE, **options)
    for thread in listener.threads:
        thread.join(PATIENCE)
    assert len(errors) == 1 and not retried(error.value)
    return error.value, errors[0]


def test_another_authority(failing: Listener, certs: Certificates, tmp_path: Path) -> None:
    other = Certificates(tmp_path)
    error, _ = refused(failing, certs.context(), TLS(ca=other.ca), session="s")
    assert "the daemon's certificate is not trusted" in str(error)


def test_the_authorities_of_the_system(failing: Listener, certs: Certificates) -> None:
    error, _ = refused(failing, certs.context(), TLS())
    assert "not trusted" in str(error)


def test_another_name(failing: Listener, listener: Listener, certs: Certificates) -> None:
    error, _ = refused(failing, certs.context(), TLS(ca=certs.ca, server_name="daemon.example.com"))
    assert "daemon.example.com" in str(error)
    listener.script(lambda peer: peer.accept() and None)
    Producer(
        listener.address, "t", SPEC, tls=TLS(ca=certs.ca, server_name="localhost"), deadline=PATIENCE
    ).abort()  # fmt: skip


def test_certificates_out_of_their_time(failing: Listener, certs: Certificates, tls: TLS, tmp_path: Path) -> None:
    for days, says in ((-3, "expired"), (3, "not yet valid")):
        context = certs.context(pair=certs.issue(tmp_path, f"days{days}", days=days))
        error, told = refused(failing, context, tls, session="s")
        assert "the daemon's certificate is not trusted" in str(error) and says in str(error)
        assert "CERTIFICATE" in told.upper()


def test_a_certificate_that_is_for_clients(failing: Listener, certs: Certificates, tls: TLS, tmp_path: Path) -> None:
    """Whoever has a client's certificate is not the daemon, even under the daemon's name."""
    context = certs.context(pair=certs.issue(tmp_path, "client", server=False))
    error, _ = refused(failing, context, tls)
    assert "not trusted" in str(error) and "purpose" in str(error)


def test_insecure(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        assert peer.end() == b""

    listener.script(script)
    tls = TLS(server_name="daemon.example.com", insecure_skip_verify=True)
    Producer(listener.address, "t", SPEC, tls=tls, deadline=PATIENCE).close(deadline=PATIENCE)
    assert "gives up" in (TLS.__doc__ or "")


@pytest.mark.parametrize("alpn", [None, "h2"])
def test_another_protocol(failing: Listener, certs: Certificates, tls: TLS, alpn: str | None) -> None:
    error, _ = refused(failing, certs.context(alpn=alpn), tls)
    assert "ingestd/1" in str(error) or "APPLICATION_PROTOCOL" in str(error).upper()


def test_an_older_version(failing: Listener, certs: Certificates, tls: TLS) -> None:
    context = certs.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    error, _ = refused(failing, context, tls)
    assert "PROTOCOL_VERSION" in str(error).upper()


def test_client_certificates(failing: Listener, certs: Certificates, tls: TLS, tmp_path: Path) -> None:
    wanted = certs.context(client_ca=certs.ca)
    error, told = refused(failing, wanted, tls)
    assert "CERTIFICATE_REQUIRED" in str(error).upper() and "did not return a certificate" in told
    other = Certificates(tmp_path)
    error, _ = refused(failing, wanted, TLS(certs.ca, *other.client))
    assert "UNKNOWN_CA" in str(error).upper()
    over_tls(failing, wanted)
    seen: list[Any] = []

    def script(peer: Peer) -> None:
        peer.accept()
        seen.append(peer.sock.getpeercert())  # type: ignore[attr-defined]
        assert peer.end() == b""

    failing.script(script)
    given = TLS(ca=certs.ca, cert=certs.client[0], key=certs.client[1])
    Producer(failing.address, "t", SPEC, tls=given, deadline=PATIENCE).close(deadline=PATIENCE)
    assert "client" in str(seen[0]["subject"])
    both = tmp_path / "both.pem"
    both.write_text(certs.client[1].read_text() + certs.client[0].read_text())
    failing.script(script)
    Producer(failing.address, "t", SPEC, tls=TLS(certs.ca, both), deadline=PATIENCE).close(deadline=PATIENCE)


def test_files_that_cannot_be_used(failing: Listener, certs: Certificates, tmp_path: Path) -> None:
    nothing, empty = tmp_path / "nothing", tmp_path / "empty"
    empty.write_text("")
    wrong: list[tuple[TLS, str]] = [
        (TLS(ca=nothing), r"ca='.*nothing' cannot be used: No such file"),
        (TLS(ca=empty), r"ca='.*empty' cannot be used"),
        (TLS(ca=certs.ca, cert=nothing), r"cert='.*nothing' cannot be used: No such file"),
        (TLS(ca=certs.ca, cert=certs.client[0], key=certs.server[1]), r"cert=.*key='.*server.key' cannot be used"),
        (TLS(ca=certs.ca, key=certs.client[1]), "give cert= too"),
        (TLS(ca=certs.ca, server_name=""), "no name"),
        (TLS(ca=certs.ca, server_name=".x"), "no name"),
    ]
    for tls, says in wrong:
        failing.make = Peer
        failing.script(lambda peer: None)
        with pytest.raises(TLSError, match=says):
            Producer(failing.address, "t", SPEC, tls=tls, deadline=PATIENCE)


def test_a_listener_without_tls(failing: Listener, tls: TLS) -> None:
    failing.script(lambda peer: peer.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    with pytest.raises((TLSError, PeerClosed), match=r"(?i)wrong.version|TLS"):
        Producer(failing.address, "t", SPEC, tls=tls, deadline=PATIENCE)
    failing.script(lambda peer: None)
    with pytest.raises(PeerClosed, match="does the daemon listen with TLS there"):
        Producer(failing.address, "t", SPEC, tls=tls, deadline=PATIENCE)
    steps = Steps()
    failing.script(lambda peer: steps.wait("over"))
    with pytest.raises(Timeout, match="handshake of TLS"):
        Producer(failing.address, "t", SPEC, tls=tls, deadline=0.05)
    steps.done("over")


@pytest.mark.parametrize("name", REMOTE)
def test_every_client_proves_its_token(certs: Certificates, tls: TLS, tmp_path: Path, name: str) -> None:
    """The proofs are bound to the connection: both sides have derived the same from their own key logs."""
    context = certs.context()
    context.keylog_filename = str(tmp_path / "keys")
    listener = over_tls(Listener.tcp(), context)
    before = len(os.listdir("/proc/self/fd"))

    def script(peer: Peer) -> None:
        log = (tmp_path / "keys").read_text().splitlines()
        exporter = exported([line.split()[2] for line in log if line.startswith("EXPORTER_SECRET ")][-1])
        frame, nonce = peer.frame(), bytes(range(32))
        mine, theirs = proofs(SECRET, frame, nonce, exporter)
        peer.reply({"nonce": nonce.hex(), "proofs": [mine.hex()]}, status=2)
        assert json.loads(peer.frame()[16:]) == {"proof": theirs.hex()}
        peer.reply({"code": "unknown_table", "reason": "no such table"}, status=1)

    listener.script(script)
    with pytest.raises(Refused, match="unknown_table"):
        OPEN[name](listener.address, tls=tls, token=TOKEN, deadline=PATIENCE)
    listener.finish()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before  # the listener has gone, and no memory of keys is left


def exported(secret: str) -> bytes:
    """RFC 8446, 7.5, of the 48 bytes of a secret."""

    def expand(key: bytes, label: str, context: bytes, size: int) -> bytes:
        text = b"tls13 " + label.encode()
        info = size.to_bytes(2, "big") + bytes([len(text)]) + text + bytes([len(context)]) + context
        return hmac.new(key, info + b"\1", hashlib.sha384).digest()[:size]

    nothing = hashlib.sha384().digest()
    key = expand(bytes.fromhex(secret), "EXPORTER-ingestd-auth-1", nothing, 48)
    return expand(key, "exporter", nothing, 32)


def test_proofs_that_are_not_of_this_connection(failing: Listener, certs: Certificates, tls: TLS) -> None:
    over_tls(failing, certs.context())
    for exporter in (bytes(32), bytes(range(32))):  # of clear TCP, and of another connection

        def script(peer: Peer, exporter: bytes = exporter) -> None:
            frame, nonce = peer.frame(), bytes(range(32))
            peer.reply({"nonce": nonce.hex(), "proofs": [proofs(SECRET, frame, nonce, exporter)[0].hex()]}, status=2)
            assert peer.end() == b""

        failing.script(script)
        with pytest.raises(DaemonUnproven):
            Producer(failing.address, "t", SPEC, tls=tls, token=TOKEN, deadline=PATIENCE)


def test_where_the_exporter_cannot_be_had(
    failing: Listener, certs: Certificates, tls: TLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = certs.context()
    context.num_tickets = 0  # who closes before these are read resets the connection
    over_tls(failing, context)

    def script(peer: Peer) -> None:
        assert peer.end() == b""  # not even a hello

    failing.script(script)
    monkeypatch.setattr(tls_exporter, "_HASHES", {})
    with pytest.raises(TLSError, match="did not give its secret"):
        Producer(failing.address, "t", SPEC, tls=tls, token=TOKEN, deadline=PATIENCE)
    failing.make = Peer
    failing.script(lambda peer: None)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(TLSError, match="need Linux"):
        Producer(failing.address, "t", SPEC, tls=tls, token=TOKEN, deadline=PATIENCE)


@pytest.mark.parametrize("size", [32, 48])
def test_the_size_of_a_secret_says_the_hash(size: int) -> None:
    assert len(tls_exporter.exporter(bytes(size))) == 32
    with pytest.raises(KeyError):
        tls_exporter.exporter(bytes(size - 1))


def test_options_of_tls_need_tls(socket_path: str) -> None:
    for make in (
        lambda a: Producer(a, "t", SPEC, tls=TLS()),
        lambda a: StepProducer(a, "t", "w", ARRAYS, tls=TLS()),
        lambda a: Publisher(a, "t", ARRAYS, tls=TLS()),
        lambda a: Subscription(a, "t", tls=TLS()),
        lambda a: GradReader(a, "t", tls=TLS()),
    ):
        for address in ("tcp://127.0.0.1:1", f"unix://{socket_path}"):
            with pytest.raises(ValueError, match="tls://host:port and quic://host:port"):
                make(address)
    with pytest.raises(ValueError, match="unix://"):
        FillProducer("tls://127.0.0.1:1", "t")
    for address in ("tls://[::1]:80", "quic://[::1]:80", "quic://host:1"):
        assert str(parse_address(address, tls=TLS())) == address


def test_tls_is_not_loaded_without_need() -> None:
    code = "import sys, ingestd; sys.exit('ssl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
