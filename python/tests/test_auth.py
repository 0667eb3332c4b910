"""Tokens: the example in docs/wire-protocol.md, and every client against a fake daemon that asks, and against liars."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarded import NAME, SECRET, TOKEN, Guarded, proofs
from ingestd import (
    Banned,
    DaemonUnproven,
    FillProducer,
    FormatError,
    GradReader,
    NotAuthenticated,
    NotChallenged,
    PeerClosed,
    Producer,
    Publisher,
    Reader,
    Refused,
    StepProducer,
    StepTimeout,
    Subscription,
    Token,
)
from ingestd import auth as authentication
from ingestd.auth import TOKEN_VARIABLE, Challenge, token_of
from ingestd.redial import retried
from ingestd.wire import encode_hello, encode_proof, hello, parse_answer, parse_reply
from tensors import GRADIENTS, GradDaemon
from test_wire import example, reply

from fakes import PATIENCE, SPEC, FakeDaemon, Listener, Peer, encoded, sample


def test_example_of_the_documentation() -> None:
    token = Token(NAME, SECRET)
    body = hello("train", "digits", token=token)
    body["token"], body["nonce"] = NAME, bytes(range(32)).hex()
    frame = encode_hello(body)
    assert frame == example("tokenhello")
    challenge = parse_answer(example("challenge"))
    assert isinstance(challenge, Challenge) and challenge.nonce == bytes(range(0x80, 0xA0))
    of = authentication.transcript(frame, challenge.nonce, None)
    assert of == example("transcript")
    assert challenge.proofs == [authentication.daemon_proof(token, of)]
    assert authentication.proves(challenge, token, of)
    assert encode_proof(authentication.client_proof(token, of)) == example("proof")


def test_what_a_proof_is_bound_to() -> None:
    token, frame, nonce = Token(NAME, SECRET), b"hello", bytes(32)
    of = authentication.transcript(frame, nonce, None)
    assert of == authentication.transcript(frame, nonce, bytes(32))
    others = [
        authentication.transcript(b"hellp", nonce, None),
        authentication.transcript(frame, bytes(31) + b"\1", None),
        authentication.transcript(frame, nonce, bytes(31) + b"\1"),
    ]
    assert len({of, *others}) == 4
    proof = authentication.daemon_proof(token, of)
    assert proof != authentication.client_proof(token, of)  # a proof that is sent back proves nothing
    assert authentication.proves(Challenge(nonce, [bytes(32), proof]), token, of)
    for wrong in others:
        assert not authentication.proves(Challenge(nonce, [proof]), token, wrong)
    assert not authentication.proves(Challenge(nonce, [authentication.client_proof(token, of)]), token, of)
    for bad in [(b"", nonce[1:], None), (b"", nonce, bytes(31))]:
        with pytest.raises(ValueError, match="32 bytes"):
            authentication.transcript(*bad)


def test_tokens() -> None:
    token = Token.parse(TOKEN)
    assert token.name == NAME and repr(token) == str(token) == f"<Token {NAME!r}>"
    assert SECRET not in f"{token} {token!r} {vars(token) if hasattr(token, '__dict__') else ''}"
    assert Token.parse(f"a:{SECRET}:{SECRET}").name == "a"  # a secret may have colons
    for again in (copy.copy(token), pickle.loads(pickle.dumps(token))):  # for workers that are spawned
        assert authentication.client_proof(again, b"") == authentication.client_proof(token, b"")
    with pytest.raises(TypeError):  # what forgets to take the secret out sends nothing
        encode_hello(hello("train", "t", token=token))
    Token("x" * 128, "!" * 32), Token("ü", "~" * 1024)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("", SECRET), ("x" * 129, SECRET), ("ü" * 65, SECRET), ("a:b", SECRET), ("a\n", SECRET), ("\ud800", SECRET),
        ("w", SECRET[:31]), ("w", "x" * 1025), ("w", SECRET + " "), ("w", SECRET + "ü"), ("w", SECRET + "\x7f"),
        ("w", ""),
    ],
)  # fmt: skip
def test_tokens_that_no_daemon_has(name: str, secret: str) -> None:
    with pytest.raises(ValueError) as error:
        Token(name, secret)
    assert not secret or secret not in str(error.value)
    with pytest.raises(ValueError, match="name:secret"):
        Token.parse("x" * 64)


@pytest.mark.parametrize("name", ["worker", "a name with spaces", "x" * 31])
def test_a_secret_in_the_place_of_the_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error shows it."""
    mixed_up = f"{SECRET}:{name}"
    monkeypatch.setenv(TOKEN_VARIABLE, mixed_up)
    for make in (lambda: Token(SECRET, name), lambda: Token.parse(mixed_up), lambda: token_of(None)):
        with pytest.raises(ValueError, match="the secret of this token") as error:
            make()
        assert SECRET not in str(error.value)
    with pytest.raises(ValueError, match=r"the secret of token 'x{31}'"):
        Token("x" * 31, "short")


def test_tokens_in_files(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    assert Token.read(path).name == NAME
    path.chmod(0o604)
    with pytest.raises(ValueError, match="chmod 600"):
        Token.read(str(path))
    path.chmod(0o600)
    path.write_text(TOKEN + "\n\n" + TOKEN)
    with pytest.raises(ValueError) as error:
        Token.read(path)
    assert SECRET not in str(error.value)


def test_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INGESTD_TOKEN", raising=False)
    assert token_of(None) is None
    monkeypatch.setenv("INGESTD_TOKEN", "")
    assert token_of(None) is None
    monkeypatch.setenv("INGESTD_TOKEN", TOKEN)
    found = token_of(None)
    assert found is not None and found.name == NAME
    given = token_of(f"other:{SECRET}")
    assert given is not None and given.name == "other"
    assert token_of(found) is found
    monkeypatch.setenv("INGESTD_TOKEN", SECRET)
    with pytest.raises(ValueError, match=r"^INGESTD_TOKEN: a token is written name:secret$"):
        Producer("tcp://127.0.0.1:1", "t", SPEC)


ARRAYS = {"w": np.zeros(3, np.float32)}
OPEN: dict[str, Callable[..., Any]] = {
    "Producer": lambda address, **o: Producer(address, "t", SPEC, **o),
    "session": lambda address, **o: Producer(address, "t", SPEC, session="s", **o),
    "StepProducer": lambda address, **o: StepProducer(address, "t", "w", ARRAYS, **o),
    "Publisher": lambda address, **o: Publisher(address, "t", ARRAYS, **o),
    "streamed": lambda address, **o: Subscription(address, "t", stream=True, **o),
    "FillProducer": lambda address, **o: FillProducer(address, "t", **o),
    "filled steps": lambda address, **o: StepProducer(address, "t", "w", ARRAYS, in_place=True, **o),
    "Reader": lambda address, **o: Reader(address, "t", **o),
    "GradReader": lambda address, **o: GradReader(address, "t", **o),
    "Subscription": lambda address, **o: Subscription(address, "t", **o),
}
REMOTE = ["Producer", "session", "StepProducer", "Publisher", "streamed"]


@pytest.fixture(params=[*((name, "tcp") for name in REMOTE), *((name, "unix") for name in OPEN)], ids="-".join)
def client(request: pytest.FixtureRequest, socket_path: str) -> Any:
    """Each client, beside a listener that it connects to."""
    name, kind = request.param
    listener = Listener.tcp() if kind == "tcp" else Listener.unix(socket_path)
    yield OPEN[name], listener
    listener.finish()


@pytest.mark.parametrize("given", ["argument", "text", "environment"])
def test_every_client_proves_its_token(client: Any, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, listener = client
    listener.make = Guarded

    def script(peer: Peer) -> None:
        peer.hello()
        peer.reply({"code": "unknown_table", "reason": "no such table"}, status=1)

    listener.script(script)
    options: dict[str, Any] = {"token": Token(NAME, SECRET)} if given == "argument" else {}
    if given == "text":
        options["token"] = TOKEN
    if given == "environment":
        monkeypatch.setenv("INGESTD_TOKEN", TOKEN)
    with pytest.raises(Refused, match="unknown_table"):
        make(listener.address, deadline=PATIENCE, **options)


def test_every_client_ends_where_it_is_not_challenged(client: Any) -> None:
    make, listener = client

    def script(peer: Peer) -> None:
        body = peer.hello()
        peer.reply({"table": "t", "fingerprint": body.get("fingerprint"), "stream": 1})
        assert peer.end() == b""

    listener.script(script)
    with pytest.raises(NotChallenged, match=f"token '{NAME}'.*nor ask for proof"):
        make(listener.address, deadline=PATIENCE, token=TOKEN)


def test_every_client_ends_where_the_daemon_proves_nothing(client: Any) -> None:
    make, listener = client

    def script(peer: Peer) -> None:
        frame = peer.frame()
        nonce = bytes(range(32))
        wrong, reflected = proofs("another-secret-of-33-characters!!", frame, nonce)[0], proofs(SECRET, frame, nonce)[1]
        peer.reply({"nonce": nonce.hex(), "proofs": [wrong.hex(), reflected.hex()]}, status=2)
        assert peer.end() == b""  # it proves nothing to who is not the daemon

    listener.script(script)
    with pytest.raises(DaemonUnproven, match=f"does not know token '{NAME}'") as error:
        make(listener.address, deadline=PATIENCE, token=TOKEN)
    assert SECRET not in str(error.value)


def test_a_proof_of_another_handshake_is_worth_nothing(listener: Listener) -> None:
    seen: list[dict[str, Any]] = []

    def first(peer: Peer) -> None:
        frame, nonce = peer.frame(), bytes(range(32))
        seen.append({"nonce": nonce.hex(), "proofs": [proofs(SECRET, frame, nonce)[0].hex()]})
        peer.reply(seen[0], status=2)
        peer.frame()
        peer.reply({"code": "shutting_down", "reason": "later"}, status=1)

    def replayed(peer: Peer) -> None:
        peer.frame()
        peer.reply(seen[0], status=2)
        assert peer.end() == b""

    listener.script(first)
    with pytest.raises(PeerClosed):
        Producer(listener.address, "t", SPEC, token=TOKEN, deadline=PATIENCE)
    listener.script(replayed)
    with pytest.raises(DaemonUnproven):
        Producer(listener.address, "t", SPEC, token=TOKEN, deadline=PATIENCE)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"nonce": "00" * 32}, {"nonce": "00" * 32, "proofs": []}, {"nonce": "00" * 32, "proofs": ["00" * 32] * 3},
        {"nonce": "00" * 31, "proofs": ["00" * 32]}, {"nonce": "00" * 33, "proofs": ["00" * 32]},
        {"nonce": "0g" * 32, "proofs": ["00" * 32]}, {"nonce": "AB" * 32, "proofs": ["00" * 32]},
        {"nonce": 3, "proofs": ["00" * 32]}, {"nonce": "00" * 32, "proofs": [None]},
        {"nonce": "00" * 32, "proofs": "00" * 32}, {"nonce": " 0" * 32, "proofs": ["00" * 32]},
    ],
)  # fmt: skip
def test_challenges_that_are_none(body: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="challenge"):
        parse_answer(reply(json.dumps(body).encode(), status=2))


def test_challenges_have_a_limit() -> None:
    body = {"nonce": "00" * 32, "proofs": ["00" * 32] * 2, "more": ""}
    body["more"] = "x" * (4096 - len(json.dumps(body)))
    parse_answer(reply(json.dumps(body).encode(), status=2))
    body["more"] += "x"
    with pytest.raises(FormatError, match="2 to 4096"):
        parse_answer(reply(json.dumps(body).encode(), status=2))


def test_a_challenge_where_none_is_due(listener: Listener) -> None:
    with pytest.raises(FormatError, match="no cause"):
        parse_reply(example("challenge"))

    def asks(peer: Peer) -> None:
        peer.hello()
        peer.sock.sendall(example("challenge"))

    def asks_twice(peer: Peer) -> None:
        frame, nonce = peer.frame(), bytes(32)
        body = {"nonce": nonce.hex(), "proofs": [proofs(SECRET, frame, nonce)[0].hex()]}
        peer.reply(body, status=2)
        peer.frame()
        peer.reply(body, status=2)

    for script, token in ((asks, None), (asks_twice, TOKEN)):
        listener.script(script)
        with pytest.raises(FormatError, match="no cause"):
            Producer(listener.address, "t", SPEC, token=token, deadline=PATIENCE)


@pytest.mark.parametrize(
    ("code", "kind", "again"), [("not_authenticated", NotAuthenticated, False), ("banned", Banned, True)]
)
def test_refusals(listener: Listener, code: str, kind: type[Refused], again: bool) -> None:
    def script(peer: Peer) -> None:
        peer.hello()
        peer.reply({"code": code, "reason": "no"}, status=1)

    listener.script(script)
    with pytest.raises(kind) as error:
        Producer(listener.address, "t", SPEC, deadline=PATIENCE)
    assert error.value.code == code and retried(error.value) is again


def test_each_connection_of_a_session_is_proved_anew(listener: Listener) -> None:
    nonces: list[str] = []

    def make(sock: Any) -> Peer:
        peer = Guarded(sock)
        peer.nonces = nonces
        return peer

    listener.make = make

    def first(peer: Peer) -> None:
        peer.accept(ack="committed")
        assert peer.exactly(SPEC.sample_bytes) == encoded(1)

    def second(peer: Peer) -> None:
        peer.accept(ack="committed", held=0)
        assert peer.exactly(SPEC.sample_bytes) == encoded(1)
        peer.ack(1)
        assert peer.end() == b""

    listener.script(first)
    with Producer(listener.address, "t", SPEC, session="s", token=TOKEN, deadline=PATIENCE) as p:
        p.push(sample(1))
        listener.script(second)
        p.flush(deadline=PATIENCE)
    assert len(nonces) == len(set(nonces)) == 2


@pytest.mark.parametrize("error", [NotChallenged, DaemonUnproven, NotAuthenticated])
def test_a_session_does_not_go_on_where_somebody_else_answers(listener: Listener, error: type[Exception]) -> None:
    def first(peer: Peer) -> None:
        Guarded.accept(Guarded(peer.sock), ack="committed")
        assert peer.exactly(SPEC.sample_bytes) == encoded(1)

    def other(peer: Peer) -> None:
        if error is NotChallenged:
            peer.accept(ack="committed")
        elif error is DaemonUnproven:
            peer.frame()
            peer.reply({"nonce": "00" * 32, "proofs": ["00" * 32]}, status=2)
        else:
            Guarded(peer.sock).hello()
            peer.reply({"code": "not_authenticated", "reason": "no"}, status=1)
        assert peer.end() == b""  # no sample, and no proof

    listener.script(first)
    p = Producer(listener.address, "t", SPEC, session="s", token=TOKEN, deadline=PATIENCE)
    p.push(sample(1))
    listener.script(other)
    with pytest.raises(error):
        p.flush(deadline=PATIENCE)
    p.abort()


def test_attachments_with_a_token(socket_path: str) -> None:
    with FakeDaemon(socket_path, SPEC) as daemon:
        daemon.listener.make = Guarded
        with Reader(daemon.address, "t", token=TOKEN, deadline=PATIENCE) as reader:
            daemon.deliver(0, [sample(3)])
            with reader.next(deadline=PATIENCE) as batch:
                assert batch["label"].tolist() == [103]
        assert daemon.detached.wait(PATIENCE)


def test_manifests_are_asked_for_with_the_token(make_grads: Callable[..., GradDaemon]) -> None:
    daemon = make_grads(GRADIENTS)
    daemon.listener.make = Guarded
    with GradReader(daemon.address, "t", token=TOKEN, deadline=PATIENCE) as reader:
        daemon.serve_manifest()
        daemon.opened("a")
        with pytest.raises(StepTimeout) as missing:
            reader.step(0, quorum=1, deadline=0.2)
    assert list(missing.value.missing) == ["a"]
