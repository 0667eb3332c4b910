"""The daemon's side of tokens and of TLS for the tests, written from docs/wire-protocol.md."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import json
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes import HEAD, MAGIC, PATIENCE, Listener, Peer
from real import BINARY

NAME, SECRET = "worker", "example-secret-of-32-characters!"
TOKEN = f"{NAME}:{SECRET}"


def proofs(secret: str, hello: bytes, nonce: bytes, exporter: bytes = bytes(32)) -> tuple[bytes, bytes]:
    """The daemon's and the client's."""
    t = hashlib.sha256(b"ingestd-auth-1\n" + len(hello).to_bytes(4, "little") + hello + nonce + exporter).digest()
    return (
        hmac.new(secret.encode(), b"daemon\n" + t, hashlib.sha256).digest(),
        hmac.new(secret.encode(), b"client\n" + t, hashlib.sha256).digest(),
    )


class Guarded(Peer):
    """A connection whose hello must have the token, and whose client must prove to know its secret."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.nonces: list[str] = []

    def hello(self) -> dict[str, Any]:
        frame = self.frame()
        body: dict[str, Any] = json.loads(frame[HEAD.size :])
        assert SECRET.encode() not in frame
        assert body.pop("token") == NAME
        self.nonces.append(body.pop("nonce"))
        assert len(bytes.fromhex(self.nonces[-1])) == 32 and any(bytes.fromhex(self.nonces[-1]))
        nonce = hashlib.sha256(frame).digest()
        mine, theirs = proofs(SECRET, frame, nonce)
        other, _ = proofs("another-secret-of-33-characters!!", frame, nonce)
        self.reply({"nonce": nonce.hex(), "proofs": [other.hex(), mine.hex()]}, status=2)
        proof = self.frame()
        assert HEAD.unpack(proof[: HEAD.size])[:3] == (MAGIC, 1, 0)
        assert json.loads(proof[HEAD.size :]) == {"proof": theirs.hex()}
        return body


class Certificates:
    """An authority, with certificates of a daemon at 127.0.0.1 and localhost, and of a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self.make("ca")
        self.make("server", "--host", "127.0.0.1", "--host", "localhost")
        self.make("client")
        self.server, self.client = self.pair("server"), self.pair("client")

    def make(self, what: str, *more: str) -> None:
        subprocess.run([BINARY, "cert", what, "--dir", str(self.folder), *more], check=True, capture_output=True)

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue(self, folder: Path, name: str, days: int = 0, server: bool | None = True) -> tuple[Path, Path]:
        """A certificate for 127.0.0.1 such as ``ingestd cert`` does not make: valid around so many days from now, for
        servers, for clients, or for what is not said."""
        x509 = pytest.importorskip("cryptography.x509", reason="it comes with aioquic: pip install 'ingestd[quic]'")
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        authority = x509.load_pem_x509_certificate(self.ca.read_bytes())
        signer: Any = serialization.load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        key = ec.generate_private_key(ec.SECP256R1())
        middle, day = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days), datetime.timedelta(1)
        made = x509.CertificateBuilder(
            issuer_name=authority.subject,
            subject_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=middle - day,
            not_valid_after=middle + day,
        ).add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        if server is not None:
            use = x509.ExtendedKeyUsageOID.SERVER_AUTH if server else x509.ExtendedKeyUsageOID.CLIENT_AUTH
            made = made.add_extension(x509.ExtendedKeyUsage([use]), False)
        files = folder / f"{name}.pem", folder / f"{name}.key"

        files[0].write_bytes(made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(*plain))
        files[1].chmod(0o600)
        return files

    def context(
        self,
        client_ca: Path | None = None,
        alpn: str | None = "ingestd/1",
        pair: tuple[Path, Path] | None = None,
    ) -> ssl.SSLContext:
        """The daemon's side."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(*(pair or self.server))
        if alpn is not None:
            made.set_alpn_protocols([alpn])
        if client_ca is not None:
            made.load_verify_locations(client_ca)
            made.verify_mode = ssl.CERT_REQUIRED
        return made


def over_tls(listener: Listener, context: ssl.SSLContext) -> Listener:
    """Makes it one that talks TLS."""

    def make(sock: socket.socket) -> Peer:
        sock.settimeout(PATIENCE)
        return Peer(context.wrap_socket(sock, server_side=True))

    listener.make = make
    listener.address = listener.address.replace("tcp://", "tls://")
    return listener


def that_fails(context: ssl.SSLContext, errors: list[str]) -> Callable[[socket.socket], Peer]:
    """Connections whose TLS does not come about, be it when the first byte is read."""

    def make(sock: socket.socket) -> Peer:
        sock.settimeout(PATIENCE)
        peer = Peer(sock)
        try:
            peer.sock = context.wrap_socket(sock, server_side=True)
            if not peer.sock.recv(1):
                errors.append("nothing came")
        except OSError as e:
            errors.append(str(e))
        return peer

    return make
