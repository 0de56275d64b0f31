"""Several processes of one run, as `accelerate launch` starts them: the first does everything, the others join its training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

Word = Literal["train", "done"]


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process does the work that is done once."""
    return os.environ.get("RANK", "0") == "0"


def own(name: str) -> str:
    """A name that no other process of this launch takes; the first one's is the name itself, as it is without a launcher."""
    return name if is_first() else f"{name}-{os.environ['RANK']}"


def announce(directory: Path, word: Word) -> None:
    """Tells the other processes of this launch to begin, or that there is nothing for them to do."""
    if processes() > 1:
        part = _file(directory).with_suffix(".part")
        part.write_text(word, encoding="utf-8")
        part.replace(_file(directory))


def wait(directory: Path) -> Word:
    """Waits for the first process's word; a launcher ends all processes when one of them fails."""
    while not _file(directory).is_file():
        time.sleep(0.2)
    return "done" if _file(directory).read_text(encoding="utf-8") == "done" else "train"


def _file(directory: Path) -> Path:
    # The processes of one launch have the launcher as their parent; what an earlier launch has left is not meant for this one.
    return directory / f"launch-{os.getppid()}.word"
