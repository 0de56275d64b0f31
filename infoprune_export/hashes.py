"""Hashes of files too large to be read at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 2**24


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
