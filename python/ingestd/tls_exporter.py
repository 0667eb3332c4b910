"""What TLS exports to bind a token's proof to one connection (RFC 8446, 7.5).

Python's ssl has no call for that. It can write a connection's secrets into a key log, though, one of which is the one
that the exporter is derived from. So here the key log is a piece of memory of this process (memfd), for the handshake
alone, which nobody else sees who could not read all of this process' memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import ssl
import struct

from .errors import TLSError

__all__ = ["LABEL", "Exporting", "exporter"]

LABEL = b"EXPORTER-ingestd-auth-1"

_BYTES = 32  # of what is exported
_LOG_BYTES_MAX = 1 << 16
_HASHES = {32: "sha256", 48: "sha384"}  # of TLS 1.3, by the bytes of their secrets


class Exporting:
    """Learns what the one connection of a context exports: around its handshake. Raises TLSError."""

    def __init__(self, context: ssl.SSLContext) -> None:
        if not hasattr(os, "memfd_create") or not hasattr(context, "keylog_filename"):
            raise TLSError("tokens over tls:// need Linux, and a Python whose ssl has keylog_filename")
        self._context = context
        self._fd = os.memfd_create("ingestd-tls", os.MFD_CLOEXEC)

    def __enter__(self) -> Exporting:
        try:
            self._context.keylog_filename = f"/proc/self/fd/{self._fd}"
        except (OSError, ValueError) as e:
            self.__exit__()
            raise TLSError(f"tokens over tls:// need memory that Python's ssl writes to: {e}") from e
        return self

    def export(self) -> bytes:
        """After the handshake."""
        for line in os.pread(self._fd, _LOG_BYTES_MAX, 0).splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == b"EXPORTER_SECRET":
                with contextlib.suppress(ValueError, KeyError):
                    return exporter(bytes.fromhex(words[2].decode()))
        raise TLSError("tokens over tls:// need the exporter of TLS 1.3, and Python's ssl did not give its secret")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            # Typed as text, and None ends it.
            self._context.keylog_filename = None  # type: ignore[assignment]
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def exporter(secret: bytes, label: bytes = LABEL, context: bytes = b"", size: int = _BYTES) -> bytes:
    """RFC 8446, 7.5. ``secret`` is the exporter_master_secret, whose size says the hash (KeyError)."""
    name = _HASHES[len(secret)]
    derived = _expand(name, secret, label, hashlib.new(name).digest(), len(secret))
    return _expand(name, derived, b"exporter", hashlib.new(name, context).digest(), size)


def _expand(name: str, secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """HKDF-Expand-Label (RFC 8446, 7.1); ``size`` is at most that of the hash, so one block is enough."""
    label = b"tls13 " + label
    info = struct.pack(">HB", size, len(label)) + label + bytes([len(context)]) + context
    return hmac.new(secret, info + b"\1", name).digest()[:size]
