from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import pytest

from fakes import SPEC, FakeDaemon, Listener


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
def daemon(socket_path: str) -> Iterator[Callable[..., FakeDaemon]]:
    """Makes a fake daemon that serves one trainer."""
    made: list[FakeDaemon] = []

    def make(**options: object) -> FakeDaemon:
        made.append(FakeDaemon(socket_path, SPEC, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.__exit__()
