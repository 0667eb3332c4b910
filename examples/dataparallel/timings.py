"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


class Timings:
    """Seconds by what was done, a figure per step."""

    def __init__(self, seconds: dict[str, list[float]] | None = None) -> None:
        self.seconds: dict[str, list[float]] = seconds if seconds is not None else {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Notes how long the body took; a body that fails is not noted."""
        began = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - began)

    def add(self, what: str, seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)

    def merge(self, seconds: dict[str, list[float]]) -> None:
        """Puts the figures of another process with these."""
        for what, figures in seconds.items():
            self.seconds.setdefault(what, []).extend(figures)

    def row(self, what: str) -> tuple[float, float, float, float]:
        """p50, p99, largest and mean in milliseconds."""
        figures = np.array(self.seconds[what]) * 1e3
        p50, p99 = np.percentile(figures, [50, 99])
        return float(p50), float(p99), float(figures.max()), float(figures.mean())

    def table(self, rows: list[tuple[str, str]]) -> str:
        """Lines for a person; rows are (what, words for it), those without a figure are left out."""
        lines = [f"{'per step, ms':<44}{'p50':>8}{'p99':>8}{'max':>8}{'mean':>8}"]
        for what, words in rows:
            if what in self.seconds:
                lines.append(f"{words:<44}" + "".join(f"{figure:8.2f}" for figure in self.row(what)))
        return "\n".join(lines)
