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


@pytest.fixture
def secure(serve: Callable[..., Daemon], tmp_path: Path) -> Secure:
    """Starts a daemon with a tls:// listener; it, the address, and the certificates."""

    def start(
        table: dict[str, Any] = SAMPLES, client_ca: bool = False, **more: Any
    ) -> tuple[Daemon, str, Certificates]:
        certs = Certificates(tmp_path)
        tls = {"cert": str(certs.server[0]), "key": str(certs.server[1])}
        if client_ca:
            tls["client_ca"] = str(certs.ca)
        d = serve(table, tls=tls, also=("tls://127.0.0.1:0",), **more)
        return d, d.addresses["tls"], certs

    return start


def test_samples_over_tls(secure: Secure) -> None:
    d, address, certs = secure()
    pushed(address, tls=TLS(ca=certs.ca))
    pushed(address, tls=TLS(ca=certs.ca), session="s")
    pushed(address, tls=TLS(insecure_skip_verify=True))
    read(address, 96, tls=TLS(ca=certs.ca))
    with pytest.raises(TLSError, match="not trusted"):
        pushed(address, tls=TLS())
    assert "cut_short" not in d.said()


def test_large_samples_over_tls(secure: Secure) -> None:
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


def test_client_certificates(secure: Secure) -> None:
    _, address, certs = secure(client_ca=True)
    pushed(address, tls=TLS(certs.ca, *certs.client))
    with pytest.raises(TLSError, match=r"(?i)certificate"):
        pushed(address, tls=TLS(certs.ca))


def test_weights_over_tls(secure: Secure) -> None:
    _, address, certs = secure(WEIGHTS)
    weights(address, address, tls=TLS(ca=certs.ca))


def test_gradients_over_tls(secure: Secure) -> None:
    d, address, certs = secure(TENSORS)
    with GradReader(d.unix, "t", deadline=PATIENCE) as reader:
        with StepProducer(address, "t", "a", ARRAYS, tls=TLS(ca=certs.ca), deadline=PATIENCE) as p:
            p.send(1, ARRAYS, deadline=PATIENCE)
        with reader.step(1, quorum=1, deadline=PATIENCE) as step:
            assert np.array_equal(step.sum()["w"], ARRAYS["w"])


def test_tokens_over_tls(secure: Secure, tokens: Path) -> None:
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
