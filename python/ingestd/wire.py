"""The handshake of the native protocol, version 1 (``docs/wire-protocol.md``), and its limits."""

from __future__ import annotations

import contextlib
import json
import struct
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

from . import auth
from ._io import Deadline, receive, send_all
from .auth import Challenge, Token
from .errors import (
    Banned,
    DaemonUnproven,
    Difference,
    Error,
    FormatError,
    NotAuthenticated,
    NotChallenged,
    Note,
    PeerClosed,
    Refused,
    ShuttingDown,
)
from .spec import Spec

if TYPE_CHECKING:
    from ._io import Conn

__all__ = ["Reply", "encode_hello", "handshake", "hello", "json_object", "parse_note", "parse_notice", "parse_reply"]

MAGIC = b"INGESTD\n"
VERSION = 1
BODY_BYTES_MAX = 2_097_152
NOTICE_BYTES_MAX = 65_536
CHALLENGE_BYTES_MAX = 4_096
TEXT_BYTES_MAX = 128
ACK = 0x01
NOTE = 0x02
NOTICE = 0x00

_ACCEPTED, _REFUSED, _CHALLENGE = 0, 1, 2  # status of a reply

_HEAD = struct.Struct("<8sHHI")
_FIELDS = (
    "role", "table", "byte_order", "spec", "fingerprint", "session", "ack", "window_samples", "window_bytes",
    "prefetch", "group", "notes", "manifest", "manifest_id", "session_of", "in_place", "wait", "stream", "delta",
    "have", "have_digest", "resume", "resume_digest", "resume_offset", "compression", "token", "nonce", "client",
)  # fmt: skip


class Reply(NamedTuple):
    """An accepted handshake: the version in force, and the fields of its body."""

    version: int
    body: dict[str, Any]

    def integer(self, field: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
        """A whole number of the body. Raises FormatError when it is missing or out of range."""
        value = self.body.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise FormatError(f"the daemon's reply has {field} = {value!r}, want a whole number of {least} to {most}")
        return value


def hello(role: str, table: str, spec: Spec | None = None, **options: Any) -> dict[str, Any]:
    """The body of a hello. Options that are None, 0 or empty are left out; unknown ones raise ValueError.

    ``token`` is a :class:`Token`, of which :func:`handshake` sends the name alone.
    """
    _check_text("table", table, least=1)
    for field in ("session", "group", "client"):
        if options.get(field) is not None:
            _check_text(field, options[field], least=0)
    unknown = set(options) - set(_FIELDS)
    if unknown:
        raise ValueError(f"unknown options of the handshake: {', '.join(sorted(unknown))}")
    body = {"role": role, "table": table, "byte_order": "little", **options}
    if spec is not None:
        body["spec"] = spec.to_dict()
        body["fingerprint"] = spec.fingerprint
    return {field: body[field] for field in _FIELDS if body.get(field)}


def _check_text(field: str, value: Any, least: int) -> None:
    if not isinstance(value, str) or not least <= len(value.encode()) <= TEXT_BYTES_MAX:
        raise ValueError(f"{field}={value!r}: want text of {least} to {TEXT_BYTES_MAX} bytes")
    if any(unicodedata.category(c) == "Cc" for c in value):
        raise ValueError(f"{field}={value!r} contains a control character")


def encode_hello(body: dict[str, Any]) -> bytes:
    """The bytes of a hello: magic, versions, length, JSON."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > BODY_BYTES_MAX:
        raise ValueError(
            f"the hello has {len(text)} bytes, at most {BODY_BYTES_MAX} are allowed; shorten the leaf names"
        )
    return _HEAD.pack(MAGIC, VERSION, VERSION, len(text)) + text


def parse_reply_head(head: bytes) -> tuple[int, int, int]:
    """``(version, status, length)`` of the 16 bytes that start a reply. Raises FormatError."""
    magic, version, status, length = _HEAD.unpack(head)
    if magic != MAGIC:
        raise FormatError(
            f"the reply starts with {magic!r}, want {MAGIC!r}; is this the address of an ingestd listener?"
        )
    if status not in (_ACCEPTED, _REFUSED, _CHALLENGE):
        raise FormatError(f"the reply has status {status}, want 0, 1 or 2")
    most = CHALLENGE_BYTES_MAX if status == _CHALLENGE else BODY_BYTES_MAX
    if not 2 <= length <= most:
        raise FormatError(f"the reply has a body of {length} bytes, want 2 to {most}")
    return version, status, length


def parse_answer(data: bytes) -> Reply | Challenge:
    """A whole reply. Raises Refused or ShuttingDown when the daemon refused, FormatError for other bytes."""
    if len(data) < _HEAD.size:
        raise FormatError(f"a reply has at least {_HEAD.size} bytes, got {len(data)}")
    version, status, length = parse_reply_head(data[: _HEAD.size])
    if len(data) != _HEAD.size + length:
        raise FormatError(f"the reply announces a body of {length} bytes, got {len(data) - _HEAD.size}")
    body = json_object(data[_HEAD.size :], "the reply")
    if status == _REFUSED:
        raise _refused(body)
    if status == _CHALLENGE:
        return Challenge.parse(body)
    if version != VERSION:
        raise FormatError(f"the daemon chose version {version}; this client speaks {VERSION} only")
    return Reply(version, body)


def parse_reply(data: bytes) -> Reply:
    """A whole reply that is no challenge. Raises as :func:`parse_answer`."""
    answer = parse_answer(data)
    if isinstance(answer, Challenge):
        raise FormatError("the daemon asked for a proof where it had no cause to")
    return answer


def encode_proof(proof: bytes) -> bytes:
    """The bytes with which a client answers a challenge."""
    text = json.dumps({"proof": proof.hex()}, separators=(",", ":")).encode()
    return _HEAD.pack(MAGIC, VERSION, 0, len(text)) + text


def _refused(body: dict[str, Any]) -> Error:
    if body.get("code") == "shutting_down":
        return ShuttingDown("shutting_down", str(body.get("reason", "no reason given")))
    diff = [
        Difference(str(d.get("leaf", "")), str(d.get("got", "")), str(d.get("want", "")))
        for d in body.get("diff") or []
        if isinstance(d, dict)
    ]
    spec = json.dumps(body["spec"], separators=(",", ":")) if body.get("spec") else None
    code = str(body.get("code", "unknown"))
    kind = {"not_authenticated": NotAuthenticated, "banned": Banned}.get(code, Refused)
    return kind(code, str(body.get("reason", "no reason given")), diff, spec)


def parse_notice(body: bytes) -> tuple[str, str]:
    """``(code, reason)`` of the JSON body of a closing notice. Raises FormatError."""
    fields = json_object(body, "the closing notice")
    return str(fields.get("code", "unknown")), str(fields.get("reason", "no reason given"))


def parse_note(body: bytes) -> Note:
    """The JSON body of a note; fields that are missing or of another type are left empty. Raises FormatError."""
    fields = json_object(body, "the note")
    known = Note(str(fields.get("code", "unknown")), str(fields.get("reason", "no reason given")))
    more = {
        field: fields[field]
        for field, empty in zip(known._fields[2:], known[2:])
        if type(fields.get(field)) is type(empty)
    }
    return known._replace(**more)


def json_object(text: bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{what} is not JSON: {e}") from None
    if not isinstance(body, dict):
        raise FormatError(f"{what} is not a JSON object")
    return body


def handshake(sock: Conn, body: dict[str, Any], deadline: Deadline, fds: list[int] | None = None) -> Reply:
    """Sends the hello and reads the reply on a non-blocking socket; descriptors that come along go to ``fds``.

    Where the hello has a token, both sides prove to each other that they know its secret.

    Raises Refused, DaemonUnproven, NotChallenged, FormatError, PeerClosed or Timeout. The socket and ``fds`` remain the
    caller's in every case.
    """
    token: Token | None = body.get("token")
    if token is None:
        return parse_reply(_ask(sock, encode_hello(body), deadline, fds))
    exporter = sock.exporter() if hasattr(sock, "exporter") else None
    said = {**body, "token": token.name, "nonce": auth.new_nonce()}
    sent = encode_hello({field: said[field] for field in _FIELDS if field in said})
    challenge = parse_answer(_ask(sock, sent, deadline, fds))
    if not isinstance(challenge, Challenge):
        raise NotChallenged(
            f"the daemon did not prove to know token {token.name!r}, nor ask for proof: it has no tokens, or it is not "
            "who it should be"
        )
    transcript = auth.transcript(sent, challenge.nonce, exporter)
    if not auth.proves(challenge, token, transcript):
        raise DaemonUnproven(
            f"the daemon does not know token {token.name!r} with this secret: one of them is wrong, or it is not the "
            "daemon it should be"
        )
    return parse_reply(_ask(sock, encode_proof(auth.client_proof(token, transcript)), deadline, fds))


def _ask(sock: Conn, what: bytes, deadline: Deadline, fds: list[int] | None) -> bytes:
    """Sends, and reads one reply."""
    doing = "waiting for the daemon's answer to the handshake"
    try:
        # A daemon that refuses before it has read everything may close first; its reason is there to read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_all(sock, what, deadline, doing)
        head = receive(sock, _HEAD.size, deadline, doing, fds)
        if len(head) < _HEAD.size:
            raise PeerClosed("the daemon closed the connection during the handshake; its log says why")
        length = parse_reply_head(head)[2]
        rest = receive(sock, length, deadline, doing)
    except OSError as e:
        if isinstance(e, (Error, TimeoutError)):
            raise
        raise PeerClosed(f"the connection failed during the handshake: {e.strerror or e}") from e
    if len(rest) < length:
        raise PeerClosed("the daemon closed the connection in the middle of its reply")
    return head + rest
