"""Files of any size: hashed block by block, and written so that a reader finds the old one or the new one, never half of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BLOCK = 2**24
PART = ".part"
"""Ends the name of a file that is being written."""


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to be written that takes its place, on the disk and not in a cache, when the context is left; after an error nothing is left.

    What stood there is neither changed nor shortened: who has it open or linked keeps it.
    """
    part = path.with_name(path.name + PART)
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Writes a file as `written_whole` does; text as UTF-8."""
    with written_whole(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)
