#!/usr/bin/env bash
# Checks in seconds that an installation answers: the command line, the packaged recipes, what this machine can do.
#
#   tools/smoke.sh [VENV]
#
# VENV   environment to check; the `infoprune-export` and `python` of PATH when left out
set -euo pipefail

[ $# -ge 1 ] && PATH="$(cd "$1" && pwd)/bin:$PATH"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

fail() {
    echo "smoke: $1" >&2
    exit 1
}

infoprune-export --help >/dev/null
infoprune-export recipes | grep -q tiny-llava || fail "the packaged recipes are missing"
infoprune-export doctor

# Nothing but the stages that compress and export may need PyTorch.
python - <<'PYTHON'
import sys

import infoprune_export.engines.build, infoprune_export.runtime.session, infoprune_export.validation.report  # noqa: E401

heavy = sorted({"torch", "transformers"} & set(sys.modules))
sys.exit(f"smoke: engines, runtime or validate import {', '.join(heavy)}" if heavy else 0)
PYTHON

# Without PyTorch the main job says what to install, with exit code 3, and leaves nothing behind.
if ! python -c "import torch" 2>/dev/null; then
    code=0
    infoprune-export tiny-llava --out "$scratch/bundle" 2>"$scratch/errors" || code=$?
    [ "$code" = 3 ] || fail "without PyTorch the main job ended with exit code $code, not 3"
    grep -q "infoprune-export\[export\]" "$scratch/errors" || fail "without PyTorch the main job names no install line"
    [ ! -e "$scratch/bundle" ] || fail "a refused command left files behind"
fi
echo "smoke: passed"
