"""Main memory that this process may use: the machine's, or its control group's where that is less."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory that this process may use, and that are free now."""

    total: int
    available: int


def memory() -> Memory:
    """Main memory: the machine's, or the control group's where that is less."""
    machine = {
        key: int(rest.split()[0]) * 1024
        for key, _, rest in (line.partition(":") for line in read_small(Path("/proc/meminfo")).splitlines())
    }
    if "MemTotal" not in machine:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        return Memory(page * pages, page * pages)
    total, available = machine["MemTotal"], machine.get("MemAvailable", machine["MemFree"])
    limit, used = read_small(CGROUP / "memory.max"), read_small(CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, int(limit) - int(used) + _reclaimable())
    return Memory(total, available)


def give_back_large_blocks() -> None:
    """Lets the C library hand blocks from 2 MiB on back to the system as soon as they are free.

    Left to itself, glibc learns from every large block that was freed to keep the next ones (up to 32 MiB) in its heap, where
    activations of all sizes leave gaps: walking LLaVA-1.5-7B's layers, 3.5 GiB of them. Elsewhere this does nothing.
    """
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 2 * 2**20)


def _reclaimable() -> int:
    """Bytes of file cache that the control group is charged for and gives up on demand."""
    statistics = dict(line.split() for line in read_small(CGROUP / "memory.stat").splitlines())
    return int(statistics.get("inactive_file", 0))


def read_small(path: Path) -> str:
    """A small system file, empty where it does not exist."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
