"""Sections of a benchmark: one that fails is written down with its reason and costs the others nothing."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from typing import Any


class Sections:
    """Sections with their results, until time is up."""

    def __init__(self, seconds: float = math.inf):
        self.end = time.monotonic() + seconds
        self.found: dict[str, Any] = {}
        self.not_measured: list[dict[str, str]] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def done(self) -> bool:
        return self.left <= 0

    def skip(self, name: str, reason: str) -> None:
        self.not_measured.append({"what": name, "reason": reason})
        print(f"SKIPPED | {name} | {reason}", flush=True)

    def section(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs one; what it raises is its result."""
        if self.done():
            return self.skip(name, "no time was left")
        begin = time.monotonic()
        try:
            self.found[name] = run()
        except Exception as e:  # one section must not cost the others
            traceback.print_exc()
            return self.skip(name, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}")
        print(f"MEASURED | {name} | {time.monotonic() - begin:.0f} s", flush=True)
        return None
