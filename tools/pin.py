"""Writes constraints.txt: the exact versions of this environment, without what only its index or its Python has.

    .venv/bin/python tools/pin.py > constraints.txt

Local version suffixes go (`2.13.0+cpu` becomes `2.13.0`, which any build of that version satisfies). A package that
does not run on every Python this project supports is pinned where it does; elsewhere the installer takes an older one.
"""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OLDEST = (3, 10)
NOT_PINNED = {"infoprune-export", "pip"}


def pin(distribution: metadata.Distribution) -> str:
    """One line of a constraints file."""
    public_version = distribution.version.partition("+")[0]
    line = f"{canonicalize_name(distribution.metadata['Name'])}=={public_version}"
    supported = SpecifierSet(distribution.metadata["Requires-Python"] or "")
    minor = OLDEST[1]
    while f"{OLDEST[0]}.{minor}.99" not in supported:
        minor += 1
    return line if minor == OLDEST[1] else f'{line} ; python_version >= "{OLDEST[0]}.{minor}"'


def main() -> None:
    print("# Exact versions that the tests run with (CPU). Made by tools/pin.py; use: pip install -c constraints.txt ...")
    lines = {pin(d) for d in metadata.distributions() if canonicalize_name(d.metadata["Name"]) not in NOT_PINNED}
    print(*sorted(lines), sep="\n")


if __name__ == "__main__":
    main()
