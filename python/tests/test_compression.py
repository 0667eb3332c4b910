"""Producers that compress: the bytes, the socket, and the real daemon."""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

import numpy as np
import pytest
from guarded import Certificates
from ingestd import TLS, Error, FormatError, Producer, Reader, Refused, Spec
from ingestd.compression import KINDS, Compression, Shuffle
from ingestd.redial import retried
from test_wire import example

from fakes import SPEC, Listener, Peer, encoded, sample
from real import PATIENCE, POINT, Daemon, Serve, points, verify

zstandard = pytest.importorskip("zstandard", reason="pip install 'ingestd[compression]'")
cramjam = pytest.importorskip("cramjam", reason="pip install 'ingestd[compression]'")

ODD = Spec.parse("a:U8[5],b:F32[7],c:U16,d:F64[3],e:BOOL")
LONG = Spec.parse("a:F32[40000],b:U8[70000],c:I64[8193]")  # several pieces each, the last ones short


def plain(kind: str, stream: bytes) -> bytes:
    """What the package that did not make the stream makes of it; all of it must be whole."""
    if kind.startswith("zstd"):
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 20).decompressobj()
        data: bytes = reader.decompress(stream)
        assert reader.eof and not reader.unused_data
        return data
    return bytes(cramjam.snappy.decompress(stream))


def unshuffled(spec: Spec, data: bytes) -> bytes:
    """By the words of docs/wire-protocol.md, byte for byte."""
    out, at = bytearray(len(data)), 0
    while at < len(data):
        for leaf in spec.leaves:
            item = leaf.numpy_dtype.itemsize
            for start in range(0, leaf.nbytes, 65536):
                size = min(65536, leaf.nbytes - start)
                n = size // item
                for j in range(item):
                    out[at + j : at + size : item] = data[at + j * n : at + (j + 1) * n]
                at += size
    return bytes(out)


def samples(spec: Spec, n: int) -> bytes:
    return np.random.default_rng(1).integers(0, 4, n * spec.sample_bytes, np.uint8).tobytes()


def test_the_example_of_the_documentation() -> None:
    spec = Spec.parse("x:F32[3],y:U8[2]")
    assert Shuffle(spec).shuffle(example("plainsample")) == example("shuffledsample")
    here, there = socket.socketpair()
    sock = Compression.of("s2+shuffle", spec).over(here)
    assert sock.send(example("plainsample")) == 14
    got = there.recv(1000)
    assert got[:10] == b"\xff\x06\0\0sNaPpY" and got[10:] == example("s2sample")[10:]  # of Snappy, and then the same
    sock.close()
    there.close()


@pytest.mark.parametrize("spec", [ODD, LONG], ids=["odd", "long"])
@pytest.mark.parametrize("step", [1, 7, 4096, 65536, 1 << 30])
def test_shuffled_in_pieces_of_any_size(spec: Spec, step: int) -> None:
    if step < 4096 and spec is LONG:
        step *= 1009
    data, shuffle = samples(spec, 6), Shuffle(spec)
    got = b"".join(shuffle.shuffle(data[at : at + step]) for at in range(0, len(data), step))
    assert len(got) == len(data) and unshuffled(spec, got) == data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [ODD, LONG], ids=["odd", "long"])
def test_what_was_taken_can_be_read(kind: str, spec: Spec) -> None:
    """After each call, without what the next one makes; and the end of the stream is one of its format."""
    here, there = socket.socketpair()
    there.setblocking(False)
    sock = Compression.of(kind, spec).over(here)
    data, sent, stream = samples(spec, 4), 0, b""
    while sent < len(data):
        sent += sock.sendmsg([data[sent : sent + 1000], b"", data[sent + 1000 : sent + 100_000]])
        with contextlib.suppress(BlockingIOError):
            while True:
                stream += there.recv(1 << 20)
        unzip = zstandard.ZstdDecompressor().decompressobj
        so_far = unzip().decompress(stream) if "zstd" in kind else plain(kind, stream)
        if "shuffle" not in kind:
            assert so_far == data[:sent]
        assert len(so_far) > sent - 65536
    assert sock.unsent == 0
    sock.shutdown(socket.SHUT_WR)
    while part := there.recv(1 << 20):
        stream += part
    whole = plain(kind, stream)
    assert (unshuffled(spec, whole) if "shuffle" in kind else whole) == data
    assert len(stream) < len(data) * (0.7 if spec is LONG else 1)
    there.send(b"ack")
    assert sock.recv(10) == b"ack"
    sock.close()
    there.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_without_room(kind: str) -> None:
    """Nothing is lost or out of order, the end included, whatever room there is."""
    here, there = socket.socketpair()
    here.setblocking(False)
    sock = Compression.of(kind, ODD).over(here)
    data = np.random.default_rng(1).bytes(20_000 * ODD.sample_bytes)  # which does not shrink
    view, stream, full, ended = memoryview(data), b"", 0, False
    while view or sock.unsent:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            full += 1
            assert sock.unsent
            stream += there.recv(10_000)
        if not view and not ended:
            ended = True
            sock.shutdown(socket.SHUT_WR)
            assert sock.unsent  # which did not fit
    assert full > 10
    while part := there.recv(1 << 16):
        stream += part
    whole = plain(kind, stream)
    assert (unshuffled(ODD, whole) if "shuffle" in kind else whole) == data
    sock.close()
    there.close()


def test_a_socket_whose_other_side_has_gone() -> None:
    here, there = socket.socketpair()
    sock = Compression.of("zstd", ODD).over(here)
    there.close()
    assert sock.send(b"taken") == 5 and sock.unsent  # and lost, as what lies in the system's buffers is
    for _ in range(2):
        with pytest.raises(BrokenPipeError):
            sock.send(b"more")
    sock.close()


def test_a_session_begins_a_new_stream(socket_path: str) -> None:
    listener = Listener.unix(socket_path)

    def samples_of(peer: Peer, stream: Any, n: int) -> bytes:
        got = b""
        while len(got) < n * SPEC.sample_bytes:
            got += stream.decompress(peer.sock.recv(1 << 16))
        return got

    def first(peer: Peer) -> None:
        stream = zstandard.ZstdDecompressor().decompressobj()
        assert peer.accept(ack="committed", compression="zstd")["compression"] == "zstd"
        assert samples_of(peer, stream, 1) == encoded(0)
        peer.ack(1)
        assert samples_of(peer, stream, 1).startswith(encoded(1))  # and dies of it

    def second(peer: Peer) -> None:
        stream = zstandard.ZstdDecompressor().decompressobj()
        peer.accept(ack="committed", held=1, compression="zstd")
        assert samples_of(peer, stream, 2) == encoded(1) + encoded(2)
        peer.ack(2)
        assert stream.decompress(peer.end()) == b"" and stream.eof

    listener.script(first)
    with Producer(listener.address, "t", SPEC, session="s", compression="zstd", deadline=PATIENCE) as p:
        p.push(sample(0))
        p.flush(deadline=PATIENCE)
        listener.script(second)
        p.push(sample(1))
        p.push(sample(2))
        p.close(deadline=PATIENCE)
    assert p.reconnects == 1 and p.acked == 3
    listener.finish()


def test_what_cannot_be(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="want one of s2, zstd"):
        Producer("unix:///nowhere", "t", SPEC, compression="lz4")
    listener = Listener.unix(socket_path)
    for agreed in ({}, {"compression": "s2"}):
        listener.script(lambda peer, agreed=agreed: peer.accept(**agreed) and None)  # type: ignore[misc]
        with pytest.raises(FormatError, match="another compression"):
            Producer(listener.address, "t", SPEC, compression="zstd", deadline=PATIENCE)
    listener.finish()
    for kind, package in (("zstd+shuffle", "zstandard"), ("s2", "cramjam")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(Error, match=rf"needs {package}, pip install 'ingestd\[compression\]'") as error:
            Producer("unix:///nowhere", "t", SPEC, compression=kind)
        assert not retried(error.value)


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def daemon(serve: Serve, certs: Certificates) -> Daemon:
    """Which offers all there is, on all kinds of listeners."""
    return serve(
        batch_size=32,
        batches=64,
        compression=list(KINDS),
        also=("tls://127.0.0.1:0", "quic://127.0.0.1:0"),
        tls={"cert": str(certs.server[0]), "key": str(certs.server[1])},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["tcp", "unix", "tls", "quic"])
def test_the_daemon_gets_every_sample(daemon: Daemon, certs: Certificates, kind: str, scheme: str) -> None:
    if scheme == "quic":
        pytest.importorskip("aioquic", reason="quic:// needs the extra: pip install 'ingestd[quic]'")
    address = daemon.addresses[scheme]
    tls = TLS(ca=certs.ca) if scheme in ("tls", "quic") else None
    for session in (None, "s"):
        with Producer(address, "t", POINT, session=session, tls=tls, compression=kind, deadline=PATIENCE) as p:
            for k in range(32):
                p.push(_row(points(1, k, 1)), deadline=PATIENCE)
            p.flush(deadline=PATIENCE)
            p.push_batch(points(1, 32, 480), deadline=PATIENCE)
            p.close(deadline=PATIENCE)
            assert p.acked == 512
    seen = []
    with Reader(daemon.unix, "t", deadline=PATIENCE) as reader:
        while len(seen) < 1024:
            with reader.next(deadline=PATIENCE) as batch:
                seen += [verify(batch.tree, row) for row in range(batch.count)]
    assert sorted(seen) == sorted([(1, k) for k in range(512)] * 2)


def _row(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _row(value) for name, value in tree.items()}
    return tuple(map(_row, tree)) if isinstance(tree, tuple) else tree[0]


@pytest.mark.parametrize("kind", KINDS)
def test_large_samples(serve: Serve, kind: str) -> None:
    d = serve(spec="a:F32[300000],b:U8[700001]", batch_size=2, batches=8, compression=[kind])
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(6, 300_000)).astype(np.float32), rng.integers(0, 9, (6, 700_001), np.uint8)
    with Producer(d.tcp, "t", "a:F32[300000],b:U8[700001]", compression=kind, deadline=PATIENCE) as p:
        p.push({"a": a[0], "b": b[0]}, deadline=PATIENCE)
        p.push_batch({"a": a[1:], "b": b[1:]}, deadline=PATIENCE)
        p.close(deadline=PATIENCE)
    with Reader(d.unix, "t", deadline=PATIENCE) as reader:
        for k in range(0, 6, 2):
            with reader.next(deadline=PATIENCE) as batch:
                assert np.array_equal(batch["a"], a[k : k + 2]) and np.array_equal(batch["b"], b[k : k + 2])


def test_a_daemon_that_offers_none(serve: Serve) -> None:
    d = serve()
    with pytest.raises(Refused, match="compression") as refused:
        Producer(d.tcp, "t", POINT, session="s", compression="zstd", deadline=PATIENCE)
    assert refused.value.code == "bad_option" and not retried(refused.value)
