"""Tokens and TLS against the real daemon."""

from __future__ import annotations

import json
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarded import Certificates, over_tls
from ingestd import (
    TLS,
    DaemonUnproven,
    GradReader,
    NotAuthenticated,
    NotChallenged,
    Producer,
    Publisher,
    Reader,
    Refused,
    StepProducer,
    Subscription,
    TLSError,
    Token,
)
from ingestd.redial import retried

from fakes import Listener, Peer
from real import PATIENCE, POINT, Daemon, points, verify

SECRETS = {name: f"{name}-{'0123456789' * 4}" for name in ("push", "read", "publish", "all")}
TOKENS = {name: Token(name, secret) for name, secret in SECRETS.items()}
ARRAYS = {"w": np.arange(1000, dtype=np.float32), "b": np.float32(3)}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file of tokens that have one right each, and one that has all, for table t."""
    path = tmp_path / "tokens.yaml"
    lines = ["tokens:"]
    for name, secret in SECRETS.items():
        rights = "push, read, publish" if name == "all" else name
        lines.append(f"  - {{name: {name}, secret: '{secret}', rights: [{rights}], tables: [t]}}")
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


SAMPLES: dict[str, Any] = {"spec": POINT, "batch_size": 32, "batches": 8, "linger": "0s"}
TENSORS: dict[str, Any] = {"kind": "tensors"}
WEIGHTS: dict[str, Any] = {"kind": "weights"}


@pytest.fixture
def serve() -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []
    with tempfile.TemporaryDirectory(prefix="ingestd-") as folder:

        def start(table: dict[str, Any] = SAMPLES, **settings: Any) -> Daemon:
            where = Path(folder) / str(len(daemons))
            where.mkdir()
            daemons.append(Daemon(where, [{"name": "t", **table}], **settings))
            return daemons[-1]

        yield start
        for d in daemons:
            d.close()


def pushed(address: str, **options: Any) -> None:
    with Producer(address, "t", POINT, ack="committed", deadline=PATIENCE, **options) as p:
        assert p.push_batch(points(1, 0, 32), deadline=PATIENCE) == 32
        p.close(deadline=PATIENCE)


def read(address: str, n: int, **options: Any) -> None:
    with Reader(address, "t", deadline=PATIENCE, **options) as reader:
        seen = 0
        while seen < n:
            with reader.next(deadline=PATIENCE) as batch:
                for row in range(batch.count):
                    verify(batch.tree, row)
                seen += batch.count


def test_who_may_do_what(serve: Callable[..., Daemon], tokens: Path) -> None:
    d = serve(tokens=str(tokens))
    for name in ("push", "all"):
        pushed(d.tcp, token=TOKENS[name])
        pushed(d.unix, token=TOKENS[name])
    pushed(d.unix)  # its own user
    read(d.tcp, 160, token=TOKENS["read"])
    with pytest.raises(Refused):
        Reader(d.tcp, "t", token=TOKENS["push"], deadline=PATIENCE)
    with pytest.raises(Refused) as refused:
        pushed(d.tcp, token=TOKENS["read"])
    assert refused.value.code == "not_permitted"
    with pytest.raises(Refused) as refused:
        Reader(d.unix, "t", token=TOKENS["push"], deadline=PATIENCE)
    assert refused.value.code == "not_permitted"
    with pytest.raises(Refused) as refused:
        Producer(d.tcp, "other", POINT, token=TOKENS["push"], deadline=PATIENCE)
    assert refused.value.code == "not_permitted"


def test_who_is_nobody(serve: Callable[..., Daemon], tokens: Path) -> None:
    d = serve(tokens=str(tokens))
    with pytest.raises(NotAuthenticated):
        pushed(d.tcp)
    for wrong in (Token("push", "x" * 40), Token("nobody", SECRETS["push"])):
        with pytest.raises(DaemonUnproven):
            pushed(d.tcp, token=wrong)
    pushed(d.tcp, token=TOKENS["push"])
    assert not any(secret in d.said() for secret in SECRETS.values())


def test_a_daemon_without_tokens(serve: Callable[..., Daemon]) -> None:
    d = serve()
    with pytest.raises((Refused, NotChallenged)):
        pushed(d.tcp, token=TOKENS["push"])


def test_gradients(serve: Callable[..., Daemon], tokens: Path) -> None:
    d = serve(TENSORS, tokens=str(tokens))
    with GradReader(d.unix, "t", token=TOKENS["read"], deadline=PATIENCE) as reader:
        with StepProducer(d.tcp, "t", "a", ARRAYS, token=TOKENS["push"], deadline=PATIENCE) as p:
            p.send(1, ARRAYS, deadline=PATIENCE)
        with reader.step(1, quorum=1, deadline=PATIENCE) as step:
            assert np.array_equal(step.sum()["w"], ARRAYS["w"])


def weights(publish: str, subscribe: str, **options: Any) -> None:
    at = options.pop("publisher", {}), options.pop("reader", {})
    with Publisher(publish, "t", ARRAYS, deadline=PATIENCE, **at[0], **options) as pub:
        pub.publish(ARRAYS, deadline=PATIENCE)
        with Subscription(subscribe, "t", deadline=PATIENCE, **at[1], **options) as sub:
            with sub.wait(deadline=PATIENCE) as w:
                assert np.array_equal(w["w"], ARRAYS["w"])
                seen = w.generation
            pub.publish({**ARRAYS, "b": np.float32(4)}, deadline=PATIENCE)
            with sub.wait(newer_than=seen, deadline=PATIENCE) as w:
                assert w["b"] == 4


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_weights(serve: Callable[..., Daemon], tokens: Path, where: str) -> None:
    d = serve(WEIGHTS, tokens=str(tokens))
    address = d.tcp if where == "tcp" else d.unix
    weights(address, address, publisher={"token": TOKENS["publish"]}, reader={"token": TOKENS["read"]})


Secure = Callable[..., tuple[Daemon, str, Certificates]]


@pytest.fixture(params=["tls", "quic"])
def secure(request: pytest.FixtureRequest, serve: Callable[..., Daemon], tmp_path: Path) -> Secure:
    """Starts a daemon with a listener of either kind; it, the address, and the certificates.

    ``expired``: the client's certificate is.
    """
    if request.param == "quic":
        pytest.importorskip("aioquic", reason="quic:// needs the extra: pip install 'ingestd[quic]'")

    def start(
        table: dict[str, Any] = SAMPLES, client_ca: bool = False, expired: bool = False, **more: Any
    ) -> tuple[Daemon, str, Certificates]:
        certs = Certificates(tmp_path)
        if expired:
            certs.client = certs.issue(tmp_path, "expired", days=-3, server=False)
        tls = {"cert": str(certs.server[0]), "key": str(certs.server[1])}
        if client_ca:
            tls["client_ca"] = str(certs.ca)
        d = serve(table, tls=tls, also=(f"{request.param}://127.0.0.1:0",), **more)
        return d, d.addresses[request.param], certs

    return start


def test_samples_over_it(secure: Secure) -> None:
    d, address, certs = secure()
    pushed(address, tls=TLS(ca=certs.ca))
    pushed(address, tls=TLS(ca=certs.ca), session="s")
    pushed(address, tls=TLS(insecure_skip_verify=True))
    read(address, 96, tls=TLS(ca=certs.ca))
    with pytest.raises(TLSError, match="not trusted"):
        pushed(address, tls=TLS())
    assert "cut_short" not in d.said()


def test_large_samples_over_it(secure: Secure) -> None:
    d, address, certs = secure({**SAMPLES, "spec": "a:U8[1048576]", "batch_size": 2})
    data = np.random.default_rng(1).integers(0, 256, (12, 1 << 20), np.uint8)
    with Producer(address, "t", "a:U8[1048576]", tls=TLS(ca=certs.ca), ack="committed", deadline=PATIENCE) as p:
        for k in range(4):
            p.push({"a": data[k]}, deadline=PATIENCE)
        p.push_batch({"a": data[4:]}, deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
    with Reader(d.unix, "t", deadline=PATIENCE) as reader:
        for k in range(0, 12, 2):
            with reader.next(deadline=PATIENCE) as batch:
                assert np.array_equal(batch["a"], data[k : k + 2])


def test_client_certificates(secure: Secure, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, address, certs = secure(client_ca=True)
    pushed(address, tls=TLS(certs.ca, *certs.client))
    other = Certificates(tmp_path_factory.mktemp("other"))
    for mine, says in (((), r"(?i)certificate.required"), (other.client, r"(?i)unknown.ca|bad.certificate")):
        with pytest.raises(TLSError, match=says) as error:
            pushed(address, tls=TLS(certs.ca, *mine), session="s")
        assert not retried(error.value)


def test_a_client_whose_certificate_has_expired(secure: Secure) -> None:
    """It is told so once, and does not try again and again until its address is banned."""
    d, address, certs = secure(client_ca=True, expired=True)
    with pytest.raises(TLSError, match=r"(?i)certificate.expired") as error:
        pushed(address, tls=TLS(certs.ca, *certs.client), session="s")
    assert not retried(error.value)
    with pytest.raises(TLSError, match=r"(?i)certificate.expired"):
        Reader(address, "t", tls=TLS(certs.ca, *certs.client), deadline=PATIENCE)
    pushed(d.unix)


CLIENTS: dict[str, Callable[..., Any]] = {
    "producer": lambda a, **o: Producer(a, "t", POINT, **o),
    "session": lambda a, **o: Producer(a, "t", POINT, session="s", **o),
    "steps": lambda a, **o: StepProducer(a, "t", "w", ARRAYS, **o),
    "publisher": lambda a, **o: Publisher(a, "t", ARRAYS, **o),
    "subscription": lambda a, **o: Subscription(a, "t", **o),
    "reader": lambda a, **o: Reader(a, "t", **o),
}


@pytest.mark.parametrize("why", ["authority", "name"])
def test_a_daemon_that_is_not_believed(secure: Secure, tmp_path_factory: pytest.TempPathFactory, why: str) -> None:
    """Every client says why, and does not try again."""
    d, address, certs = secure()
    tls, says = {
        "authority": (TLS(Certificates(tmp_path_factory.mktemp("other")).ca), "issuer certificate"),
        "name": (TLS(certs.ca, server_name="daemon.example.com"), r"daemon\.example\.com"),
    }[why]
    for name, make in CLIENTS.items():
        with pytest.raises(TLSError, match=says) as error:
            make(address, tls=tls, deadline=PATIENCE)
        assert "the daemon's certificate is not trusted" in str(error.value), name
        assert not retried(error.value)
    pushed(d.unix)


def test_a_session_goes_on_when_the_daemon_is_back(secure: Secure, tmp_path: Path) -> None:
    segments = tmp_path / "segments"
    segments.mkdir(0o700)
    d, address, certs = secure(segment_dir=str(segments))
    tls = TLS(ca=certs.ca)
    with Producer(address, "t", POINT, session="s", ack="committed", tls=tls, deadline=PATIENCE) as p:
        for k in range(4):
            p.push_batch(points(1, 32 * k, 32), deadline=PATIENCE)
            p.flush(deadline=PATIENCE)
            if k == 1:
                d.also = (address,)
                d.restart(in_order=True)
        p.close(deadline=PATIENCE)
    assert p.reconnects == 1
    with Reader(address, "t", tls=tls, deadline=PATIENCE) as reader:
        for k in range(4):
            with reader.next(deadline=PATIENCE) as batch:
                assert [verify(batch.tree, row) for row in range(32)] == [(1, 32 * k + row) for row in range(32)]


def test_weights_over_it(secure: Secure) -> None:
    _, address, certs = secure(WEIGHTS)
    weights(address, address, tls=TLS(ca=certs.ca))


def test_gradients_over_it(secure: Secure, tokens: Path) -> None:
    _, address, certs = secure(TENSORS, tokens=str(tokens))
    tls = TLS(ca=certs.ca)
    with GradReader(address, "t", tls=tls, token=TOKENS["read"], deadline=PATIENCE) as reader:
        with StepProducer(address, "t", "a", ARRAYS, tls=tls, token=TOKENS["push"], deadline=PATIENCE) as p:
            p.send(1, ARRAYS, deadline=PATIENCE)
        with reader.step(1, quorum=1, deadline=PATIENCE) as step:
            assert step.have == ["a"] and np.array_equal(step.sum()["w"], ARRAYS["w"])


def test_tokens_over_it(secure: Secure, tokens: Path) -> None:
    """The proof is bound to the connection by what TLS exports: the daemon takes no other."""
    d, address, certs = secure(tokens=str(tokens))
    tls = TLS(ca=certs.ca)
    for session in (None, "s"):
        pushed(address, tls=tls, token=TOKENS["push"], session=session)
    read(d.unix, 64, token=TOKENS["read"])
    with pytest.raises(DaemonUnproven):
        pushed(address, tls=tls, token=Token("push", "x" * 40))
    with pytest.raises(NotAuthenticated):
        pushed(address, tls=tls)


@pytest.mark.parametrize("secure", ["tls"], indirect=True)
def test_who_meets_tls_in_the_middle_gains_nothing(secure: Secure, tokens: Path) -> None:
    """Even of a client that takes any certificate: what the daemon proves to the relay is for another connection."""
    _, address, certs = secure(tokens=str(tokens))
    host, port = address.rpartition("/")[2].split(":")
    outside = ssl.create_default_context(cafile=str(certs.ca))
    outside.set_alpn_protocols(["ingestd/1"])
    listener = over_tls(Listener.tcp(), certs.context())
    relayed: list[bytes] = []

    def script(peer: Peer) -> None:
        with outside.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as onward:
            onward.settimeout(PATIENCE)
            hello = peer.frame()
            onward.sendall(hello)
            relayed.append(Peer(onward).frame())
            peer.sock.sendall(relayed[0])
            assert peer.end() == b""  # no proof

    listener.script(script)
    with pytest.raises(DaemonUnproven):
        pushed(listener.address, tls=TLS(insecure_skip_verify=True), token=TOKENS["push"])
    listener.finish()
    assert len(json.loads(relayed[0][16:])["proofs"]) == 2
