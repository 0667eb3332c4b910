from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ingestd import Manifest
from tensors import GRADIENTS, GradDaemon, Make

from fakes import SPEC, FakeDaemon, Listener
from real import BINARY, POINT, Daemon, Serve


@pytest.fixture
def socket_path() -> Iterator[str]:
    """A path for a unix socket; pytest's own folders are too long for one on some machines."""
    with tempfile.TemporaryDirectory(prefix="ingestd-") as folder:
        yield f"{folder}/sock"


@pytest.fixture(params=["tcp", "unix"])
def listener(request: pytest.FixtureRequest, socket_path: str) -> Iterator[Listener]:
    """A fake daemon that serves producers, over both kinds of sockets."""
    made = Listener.tcp() if request.param == "tcp" else Listener.unix(socket_path)
    yield made
    made.finish()


@pytest.fixture
def tcp() -> Iterator[Listener]:
    """A fake daemon that serves over TCP."""
    made = Listener.tcp()
    yield made
    made.finish()


@pytest.fixture
def daemon(socket_path: str) -> Iterator[Callable[..., FakeDaemon]]:
    """Makes a fake daemon that serves one trainer."""
    made: list[FakeDaemon] = []

    def make(**options: object) -> FakeDaemon:
        made.append(FakeDaemon(socket_path, SPEC, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.__exit__()


@pytest.fixture
def serve() -> Iterator[Serve]:
    if not os.path.exists(BINARY):
        pytest.fail(f"no daemon at {BINARY}: run `make build`, or name it in INGESTD_BIN")
    daemons: list[Daemon] = []
    with tempfile.TemporaryDirectory(prefix="ingestd-") as folder:

        def start(
            spec: str = POINT,
            batch_size: int = 8,
            batches: int = 4,
            linger: str = "0s",
            more: dict[str, Any] | None = None,
            **settings: Any,
        ) -> Daemon:
            where = Path(folder) / str(len(daemons))
            where.mkdir()
            table = {"name": "t", "spec": spec, "batch_size": batch_size, "batches": batches, "linger": linger}
            table.update(more or {})
            daemons.append(Daemon(where, [table], **settings))
            return daemons[-1]

        yield start
        for d in daemons:
            d.close()


@pytest.fixture
def make_grads(socket_path: str) -> Iterator[Make]:
    """Makes the fake daemon of a test, which knows producers a, b, c, d as streams 2, 3, 4, 5."""
    made: list[GradDaemon] = []

    def start(manifest: Manifest = GRADIENTS, **options: Any) -> GradDaemon:
        made.append(GradDaemon(socket_path, manifest, **options))
        for k, name in enumerate("abcd"):
            made[0].know(name, 2 + k)
        return made[0]

    yield start
    for one in made:
        one.__exit__()
