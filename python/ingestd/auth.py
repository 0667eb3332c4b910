"""Tokens: who this process is to a daemon that asks for it (``docs/wire-protocol.md``, Authentication).

A token is a name and a secret. The secret is never sent: each side proves to the other that it knows it, for this one
handshake. The daemon goes first, so this side proves nothing to a machine that is not the daemon.

What is said after that over ``tcp://`` can be read and changed by machines in between; over ``tls://`` and ``quic://``
it cannot.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import unicodedata
from typing import Any, NamedTuple

from .errors import FormatError

__all__ = [
    "TOKEN_VARIABLE",
    "Challenge",
    "Token",
    "client_proof",
    "daemon_proof",
    "new_nonce",
    "token_of",
    "transcript",
]

#: The environment variable that has the token of clients that are given none: ``name:secret``.
TOKEN_VARIABLE = "INGESTD_TOKEN"

NAME_BYTES_MAX = 128
SECRET_MIN, SECRET_MAX = 32, 1024  # characters
NONCE_BYTES = PROOF_BYTES = EXPORTER_BYTES = 32
PROOFS_MAX = 2

_NO_EXPORTER = bytes(EXPORTER_BYTES)
_FILE_BYTES_MAX = 4096


class Token:
    """A name and a secret, as in the daemon's file of tokens; ``ingestd token new NAME`` makes them.

    Neither ``repr`` nor the errors of this package show the secret. Raises ValueError where the daemon would not have
    such a token: the name has 1 to 128 bytes and no colon, the secret 32 to 1,024 characters of printable ASCII.
    """

    __slots__ = ("_secret", "name")

    def __init__(self, name: str, secret: str) -> None:
        if not name or len(name.encode(errors="replace")) > NAME_BYTES_MAX:
            raise ValueError(f"the token's name has {len(name)} characters, want 1 to {NAME_BYTES_MAX} bytes")
        if ":" in name or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise ValueError("the token's name has a colon or a control character, or is no text")
        if not SECRET_MIN <= len(secret) <= SECRET_MAX:
            raise ValueError(
                f"the secret of {_called(name)} has {len(secret)} characters, want {SECRET_MIN} to {SECRET_MAX}; "
                "`ingestd token new NAME` makes one"
            )
        if any(not "!" <= c <= "~" for c in secret):
            raise ValueError(f"the secret of {_called(name)} has a character that is not printable ASCII, or a space")
        self.name = name
        self._secret = secret.encode()

    @classmethod
    def parse(cls, text: str) -> Token:
        """Reads ``name:secret``. Raises ValueError, which does not show the secret."""
        name, colon, secret = text.partition(":")
        if not colon:
            raise ValueError("a token is written name:secret")
        return cls(name, secret)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Token:
        """Reads a file with one line, ``name:secret``; refuses one that everybody on the machine may use."""
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o007:
                raise ValueError(f"{os.fspath(path)} has mode {stat.S_IMODE(mode):#o}: everybody may use it; chmod 600")
            text = file.read(_FILE_BYTES_MAX)
        return cls.parse(text.decode("utf-8", "replace").rstrip("\r\n"))

    def __repr__(self) -> str:
        return f"<Token {self.name!r}>"


def _called(name: str) -> str:
    """What errors call a token. Where the two parts were mixed up the name is the secret, which is not shown."""
    return f"token {name!r}" if len(name) < SECRET_MIN else "this token"


def token_of(given: Token | str | None) -> Token | None:
    """The token that a client was given, or that of the environment; None: there is none. Raises ValueError."""
    if given is None:
        text = os.environ.get(TOKEN_VARIABLE, "")
        if not text:
            return None
        try:
            return Token.parse(text)
        except ValueError as e:
            raise ValueError(f"{TOKEN_VARIABLE}: {e}") from None
    return given if isinstance(given, Token) else Token.parse(given)


def new_nonce() -> str:
    """64 hex digits, made at random."""
    return secrets.token_hex(NONCE_BYTES)


class Challenge(NamedTuple):
    """What the daemon answers to a hello with a token: its nonce, and its proofs, one for each secret it has."""

    nonce: bytes
    proofs: list[bytes]

    @classmethod
    def parse(cls, body: dict[str, Any]) -> Challenge:
        """Reads the body of a reply of status 2. Raises FormatError."""
        proofs = body.get("proofs")
        if not isinstance(proofs, list) or not 1 <= len(proofs) <= PROOFS_MAX:
            raise FormatError(f"the daemon's challenge has no list of 1 to {PROOFS_MAX} proofs")
        return cls(_unhex(body.get("nonce"), "nonce"), [_unhex(p, "proof") for p in proofs])


def _unhex(text: Any, what: str) -> bytes:
    if not isinstance(text, str) or len(text) != 2 * NONCE_BYTES or text.strip("0123456789abcdef"):
        raise FormatError(f"the {what} of the daemon's challenge is not {2 * NONCE_BYTES} hex digits")
    return bytes.fromhex(text)


def transcript(hello: bytes, nonce: bytes, exporter: bytes | None) -> bytes:
    """The digest of what both sides must have seen alike.

    ``hello`` is its whole frame as it was sent, ``nonce`` the daemon's, ``exporter`` what TLS exports, None without.
    """
    exporter = _NO_EXPORTER if exporter is None else exporter
    if len(exporter) != EXPORTER_BYTES or len(nonce) != NONCE_BYTES:
        raise ValueError(f"an exporter and a nonce have {EXPORTER_BYTES} bytes")
    size = len(hello).to_bytes(4, "little")
    return hashlib.sha256(b"ingestd-auth-1\n" + size + hello + nonce + exporter).digest()


def daemon_proof(token: Token, of: bytes) -> bytes:
    """What a daemon shows of the secret, for a :func:`transcript`."""
    return hmac.new(token._secret, b"daemon\n" + of, hashlib.sha256).digest()


def client_proof(token: Token, of: bytes) -> bytes:
    """What a client shows of it."""
    return hmac.new(token._secret, b"client\n" + of, hashlib.sha256).digest()


def proves(challenge: Challenge, token: Token, of: bytes) -> bool:
    """Whether the daemon knows the secret: one of its proofs is right. Takes the same time whichever it is."""
    want = daemon_proof(token, of)
    return any([hmac.compare_digest(want, proof) for proof in challenge.proofs])
