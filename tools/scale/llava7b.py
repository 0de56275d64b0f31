"""LLaVA-1.5-7B's shapes through the whole main job, and its compressed decoder through two runtimes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scale.runs import Run, tree_anonymous
from scale.shapes import CONFIG, counted

TOKEN = """
import sys
import numpy as np
from infoprune_export.engines.onnxruntime import OrtEngine
from pathlib import Path
engine = OrtEngine.open(Path(sys.argv[1]), threads=2)
feeds = {}
for x in engine.inputs:
    if x.name == "inputs_embeds":
        feeds[x.name] = np.ones((1, 1, x.shape[2]), x.dtype)
    elif x.name.startswith("past_key_values."):
        feeds[x.name] = np.zeros((1, x.shape[1], 0, x.shape[3]), x.dtype)
    else:
        feeds[x.name] = np.ones((1, 1), x.dtype) if x.name == "attention_mask" else np.zeros((1, 1), x.dtype)
logits = engine.run(feeds, ["logits"])["logits"]
assert np.isfinite(logits).all()
"""


def measure(work: Path, samples: int, threads: int) -> dict[str, Any]:
    """Compresses, exports, makes a token and builds an engine.

    Args:
        work: For the bundle, some 60 GB.
        samples: Calibration questions.
        threads: Of everything.

    Returns:
        What `shapes.counted` says, `run` (see `Run.whole`), `flops` kept, `token_bytes` and `engine`: seconds, or the reason why
        there is none.
    """
    run = Run("llava", work / "llava", samples)
    found: dict[str, Any] = counted(CONFIG) | {"run": run.whole()}
    found["flops"] = found["run"]["report"]["flops"]["achieved"]
    decoder = run.out / "onnx" / "decoder_model_merged_fp16.onnx"
    found["token_bytes"] = _peak([sys.executable, "-c", TOKEN, str(decoder)])
    begin = time.monotonic()
    build = [sys.executable, "-m", "infoprune_export", "build", str(run.out), "--target", "trt", "--gpu-arch", "sm89", "--quiet"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    found["engine"] = {"seconds": time.monotonic() - begin} if not done.returncode else {"reason": done.stderr.strip()[-500:]}
    return found


def checks(found: dict[str, Any]) -> dict[str, float]:
    """The figures of summary.json."""
    resources, minutes = found["run"]["report"]["resources"], 60
    memory, parts = resources["memory_bytes"], resources["parts"]
    values = {
        "llava7b.peak_rss_gib": memory["measured"] / 2**30,
        "llava7b.compress_export_minutes": (parts["algebra"] + parts["files"]) / minutes,
        "llava7b.calibration_minutes": parts["calibration"] / minutes,
        "llava7b.achieved_flops": found["flops"],
        "llava7b.predicted_over_actual_memory": memory["predicted"] / memory["measured"],
        "llava7b.one_token_peak_gib": found["token_bytes"] / 2**30,
    }
    if "seconds" in found["engine"]:
        values["llava7b.engine_minutes"] = found["engine"]["seconds"] / minutes
    return values


def _peak(command: list[str]) -> int:
    """The most anonymous memory of a command."""
    process, most = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        most = max(most, tree_anonymous(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(process.stderr.read()[-1500:] if process.stderr else "it failed")
    return most
