"""Whom a client trusts over ``tls://`` and ``quic://``: :class:`TLS`."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["TLS"]


class TLS(NamedTuple):
    """Whom a client trusts over ``tls://`` and ``quic://``, and what it shows of itself.

    The files are read for each connection.

    ``ca``: file with the PEM certificates of the authorities that may vouch for the daemon; None: those of the system.
    ``cert``, ``key``: PEM files of this client, where the daemon wants certificates; ``key`` may be in ``cert``.
    ``server_name``: the name or IP address that the daemon's certificate must have; None: the address' host.

    ``insecure_skip_verify``: take any certificate. That gives up knowing who the daemon is: whoever is in between reads
    and changes everything, as without TLS. It is for trying things out; use a ``ca`` (``ingestd cert ca``) instead.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None
    insecure_skip_verify: bool = False
