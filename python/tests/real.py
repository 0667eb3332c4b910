"""The real daemon for the tests, `bin/ingestd` or what INGESTD_BIN names, and samples that prove themselves."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 60
BINARY = os.environ.get("INGESTD_BIN") or str(Path(__file__).resolve().parents[2] / "bin" / "ingestd")
POINT = "obs/image:U8[4,4],obs/pos/(0):F32[3],obs/pos/(1):F64,action:I64,done:BOOL"


class Daemon:
    """A running ``ingestd serve`` with the given tables, each a dict as in its configuration file."""

    def __init__(self, folder: Path, tables: list[dict[str, Any]], also: tuple[str, ...] = (), **settings: Any) -> None:
        self.folder, self.tables, self.settings = folder, tables, settings
        self.also = also  # listeners beside tcp and unix
        self.unix = f"unix://{folder}/sock"
        self.log = (folder / "log").open("w+")
        self.start("tcp://127.0.0.1:0")

    def start(self, tcp: str) -> None:
        config, ready = self.folder / "config.yaml", self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        wanted = {"listen": [tcp, self.unix, *self.also], "admin": "off", "tables": self.tables, **self.settings}
        config.write_text(json.dumps(wanted))  # JSON is YAML
        command = [BINARY, "serve", "--config", str(config), "--ready-file", str(ready)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        ended = os.pidfd_open(self.process.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            while not ready.exists():
                assert not poll.poll(10), f"the daemon ended:\n{self.said()}"
        finally:
            os.close(ended)
        self.addresses: dict[str, str] = json.loads(ready.read_text())
        assert self.addresses["unix"] == self.unix
        self.tcp = self.addresses["tcp"]

    def said(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def stop(self) -> None:
        """SIGTERM; returns when the daemon has drained and ended well."""
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.said()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def restart(self, in_order: bool = False) -> None:
        """Kills the daemon, or stops it in order, and starts it again at the same addresses."""
        if in_order:
            self.stop()
        self.kill()
        self.start(self.tcp)

    def close(self) -> None:
        self.kill()
        self.log.close()


Serve = Callable[..., Daemon]


def point(who: int, k: int) -> dict[str, Any]:
    """Sample k of a producer: its content proves where it comes from."""
    return {
        "obs": {
            "image": np.full((4, 4), (who * 31 + k) % 251, np.uint8),
            "pos": (np.array([who, k, who + k], np.float32), np.float64(who * 1e6 + k)),
        },
        "action": np.int64(who << 32 | k),
        "done": np.bool_(k % 3 == 0),
    }


def points(who: int, first: int, n: int) -> dict[str, Any]:
    ks = np.arange(first, first + n)
    image = np.broadcast_to(((who * 31 + ks) % 251).astype(np.uint8)[:, None, None], (n, 4, 4))
    pos = np.stack([np.full(n, who), ks, who + ks], axis=1).astype(np.float32)
    return {
        "obs": {"image": image, "pos": (pos, who * 1e6 + ks.astype(np.float64))},
        "action": who << 32 | ks.astype(np.int64),
        "done": ks % 3 == 0,
    }


def verify(tree: Any, row: int) -> tuple[int, int]:
    """Checks one sample of a batch against what its producer must have sent; (producer, k)."""
    action = int(tree["action"][row])
    who, k = action >> 32, action & 0xFFFFFFFF
    want = point(who, k)
    assert np.array_equal(tree["obs"]["image"][row], want["obs"]["image"])
    assert np.array_equal(tree["obs"]["pos"][0][row], want["obs"]["pos"][0])
    assert tree["obs"]["pos"][1][row] == want["obs"]["pos"][1]
    assert tree["done"][row] == want["done"]
    return who, k
