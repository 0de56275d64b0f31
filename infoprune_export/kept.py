"""What a run keeps for the next one of this user on this machine: it spares time, and nothing depends on it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """Where things of a kind are kept, such as `latency`; it need not exist."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        home = tempfile.gettempdir()
    return Path(home) / "infoprune-export" / kind


def keep(path: Path, data: bytes) -> None:
    """Puts a file there whole, or leaves what is there: a read-only home costs the next run its time, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")  # others may keep the same thing now
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(data)
            os.replace(part, path)
        except OSError:
            os.unlink(part)


def kept(path: Path) -> bytes | None:
    """What was kept there, if it can be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None
