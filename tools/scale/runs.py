"""One run of the main job in processes that are watched, and killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
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
        target = ["--target", "onnx", "--dtype", "fp16", "--no-original", "--seconds", "0.5", "--quiet"]
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


def undisturbed(run: Run) -> dict[str, Any]:
    """What kills are held against: `seconds` of a run that is left alone, and `expected`, see `Run.digest`; `tried` and `identical` 0."""
    seconds = run.whole()["seconds"]
    expected = run.digest()
    shutil.rmtree(run.out)
    return {"seconds": seconds, "expected": expected, "tried": 0, "identical": 0, "moments": []}


def killed_once_more(run: Run, before: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Kills a run at a random moment and lets it be gone on with.

    Args:
        run: Anew; its bundle is removed in the end.
        before: From `undisturbed`, or from here.
        seed: Of the moment, with the number of kills before.

    Returns:
        `before` with one more of `tried`, of `identical` where the bundle's bytes are those expected, and of `moments` in seconds.
    """
    draws = random.Random(seed + before["tried"])
    while not run.killed_after(moment := draws.uniform(0.05, 0.95) * before["seconds"]):
        shutil.rmtree(run.out)  # it was at its end already
    run.whole()
    identical = before["identical"] + (run.digest() == before["expected"])
    shutil.rmtree(run.out)
    return before | {"tried": before["tried"] + 1, "identical": identical, "moments": [*before["moments"], round(moment, 1)]}


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
