#!/usr/bin/env bash
# Makes a virtual environment and installs this project into it, with the versions of constraints.txt.
#
#   tools/install.sh VENV [EXTRAS]
#
# VENV     directory of the environment; made when it is not there
# EXTRAS   comma-separated, such as export,trt-rtx; none: what a device needs to run a bundle
#
# From the environment:
#   PYTHON         interpreter to make it with (python3)
#   EDITABLE       1: the environment uses this checkout (default); 0: a copy of it
#   VENV_OPTIONS   further options of `python -m venv`, such as --system-site-packages
#   COMPILE        1: compile all of Python's files now (default), as a read-only environment needs it; 0: each when it is first imported
#   CONSTRAINTS    constraints file (constraints.txt); empty: the newest versions that pyproject.toml allows
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf ...) hold as always.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: tools/install.sh VENV [EXTRAS]" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$1"
extras="${2:-}"
python="${PYTHON:-python3}"
constraints="${CONSTRAINTS-$root/constraints.txt}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "install: $python is not there or older than 3.10" >&2
    echo "install Python 3.10 or newer, or name one: PYTHON=python3.12 make venv" >&2
    exit 3
fi
if [ ! -x "$venv/bin/python" ]; then
    # shellcheck disable=SC2086  # several options, split on purpose
    "$python" -m venv ${VENV_OPTIONS:-} "$venv"
fi

target="$root${extras:+[$extras]}"
options=(--quiet --disable-pip-version-check)
[ -n "$constraints" ] && options+=(--constraint "$constraints")
[ "${COMPILE:-1}" = 1 ] || options+=(--no-compile)
[ "${EDITABLE:-1}" = 1 ] && options+=(--editable)
"$venv/bin/python" -m pip install "${options[@]}" "$target"
