"""One run of the main job in processes that are watched, and killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME = ("plan.json", "factors.safetensors", "model", "onnx")
"""Of a bundle: what the same inputs give the same bytes of."""


@dataclass(frozen=True)
class Run:
    """A command that makes a bundle of a model with random weights.

    Attributes:
        model: Recipe name, or a directory with a config.
        out: The bundle's directory.
        samples: Calibration questions.
        flops: Fraction kept.
    """

    model: str
    out: Path
    samples: int
    flops: float = 0.33

    @property
    def command(self) -> list[str]:
        target = ["--target", "onnx", "--dtype", "fp16", "--no-original", "--quiet"]
        amount = ["--random-weights", "--flops", str(self.flops), "--samples", str(self.samples)]
        return [sys.executable, "-m", "infoprune_export", self.model, *amount, *target, "--out", str(self.out)]

    def whole(self) -> dict[str, Any]:
        """Runs it to its end.

        Returns:
            `report` (report.json), `seconds` of all, `tree_bytes`: the most anonymous memory of the process tree.

        Raises:
            RuntimeError: it failed for another reason than its gates.
        """
        begin = time.monotonic()
        process, most = self._start(), 0
        while process.poll() is None:
            most = max(most, tree_anonymous(process.pid))
            time.sleep(0.1)
        error = process.stderr.read() if process.stderr else ""
        if process.returncode not in (0, 1):
            raise RuntimeError(error[-2000:])
        report = json.loads((self.out / "report.json").read_text())
        return {"report": report, "seconds": time.monotonic() - begin, "tree_bytes": most}

    def killed_after(self, seconds: float) -> bool:
        """Runs it for so long, and kills it with all that it started; whether it was still running."""
        process = self._start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        return False

    def digest(self) -> dict[str, str]:
        """Hashes of what has to be the same."""
        files = [p for name in SAME for p in ([self.out / name] if (self.out / name).is_file() else sorted((self.out / name).rglob("*")))]
        return {str(p.relative_to(self.out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=dict(os.environ)
        )


def kills(make: Any, tries: int, seed: int) -> dict[str, Any]:
    """Kills runs at random moments and lets each be gone on with.

    Args:
        make: Gives a `Run` by its number.
        tries: How many are killed.
        seed: Of the moments.

    Returns:
        `tried`, `identical`, `moments` in seconds, and the seconds of the run that was left alone.
    """
    first: Run = make(0)
    alone = first.whole()["seconds"]
    expected, draws = first.digest(), random.Random(seed)
    tried = identical = 0
    moments = []
    while tried < tries:
        run, moment = make(tried + 1), draws.uniform(0.05, 0.95) * alone
        if not run.killed_after(moment):
            continue
        run.whole()
        tried, moments = tried + 1, [*moments, round(moment, 1)]
        identical += run.digest() == expected
    return {"tried": tried, "identical": identical, "moments": moments, "seconds": alone}


def tree_anonymous(pid: int) -> int:
    """Anonymous memory of a process and all below it, in bytes."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += tree_anonymous(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total
