"""The CPUs that a measurement may run on."""

from __future__ import annotations

import os
from collections.abc import Iterable

from infoprune_export.errors import InputError, MissingRequirement


def allowed() -> list[int] | None:
    """CPUs that this process may run on; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def pin(cpus: Iterable[int]) -> None:
    """Keeps this process, and every thread that it starts from now on, on these CPUs.

    Raises:
        InputError: one that it may not run on.
        MissingRequirement: a system that does not pin processes.
    """
    free = allowed()
    if free is None:
        raise MissingRequirement("this system does not pin processes to CPUs", mend="leave --cpus out")
    if missing := sorted(set(cpus) - set(free)):
        raise InputError(f"CPU {missing[0]} is not among those that this process may use ({spans(free)})", where="--cpus")
    os.sched_setaffinity(0, cpus)


def parse(text: str) -> list[int]:
    """Numbers and ranges, such as `0,2-3`.

    Raises:
        ValueError: anything else.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        span = range(int(first), int(last if dash else first) + 1)
        if not span or span[0] < 0:
            raise ValueError(part)
        found.update(span)
    return sorted(found)


def spans(cpus: Iterable[int]) -> str:
    """The reverse of `parse`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
