"""The processes of a demo: started together, ended together, and their failures told in a sentence."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

LOG = "daemon.log"


class Failure(Exception):
    """What went wrong, for the person who runs the demo."""


def die_with_parent() -> None:
    """In a child before its program starts: even if the demo is killed outright, the kernel ends the child with it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Processes:
    """The children, by name. Whatever happens, none outlives the demo."""

    def __init__(self) -> None:
        self.all: dict[str, subprocess.Popen[str]] = {}
        self.killed: set[str] = set()

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        self.all[name] = subprocess.Popen(
            command, env=environment, text=True, start_new_session=True, preexec_fn=die_with_parent, **options
        )
        return self.all[name]

    def kill(self, name: str) -> None:
        """Kill -9 on purpose: this end is no failure."""
        self.killed.add(name)
        self.all[name].kill()

    def check(self) -> None:
        """Fail as soon as one of them has failed."""
        for name, process in self.all.items():
            if process.poll() and name not in self.killed:
                raise Failure(f"{name} ended with exit code {process.returncode}")

    def wait(self, names: list[str], until: float) -> None:
        """Wait until these have ended well."""
        while True:
            self.check()
            running = [name for name in names if self.all[name].poll() is None]
            if not running:
                return
            if time.monotonic() > until:
                raise Failure(f"{', '.join(running)} did not end in time")
            time.sleep(0.02)

    def stop(self) -> None:
        for process in reversed(list(self.all.values())):  # the daemon last, so that nobody complains of its end
            if process.poll() is None:
                process.kill()
        for process in self.all.values():
            process.wait()


def start_daemon(processes: Processes, daemon: Path, folder: Path, *arguments: str) -> dict[str, str]:
    """Start the daemon on ports of its choice and wait until it serves; returns its addresses."""
    ready, log = folder / "ready.json", folder / LOG
    command = [
        str(daemon), "serve", *arguments,
        "--listen", "tcp://127.0.0.1:0", "--listen", f"unix://{folder / 'ingestd.sock'}",
        "--admin", "127.0.0.1:0", "--ready-file", str(ready),
    ]  # fmt: skip
    print("$", " ".join(command), flush=True)
    with log.open("w") as out:
        process = processes.start("the daemon", *command, stdout=out, stderr=subprocess.STDOUT)
    until = time.monotonic() + 15
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise Failure("the daemon did not become ready")
        time.sleep(0.01)
    addresses: dict[str, str] = json.loads(ready.read_text())
    return addresses


def fail_on_signals() -> None:
    """Let signals that end a process be a :class:`Failure`, so that the demo cleans up."""

    def interrupted(number: int, _: object) -> NoReturn:
        raise Failure(f"interrupted by {signal.Signals(number).name}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)


def show_log(log: Path) -> None:
    """The daemon's last words, for whoever looks for the reason."""
    if log.exists():
        print(f"the end of the daemon's log:\n{log.read_text()[-3000:]}", file=sys.stderr)
