"""What a run takes, held against what was predicted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infoprune_export.memory import read_small
from infoprune_export.preflight import Needs, Work, check, gib, matrix_rate
from infoprune_export.validation.records import Estimate, Resources
from infoprune_export.workspace import Workspace, tree_bytes

WORTH_TELLING = 120
"""Seconds from which a prediction of time is told."""
LOOK_EVERY = 0.1
"""Seconds between two looks at the memory."""


def foresee(work: Work, out: Path, spill: Path, note: Callable[[str], None], written: int = 0, spilled: int = 0) -> Needs:
    """Predicts what work takes, refuses what would not fit, and tells what will take long; see `preflight.check`.

    Raises:
        NotEnough: less memory or disk than the work takes.
    """
    needs = work.needs(matrix_rate())
    check(needs, work, out, spill, written, spilled)
    if needs.seconds >= WORTH_TELLING:
        minutes = f"{round(needs.seconds / 60)} minutes" + " on the CPU and less with the GPU" * work.on_gpu
        note(f"compressing takes about {minutes}, {gib(needs.memory)} of memory and {gib(needs.disk)} of disk here")
    return needs


class Ledger:
    """Predicts, refuses what would not fit, and writes down what compressing and exporting took.

    Args:
        work: What is to be done.
        space: Where files grow; what an earlier run wrote there needs no disk again.
        spill: The folder elsewhere where hidden states go, if there is one; likewise.
        note: Gets a line where the work will take long.

    Raises:
        NotEnough: less memory or disk than the work takes.
    """

    def __init__(self, work: Work, space: Workspace, spill: Path | None, note: Callable[[str], None]):
        self._space, self._folders = space, [space.folder] if spill is None else [space.folder, spill]
        written, spilled = tree_bytes(space.folder), sum(map(tree_bytes, self._folders[1:]))
        self.needs = foresee(work, space.folder.parent, self._folders[-1].parent, note, written, spilled)
        self._memory = self._disk = 0
        # A run that was killed inside a stage has done a part of it without having marked it.
        self._seconds, self._whole = 0.0, not (space.resume and (written or spilled))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Looks at the memory of this process until the context ends."""
        over = threading.Event()

        def look() -> None:
            while True:
                self._memory = max(self._memory, anonymous_bytes())
                if over.wait(LOOK_EVERY):
                    break

        thread = threading.Thread(target=look, daemon=True)
        self._watch, self._over = thread, over
        thread.start()
        try:
            yield
        finally:
            self._stop()

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Runs a stage of compressing or exporting; see `Workspace.stage`."""
        begin = time.monotonic()
        self._whole &= self._space.stage(name, work)
        self._seconds += time.monotonic() - begin
        self._disk = max(self._disk, sum(map(tree_bytes, self._folders)))

    def close(self, parts: Mapping[str, float]) -> Resources:
        """What was taken until now, beside the prediction; what a run that was gone on from took before is not known.

        Args:
            parts: Seconds of compressing by what they went into.
        """
        self._stop()
        measured = (self._memory or None, self._disk, self._seconds) if self._whole else (None, None, None)
        predicted = (self.needs.memory, self.needs.disk, self.needs.seconds)
        memory, disk, seconds = (Estimate(predicted=p, measured=m) for p, m in zip(predicted, measured, strict=True))
        rest = self._seconds - sum(parts.values())
        return Resources(memory_bytes=memory, disk_bytes=disk, seconds=seconds, parts={**parts, "files": rest} if self._whole else {})

    def _stop(self) -> None:
        self._over.set()
        self._watch.join()


def anonymous_bytes() -> int:
    """Memory of this process that no file lies behind; 0 where the system does not tell (only Linux does)."""
    for line in read_small(Path("/proc/self/status")).splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
